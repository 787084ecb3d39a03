"""``inference.GRPCInferenceService``: the Open Inference Protocol v2 over gRPC, less what operators ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from service import __version__
from service.bounds import Bounds
from service.errors import NotFound
from service.predictor import EXTENSIONS, SERVER_NAME, Decoded, ModelRef, Predictor
from service.registry.lifecycle import State
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc.handlers import Handler, Handlers, Timed
from service.rpc.known_requests import KnownRequest, KnownRequests
from service.rpc.messages import parse, parse_tensors
from service.rpc.open_inference_codec import (
    decode_infer,
    encode_infer,
    encode_metadata,
    is_plain,
    output_extents,
    without_tensor,
)
from service.shared_memory import SharedMemory
from service.tensors import Signature

SERVICE = "inference.GRPCInferenceService"


def open_inference_handlers(
    predictor: Predictor, is_ready: Callable[[], bool], memory: SharedMemory, bounds: Bounds
) -> Handlers:
    """Byte-level handlers by full method path."""
    engine = predictor.engine

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

    methods: Handlers = {
        "ModelInfer": _infer_handler(predictor, memory, bounds),
        "ServerLive": live,
        "ServerReady": ready,
        "ModelReady": model_ready,
        "ServerMetadata": server_metadata,
        "ModelMetadata": model_metadata,
    }
    return {f"/{SERVICE}/{name}": method for name, method in methods.items()}


def _infer_handler(predictor: Predictor, memory: SharedMemory, bounds: Bounds) -> Handler:
    known_requests = KnownRequests()

    async def infer(data: bytes, deadline: float) -> Timed:
        known = known_requests.find(data)
        if known is not None:
            return await again(known, data, deadline)
        request = parse_tensors(pb.ModelInferRequest, data)
        ref = model_ref(request.model_name, request.model_version)
        with predictor.request(ref, "grpc-v2") as counted:
            extents = output_extents(request, memory) if request.outputs else {}

            def decode(signatures: Mapping[str, Signature]) -> Decoded:
                decoded = decode_infer(request, signatures, memory, bounds)
                if is_plain(request):
                    known_requests.add(
                        data,
                        request.raw_input_contents[0],
                        ref,
                        decoded,
                        partial(encode_infer, without_tensor(request)),
                    )
                return decoded

            prediction = await counted.predict(deadline, decode)
            return Timed(encode_infer(request, prediction, extents), prediction.spent)

    async def again(known: KnownRequest, data: bytes, deadline: float) -> Timed:
        with predictor.request(known.ref, "grpc-v2") as counted:

            def decode(signatures: Mapping[str, Signature]) -> Decoded:
                decoded = known.decode(data, signatures)
                return decoded or decode_infer(parse_tensors(pb.ModelInferRequest, data), signatures, memory, bounds)

            prediction = await counted.predict(deadline, decode)
            return Timed(known.encode(prediction), prediction.spent)

    return infer


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
