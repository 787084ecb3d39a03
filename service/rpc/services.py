"""Every gRPC service of Kiln as byte-level handlers, for whatever transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from service.errors import KilnError
from service.predictor import Predictor
from service.rpc.handlers import Handlers, Refused, StreamHandlers
from service.rpc.health import HEALTH_SERVICE, HealthService
from service.rpc.open_inference import SERVICE, open_inference_handlers
from service.rpc.open_inference_admin import open_inference_admin_handlers
from service.rpc.open_inference_stream import open_inference_streams
from service.rpc.options import RpcOptions
from service.rpc.reflection import REFLECTION_SERVICES, reflection_streams
from service.rpc.shared_memory import shared_memory_handlers
from service.rpc.tfserving import MODEL_SERVICE, PREDICTION_SERVICE, tfserving_handlers

_PROTOCOLS = {
    f"/{SERVICE}/ModelInfer": "grpc-v2",
    **{
        f"/{PREDICTION_SERVICE}/{method}": "grpc-tfs" for method in ("Predict", "Classify", "Regress", "MultiInference")
    },
}
"""Of the unary methods that ask to predict, as the metrics call them."""
_DIALECTS = (SERVICE, PREDICTION_SERVICE, MODEL_SERVICE)


@dataclass(frozen=True)
class Services:
    """Handlers by full method path, unary and streaming, the health that they tell of, and who is told of refusals."""

    handlers: Handlers
    streams: StreamHandlers
    health: HealthService
    refused: Refused


def all_services(predictor: Predictor, is_ready: Callable[[], bool], options: RpcOptions) -> Services:
    """Both dialects, health and reflection."""
    memory, bounds = options.memory, options.bounds
    health = HealthService(_DIALECTS)
    handlers = {
        **open_inference_handlers(predictor, is_ready, memory, bounds),
        **open_inference_admin_handlers(predictor),
        **shared_memory_handlers(SERVICE, memory),
        **tfserving_handlers(predictor, bounds),
    }
    if options.around is not None:
        handlers = {path: options.around(path, handler) for path, handler in handlers.items()}
    return Services(
        handlers={**handlers, **health.handlers()},
        streams={
            **open_inference_streams(predictor, memory, bounds),
            **health.streams(),
            **reflection_streams((*_DIALECTS, HEALTH_SERVICE, *REFLECTION_SERVICES)),
        },
        health=health,
        refused=_count_refused(predictor),
    )


def _count_refused(predictor: Predictor) -> Refused:
    """Calls that ask to predict and are refused before they are requests, too large or unreadable, are counted."""

    def refused(path: str, error: KilnError) -> None:
        protocol = _PROTOCOLS.get(path)
        if protocol is not None:
            predictor.refused(protocol, error)

    return refused
