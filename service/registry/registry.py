"""The registry: loads what is wanted, keeps what is ready, drains what goes.

State changes happen on the event loop; loading, which blocks for seconds, in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from service.batching.batcher import Batcher
from service.batching.batcher import Model as BatchModel
from service.batching.queue import Limits
from service.batching.runner import Runner, ThreadRunner, result_of
from service.errors import InvalidArgument, KilnError, NotFound, Unavailable
from service.metrics import Metrics
from service.predictor import Handle, ModelInfo, ModelRef
from service.registry.lifecycle import Lifecycle, State, VersionStatus
from service.registry.policy import Latest, wanted
from service.registry.repository import Kind, Repository, Source
from service.runtime.base import signatures_line
from service.runtime.planner import Choice
from service.tensors import Signature, Tensors

_log = logging.getLogger("kiln.registry")


class Model(BatchModel, Protocol):
    """A loaded version; see `service.runtime.model.LoadedModel`."""

    signatures: dict[str, Signature]
    device: str

    def warm_up(self) -> Mapping[str, Choice]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class RegistryOptions:
    """How every version is batched, and how it is brought in.

    `materialize` turns what lies in the repository into a SavedModel folder and `load` loads
    that; both block.
    """

    materialize: Callable[[Source], Path]
    load: Callable[[Path], Model]
    limits: Limits
    split_oversize: bool = True


class Version:
    """One version: its state, and once loaded its model and batcher."""

    def __init__(self, source: Source, on_change: Callable[[VersionStatus], None]) -> None:
        self.source = source
        self.lifecycle = Lifecycle(source.model, source.version, on_change)
        self.model: Model | None = None
        self.batcher: Batcher | None = None

    def __repr__(self) -> str:
        return f"<Version {self.lifecycle!r}>"


class VersionHandle:
    """A READY version held for one request."""

    __slots__ = ("_batcher", "_lifecycle", "model", "signatures", "version")

    def __init__(self, version: Version) -> None:
        assert version.model is not None
        assert version.batcher is not None
        version.lifecycle.acquire()
        self.model = version.source.model
        self.version = version.source.version
        self.signatures: Mapping[str, Signature] = version.model.signatures
        self._batcher = version.batcher
        self._lifecycle = version.lifecycle

    def submit(self, signature: Signature, inputs: Tensors, deadline: float | None) -> Awaitable[Tensors]:
        return self._batcher.submit(signature, inputs, deadline)

    def release(self) -> None:
        self._lifecycle.release()


class Registry:
    """All models of one server; the `Engine` that the predictor sees."""

    def __init__(self, repository: Repository, options: RegistryOptions, metrics: Metrics) -> None:
        self._options = options
        self._metrics = metrics
        self._models: dict[str, dict[int, Version]] = {}
        self._problems: dict[str, list[VersionStatus]] = {}
        self._defaults: dict[str, Version] = {}
        """The highest READY version of each model that has one."""
        self.draining = False
        for problem in repository.problems:
            _log.error("%s: %s", _label(problem.model, problem.version), problem.reason)
            metrics.folder_problem(problem.model, problem.version, problem.reason)
            status = VersionStatus(problem.model, problem.version or 0, State.FAILED, problem.reason)
            self._problems.setdefault(problem.model, []).append(status)
        for name, sources in _by_model(repository.sources).items():
            chosen = wanted(sources, Latest(1))
            self._models[name] = {v: Version(s, self._on_change) for v, s in sources.items() if v in chosen}

    async def load_all(self) -> None:
        """Load every wanted version, one after another; none that fails stops the rest."""
        versions = [version for by_number in self._models.values() for version in by_number.values()]
        loader = ThreadRunner("kiln-loader", asyncio.get_running_loop())
        for position, version in enumerate(versions, start=1):
            _log.info("loading %s (%d of %d)", _label_of(version), position, len(versions))
            await self._load(version, loader)
        loader.close()

    def acquire(self, ref: ModelRef) -> Handle:
        """Hold the version that `ref` means; see `Engine.acquire`."""
        return VersionHandle(self._ready_version(ref))

    def check(self, ref: ModelRef) -> None:
        self._ready_version(ref)

    def describe(self, ref: ModelRef) -> ModelInfo:
        version = self._ready_version(ref)
        assert version.model is not None
        ready = [n for n, v in self._models[ref.name].items() if v.lifecycle.state is State.READY]
        source = version.source
        platform = "tensorflow_savedmodel" if source.kind is Kind.SAVED_MODEL else "keras"
        return ModelInfo(source.model, source.version, tuple(sorted(ready)), platform, version.model.signatures)

    def statuses(self, ref: ModelRef) -> list[VersionStatus]:
        """See `Engine.statuses`; folders that could not be a version are FAILED with the reason."""
        if ref.label is not None:
            raise _unknown_label(ref.label)
        known = [version.lifecycle.status for version in self._models.get(ref.name, {}).values()]
        known += self._problems.get(ref.name, [])
        if not known:
            raise NotFound(f"Could not find any versions of model {ref.name}; {self._loaded_names()}")
        if ref.version is not None:
            known = [status for status in known if status.version == ref.version]
            if not known:
                raise NotFound(f"Could not find version {ref.version} of model {ref.name}")
        return sorted(known, key=lambda status: -status.version)

    def all_statuses(self) -> list[VersionStatus]:
        """The states of all versions that are loaded or to be loaded."""
        return [v.lifecycle.status for by_number in self._models.values() for v in by_number.values()]

    def model_names(self) -> list[str]:
        return sorted(self._models.keys() | self._problems.keys())

    async def stop(self, drain_s: float) -> bool:
        """Finish what was accepted within `drain_s`, then unload everything; whether it was enough."""
        self.draining = True
        versions = [version for by_number in self._models.values() for version in by_number.values()]
        return all(await asyncio.gather(*(self._unload(version, drain_s) for version in versions)))

    def _ready_version(self, ref: ModelRef) -> Version:
        """The version meant by `ref`: the highest READY one where none is named."""
        versions = self._models.get(ref.name)
        if self.draining and versions is not None:
            raise Unavailable("the server is stopping and takes no new requests")
        if ref.version is None and ref.label is None:
            default = self._defaults.get(ref.name)
            if default is not None:
                return default
        if versions is None:
            for problem in self._problems.get(ref.name, []):
                raise Unavailable(f"model {ref.name!r} could not be loaded: {problem.reason}")
            raise NotFound(f"Servable not found for request: {_request(ref)}; {self._loaded_names()}")
        if ref.label is not None:
            raise _unknown_label(ref.label)
        if ref.version is None:
            version = max(versions.values(), key=lambda v: v.source.version)  # none is READY
        elif ref.version in versions:
            version = versions[ref.version]
        else:
            known = ", ".join(str(number) for number in sorted(versions))
            raise NotFound(f"Servable not found for request: {_request(ref)}; model {ref.name!r} has version {known}")
        if version.lifecycle.state is not State.READY:
            status = version.lifecycle.status
            why = f": {status.reason}" if status.reason else ""
            raise Unavailable(f"model {ref.name!r} version {status.version} is {status.state.value}, not READY{why}")
        return version

    def _on_change(self, status: VersionStatus) -> None:
        """A version has changed its state."""
        self._metrics.state_changed(status)
        ready = [v for v in self._models[status.model].values() if v.lifecycle.state is State.READY]
        if ready:
            self._defaults[status.model] = max(ready, key=lambda v: v.source.version)
        else:
            self._defaults.pop(status.model, None)

    def _loaded_names(self) -> str:
        return f"loaded are {', '.join(sorted(self._defaults))}" if self._defaults else "no model is loaded"

    async def _load(self, version: Version, loader: Runner) -> None:
        start = time.monotonic()
        version.lifecycle.advance(State.LOADING)
        try:
            path = await result_of(loader, lambda: self._options.materialize(version.source))
            version.model = model = await result_of(loader, lambda: self._options.load(path))
            version.lifecycle.advance(State.WARMING)
            _log.info("warming up %s", _label_of(version))
            warm_up_start = time.monotonic()
            choices = await result_of(loader, model.warm_up)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this version's failure only
            self._fail(version, error)
            return
        warm_up_s = time.monotonic() - warm_up_start
        self._publish(version, model, choices)
        seconds = time.monotonic() - start
        self._metrics.loaded(version.source.model, version.source.version, seconds)
        _log.info(
            "%s is ready on %s: %s (plans %s; loaded in %.1f s, of which warm-up %.1f s)",
            _label_of(version),
            model.device,
            signatures_line(model.signatures),
            _plans_line(choices),
            seconds,
            warm_up_s,
        )

    def _publish(self, version: Version, model: Model, choices: Mapping[str, Choice]) -> None:
        name, number = version.source.model, version.source.version
        runner = ThreadRunner(f"kiln-{name}-{number}", asyncio.get_running_loop())
        observer = self._metrics.version(name, number, lambda: batcher.queue.rows)
        batcher = Batcher(
            model,
            self._options.limits,
            runner=runner,
            observer=observer,
            split_oversize=self._options.split_oversize,
        )
        version.batcher = batcher
        for signature, choice in choices.items():
            self._metrics.plan_chosen(name, number, signature, choice.names)
        version.lifecycle.advance(State.READY)

    def _fail(self, version: Version, error: Exception) -> None:
        if isinstance(error, KilnError):
            reason = str(error)
        else:
            reason = f"{type(error).__name__}: {error}"
            _log.error("%s: unexpected error while loading", _label_of(version), exc_info=error)
        model, version.model = version.model, None
        if model is not None:
            model.close()
        version.lifecycle.advance(State.FAILED, reason)
        _log.error("%s failed: %s", _label_of(version), reason)

    async def _unload(self, version: Version, drain_s: float) -> bool:
        """Drain a READY version and let it go; False if some of its requests had to be given up."""
        if version.lifecycle.state is not State.READY:
            return True
        assert version.batcher is not None
        assert version.model is not None
        idle = asyncio.Event()
        version.lifecycle.drain(idle.set)
        stop = time.monotonic() + drain_s
        try:
            await asyncio.wait_for(idle.wait(), drain_s)
        except TimeoutError:
            _log.warning("%s: %d requests not finished in time", _label_of(version), version.lifecycle.handles)
        is_drained = await version.batcher.stop(max(stop - time.monotonic(), 0.0))
        self._metrics.forget_version(version.source.model, version.source.version)
        version.lifecycle.advance(State.UNLOADED)
        return is_drained


def _by_model(sources: Iterable[Source]) -> dict[str, dict[int, Source]]:
    grouped: dict[str, dict[int, Source]] = {}
    for source in sources:
        grouped.setdefault(source.model, {})[source.version] = source
    return grouped


def _label(model: str, version: int | None) -> str:
    return model if version is None else f"{model} v{version}"


def _label_of(version: Version) -> str:
    return _label(version.source.model, version.source.version)


def _request(ref: ModelRef) -> str:
    """As TensorFlow Serving writes it: ``Latest(half)`` or ``Specific(half, 99)``."""
    return f"Latest({ref.name})" if ref.version is None else f"Specific({ref.name}, {ref.version})"


def _unknown_label(label: str) -> InvalidArgument:
    return InvalidArgument(f"Unrecognized servable version label: {label}")


def _plans_line(choices: Mapping[str, Choice]) -> str:
    names = sorted({name for choice in choices.values() for name in choice.names.values()})
    return ", ".join(names) or "none"
