"""``inference.GRPCInferenceService``: what operators ask, by Triton's extensions."""

from __future__ import annotations

from service.extensions.model_configuration import model_configuration
from service.extensions.repository import check_load, check_unload
from service.extensions.settings import change_log_settings, change_trace_settings
from service.extensions.statistics import statistics_of
from service.predictor import Predictor
from service.registry.lifecycle import State
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc.handlers import Handlers
from service.rpc.messages import parse
from service.rpc.open_inference import SERVICE, model_ref
from service.rpc.open_inference_admin_codec import (
    decode_log_settings,
    decode_trace_settings,
    encode_config,
    encode_index,
    encode_log_settings,
    encode_statistics,
    encode_trace_settings,
)
from service.rpc.open_inference_codec import plain_parameters


def open_inference_admin_handlers(predictor: Predictor) -> Handlers:
    """Byte-level handlers by full method path."""
    engine = predictor.engine

    async def config(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.ModelConfigRequest, data)
        return encode_config(model_configuration(engine.describe(model_ref(request.name, request.version))))

    async def statistics(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.ModelStatisticsRequest, data)
        ref = model_ref(request.name, request.version) if request.name else None
        return encode_statistics(statistics_of(engine.statistics(ref)))

    async def trace(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.TraceSettingRequest, data)
        if request.model_name:
            engine.statuses(model_ref(request.model_name, ""))
        return encode_trace_settings(change_trace_settings(decode_trace_settings(request), predictor.trace_share))

    async def log(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.LogSettingsRequest, data)
        return encode_log_settings(change_log_settings(decode_log_settings(request)))

    async def index(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.RepositoryIndexRequest, data)
        return encode_index([s for s in engine.all_statuses() if not request.ready or s.state is State.READY])

    async def load(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.RepositoryModelLoadRequest, data)
        check_load(plain_parameters(request.parameters))
        await engine.load(request.model_name or request.repository_name)
        return pb.RepositoryModelLoadResponse().SerializeToString()

    async def unload(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.RepositoryModelUnloadRequest, data)
        check_unload(plain_parameters(request.parameters))
        await engine.unload(request.model_name or request.repository_name)
        return pb.RepositoryModelUnloadResponse().SerializeToString()

    methods = {
        "ModelConfig": config,
        "ModelStatistics": statistics,
        "TraceSetting": trace,
        "LogSettings": log,
        "RepositoryIndex": index,
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": unload,
    }
    return {f"/{SERVICE}/{name}": method for name, method in methods.items()}
