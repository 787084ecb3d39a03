"""A server in this process: the real front ends before a registry with a `FakeModel`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest_asyncio

from service.batching.queue import Limits
from service.bounds import DEFAULT_BOUNDS, Bounds
from service.health import Health
from service.metrics import Metrics
from service.predictor import Predictor
from service.registry.config import ModelConfigs
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from service.rest.app import KilnApp, rest_app
from service.rest.options import RestOptions
from service.rpc.options import RpcOptions
from service.rpc.server import RpcServer
from service.shared_memory import OFF, SharedMemory
from tests.fakes import FakeModel

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
    grpc_port: int = 0
    limits: Limits = field(default_factory=lambda: Limits(8, 64, 1 << 20))


async def start_kiln(
    models: dict[str, FakeModel],
    limits: Limits | None = None,
    *,
    split_oversize: bool = True,
    explicit: bool = False,
    configs: ModelConfigs | None = None,
    memory: SharedMemory = OFF,
    bounds: Bounds = DEFAULT_BOUNDS,
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
    predictor = Predictor(registry, metrics)
    rpc = RpcServer(predictor, health.is_ready, RpcOptions("127.0.0.1:0", MAX_MESSAGE_BYTES, 30.0, memory, bounds))
    rest_options = RestOptions(MAX_MESSAGE_BYTES, 100, 30.0, GZIP_MIN_BYTES, memory, bounds)
    app = rest_app(predictor, metrics, health.is_ready, rest_options)
    await registry.load_all()
    health.loaded = True
    kiln = Kiln(next(iter(models.values())), metrics, registry, health, predictor, app, rpc, limits=limits)
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
