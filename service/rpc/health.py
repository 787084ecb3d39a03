"""``grpc.health.v1``: what is told of the server and of each service, to callers who ask or watch.

grpcio's own servicer writes to grpcio's contexts alone, and forgets all watchers of a service when
one of them leaves; the messages are its.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable

from grpc_health.v1 import health_pb2 as pb

from service.errors import InvalidArgument, NotFound
from service.rpc.handlers import CallLimits, Handlers, StreamHandlers
from service.rpc.messages import parse

HEALTH_SERVICE = "grpc.health.v1.Health"


class HealthService:
    """One status for the server, whose name is empty, and for all of its services."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._status = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()

    def set_serving(self, *, serving: bool) -> None:
        """Tell those who watch, if it changes."""
        status = pb.HealthCheckResponse.SERVING if serving else pb.HealthCheckResponse.NOT_SERVING
        if status != self._status:
            self._status = status
            self._changed.set()
            self._changed = asyncio.Event()

    def handlers(self) -> Handlers:
        """Byte-level handlers by full method path."""
        return {f"/{HEALTH_SERVICE}/Check": self._check}

    def streams(self) -> StreamHandlers:
        """Byte-level stream handlers by full method path."""
        return {f"/{HEALTH_SERVICE}/Watch": self._watch}

    async def _check(self, data: bytes, deadline: float) -> bytes:  # noqa: ARG002
        name = parse(pb.HealthCheckRequest, data).service
        if name not in self._services:
            raise NotFound(f"there is no service {name!r}")
        return self._answer()

    async def _watch(self, messages: AsyncIterator[bytes], limits: CallLimits) -> AsyncGenerator[bytes, None]:  # noqa: ARG002
        data = await anext(messages, None)
        if data is None:
            raise InvalidArgument("one message expected, got none")
        is_known = parse(pb.HealthCheckRequest, data).service in self._services
        while True:
            changed, status = self._changed, self._status
            yield self._answer() if is_known else _UNKNOWN
            while not is_known or self._status == status:
                await changed.wait()
                changed = self._changed

    def _answer(self) -> bytes:
        answer: bytes = pb.HealthCheckResponse(status=self._status).SerializeToString()
        return answer


_UNKNOWN = pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN).SerializeToString()
