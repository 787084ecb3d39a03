"""The transport grpcio: one grpc.aio server with every gRPC service of Kiln on one port."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from service.predictor import Predictor
from service.rpc.handlers import GenericHandlers
from service.rpc.options import RpcOptions
from service.rpc.services import all_services

_OVER_LIMIT_BYTES = 64 * 2**20
"""A message this much over the limit is still received, to be refused with a text that has the numbers.

Beyond it grpcio refuses by itself, unread, with RESOURCE_EXHAUSTED.
"""


class RpcServer:
    """Both dialects, health and reflection; start it in a running event loop."""

    def __init__(self, predictor: Predictor, is_ready: Callable[[], bool], options: RpcOptions) -> None:
        self.services = services = all_services(predictor, is_ready, options)
        self._handlers = GenericHandlers(
            services.handlers,
            services.streams,
            services.refused,
            request_timeout_s=options.request_timeout_s,
            max_message_bytes=options.max_message_bytes,
        )
        self._address = options.address
        self._options = (
            ("grpc.max_receive_message_length", options.max_message_bytes + _OVER_LIMIT_BYTES),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(options.is_shared)),
        )
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Bind and accept; returns the port. `OSError` if the address cannot be bound."""
        self._server = server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers((self._handlers,))
        try:
            port = server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"the gRPC port {self._address} cannot be bound: {error}") from error
        await server.start()
        return int(port)

    async def set_serving(self, *, serving: bool) -> None:
        """What grpc.health.v1 answers, for the server and for each service."""
        self.services.health.set_serving(serving=serving)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and cancel those that are not done within `grace_s`."""
        if self._server is not None:
            await self._server.stop(grace_s)
