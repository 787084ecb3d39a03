"""One model: what lies on disk, what is wanted of it, and the steps from one to the other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from service.batching.runner import Runner, ThreadRunner
from service.metrics import Metrics
from service.registry.config import ModelConfig
from service.registry.lifecycle import State, VersionStatus
from service.registry.memory import Resident
from service.registry.policy import Load, next_action, wanted
from service.registry.repository import Problem, Source
from service.registry.room import Room
from service.registry.routes import Routes
from service.registry.version import RegistryOptions, Version

_log = logging.getLogger("kiln.registry")
_MAX_RETRIES = 5
_LONGEST_RETRY_S = 60.0
_ON_DEMAND = "it is loaded at its next request"


@dataclass(frozen=True)
class Failure:
    """A version that could not be loaded: it is tried again at `retry_at`, or when its files change.

    With `is_due` that time has come.
    """

    fingerprint: str
    attempts: int
    retry_at: float
    status: VersionStatus
    is_due: bool = False


class Follower:
    """Who is told of changes, for front ends in other processes; this one is not interested."""

    def changed(self) -> None:
        """What requests see of the models is another, or is about to be: once the current step ends."""

    def draining(self, version: Version) -> None:
        """A version takes no new requests from now on; those that hold it can still be counted."""


@dataclass(frozen=True)
class Bench:
    """What all models share: how versions are brought in, where that is told, and how many may be at once.

    `fetching` is for what is done in other processes or elsewhere, `loading` for what this process does itself.
    """

    options: RegistryOptions
    metrics: Metrics
    loading: asyncio.Semaphore
    room: Room
    fetching: asyncio.Semaphore
    planning: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    follower: Follower = field(default_factory=Follower)
    clock: Callable[[], float] = time.monotonic


class ServedModel(Routes[Version]):
    """The versions of one model.

    `versions` are those being loaded or loaded. Of a number there is one READY version at most,
    and a second one while the files of the first are being replaced.
    """

    def __init__(self, name: str, config: ModelConfig, bench: Bench, *, is_enabled: bool) -> None:
        self.name = name
        self.config = config
        self.is_enabled = is_enabled
        self.sources: dict[int, Source] = {}
        self.problems = {}
        self.versions: list[Version] = []
        self.labels = {}
        self.default = None
        self._bench = bench
        self._ready = {}
        self._failures: dict[int, Failure] = {}
        self._is_reconciling = asyncio.Lock()
        self._has_served = False
        self._is_awake = False
        self._is_waking = False
        self._arrived = asyncio.Event()
        """Set and replaced whenever a version becomes READY or FAILED."""

    def __repr__(self) -> str:
        return f"<ServedModel {self.name}: {self.versions!r}>"

    # What is there

    def found(self, sources: Mapping[int, Source], problems: Mapping[int | None, Problem]) -> None:
        """Take note of what lies on disk now."""
        self.sources = dict(sources)
        for number in [number for number in self._failures if number not in sources]:
            del self._failures[number]
        told = self.problems
        self.problems = {
            number: VersionStatus(self.name, number or 0, State.FAILED, problem.reason)
            for number, problem in problems.items()
        }
        for place, status in self.problems.items():
            if told.get(place) != status:
                _log.error("%s: %s", self.name if place is None else f"{self.name} v{place}", status.reason)
            self._bench.metrics.folder_problem(self.name, place, status.reason)
        for place in told.keys() - self.problems.keys():
            self._bench.metrics.forget_state(self.name, place)
        self._bench.follower.changed()

    def statuses(self) -> list[VersionStatus]:
        """Every version that is known, newest first.

        A version in use hides the failure of its replacement; one that failed shows that until it is
        READY, however often it is tried.
        """
        state, reason = (State.UNLOADED, _ON_DEMAND) if self.is_asleep else (State.NEW, "")
        known = {number: VersionStatus(self.name, number, state, reason) for number in self._chosen()}
        known |= {status.version: status for status in self.problems.values()}
        known |= {number: failure.status for number, failure in self._failures.items()}
        for version in self.versions:
            if self._is_shown(version):
                known[version.source.version] = version.status
        return sorted(known.values(), key=lambda status: -status.version)

    def _is_shown(self, version: Version) -> bool:
        """Whether the state of its number is told by this version."""
        number = version.source.version
        if version.is_ready:
            return True
        failure = self._failures.get(number)
        is_retry = failure is not None and failure.fingerprint == version.source.fingerprint
        return number not in self._ready and (not is_retry or version.lifecycle.state is State.FAILED)

    @property
    def numbers(self) -> set[int]:
        """See `Routes.numbers`."""
        return {*self.sources, *self._ready, *(number for number in self.problems if number is not None)}

    def failure_of(self, number: int) -> str:
        """Why the latest attempt to load a version failed; ``""`` if it did not."""
        failure = self._failures.get(number)
        return failure.status.reason if failure else ""

    # Who answers

    @property
    def is_moving(self) -> bool:
        """See `Routes.is_moving`."""
        is_awaited = self._has_served or self.config.on_demand
        return is_awaited and (self._is_waking or self._is_reconciling.locked()) and self._missing()

    @property
    def is_asleep(self) -> bool:
        """Whether it is loaded at its next request, and not before."""
        return self.config.on_demand and self.is_enabled and not self._is_awake and bool(self.sources)

    def wake(self) -> bool:
        """Whether there is something that the next `reconcile` has to load, which it was left until now."""
        if not self.is_asleep:
            return False
        self._is_awake = self._is_waking = True
        self._bench.follower.changed()
        return True

    async def evict(self) -> None:
        """Let all versions go until the model is asked for again; not while it is changing anyway."""
        if self._is_reconciling.locked():
            return
        async with self._is_reconciling:
            self._is_awake = False
            for version in list(self.versions):
                await self._unload(version)
        self._bench.follower.changed()

    def residents(self) -> list[Resident]:
        """Its loaded versions, as the memory budget sees them."""
        is_idle = not self._is_reconciling.locked() and all(version.is_idle for version in self.versions)
        return [
            Resident(self.name, v.source.version, v.last_used, is_idle=is_idle, on_demand=self.config.on_demand)
            for v in self.versions
            if v.is_ready
        ]

    async def arrival(self) -> None:
        """Until a version has become READY or FAILED."""
        await self._arrived.wait()

    # The steps

    @property
    def is_reconciling(self) -> bool:
        return self._is_reconciling.locked()

    @property
    def is_settled(self) -> bool:
        """Whether a `reconcile` would find nothing to do, now or when a failed version is due again."""
        is_here = bool(self.sources or self.problems or self.versions)
        is_as_wanted = next_action(self.wanted(), self._states(), self.config.transition) is None
        return is_here and is_as_wanted and not self._failures and not self._is_waking and not self.unmoved_labels()

    def retry_now(self) -> None:
        """Let what failed be tried again without waiting."""
        self._failures = {n: replace(f, attempts=0, is_due=True) for n, f in self._failures.items()}

    async def reconcile(self) -> None:
        """Bring in what is wanted and let go what is not, one step after another."""
        async with self._is_reconciling:
            self._is_waking = False
            self._mark_due_failures()
            self._bench.follower.changed()
            while (action := next_action(self.wanted(), self._states(), self.config.transition)) is not None:
                if isinstance(action, Load):
                    await self._load(self.sources[action.version])
                else:
                    await self._unload(self._ready[action.version])
            self._move_labels()
        self._bench.follower.changed()

    def wanted(self) -> set[int]:
        """The versions that should be READY."""
        return set() if self.is_asleep else self._chosen()

    def _chosen(self) -> set[int]:
        return wanted(self.sources, self.config.versions) if self.is_enabled else set()

    def _missing(self) -> bool:
        return any(number not in self._ready and number not in self._failures for number in self.wanted())

    def _states(self) -> dict[int, State]:
        """States for the policy: a READY version whose files have changed counts as NEW."""
        states = dict.fromkeys(self._ready, State.READY)
        for number, source in self.sources.items():
            ready = self._ready.get(number)
            failure = self._failures.get(number)
            if failure is not None and failure.fingerprint == source.fingerprint and not failure.is_due:
                states[number] = State.READY if ready else State.FAILED
            elif ready is not None and ready.source.fingerprint != source.fingerprint:
                states[number] = State.NEW
        return states

    def _mark_due_failures(self) -> None:
        now = self._bench.clock()
        for number, failure in list(self._failures.items()):
            source = self.sources.get(number)
            is_changed = source is not None and source.fingerprint != failure.fingerprint
            if is_changed or (failure.attempts <= _MAX_RETRIES and now >= failure.retry_at):
                attempts = 0 if is_changed else failure.attempts
                self._failures[number] = replace(failure, attempts=attempts, is_due=True)

    async def _load(self, source: Source) -> None:
        version = Version(source, self._on_change)
        before = self._ready.get(source.version)
        self.versions.append(version)
        await self._bring_in(version)
        if not version.is_ready:
            self._note_failure(version)
            return
        version.start_planning(self._bench.planning, self._bench.metrics, self._bench.room)
        if before is not None:
            await self._unload(before)

    async def _bring_in(self, version: Version) -> None:
        """Fetch and convert, then load: what takes long to convert holds up nothing that is here as a SavedModel."""
        bench = self._bench
        async with contextlib.nullcontext() if version.source.is_at_hand else bench.fetching:
            _log.info("loading %s", version.label)
            with _thread(version) as loader:
                await version.fetch(bench.options, loader)
        async with bench.loading:
            with _thread(version) as loader:
                await version.load(self.config, bench.options, bench.metrics, loader, bench.room)

    def _note_failure(self, version: Version) -> None:
        number = version.source.version
        earlier = self._failures.get(number)
        attempts = earlier.attempts + 1 if earlier else 1
        wait_s = min(self._bench.options.retry_s * 2 ** (attempts - 1), _LONGEST_RETRY_S)
        status = version.status
        if attempts <= _MAX_RETRIES:
            _log.info("%s is tried again in %.0f s, or when its files change", version.label, wait_s)
        self._failures[number] = Failure(version.source.fingerprint, attempts, self._bench.clock() + wait_s, status)
        self.versions.remove(version)
        if (ready := self._ready.get(number)) is not None:
            self._bench.room.settle(self.name, number, ready.held_bytes)  # the one that it was to replace

    async def _unload(self, version: Version) -> None:
        with _thread(version) as loader:
            await version.unload(self._bench.options.drain_s, self._bench.metrics, loader)
        self.versions.remove(version)
        if version.source.version not in self._ready:
            self._bench.room.release(self.name, version.source.version)
            self._bench.metrics.forget_state(self.name, version.source.version)

    async def stop(self, drain_s: float) -> bool:
        """Finish what was accepted within `drain_s`; whether it was enough."""
        leaving = [v.unload(drain_s, self._bench.metrics) for v in self.versions]
        return all(await asyncio.gather(*leaving))

    def _on_change(self, version: Version) -> None:
        """Keep the tables that requests look into."""
        number = version.source.version
        state = version.lifecycle.state
        if state is State.READY:
            self._ready[number] = version
            self._failures.pop(number, None)
            self._has_served = True
        elif self._ready.get(number) is version:
            del self._ready[number]
        self.default = self._ready[max(self._ready)] if self._ready else None
        self.labels = {label: number for label, number in self.labels.items() if number in self._ready}
        if state is State.READY:
            self._move_labels()
        if self._is_shown(version):
            self._bench.metrics.state_changed(version.status)
        if state is State.DRAINING:
            self._bench.follower.draining(version)
        self._bench.follower.changed()
        if state in (State.READY, State.FAILED):
            arrived, self._arrived = self._arrived, asyncio.Event()
            arrived.set()

    def _move_labels(self) -> None:
        """Labels move to READY versions only; one whose new version is not READY stays where it is."""
        for label in self.labels.keys() - self.config.labels.keys():
            del self.labels[label]
        for label, number in self.config.labels.items():
            if number in self._ready:
                self.labels[label] = number

    def unmoved_labels(self) -> dict[str, int]:
        """Labels that wait for their version."""
        return {label: number for label, number in self.config.labels.items() if self.labels.get(label) != number}


@contextlib.contextmanager
def _thread(version: Version) -> Iterator[Runner]:
    """A thread of its own, so that a load that hangs holds up no other model."""
    runner = ThreadRunner(f"kiln-load-{version.source.model}-{version.source.version}", asyncio.get_running_loop())
    try:
        yield runner
    finally:
        runner.close()
