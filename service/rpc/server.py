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
from service.rpc.reflection import public_pool
from service.rpc.tfserving import MODEL_SERVICE, PREDICTION_SERVICE, tfserving_handlers

_HEALTH_SERVICE = "grpc.health.v1.Health"
_SERVICES = (SERVICE, PREDICTION_SERVICE, MODEL_SERVICE)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RpcServer:
    """Both dialects, health and reflection; start it in a running event loop."""

    def __init__(
        self,
        predictor: Predictor,
        *,
        is_ready: Callable[[], bool],
        address: str,
        max_message_bytes: int,
        request_timeout_s: float,
    ) -> None:
        self._handlers = {**open_inference_handlers(predictor, is_ready), **tfserving_handlers(predictor)}
        self._timeout_s = request_timeout_s
        self._address = address
        self._options = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.so_reuseport", 0),
        )
        self._health = health.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Bind and accept; returns the port. `OSError` if the address cannot be bound."""
        self._server = server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers((GenericHandlers(self._handlers, self._timeout_s),))
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

    async def set_serving(self, serving: bool) -> None:  # noqa: FBT001
        """What grpc.health.v1 answers, for the server and for each service."""
        await self._set_health(_SERVING if serving else _NOT_SERVING)

    async def _set_health(self, status: int) -> None:
        for service in ("", *_SERVICES):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and cancel those that are not done within `grace_s`."""
        if self._server is not None:
            await self._server.stop(grace_s)
