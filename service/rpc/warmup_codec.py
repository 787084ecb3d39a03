"""Records of a warm-up file → the inputs of a signature, pure.

Source: TensorFlow Serving's ``prediction_log.proto``; a record is decoded and checked as a request is.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.bounds import Bounds
from service.errors import Unimplemented
from service.predictor import validate
from service.rpc._generated.kiln.tensorflow.serving.prediction_log_pb2 import PredictionLog
from service.rpc.messages import parse
from service.rpc.tfserving_codec import decode_predict
from service.tensors import Signature, Tensors

_BOUNDS = Bounds(max_filled_elements=2**24)
"""Of a file that comes with the model: one value may well stand for a batch of images."""


def decode_warm_up(record: bytes, signatures: Mapping[str, Signature]) -> tuple[Signature, Tensors]:
    """The signature that a ``PredictionLog`` names, and its inputs.

    Raises:
        Unimplemented: it logs something else than a predict request.
        InvalidArgument, FailedPrecondition: it is no such message, or does not fit the model.
    """
    log = parse(PredictionLog, record)
    kind = log.WhichOneof("log_type")
    if kind != "predict_log":
        raise Unimplemented(f"{kind or 'an empty record'} is not replayed: only predict_log is")
    decoded = decode_predict(log.predict_log.request, signatures, _BOUNDS)
    validate(decoded)
    return decoded.signature, decoded.inputs
