"""REST and gRPC of one process, before an engine that is in it or behind a channel."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from service.bounds import Bounds
from service.errors import FailedPrecondition
from service.frontend.fresh import FreshApp, Mirror, around
from service.predictor import Predictor
from service.rest.app import Pages, rest_app
from service.rest.options import RestOptions
from service.rest.server import RestServer
from service.rpc.options import RpcOptions
from service.settings import Settings
from service.shared_memory import SharedMemory


class Rpc(Protocol):
    """The gRPC side, over whatever transport."""

    async def start(self) -> int:
        """Accept; returns the port. `OSError` if the address cannot be bound."""

    async def set_serving(self, *, serving: bool) -> None:
        """What grpc.health.v1 answers."""

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and cancel those that are not done within `grace_s`."""


BuildRpc = Callable[[Predictor, Callable[[], bool], RpcOptions], Rpc]


@dataclass(frozen=True)
class Behind:
    """What the doors open on: who answers predict calls, the page of metrics, and readiness.

    `mirror` is how an engine in another process is seen.
    """

    predictor: Predictor
    pages: Pages
    is_ready: Callable[[], bool]
    memory: SharedMemory
    mirror: Mirror | None = None


class Doors:
    """REST and gRPC in this process."""

    def __init__(self, settings: Settings, behind: Behind, build_rpc: BuildRpc) -> None:
        bounds = Bounds(settings.max_tensor_elements, settings.max_string_bytes)
        options = RestOptions(
            settings.max_message_bytes,
            settings.max_json_depth,
            settings.request_timeout_s,
            settings.gzip_min_bytes,
            behind.memory,
            bounds,
        )
        app = rest_app(behind.predictor, behind.pages, behind.is_ready, options)
        mirror = behind.mirror
        self._rest = RestServer(
            app if mirror is None else FreshApp(app, mirror),
            settings.host,
            settings.rest_port,
            is_shared=mirror is not None,
        )
        self._rpc = build_rpc(
            behind.predictor,
            behind.is_ready,
            RpcOptions(
                f"{settings.host}:{settings.grpc_port}",
                settings.max_message_bytes,
                settings.request_timeout_s,
                behind.memory,
                bounds,
                is_shared=mirror is not None,
                around=None if mirror is None else around(mirror),
            ),
        )

    async def start(self) -> tuple[int, int]:
        """Accept; returns the ports of REST and gRPC. `OSError` if an address cannot be bound."""
        grpc_port = await self._rpc.start()
        try:
            return await self._rest.start(), grpc_port
        except OSError:
            await self._rpc.stop(0.0)  # left to the garbage collector it prints a traceback after the reason
            raise

    async def set_serving(self, *, serving: bool) -> None:
        """What callers are told of the server's health."""
        await self._rpc.set_serving(serving=serving)

    def refuse_new(self) -> None:
        """Have clients go elsewhere for their next requests."""
        self._rest.refuse_new()

    async def stop(self) -> None:
        """Close, with a little time for what is under way."""
        await asyncio.gather(self._rpc.stop(1.0), self._rest.stop())


def shared_memory(settings: Settings) -> SharedMemory:
    """Regions of shared memory, as the settings have them; `FailedPrecondition` if this machine has none."""
    return SharedMemory(enabled=settings.shared_memory, max_tensor_bytes=settings.max_message_bytes)


def check_settings(settings: Settings) -> None:
    """Raise `FailedPrecondition` for settings of front-end processes that exclude each other."""
    if settings.frontends and settings.grpc_transport != "grpcio":
        raise FailedPrecondition(
            f"frontends: 0 expected with grpc_transport {settings.grpc_transport}, got {settings.frontends}: "
            "front-end processes have grpcio"
        )
