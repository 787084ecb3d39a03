"""TensorFlow Serving's ``PredictionService`` and ``ModelService``, under their public names."""

from __future__ import annotations

from service.bounds import Bounds
from service.errors import Unimplemented
from service.predictor import Predictor
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.rpc.handlers import Handler, Handlers
from service.rpc.messages import parse
from service.rpc.tfserving_codec import (
    decode_predict,
    decode_reload,
    encode_metadata,
    encode_predict,
    encode_statuses,
    model_ref,
)

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"


def tfserving_handlers(predictor: Predictor, bounds: Bounds) -> Handlers:
    """Byte-level handlers by full method path."""
    engine = predictor.engine

    async def predict(data: bytes, deadline: float) -> bytes:
        request = parse(pb.PredictRequest, data)
        with predictor.request(model_ref(request.model_spec), "grpc-tfs") as counted:
            prediction = await counted.predict(deadline, lambda signatures: decode_predict(request, signatures, bounds))
            return encode_predict(request, prediction)

    async def metadata(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.GetModelMetadataRequest, data)
        return encode_metadata(request, engine.describe(model_ref(request.model_spec)))

    async def status(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.GetModelStatusRequest, data)
        return encode_statuses(engine.statuses(model_ref(request.model_spec)))

    async def reload(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        await engine.configure(decode_reload(parse(pb.ReloadConfigRequest, data)))
        return pb.ReloadConfigResponse(status=pb.StatusProto()).SerializeToString()

    return {
        f"/{PREDICTION_SERVICE}/Predict": predict,
        f"/{PREDICTION_SERVICE}/GetModelMetadata": metadata,
        f"/{PREDICTION_SERVICE}/Classify": _unimplemented("Classify is not answered yet: use Predict"),
        f"/{PREDICTION_SERVICE}/Regress": _unimplemented("Regress is not answered yet: use Predict"),
        f"/{PREDICTION_SERVICE}/MultiInference": _unimplemented("MultiInference is not answered yet: use Predict"),
        f"/{MODEL_SERVICE}/GetModelStatus": status,
        f"/{MODEL_SERVICE}/HandleReloadConfigRequest": reload,
    }


def _unimplemented(text: str) -> Handler:
    async def refuse(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        raise Unimplemented(text)

    return refuse
