"""A server in this process: the real front ends before a registry with a `FakeModel`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from service.batching.queue import Limits
from service.bounds import DEFAULT_BOUNDS, Bounds
from service.following.followed import Following
from service.frontend.fresh import FreshApp, around
from service.frontend.hub import Hub
from service.health import Health
from service.metrics import Metrics
from service.predictor import Engine, Predictor
from service.registry.config import ModelConfigs
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from service.rest.app import Pages, rest_app
from service.rest.http import Asgi
from service.rest.options import RestOptions
from service.rpc.asgi import GrpcApp
from service.rpc.options import RpcOptions
from service.rpc.server import RpcServer
from service.shared_memory import OFF, SharedMemory
from tests.asgi_channel import AsgiChannel
from tests.fakes import FakeModel
from tests.integration.loopback import FrontEnd
from tests.integration.rpc import Caller

MAX_MESSAGE_BYTES = 1 << 20
GZIP_MIN_BYTES = 1 << 10
BEHIND_CHANNEL = False
"""Whether `start_kiln` puts a channel between front ends and engine, as `--frontends` does."""


@dataclass
class Kiln:
    """Everything that `service.server` builds, without uvicorn: `app` is called through ASGI."""

    model: FakeModel
    metrics: Metrics
    registry: Registry
    health: Health
    predictor: Predictor
    app: Asgi
    rpc: RpcServer
    grpc_app: GrpcApp
    grpc_port: int = 0
    limits: Limits = field(default_factory=lambda: Limits(8, 64, 1 << 20))
    front_end: FrontEnd | None = None

    async def stop(self, drain_s: float, grace_s: float) -> bool:
        """Let all go, what is between front ends and engine too; returns whether all requests were finished."""
        is_drained = await self.registry.stop(drain_s)
        await self.rpc.stop(grace_s)
        if self.front_end is not None:
            self.front_end.close()
        return is_drained

    @contextlib.asynccontextmanager
    async def channel(self, transport: str) -> AsyncIterator[Any]:
        """To the same services, over grpcio's server or the ASGI application that Envoy runs."""
        if transport == "asgi":
            yield AsgiChannel(self.grpc_app)
            return
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc_port}") as channel:
            yield channel


async def start_kiln(
    models: dict[str, FakeModel],
    limits: Limits | None = None,
    *,
    split_oversize: bool = True,
    explicit: bool = False,
    configs: ModelConfigs | None = None,
    memory: SharedMemory = OFF,
    bounds: Bounds = DEFAULT_BOUNDS,
    following: Following | None = None,
) -> Kiln:
    """Serve `models`, each as version 1; the gRPC server listens on a free port of 127.0.0.1."""
    limits = limits or Limits(8, 64, 1 << 20)
    metrics = Metrics()
    hub = Hub(metrics) if BEHIND_CHANNEL else None
    options = RegistryOptions(
        materialize=lambda source: source.path,
        load=lambda path, config: models[path.name],
        limits=limits,
        split_oversize=split_oversize,
        explicit=explicit,
    )
    sources = tuple(Source(name, 1, Kind.KERAS, Path(name)) for name in sorted(models))
    registry = Registry(Repository(sources), options, metrics, configs=configs, follower=hub)
    health = Health(registry.can_serve)
    engine: Engine = registry
    pages: Pages = metrics
    front_end = wrap = None
    if hub is not None:
        hub.follow(registry, health.is_ready)
        front_end = FrontEnd(1, hub, memory)
        await front_end.join()
        engine = pages = front_end.engine
        wrap = around(front_end.engine)
    predictor = Predictor(engine, front_end.metrics if front_end else metrics, following)
    rpc_options = RpcOptions("127.0.0.1:0", MAX_MESSAGE_BYTES, 30.0, memory, bounds, around=wrap)
    rpc = RpcServer(predictor, health.is_ready, rpc_options)
    grpc_app = GrpcApp(rpc.services, rpc_options)
    rest_options = RestOptions(MAX_MESSAGE_BYTES, 100, 30.0, GZIP_MIN_BYTES, memory, bounds)
    app: Any = rest_app(predictor, pages, health.is_ready, rest_options)
    if front_end is not None:
        app = FreshApp(app, front_end.engine)
    await registry.load_all()
    health.loaded = True
    kiln = Kiln(next(iter(models.values())), metrics, registry, health, predictor, app, rpc, grpc_app, limits=limits)
    kiln.front_end = front_end
    kiln.grpc_port = await rpc.start()
    await rpc.set_serving(serving=health.is_ready())
    return kiln


@pytest.fixture
def behind_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of this test have a channel between front ends and engine."""
    monkeypatch.setattr("tests.integration.conftest.BEHIND_CHANNEL", True)


@pytest.fixture(params=["in one process", "behind a channel"])
def placed(request: pytest.FixtureRequest) -> None:
    """Servers are asked where front ends and engine are one process, and where shared memory is between them."""
    if request.param == "behind a channel":
        request.getfixturevalue("behind_channel")


@pytest_asyncio.fixture
async def kiln() -> AsyncIterator[Kiln]:
    """A server with one model, ``double``: see `tests.fakes.FakeModel`."""
    model = FakeModel()
    kiln = await start_kiln({"double": model})
    yield kiln
    model.unblock()
    await kiln.stop(5.0, 0.5)


@pytest.fixture(params=["grpcio", "asgi"])
def transport(request: pytest.FixtureRequest) -> str:
    """What carries gRPC: every test that takes it runs over each."""
    return str(request.param)


@pytest_asyncio.fixture
async def caller(kiln: Kiln, transport: str) -> AsyncIterator[Caller]:
    """A client of the running server."""
    async with kiln.channel(transport) as channel:
        yield Caller(channel)
