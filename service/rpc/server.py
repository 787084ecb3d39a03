"""One grpc.aio server with every gRPC service of Kiln on one port."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection

from service.predictor import Predictor
from service.rpc.handlers import GenericHandlers
from service.rpc.open_inference import SERVICE, open_inference_handlers
from service.rpc.open_inference_admin import open_inference_admin_handlers
from service.rpc.open_inference_stream import open_inference_streams
from service.rpc.options import RpcOptions
from service.rpc.reflection import public_pool
from service.rpc.shared_memory import shared_memory_handlers
from service.rpc.tfserving import MODEL_SERVICE, PREDICTION_SERVICE, tfserving_handlers

_HEALTH_SERVICE = "grpc.health.v1.Health"
_SERVICES = (SERVICE, PREDICTION_SERVICE, MODEL_SERVICE)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_OVER_LIMIT_BYTES = 64 * 2**20
"""A message this much over the limit is still received, to be refused with a text that has the numbers.

Beyond it grpcio refuses by itself, unread, with RESOURCE_EXHAUSTED.
"""
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """Both dialects, health and reflection; start it in a running event loop."""

    def __init__(self, predictor: Predictor, is_ready: Callable[[], bool], options: RpcOptions) -> None:
        memory, bounds = options.memory, options.bounds
        self._handlers = GenericHandlers(
            {
                **open_inference_handlers(predictor, is_ready, memory, bounds),
                **open_inference_admin_handlers(predictor),
                **shared_memory_handlers(SERVICE, memory),
                **tfserving_handlers(predictor, bounds),
            },
            open_inference_streams(predictor, memory, bounds),
            request_timeout_s=options.request_timeout_s,
            max_message_bytes=options.max_message_bytes,
        )
        self._address = options.address
        self._options = (
            ("grpc.max_receive_message_length", options.max_message_bytes + _OVER_LIMIT_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        )
        self._health = health.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Bind and accept; returns the port. `OSError` if the address cannot be bound."""
        self._server = server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers((self._handlers,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*_SERVICES, _HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server, pool=public_pool())
        await self._set_health(_NOT_SERVING)
        try:
            port = server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"the gRPC port {self._address} cannot be bound: {error}") from error
        await server.start()
        return int(port)

    async def set_serving(self, *, serving: bool) -> None:
        """What grpc.health.v1 answers, for the server and for each service."""
        await self._set_health(_SERVING if serving else _NOT_SERVING)

    async def _set_health(self, status: int) -> None:
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and cancel those that are not done within `grace_s`."""
        if self._server is not None:
            await self._server.stop(grace_s)
