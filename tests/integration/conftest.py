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
from service.health import Health
from service.metrics import Metrics
from service.predictor import Predictor
from service.registry.config import ModelConfigs
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from service.rest.app import KilnApp, rest_app
from service.rest.options import RestOptions
from service.rpc.asgi import GrpcApp
from service.rpc.options import RpcOptions
from service.rpc.server import RpcServer
from service.shared_memory import OFF, SharedMemory
from tests.asgi_channel import AsgiChannel
from tests.fakes import FakeModel
from tests.integration.rpc import Caller

MAX_MESSAGE_BYTES = 1 << 20
GZIP_MIN_BYTES = 1 << 10


@dataclass
class Kiln:
    """Everything that `service.server` builds, without uvicorn: `app` is called through ASGI."""

    model: FakeModel
    metrics: Metrics
    registry: Registry
    health: Health
    predictor: Predictor
    app: KilnApp
    rpc: RpcServer
    grpc_app: GrpcApp
    grpc_port: int = 0
    limits: Limits = field(default_factory=lambda: Limits(8, 64, 1 << 20))

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
    options = RegistryOptions(
        materialize=lambda source: source.path,
        load=lambda path, config: models[path.name],
        limits=limits,
        split_oversize=split_oversize,
        explicit=explicit,
    )
    sources = tuple(Source(name, 1, Kind.KERAS, Path(name)) for name in sorted(models))
    registry = Registry(Repository(sources), options, metrics, configs=configs)
    health = Health(registry.can_serve)
    predictor = Predictor(registry, metrics, following)
    rpc_options = RpcOptions("127.0.0.1:0", MAX_MESSAGE_BYTES, 30.0, memory, bounds)
    rpc = RpcServer(predictor, health.is_ready, rpc_options)
    grpc_app = GrpcApp(rpc.services, rpc_options)
    rest_options = RestOptions(MAX_MESSAGE_BYTES, 100, 30.0, GZIP_MIN_BYTES, memory, bounds)
    app = rest_app(predictor, metrics, health.is_ready, rest_options)
    await registry.load_all()
    health.loaded = True
    kiln = Kiln(next(iter(models.values())), metrics, registry, health, predictor, app, rpc, grpc_app, limits=limits)
    kiln.grpc_port = await rpc.start()
    await rpc.set_serving(serving=health.is_ready())
    return kiln


@pytest_asyncio.fixture
async def kiln() -> AsyncIterator[Kiln]:
    """A server with one model, ``double``: see `tests.fakes.FakeModel`."""
    model = FakeModel()
    kiln = await start_kiln({"double": model})
    yield kiln
    model.unblock()
    await kiln.registry.stop(5.0)
    await kiln.rpc.stop(0.5)


@pytest.fixture(params=["grpcio", "asgi"])
def transport(request: pytest.FixtureRequest) -> str:
    """What carries gRPC: every test that takes it runs over each."""
    return str(request.param)


@pytest_asyncio.fixture
async def caller(kiln: Kiln, transport: str) -> AsyncIterator[Caller]:
    """A client of the running server."""
    async with kiln.channel(transport) as channel:
        yield Caller(channel)
