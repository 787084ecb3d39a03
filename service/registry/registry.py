"""The registry: loads what is wanted, keeps what is ready, drains what goes.

State changes happen on the event loop; loading, which blocks for seconds, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from service.batching.statistics import VersionStatistics
from service.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from service.metrics import Metrics
from service.predictor import Handle, ModelInfo, ModelRef
from service.registry.catalogue import Catalogue
from service.registry.config import ModelConfig, ModelConfigs
from service.registry.memory import Resident
from service.registry.repository import Kind, Problem, Repository, Source
from service.registry.room import Room
from service.registry.served_model import Bench, Follower, ServedModel
from service.registry.shadow import ShadowedHandle
from service.registry.version import RegistryOptions, Version, VersionHandle
from service.registry.watch import Watcher

_DEFAULT = ModelConfig()


class Registry(Catalogue[Version]):
    """All models of one server; the `Engine` that the predictor sees."""

    def __init__(
        self,
        repository: Repository,
        options: RegistryOptions,
        metrics: Metrics,
        *,
        configs: ModelConfigs | None = None,
        watcher: Watcher | None = None,
        follower: Follower | None = None,
    ) -> None:
        self.draining = False
        self._options = options
        self._metrics = metrics
        self._configs: ModelConfigs = configs or {}
        self._watcher = watcher
        self._noted = repository
        self._models: dict[str, ServedModel] = {}
        self._is_closed = False
        """Whether a client has said what is to be served, so that nothing else is."""
        room = Room(self, metrics)
        self._follower = follower or Follower()
        loading = asyncio.Semaphore(options.parallel_loads)
        fetching = asyncio.Semaphore(max(options.parallel_loads, options.parallel_fetches))
        self._bench = Bench(options, metrics, loading, room, fetching, follower=self._follower)
        self._tasks: set[asyncio.Task[None]] = set()
        self._note(repository)

    # Changes

    async def load_all(self) -> None:
        """Bring in all that is wanted; no model that fails stops the rest.

        Plans are looked for afterwards: it would hold up what is still to come, and be disturbed by it.
        """
        async with self._bench.planning:
            await self._reconcile(self._models.values())

    async def watch(self) -> None:
        """Follow changes of the folder and of the configs until cancelled."""
        if self._watcher is not None and not self._options.fixed:
            await self._watcher.run(self._look_again)

    async def _look_again(self, configs: ModelConfigs | None) -> bool:
        """Whether there is nothing to do."""
        assert self._watcher is not None
        if configs is not None:
            self._configs = configs
        found = await self._watcher.found(self._configs)
        if configs is not None or not found.is_same(self._noted):
            self._note(found)
        unsettled = [model for model in self._models.values() if not model.is_settled]
        for model in unsettled:
            self._keep(asyncio.create_task(self._settle(model)))
        return not unsettled

    def _keep(self, task: asyncio.Task[None]) -> None:
        """Hold a task until it ends: the event loop does so only weakly."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, model: ServedModel) -> None:
        """One round for one model; a round that is under way goes on to what is wanted now."""
        if not model.is_reconciling and not self.draining:
            await model.reconcile()
            self._drop_if_gone(model)

    async def configure(self, configs: ModelConfigs) -> None:
        """Serve these models so, and no others, as soon as they are ready.

        Raises:
            Unavailable: models do not change here.
            InvalidArgument: a path leads out of the models' folder.
            FailedPrecondition: a wanted version could not be loaded, or a label's is not READY.
        """
        if self._options.fixed:
            raise Unavailable("models do not change with --model-control none")
        for name, config in configs.items():
            self._check_within(name, config.path)
        before = dict(self._models)
        self._configs = dict(configs)
        self._is_closed = True
        if self._watcher is not None:
            self._note(await self._watcher.found_whole(self._configs))
        for name, model in self._models.items():
            model.config = configs.get(name, _DEFAULT)
            self._set_goal(model)
            model.is_enabled = name in configs
        await self._reconcile([*before.values(), *self._models.values()])
        for name in configs:
            self._check_arrived(name)
            unmoved = self._models[name].unmoved_labels()
            for label, number in unmoved.items():
                raise FailedPrecondition(
                    f"model {name!r}: label {label!r} cannot move to version {number}, which is not READY"
                )

    async def load(self, name: str) -> None:
        """Load a model, or what has changed of it; waits until it is READY.

        Raises:
            Unavailable: models are not loaded by request here.
            NotFound: there is no such model.
            FailedPrecondition: it cannot be loaded; the text says why.
        """
        self._check_explicit("loaded")
        if self._watcher is not None:
            self._note(await self._watcher.found_whole(self._configs))
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"there is no model {name!r} to load; {self._known_names()}")
        model.is_enabled = True
        model.retry_now()
        await model.reconcile()
        self._check_arrived(name)

    async def unload(self, name: str) -> None:
        """Drain a model and let it go.

        Raises:
            Unavailable: models are not unloaded by request here.
            NotFound: there is no such model.
        """
        self._check_explicit("unloaded")
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"there is no model {name!r} to unload; {self._known_names()}")
        model.is_enabled = False
        await model.reconcile()

    async def stop(self, drain_s: float) -> bool:
        """Finish what was accepted within `drain_s`, then unload everything.

        Returns whether that was enough and nothing is being loaded: a thread may be in TensorFlow else.
        """
        self.draining = True
        self._follower.changed()
        is_loading = any(model.is_reconciling for model in self._models.values())
        for task in self._tasks:
            task.cancel()
        drained = await asyncio.gather(*(model.stop(drain_s) for model in self._models.values()))
        return all(drained) and not is_loading

    # What the predictor asks

    @property
    def routes(self) -> dict[str, ServedModel]:
        """See `Catalogue.routes`."""
        return self._models

    def acquire(self, ref: ModelRef) -> Handle:
        """Hold the version that `ref` means; see `Engine.acquire`."""
        ref = self._meant(ref)
        version = self._route(ref)
        version.lifecycle.acquire()
        return self._shadowed(version) if ref.version is None and ref.label is None else VersionHandle(version)

    def hold(self, version: Version, *, is_named: bool) -> Handle:
        """As `acquire`, of a version that another process has routed to while it was READY.

        `is_named` tells whether its caller named a version or label: such requests have no shadow.
        """
        version.lifecycle.hold()
        return VersionHandle(version) if is_named else self._shadowed(version)

    def _shadowed(self, version: Version) -> Handle:
        """A handle of a version that is counted already."""
        handle = VersionHandle(version)
        model = self._models.get(version.source.model)
        if model is None or (shadow := model.config.shadow) is None:
            return handle
        other = model.resolve(shadow.to)
        if other is None or other is version:
            return handle
        return ShadowedHandle(handle, other, shadow.share, self._metrics, self._keep)

    async def wait(self, ref: ModelRef, deadline: float | None) -> None:
        """See `Engine.wait`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if deadline is None else max(deadline - time.monotonic(), 0.0)):
                while self.is_coming(ref):
                    model = self._models[ref.name]
                    arrival = model.arrival()
                    if model.wake():
                        self._keep(asyncio.create_task(model.reconcile()))
                    await arrival

    def describe(self, ref: ModelRef) -> ModelInfo:
        """See `Engine.describe`."""
        return self.info(self._route(self._meant(ref)))

    def info(self, version: Version) -> ModelInfo:
        """What a READY version says of itself."""
        assert version.model is not None
        source = version.source
        platform = "tensorflow_savedmodel" if source.kind is Kind.SAVED_MODEL else "keras"
        ready = tuple(sorted(v.source.version for v in self._models[source.model].versions if v.is_ready))
        return ModelInfo(
            source.model,
            source.version,
            ready,
            platform,
            version.model.signatures,
            device=version.model.device,
            config=self._models[source.model].config,
            max_batch_rows=self._options.limits.max_batch_rows,
            batch_wait_s=self._options.limits.batch_wait_s,
            plans=version.model.plans,
        )

    def statistics_of(self, name: str) -> list[VersionStatistics]:
        """See `Catalogue.statistics_of`."""
        return [
            VersionStatistics(name, version.source.version, version.batcher.statistics, version.held_bytes)
            for version in sorted(self._models[name].versions, key=lambda version: version.source.version)
            if version.batcher is not None
        ]

    def can_serve(self) -> bool:
        """Whether there is anything to ask, or something may be loaded by request."""
        return self._options.explicit or any(
            model.default is not None or model.is_asleep for model in self._models.values()
        )

    # What the memory budget asks

    def residents(self) -> list[Resident]:
        """See `Tenants.residents`."""
        return [resident for model in self._models.values() for resident in model.residents()]

    async def evict(self, model: str, version: int) -> None:  # noqa: ARG002 - an idle model goes whole
        """See `Tenants.evict`."""
        await self._models[model].evict()

    # Within

    def _note(self, repository: Repository) -> None:
        """Take note of what lies there; models come into being here."""
        self._noted = repository
        sources: dict[str, dict[int, Source]] = {}
        problems: dict[str, dict[int | None, Problem]] = {}
        for source in repository.sources:
            sources.setdefault(source.model, {})[source.version] = source
        for problem in repository.problems:
            problems.setdefault(problem.model, {})[problem.version] = problem
        for name in sorted(sources.keys() | problems.keys() | self._models.keys()):
            config = self._configs.get(name, _DEFAULT)
            model = self._models.get(name)
            if model is None:
                is_enabled = name in self._configs if self._is_closed else not self._options.explicit
                model = ServedModel(name, config, self._bench, is_enabled=is_enabled)
                self._models[name] = model
            model.config = config
            self._set_goal(model)
            model.found(sources.get(name, {}), problems.get(name, {}))

    def _set_goal(self, model: ServedModel) -> None:
        self._metrics.goal(model.name, model.config.slo_ms)
        self._options.devices.weigh(model.name, model.config.weight)
        for version in model.versions:
            version.hold_to(model.config.slo_ms)

    async def _reconcile(self, models: Iterable[ServedModel]) -> None:
        unique = {model.name: model for model in models}
        await asyncio.gather(*(model.reconcile() for model in unique.values()))
        for model in unique.values():
            self._drop_if_gone(model)

    def _drop_if_gone(self, model: ServedModel) -> None:
        if not (model.sources or model.problems or model.versions) and self._models.get(model.name) is model:
            del self._models[model.name]
            self._follower.changed()

    def _check_arrived(self, name: str) -> None:
        """Raise why a model that should be there is not."""
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"there is no model {name!r}; {self._known_names()}")
        for number in sorted(model.wanted(), reverse=True):
            if reason := model.failure_of(number):
                raise FailedPrecondition(f"model {name!r} version {number} could not be loaded: {reason}")
        if model.default is None:
            reasons = "; ".join(status.reason for status in model.problems.values()) or "it has no version to load"
            raise FailedPrecondition(f"model {name!r} could not be loaded: {reasons}")

    def _check_within(self, name: str, path: str | None) -> None:
        """A client may not have the server read whatever it can."""
        root = self._options.root
        if path is None or root is None:
            return
        if "://" in root or "://" in path:
            is_within = path == root or (path.startswith(root.rstrip("/") + "/") and ".." not in path.split("/"))
        else:
            is_within = Path(path).resolve().is_relative_to(Path(root).resolve())
        if not is_within:
            raise InvalidArgument(f"model {name!r}: a base_path below {root!r} expected, got {path!r}")

    def _check_explicit(self, what: str) -> None:
        if not self._options.explicit:
            raise Unavailable(f"models are {what} by request only with --model-control explicit")

    def _known_names(self) -> str:
        return f"there are {', '.join(sorted(self._models))}" if self._models else "the repository is empty"
