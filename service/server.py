"""The composition root: build, start, load, be ready, drain, stop, in that order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from service import __version__
from service.batching.queue import Limits
from service.batching.runner import ThreadRunner
from service.following.followed import Following
from service.frontend.doors import Behind, BuildRpc, Doors, check_settings, shared_memory
from service.frontend.hub import Hub
from service.frontend.loop import loop_factory, spare_garbage_collector
from service.frontend.supervisor import FrontEnds
from service.gpus import gpu_reader
from service.health import Health
from service.metrics import Metrics
from service.observers import Observers, observers
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
from service.registry.served_model import Follower
from service.registry.version import Memory, RegistryOptions, Version
from service.registry.watch import Watcher, look
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
from service.warm_cache import link_warm_cache

_log = logging.getLogger("kiln.server")
_LINGER_S = 0.3
"""After the last answer, how long connections stay open so that late requests are refused, not cut."""
_MOST_FETCHES = 4
"""Versions that are fetched or converted at once; a child that converts takes a core and 600 MB."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one leaves at once.

    Raises:
        KilnError: the models' path does not exist, or what the transport needs is not installed.
        OSError: a port cannot be bound.
    """
    check_settings(settings)
    if settings.grpc_transport == "envoy":
        from service.rpc.envoy import become_envoy

        become_envoy(settings.model_dump_json(), settings.host, settings.grpc_port)  # and go on in service.embedded
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        is_idle = runner.run(_serve_with_grpcio(settings))
    if not is_idle:  # a thread is still in TensorFlow, which does not bear being torn down meanwhile
        logging.shutdown()
        os._exit(0)


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
    observing = Observers(Following()) if settings.frontends else observers(settings, metrics)  # front ends have theirs
    watcher = _watcher(settings)
    watcher.read_config_file()
    found = await watcher.found_whole(watcher.configs)  # a start that is ready has what was copied just before it
    hub = Hub(metrics) if settings.frontends else None
    options = registry_options(settings)
    changes = _Changes(watcher, hub or Follower())
    registry = Registry(found, options, metrics, configs=watcher.configs, watcher=watcher, follower=changes)
    on_signal(signal.SIGHUP, watcher.poke)
    health = Health(registry.can_serve)
    doors: Doors | FrontEnds
    if hub is None:
        predictor = Predictor(registry, metrics, observing.following)
        doors = Doors(settings, Behind(predictor, metrics, health.is_ready, shared_memory(settings)), build_rpc)
    else:
        hub.follow(registry, health.is_ready)
        doors = FrontEnds(settings, hub)
    rest_port, grpc_port = await doors.start()
    _log.info("kiln %s listens: REST on %s:%d, gRPC on %s:%d",
              __version__, settings.host, rest_port, settings.host, grpc_port)  # fmt: skip
    loading = asyncio.create_task(registry.load_all())
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()
        spare_garbage_collector()
        health.loaded = True
        following = [asyncio.create_task(_announce(health, registry, doors, metrics, changes.seen))]
        following.append(asyncio.create_task(registry.watch()))
        await stopped
        for task in following:
            task.cancel()
    is_drained = await _stop(settings.drain_s, health, registry, doors, metrics)
    await asyncio.to_thread(observing.close)
    return is_drained and loading.done()


async def _stop(drain_s: float, health: Health, registry: Registry, doors: Doors | FrontEnds, metrics: Metrics) -> bool:
    """Readiness off, refuse new, finish what was accepted, then close the doors.

    Returns whether all of it was finished.
    """
    _log.info("stopping: finishing accepted requests for up to %.0f s", drain_s)
    health.draining = True
    metrics.ready(is_ready=False)
    await doors.set_serving(serving=False)
    doors.refuse_new()
    is_drained = await registry.stop(drain_s)
    await asyncio.sleep(_LINGER_S)
    await doors.stop()
    _log.info("stopped")
    return is_drained


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


class _Changes(Follower):
    """Sets `seen` with each change of the models, and has the watcher and `other` told of it too."""

    def __init__(self, watcher: Watcher, other: Follower) -> None:
        self.seen = asyncio.Event()
        self._watcher = watcher
        self._other = other

    def changed(self) -> None:
        self.seen.set()
        self._watcher.stir()
        self._other.changed()

    def draining(self, version: Version) -> None:
        self._other.draining(version)


async def _announce(
    health: Health, registry: Registry, doors: Doors | FrontEnds, metrics: Metrics, changed: asyncio.Event
) -> None:
    """Tell of readiness wherever it is asked for, now and where it is another after something has `changed`."""
    told: bool | None = None
    while True:
        changed.clear()
        is_ready = health.is_ready()
        if is_ready != told:
            await doors.set_serving(serving=is_ready)
            metrics.ready(is_ready=is_ready)
            if is_ready:
                _log.info("ready")
            else:
                _log.error("not ready: none of %d models could be loaded", len(registry.model_names()))
        told = is_ready
        await changed.wait()


def _listen_to_signals(stopping: asyncio.Event, on_signal: Callable[..., object]) -> None:
    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)  # asked twice: at once, whatever is still running
        stopping.set()

    for number in _SIGNALS:
        on_signal(number, stop, number)
