"""The composition root: build, start, load, be ready, drain, stop, in that order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import uvicorn

from service import __version__
from service.batching.queue import Limits
from service.batching.runner import ThreadRunner
from service.bounds import Bounds
from service.gpus import gpu_reader
from service.health import Health
from service.metrics import Metrics
from service.observers import observers
from service.predictor import Predictor
from service.registry.config import ModelConfig, ModelConfigs
from service.registry.estimate import Estimator
from service.registry.glance import Glance
from service.registry.importer import import_model
from service.registry.labels import read_labels
from service.registry.meaning import read_meaning
from service.registry.registry import Registry
from service.registry.remote import fetch
from service.registry.repository import Repository, Source
from service.registry.version import Memory, RegistryOptions
from service.registry.watch import Watcher, look
from service.rest.app import KilnApp, rest_app
from service.rest.options import RestOptions
from service.rpc.options import RpcOptions
from service.rpc.server import RpcServer
from service.rpc.warmup_codec import decode_warm_up
from service.runtime.devices import devices_for
from service.runtime.memory import limit_bytes
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.parity import Tolerance
from service.runtime.plan_record import usable_cores
from service.runtime.planning import PlanningOptions
from service.runtime.xla import keep_programs_in
from service.settings import Settings
from service.shared_memory import SharedMemory
from service.warm_cache import link_warm_cache

_log = logging.getLogger("kiln.server")
_LINGER_S = 0.3
"""After the last answer, how long connections stay open so that late requests are refused, not cut."""
_GC_THRESHOLD = 20_000
_READINESS_S = 0.5
_MOST_FETCHES = 4
"""Versions that are fetched or converted at once; a child that converts takes a core and 600 MB."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one leaves at once.

    Raises:
        KilnError: the models' path does not exist, or what the transport needs is not installed.
        OSError: a port cannot be bound.
    """
    if settings.grpc_transport == "envoy":
        from service.rpc.envoy import become_envoy

        become_envoy(settings.model_dump_json(), settings.host, settings.grpc_port)  # and go on in service.embedded
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        is_idle = runner.run(_serve_with_grpcio(settings))
    if not is_idle:  # a thread is still in TensorFlow, which does not bear being torn down meanwhile
        logging.shutdown()
        os._exit(0)


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return None
    return uvloop.Loop


class Rpc(Protocol):
    """The gRPC side, over whatever transport."""

    async def start(self) -> int:
        """Accept; returns the port. `OSError` if the address cannot be bound."""

    async def set_serving(self, *, serving: bool) -> None:
        """What grpc.health.v1 answers."""

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and cancel those that are not done within `grace_s`."""


BuildRpc = Callable[[Predictor, Callable[[], bool], RpcOptions], Rpc]


async def _serve_with_grpcio(settings: Settings) -> bool:
    return await serve(settings, RpcServer, asyncio.get_running_loop().add_signal_handler)


async def serve(settings: Settings, build_rpc: BuildRpc, on_signal: Callable[..., object]) -> bool:
    """Serve until a signal comes through `on_signal`, which is as `loop.add_signal_handler`.

    Returns whether all threads came to rest.

    Raises:
        KilnError: the models' path does not exist, or what follows requests cannot be had.
        OSError: a port cannot be bound.
    """
    stopping = asyncio.Event()
    _listen_to_signals(stopping, on_signal)
    metrics = Metrics(gpu_reader())
    observing = observers(settings, metrics)
    watcher = _watcher(settings)
    watcher.read_config_file()
    found = await watcher.found(watcher.configs)
    registry = Registry(found, registry_options(settings), metrics, configs=watcher.configs, watcher=watcher)
    on_signal(signal.SIGHUP, watcher.poke)
    health = Health(registry.can_serve)
    predictor = Predictor(registry, metrics, observing.following)
    memory = SharedMemory(enabled=settings.shared_memory, max_tensor_bytes=settings.max_message_bytes)
    options = RestOptions(
        settings.max_message_bytes,
        settings.max_json_depth,
        settings.request_timeout_s,
        settings.gzip_min_bytes,
        memory,
        Bounds(settings.max_tensor_elements, settings.max_string_bytes),
    )
    rpc = build_rpc(
        predictor,
        health.is_ready,
        RpcOptions(
            f"{settings.host}:{settings.grpc_port}",
            settings.max_message_bytes,
            settings.request_timeout_s,
            memory,
            options.bounds,
        ),
    )
    rest = _Rest(rest_app(predictor, metrics, health.is_ready, options), settings)
    grpc_port = await rpc.start()
    try:
        rest_port = await rest.start()
    except OSError:
        await rpc.stop(0.0)  # left to the garbage collector it prints a traceback after the reason
        raise
    _log.info("kiln %s listens: REST on %s:%d, gRPC on %s:%d",
              __version__, settings.host, rest_port, settings.host, grpc_port)  # fmt: skip
    loading = asyncio.create_task(registry.load_all())
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()
        _spare_garbage_collector()
        health.loaded = True
        following = [asyncio.create_task(_announce(health, registry, rpc, metrics))]
        following.append(asyncio.create_task(registry.watch()))
        await stopped
        for task in following:
            task.cancel()
    is_drained = await _stop(settings.drain_s, health, registry, rpc, rest, metrics)
    await asyncio.to_thread(observing.close)
    return is_drained and loading.done()


