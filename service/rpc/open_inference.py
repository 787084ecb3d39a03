"""``inference.GRPCInferenceService``: the Open Inference Protocol v2 over gRPC, less what operators ask."""

from __future__ import annotations

from collections.abc import Callable

from service import __version__
from service.bounds import Bounds
from service.errors import NotFound
from service.predictor import EXTENSIONS, SERVER_NAME, ModelRef, Predictor
from service.registry.lifecycle import State
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc.handlers import Handlers
from service.rpc.messages import parse
from service.rpc.open_inference_codec import decode_infer, encode_infer, encode_metadata, output_extents
from service.shared_memory import SharedMemory

SERVICE = "inference.GRPCInferenceService"


def open_inference_handlers(
    predictor: Predictor, is_ready: Callable[[], bool], memory: SharedMemory, bounds: Bounds
) -> Handlers:
    """Byte-level handlers by full method path."""
    engine = predictor.engine

    async def infer(data: bytes, deadline: float) -> bytes:
        request = parse(pb.ModelInferRequest, data)
        return await answer_infer(predictor, request, deadline, memory=memory, bounds=bounds)

    async def live(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def ready(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        return pb.ServerReadyResponse(ready=is_ready()).SerializeToString()

    async def model_ready(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.ModelReadyRequest, data)
        states = [status.state for status in engine.statuses(model_ref(request.name, request.version))]
        return pb.ModelReadyResponse(ready=State.READY in states).SerializeToString()

    async def server_metadata(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        response = pb.ServerMetadataResponse(name=SERVER_NAME, version=__version__)
        response.extensions.extend((*EXTENSIONS, *memory.extensions))
        return response.SerializeToString()

    async def model_metadata(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.ModelMetadataRequest, data)
        info = engine.describe(model_ref(request.name, request.version))
        return encode_metadata(info, engine.statuses(ModelRef(info.name, info.version))[0])

    methods = {
        "ModelInfer": infer,
        "ServerLive": live,
        "ServerReady": ready,
        "ModelReady": model_ready,
        "ServerMetadata": server_metadata,
        "ModelMetadata": model_metadata,
    }
    return {f"/{SERVICE}/{name}": method for name, method in methods.items()}


async def answer_infer(
    predictor: Predictor, request: pb.ModelInferRequest, deadline: float, *, memory: SharedMemory, bounds: Bounds
) -> bytes:
    """The bytes of a `ModelInferResponse`."""
    with predictor.request(model_ref(request.model_name, request.model_version), "grpc-v2") as counted:
        extents = output_extents(request, memory) if request.outputs else {}
        prediction = await counted.predict(
            deadline, lambda signatures: decode_infer(request, signatures, memory, bounds)
        )
        return encode_infer(request, prediction, extents)


def model_ref(name: str, version: str) -> ModelRef:
    """Versions are text in this protocol; one that is no integer exists for no model."""
    if not version:
        return ModelRef(name)
    if not (version.isascii() and version.isdigit() and len(version) < 20):
        raise NotFound(f"model {name!r} has no version {version!r}: versions are integers")
    return ModelRef(name, int(version))
