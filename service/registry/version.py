"""One version of a model: brought in, asked, let go."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from service.batching.batcher import Batcher
from service.batching.batcher import Model as BatchModel
from service.batching.devices import Devices
from service.batching.queue import Limits, Spent
from service.batching.runner import Runner, ThreadRunner, result_of
from service.errors import KilnError
from service.meaning import MEANING_FILE, ModelMeaning
from service.metrics import Metrics
from service.padding import Padding
from service.registry.config import ModelConfig
from service.registry.labels import labelled
from service.registry.lifecycle import Lifecycle, State, VersionStatus
from service.registry.meaning import explained
from service.registry.padding import padding_problem, with_padding
from service.registry.repository import Source
from service.registry.room import Room
from service.runtime.base import signatures_line
from service.runtime.devices import memory_of
from service.runtime.memory import MemoryUse
from service.runtime.records import SignatureRecord
from service.tensors import Signature, Tensors, is_padded

_log = logging.getLogger("kiln.registry")
_KEYS = itertools.count(1)
_FIRST_REQUESTS_S = 1.0
"""Those that wait for a version to be READY come first; then its plans are looked for."""


class Model(BatchModel, Protocol):
    """A loaded version; see `service.runtime.model.LoadedModel`."""

    signatures: dict[str, Signature]
    device: str
    devices: tuple[str, ...]
    memory: dict[str, MemoryUse]
    left_out: dict[str, str]

    @property
    def parallel(self) -> int: ...
    @property
    def plans(self) -> Mapping[str, SignatureRecord]: ...
    @property
    def needs_planning(self) -> bool: ...
    def warm_up(self) -> Mapping[str, SignatureRecord]: ...
    @property
    def is_planned(self) -> bool: ...
    @property
    def is_known(self) -> bool: ...
    def plan(self, tell: Callable[[str], None] = ...) -> bool: ...
    def cancel_planning(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Memory:
    """What is known of memory: all of it may block.

    `needs` estimates what a SavedModel will take, in bytes by memory; `remember` keeps what it did
    take; `limit` is the budget of one memory, in bytes.
    """

    needs: Callable[[Path, ModelConfig], Mapping[str, int]]
    remember: Callable[[Path, ModelConfig, Mapping[str, MemoryUse]], None]
    limit: Callable[[str], int]


@dataclass(frozen=True)
class RegistryOptions:
    """How every version is batched, and how it is brought in.

    `materialize` turns what lies in the repository into a SavedModel folder, `parallel_fetches` at
    once, and `load` loads that, `parallel_loads` at once; both block. `drain_s` is the time that a
    version's requests get when another takes its place, `retry_s` the wait before a version that
    failed is tried again, doubled each time. With `explicit` models are loaded by request, with
    `fixed` nothing changes after the start. A client may name places below `root` only. `labels`
    reads the names of the classes that a version tells apart, and `meaning` what ``model.yaml`` says
    of it, raising `ModelLoadError`; both block too. On `devices` the versions take turns.
    """

    materialize: Callable[[Source], Path]
    load: Callable[[Path, ModelConfig], Model]
    limits: Limits
    labels: Callable[[Source], tuple[str, ...]] = lambda source: ()  # noqa: ARG005
    meaning: Callable[[Source], ModelMeaning | None] = lambda source: None  # noqa: ARG005
    memory: Memory | None = None
    split_oversize: bool = True
    drain_s: float = 60.0
    retry_s: float = 2.0
    parallel_loads: int = 1
    parallel_fetches: int = 1
    explicit: bool = False
    fixed: bool = False
    root: str | None = None
    devices: Devices = field(default_factory=Devices)


@dataclass
class Facts:
    """What is told of a version beside its state."""

    since: float = field(default_factory=time.time)
    device: str = ""
    plans: str = ""
    left_out: str = ""
    batch_difference: float = 0.0
    load_s: float = 0.0


class Version:
    """One version: its state, and once loaded its model and batcher."""

    def __init__(self, source: Source, on_change: Callable[[Version], None]) -> None:
        self.source = source
        self.key = next(_KEYS)
        """A number that no other version of this process has: one whose files were replaced has another."""
        self.lifecycle = Lifecycle(source.model, source.version, lambda _: self._changed())
        self.model: Model | None = None
        self.batcher: Batcher | None = None
        self.facts = Facts()
        self.held_bytes: dict[str, int] = {}
        self.last_used = time.monotonic()
        self._on_change = on_change
        self._path: Path | None = None
        self._start = 0.0
        self._planning: asyncio.Task[None] | None = None
        self._has_turn = False
        self._slo_ms: float | None = None

    def __repr__(self) -> str:
        return f"<Version {self.lifecycle!r}>"

    @property
    def label(self) -> str:
        """How the log calls it."""
        return f"{self.source.model} v{self.source.version}"

    @property
    def status(self) -> VersionStatus:
        """Its state and all that is told beside it."""
        return replace(
            self.lifecycle.status,
            since=self.facts.since,
            device=self.facts.device,
            plans=self.facts.plans,
            memory_bytes=sum(self.held_bytes.values()),
            rows=self.batcher.rows_served if self.batcher else 0,
            left_out=self.facts.left_out,
            batch_difference=self.facts.batch_difference,
        )

    @property
    def is_ready(self) -> bool:
        return self.lifecycle.state is State.READY

    def hold_to(self, slo_ms: float | None) -> None:
        """Batch to this goal from now on, or once it is loaded; None for none."""
        if slo_ms == self._slo_ms:
            return
        self._slo_ms = slo_ms
        if self.batcher is not None:
            self.batcher.hold_to(None if slo_ms is None else slo_ms / 1e3)

    def _changed(self) -> None:
        self.facts.since = time.time()
        self._on_change(self)

    async def fetch(self, options: RegistryOptions, loader: Runner) -> None:
        """``NEW`` → ``LOADING``, with a SavedModel on this disk, or ``FAILED`` with the reason; never raises."""
        self._start = time.monotonic()
        self.lifecycle.advance(State.LOADING)
        try:
            self._path = await result_of(loader, lambda: options.materialize(self.source))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this version's failure only
            await self._fail(error, loader)

    async def load(
        self, config: ModelConfig, options: RegistryOptions, metrics: Metrics, loader: Runner, room: Room
    ) -> None:
        """``LOADING`` → ``READY``, or ``FAILED`` with the reason; nothing if it was not fetched. Never raises."""
        if (path := self._path) is None:
            return
        self._slo_ms = config.slo_ms
        try:
            if (memory := options.memory) is not None:
                needs = await result_of(loader, lambda: memory.needs(path, config))
                limits = await result_of(loader, lambda: {name: memory.limit(name) for name in needs})
                await room.make(self.source.model, self.source.version, needs, limits)
            self.model = model = await result_of(loader, lambda: options.load(path, config))
            labels = await result_of(loader, lambda: options.labels(self.source))
            model.signatures = labelled(model.signatures, labels, self.label)
            await result_of(loader, lambda: self._explain(model, options))
            model.signatures = with_padding(model.signatures, config)
            self.lifecycle.advance(State.WARMING)
            _log.info("warming up %s", self.label)
            warm_up_start = time.monotonic()
            await result_of(loader, model.warm_up)
            await result_of(loader, lambda: self._check_padding(model, config))
            if memory is not None:
                await result_of(loader, lambda: memory.remember(path, config, model.memory))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this version's failure only
            await self._fail(error, loader)
            room.release(self.source.model, self.source.version)
            return
        self._settle(model, room)
        warm_up_s = time.monotonic() - warm_up_start
        self.facts.load_s = time.monotonic() - self._start
        self._publish(model, options, metrics)
        _log.info(
            "%s is ready on %s: %s (plans %s; loaded in %.1f s, of which warm-up %.1f s)",
            self.label,
            model.device,
            signatures_line(model.signatures),
            self.facts.plans,
            self.facts.load_s,
            warm_up_s,
        )

    def _explain(self, model: Model, options: RegistryOptions) -> None:
        """Give the signatures their meaning; one that cannot be read is told of, and left out."""
        signatures, problem = explained(model.signatures, lambda: options.meaning(self.source), self.label)
        model.signatures = signatures
        if problem:
            model.left_out = {**model.left_out, MEANING_FILE: problem}

    def _check_padding(self, model: Model, config: ModelConfig) -> None:
        """Raise `ModelLoadError` where padding changes answers; where that is allowed, it is told of."""
        if found := padding_problem(model, config):
            _log.warning("%s: %s", self.label, found)
            model.left_out = {**model.left_out, "padding": found}

    def start_planning(self, turn: asyncio.Semaphore, metrics: Metrics, room: Room) -> None:
        """Find out better plans while it serves, when it is its `turn`, and put them in use."""
        if self.is_ready and self.model is not None and self.model.needs_planning:
            self._planning = asyncio.create_task(self._plan(self.model, turn, metrics, room))

    async def _plan(self, model: Model, turn: asyncio.Semaphore, metrics: Metrics, room: Room) -> None:
        runner = ThreadRunner(f"kiln-plan-{self.source.model}-{self.source.version}", asyncio.get_running_loop())
        try:
            await asyncio.sleep(_FIRST_REQUESTS_S)
            async with turn:
                self._has_turn = True
                start = time.monotonic()
                what = (
                    "loading TensorFlow, which it did not wait for"
                    if model.is_known
                    else "looking for its fastest plans"
                )
                _log.info("%s: %s", self.label, what)
                is_changed = await result_of(runner, model.plan)
        except Exception:  # noqa: BLE001 - the version serves on without
            _log.exception("%s: unexpected error while planning; it is served as before", self.label)
            return
        finally:
            runner.close()
        if not self.is_ready or self.batcher is None:
            return
        self._settle(model, room)
        if is_changed:
            self.batcher.refresh(model.parallel)
            self._tell_plans(model, metrics)
            _log.info("%s: planned in %.1f s: %s", self.label, time.monotonic() - start, self.facts.plans)

    def _settle(self, model: Model, room: Room) -> None:
        self.held_bytes = {name: use.kept_bytes for name, use in model.memory.items()}
        room.settle(self.source.model, self.source.version, self.held_bytes)

    def _tell_plans(self, model: Model, metrics: Metrics) -> None:
        name, number = self.source.model, self.source.version
        self.facts.plans = ", ".join(sorted({n for r in model.plans.values() for n in r.names.values()})) or "none"
        self.facts.batch_difference = max((r.invariance.absolute for r in model.plans.values()), default=0.0)
        metrics.plans_chosen(name, number, model.plans)

    def _publish(self, model: Model, options: RegistryOptions, metrics: Metrics) -> None:
        name, number = self.source.model, self.source.version
        self.batcher = batcher = Batcher(
            model,
            options.limits,
            runner=ThreadRunner(f"kiln-{name}-{number}", asyncio.get_running_loop(), model.parallel),
            observer=metrics.version(name, number, lambda: batcher.queue.rows, options.limits),
            split_oversize=options.split_oversize,
        )
        batcher.hold_to(None if self._slo_ms is None else self._slo_ms / 1e3)
        batcher.share(partial(options.devices.join, map(memory_of, model.devices), name))
        self.facts.device = model.device
        self.facts.left_out = "; ".join(model.left_out.values())
        self._tell_plans(model, metrics)
        metrics.loaded(name, number, self.facts.load_s)
        self.lifecycle.advance(State.READY)

    async def _fail(self, error: Exception, loader: Runner) -> None:
        if isinstance(error, KilnError):
            reason = str(error)
        else:
            reason = f"{type(error).__name__}: {error}"
            _log.error("%s: unexpected error while loading", self.label, exc_info=error)
        model, self.model = self.model, None
        if model is not None:
            await result_of(loader, model.close)
        _log.error("%s failed: %s", self.label, reason)
        self.lifecycle.advance(State.FAILED, reason)

    @property
    def is_idle(self) -> bool:
        """Whether nobody asks it anything just now."""
        return self.lifecycle.handles == 0

    async def unload(self, drain_s: float, metrics: Metrics, loader: Runner | None = None) -> bool:
        """Drain a READY version and let it go; False if some of its requests had to be given up.

        Without a `loader` the model is not closed: the process is about to end.
        """
        if not self.is_ready:
            return True
        assert self.batcher is not None
        assert self.model is not None
        self.model.cancel_planning()
        idle = asyncio.Event()
        self.lifecycle.drain(idle.set)
        stop = time.monotonic() + drain_s
        try:
            if not idle.is_set():
                await asyncio.wait_for(idle.wait(), drain_s)
        except TimeoutError:
            _log.warning("%s: %d requests not finished in time", self.label, self.lifecycle.handles)
        is_drained = await self.batcher.stop(max(stop - time.monotonic(), 0.0))
        metrics.forget_version(self.source.model, self.source.version)
        if loader is not None and self._planning is not None:
            if not self._has_turn:
                self._planning.cancel()
            await asyncio.wait([self._planning])  # whose child is ended, but it may be putting plans in use
        if loader is not None and is_drained:  # a run that hangs still needs its model
            await result_of(loader, self.model.close)
        self.model = self.batcher = None
        self.lifecycle.advance(State.UNLOADED)
        _log.info("%s is unloaded", self.label)
        return is_drained


async def _cut(answer: Awaitable[Tensors], padding: Padding, sizes: Mapping[str, tuple[int, int]]) -> Tensors:
    return padding.cut(await answer, sizes)


class VersionHandle:
    """A version held for one request, whose lifecycle has counted it."""

    __slots__ = ("_batcher", "_owner", "model", "signatures", "version")

    def __init__(self, version: Version) -> None:
        assert version.model is not None
        assert version.batcher is not None
        self.model = version.source.model
        self.version = version.source.version
        self.signatures: Mapping[str, Signature] = version.model.signatures
        self._batcher = version.batcher
        self._owner = version

    def submit(
        self,
        signature: Signature,
        inputs: Tensors,
        deadline: float | None,
        spent: Spent | None = None,
        priority: int = 0,
    ) -> Awaitable[Tensors]:
        if signature.padding is None or not is_padded(signature, inputs):
            return self._batcher.submit(signature, inputs, deadline, spent, priority)
        padded, sizes = signature.padding.pad(inputs, self._batcher.queue.limits.max_queue_bytes)
        return _cut(self._batcher.submit(signature, padded, deadline, spent, priority), signature.padding, sizes)

    def release(self) -> None:
        self._owner.last_used = time.monotonic()
        self._owner.lifecycle.release()