def _spare_garbage_collector() -> None:
    """Take what is loaded out of the collector's sight, and have it look less often at the rest.

    Requests leave no cycles behind; at 64 connections looking for them took a fifth of all CPU time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 20)


async def _stop(drain_s: float, health: Health, registry: Registry, rpc: Rpc, rest: _Rest, metrics: Metrics) -> bool:
    """Readiness off, refuse new, finish what was accepted, then close the doors.

    Returns whether all of it was finished.
    """
    _log.info("stopping: finishing accepted requests for up to %.0f s", drain_s)
    health.draining = True
    metrics.ready(is_ready=False)
    await rpc.set_serving(serving=False)
    rest.refuse_new()
    is_drained = await registry.stop(drain_s)
    await asyncio.sleep(_LINGER_S)
    await asyncio.gather(rpc.stop(1.0), rest.stop())
    _log.info("stopped")
    return is_drained


class _Rest:
    """uvicorn in this event loop, on a socket of our own."""

    def __init__(self, app: KilnApp, settings: Settings) -> None:
        self._address = (settings.host, settings.rest_port)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="httptools",
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and accept; returns the port. `OSError` if the address cannot be bound."""
        listener = _bind(*self._address)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        return int(listener.getsockname()[1])

    def refuse_new(self) -> None:
        """From now on each answer closes its connection, so that clients go elsewhere."""
        self._server.server_state.default_headers.append((b"connection", b"close"))

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the composition root has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"the REST port {host}:{port} cannot be bound: {error.strerror or error}") from error


def registry_options(settings: Settings) -> RegistryOptions:
    """How versions are brought in and batched, by the settings; `OSError` if the cache folder cannot be written."""
    _prepare_cache(settings)

    def load(path: Path, config: ModelConfig) -> LoadedModel:
        options = RuntimeOptions(
            planning_options(settings, config),
            config.device,
            config.stateful,
            config.allow_operations,
            decode_warm_up,
            settings.cache_dir / "plans",
        )
        return LoadedModel(path, options)

    def materialize(source: Source) -> Path:
        here = replace(source, path=fetch(source, settings.cache_dir), remote=None)
        return import_model(
            here, cache_dir=settings.cache_dir, timeout_s=settings.import_timeout_s, imports=settings.imports
        )

    return RegistryOptions(
        materialize=materialize,
        load=load,
        labels=lambda source: read_labels(fetch(source, settings.cache_dir)),
        meaning=lambda source: read_meaning(fetch(source, settings.cache_dir)),
        memory=_memory(settings),
        limits=Limits(
            settings.max_batch_rows,
            settings.max_queue_rows,
            settings.max_queue_bytes,
            settings.batch_wait_ms / 1e3,
        ),
        split_oversize=settings.oversize == "split",
        drain_s=settings.drain_s,
        parallel_loads=settings.parallel_loads,
        parallel_fetches=min(usable_cores(), _MOST_FETCHES),
        explicit=settings.model_control == "explicit",
        fixed=settings.model_control == "none",
        root=str(settings.models),
    )


def _prepare_cache(settings: Settings) -> None:
    try:
        keep_programs_in(settings.cache_dir / "plans" / "xla")
        if settings.warm_cache_dir is not None:
            link_warm_cache(settings.warm_cache_dir, settings.cache_dir)
    except OSError as error:
        raise OSError(f"the cache folder {settings.cache_dir} (--cache-dir) cannot be used: {error}") from error


def planning_options(settings: Settings, config: ModelConfig) -> PlanningOptions:
    """How a model's plans are found, by its config and else by the settings."""
    return PlanningOptions(
        settings.max_batch_rows,
        config.plan or settings.plan,
        config.buckets or settings.buckets,
        settings.plan_budget_s if config.budget_s is None else config.budget_s,
        Tolerance(config.rtol, config.atol),
        config.deterministic,
        config.precision,
        Tolerance(config.precision_rtol, config.precision_atol),
    )


def _memory(settings: Settings) -> Memory:
    """What models need of memory, and how much of it there is for them."""
    estimator = Estimator(
        settings.cache_dir / "memory.json", plan=settings.plan, max_batch_rows=settings.max_batch_rows
    )

    def limit(memory: str) -> int:
        configured = settings.memory_budget_bytes if memory == "CPU" else settings.gpu_memory_budget_bytes
        return limit_bytes(memory, configured)

    return Memory(
        needs=lambda path, config: estimator.needs_bytes(path, devices_for(config.device)),
        remember=lambda path, config, use: estimator.remember(path, devices_for(config.device), use),
        limit=limit,
    )


def _watcher(settings: Settings) -> Watcher:
    def whole_look(configs: ModelConfigs) -> Repository:
        return look(settings.models, settings.name, configs, settings.cache_dir)

    is_here = "://" not in str(settings.models)
    return Watcher(
        Glance(whole_look, Path(settings.models)) if is_here else whole_look,
        config_file=settings.models_config,
        poll_s=settings.poll_s,
        follows_folder=settings.model_control == "poll",
        quiet_s=settings.poll_s,
        runner=ThreadRunner("kiln-watcher", asyncio.get_running_loop()),
    )


async def _announce(health: Health, registry: Registry, rpc: Rpc, metrics: Metrics) -> None:
    """Tell of readiness wherever it is asked for, now and whenever it changes."""
    told: bool | None = None
    while True:
        is_ready = health.is_ready()
        if is_ready != told:
            await rpc.set_serving(serving=is_ready)
            metrics.ready(is_ready=is_ready)
            if is_ready:
                _log.info("ready")
            else:
                _log.error("not ready: none of %d models could be loaded", len(registry.model_names()))
        told = is_ready
        await asyncio.sleep(_READINESS_S)


def _listen_to_signals(stopping: asyncio.Event, on_signal: Callable[..., object]) -> None:
    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)  # asked twice: at once, whatever is still running
        stopping.set()

    for number in _SIGNALS:
        on_signal(number, stop, number)
