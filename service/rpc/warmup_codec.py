"""Records of a warm-up file → the inputs of signatures, pure.

Source: TensorFlow Serving's ``prediction_log.proto``; a record is decoded and checked as a request is.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.json_format import Parse as ParseJson
from google.protobuf.json_format import ParseError

from service.bounds import Bounds
from service.errors import InvalidArgument, Unimplemented
from service.examples import Method, decode_examples
from service.predictor import Decoded, validate
from service.rpc._generated.kiln.tensorflow.serving.prediction_log_pb2 import PredictionLog
from service.rpc.examples_codec import ProtoExamples, tasks_of
from service.rpc.messages import parse
from service.rpc.tfserving_codec import decode_predict
from service.tensors import Signature, Tensors

_BOUNDS = Bounds(max_filled_elements=2**24)
"""Of a file that comes with the model: one value may well stand for a batch of images."""


def decode_warm_up(record: bytes, signatures: Mapping[str, Signature]) -> list[tuple[Signature, Tensors]]:
    """The signatures, one but for a multi-inference, that a ``PredictionLog`` (bytes or JSON) names, and their inputs.

    Raises:
        Unimplemented: it logs a kind of request that Kiln does not answer.
        InvalidArgument, FailedPrecondition: it is no such message, or does not fit the model.
    """
    asked = _decode(parse_log(record), signatures)
    for decoded in asked:
        validate(decoded)
    return [(decoded.signature, decoded.inputs) for decoded in asked]


def parse_log(record: bytes) -> PredictionLog:
    """A record, which may be JSON: no message begins with the brace.

    Raises:
        InvalidArgument: it is neither.
    """
    if not record.startswith(b"{"):
        return parse(PredictionLog, record)
    try:
        return ParseJson(record, PredictionLog())
    except ParseError as error:
        raise InvalidArgument(f"the JSON of the record is no PredictionLog: {error}") from None


def _decode(log: PredictionLog, signatures: Mapping[str, Signature]) -> list[Decoded]:
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        return [decode_predict(log.predict_log.request, signatures, _BOUNDS)]
    if kind == "multi_inference_log":
        multi = log.multi_inference_log.request
        examples = ProtoExamples(multi.input)
        return [decode_examples(method, examples, signatures, name) for method, name in tasks_of(multi)]
    if kind not in ("classify_log", "regress_log"):
        raise Unimplemented(f"{kind or 'an empty record'} is not replayed")
    method = Method.CLASSIFY if kind == "classify_log" else Method.REGRESS
    request = getattr(log, kind).request
    return [decode_examples(method, ProtoExamples(request.input), signatures, request.model_spec.signature_name)]
