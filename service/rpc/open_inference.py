"""``inference.GRPCInferenceService``: the Open Inference Protocol v2 over gRPC."""

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
from service.rpc.open_inference_codec import decode_infer, encode_index, encode_infer, encode_metadata

SERVICE = "inference.GRPCInferenceService"


def open_inference_handlers(predictor: Predictor, is_ready: Callable[[], bool], bounds: Bounds) -> Handlers:
    """Byte-level handlers by full method path."""
    engine = predictor.engine

    async def infer(data: bytes, deadline: float) -> bytes:
        request = parse(pb.ModelInferRequest, data)
        with predictor.request(_ref(request.model_name, request.model_version), "grpc-v2") as counted:
            prediction = await counted.predict(deadline, lambda signatures: decode_infer(request, signatures, bounds))
            return encode_infer(request, prediction)

    async def live(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        return pb.ServerLiveResponse(live=True).SerializeToString()

    async def ready(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        return pb.ServerReadyResponse(ready=is_ready()).SerializeToString()

    async def model_ready(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.ModelReadyRequest, data)
        states = [status.state for status in engine.statuses(_ref(request.name, request.version))]
        return pb.ModelReadyResponse(ready=State.READY in states).SerializeToString()

    async def server_metadata(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        response = pb.ServerMetadataResponse(name=SERVER_NAME, version=__version__, extensions=EXTENSIONS)
        return response.SerializeToString()

    async def model_metadata(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.ModelMetadataRequest, data)
        info = engine.describe(_ref(request.name, request.version))
        return encode_metadata(info, engine.statuses(ModelRef(info.name, info.version))[0])

    async def index(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.RepositoryIndexRequest, data)
        return encode_index([s for s in engine.all_statuses() if not request.ready or s.state is State.READY])

    async def load(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.RepositoryModelLoadRequest, data)
        await engine.load(request.model_name or request.repository_name)
        return pb.RepositoryModelLoadResponse().SerializeToString()

    async def unload(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.RepositoryModelUnloadRequest, data)
        await engine.unload(request.model_name or request.repository_name)
        return pb.RepositoryModelUnloadResponse().SerializeToString()

    methods = {
        "ModelInfer": infer,
        "ServerLive": live,
        "ServerReady": ready,
        "ModelReady": model_ready,
        "ServerMetadata": server_metadata,
        "ModelMetadata": model_metadata,
        "RepositoryIndex": index,
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": unload,
    }
    return {f"/{SERVICE}/{name}": method for name, method in methods.items()}


def _ref(name: str, version: str) -> ModelRef:
    """Versions are text in this protocol; one that is no integer exists for no model."""
    if not version:
        return ModelRef(name)
    if not (version.isascii() and version.isdigit() and len(version) < 20):
        raise NotFound(f"model {name!r} has no version {version!r}: versions are integers")
    return ModelRef(name, int(version))
