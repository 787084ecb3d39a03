"""The engine as a front end in another process has it: looked up in the latest snapshot, asked over a channel."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pickle
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from service.batching.queue import Spent
from service.batching.statistics import VersionStatistics
from service.errors import KilnError, Overloaded, Unavailable
from service.frontend.channel import Channel
from service.frontend.frames_codec import (
    ANSWER,
    Asked,
    CorruptFrame,
    Frame,
    Kind,
    decode_answer,
    decode_error,
    encode_asker,
    encode_request,
    frame,
)
from service.frontend.layout_codec import LayoutReader, LayoutWriter, get
from service.frontend.snapshot import ListedModel, ListedVersion, Region, Shared, Snapshot
from service.metrics import Metrics
from service.predictor import Handle, ModelInfo, ModelRef
from service.registry.catalogue import Catalogue
from service.registry.config import ModelConfig
from service.registry.lifecycle import VersionStatus
from service.registry.routes import Routes
from service.shared_memory import SharedMemory
from service.tensors import Signature, Tensors

_REFRESH_S = 5.0
"""An engine that does not answer within that is busy; what was known before is told instead."""


class RemoteVersion:
    """A READY version, and how many requests of this front end hold it."""

    def __init__(self, listed: ListedVersion) -> None:
        self.key = listed.key
        self.info = listed.info
        self.handles = 0
        self.is_gone = False
        by_name = listed.info.signatures
        self.writers = {name: LayoutWriter(place, by_name[name].inputs) for place, name in enumerate(sorted(by_name))}


class RemoteModel(Routes[RemoteVersion]):
    """One model of the snapshot."""

    def __init__(self, listed: ListedModel, ready: dict[int, RemoteVersion]) -> None:
        self.name = listed.name
        self.config = listed.config
        self.is_enabled = listed.is_enabled
        self.labels = listed.labels
        self.problems = listed.problems
        self.default = ready[max(ready)] if ready else None
        self.statistics = listed.statistics
        self._ready = ready
        self._listed = listed

    def statuses(self) -> list[VersionStatus]:
        """See `Routes.statuses`."""
        return self._listed.statuses

    @property
    def numbers(self) -> frozenset[int]:
        """See `Routes.numbers`."""
        return self._listed.numbers

    @property
    def is_asleep(self) -> bool:
        """See `Routes.is_asleep`."""
        return self._listed.is_asleep

    @property
    def is_moving(self) -> bool:
        """See `Routes.is_moving`."""
        return self._listed.is_moving


@dataclass(eq=False, slots=True)
class _Waiting:
    """A request that has been sent."""

    answer: asyncio.Future[Tensors]
    signature: Signature
    spent: Spent | None


class Terms(NamedTuple):
    """How a request is asked, as the arguments of `RemoteHandle.submit` and `Asked` have it."""

    deadline: float | None
    priority: int
    is_named: bool


class RemoteHandle:
    """A version held for one request; its place in the drain is kept by this process until `release`."""

    __slots__ = ("_engine", "_is_named", "_version", "model", "signatures", "version")

    def __init__(self, engine: RemoteEngine, version: RemoteVersion, *, is_named: bool) -> None:
        self.model = version.info.name
        self.version = version.info.version
        self.signatures: Mapping[str, Signature] = version.info.signatures
        self._engine = engine
        self._version = version
        self._is_named = is_named
        version.handles += 1

    async def submit(
        self,
        signature: Signature,
        inputs: Tensors,
        deadline: float | None,
        spent: Spent | None = None,
        priority: int = 0,
    ) -> Tensors:
        """See `Handle.submit`.

        Raises:
            Overloaded: the memory that is shared with the engine is full.
        """
        terms = Terms(deadline, priority, self._is_named)
        return await self._engine.ask(self._version, signature, inputs, spent, terms)

    def release(self) -> None:
        self._version.handles -= 1
        self._engine.let_go(self._version)


class RemoteEngine(Catalogue[RemoteVersion]):
    """The `Engine` that a front end's predictor sees; a `Peer` of its channel."""

    def __init__(self, channel: Channel, metrics: Metrics, memory: SharedMemory, on_end: Callable[[], None]) -> None:
        """`on_end` is called when the engine has gone."""
        self.draining = False
        self.is_ready = False
        self.on_change: Callable[[], None] = lambda: None
        """Called after each snapshot."""
        self.on_stop: Callable[[], Awaitable[None]] | None = None
        """How the engine has this front end stop."""
        self.on_end = on_end
        self._channel = channel
        self._metrics = metrics
        self._memory = memory
        self._shared = Shared(logging.getLogger("kiln").level)
        self._absent: frozenset[Region] = frozenset()
        """Regions that others have and that cannot be had here any more: their objects are gone."""
        self._models: dict[str, RemoteModel] = {}
        self._versions: dict[int, RemoteVersion] = {}
        self._layouts = LayoutReader()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}

    # What the predictor asks

    @property
    def routes(self) -> Mapping[str, RemoteModel]:
        """See `Catalogue.routes`."""
        return self._models

    def acquire(self, ref: ModelRef) -> Handle:
        """See `Engine.acquire`."""
        ref = self._meant(ref)
        return RemoteHandle(self, self._route(ref), is_named=ref.version is not None or ref.label is not None)

    def describe(self, ref: ModelRef) -> ModelInfo:
        """See `Engine.describe`."""
        return self._route(self._meant(ref)).info

    def statistics_of(self, name: str) -> list[VersionStatistics]:
        """See `Catalogue.statistics_of`."""
        return self._models[name].statistics

    async def wait(self, ref: ModelRef, deadline: float | None) -> None:
        """See `Engine.wait`."""
        await self._channel.call("wait", ref, deadline)

    async def load(self, name: str) -> None:
        """See `Engine.load`."""
        await self._channel.call("load", name)

    async def unload(self, name: str) -> None:
        """See `Engine.unload`."""
        await self._channel.call("unload", name)

    async def configure(self, configs: Mapping[str, ModelConfig]) -> None:
        """See `Engine.configure`."""
        await self._channel.call("configure", dict(configs))

    async def whole_page(self, accept: str) -> tuple[bytes, str]:
        """The metrics of all processes; see `Metrics.page`."""
        page: tuple[bytes, str] = await self._channel.call("page", accept)
        return page

    # What is the same in all front ends

    async def refresh(self) -> None:
        """Know how things are now, before a question about them is answered."""
        with contextlib.suppress(TimeoutError, Unavailable):
            await asyncio.wait_for(self._channel.call("refresh"), _REFRESH_S)

    async def settle(self) -> None:
        """Have what a client has changed here changed everywhere, before it is answered."""
        mine, before = self._mine(), self._shared
        if mine != before:
            self._shared = mine
            added, removed = mine.regions - before.regions, before.regions - mine.regions
            await self._channel.call("share", mine.log_level, added, removed)

    def _mine(self) -> Shared:
        regions = self._memory.status() if self._memory.extensions else []
        listed = frozenset((region.name, region.key, region.offset, region.byte_size) for region in regions)
        return Shared(logging.getLogger("kiln").level, listed | self._absent)

    def _share(self, theirs: Shared) -> None:
        """Change here what was changed elsewhere."""
        before, self._shared = self._shared, theirs
        if theirs.log_level != before.log_level:
            logging.getLogger("kiln").setLevel(theirs.log_level)
        for name, *_ in before.regions - theirs.regions:
            self._memory.unregister(name)
        self._absent &= theirs.regions
        for region in theirs.regions - before.regions:
            try:
                self._memory.register(*region)
            except KilnError:
                self._absent |= {region}

    # Requests

    async def ask(
        self,
        version: RemoteVersion,
        signature: Signature,
        inputs: Tensors,
        spent: Spent | None,
        terms: Terms,
    ) -> Tensors:
        """See `RemoteHandle.submit`."""
        if not self._channel.is_open:
            raise Unavailable("the engine has gone")
        written = version.writers[signature.name].write(inputs)
        try:
            placed = self._channel.outbox.put(written)
        except OSError as error:
            raise Overloaded(f"no memory can be shared with the engine: {error.strerror}") from None
        if placed is None:
            ring = self._channel.outbox.ring
            raise Overloaded(
                f"the memory shared with the engine is full: {ring.used_bytes} bytes wait, {written.size_bytes} came, "
                f"the limit is {ring.size_bytes}"
            )
        block, descriptor = placed
        number = next(self._numbers)
        answer: asyncio.Future[Tensors] = asyncio.get_running_loop().create_future()
        self._waiting[number] = _Waiting(answer, signature, spent)
        asker = b"" if spent is None else encode_asker(spent)
        deadline, priority, is_named = terms
        asked = Asked(version.key, deadline, is_named, block, written.layout, priority, asker)
        self._channel.send(encode_request(number, asked), descriptor)
        try:
            return await answer
        except asyncio.CancelledError:
            self._channel.send(frame(Kind.CANCEL, number))
            raise
        finally:
            del self._waiting[number]

    def let_go(self, version: RemoteVersion) -> None:
        """A request has ended; the engine waits for the last one of a version that it lets go."""
        if version.is_gone and version.handles == 0:
            self._channel.send(frame(Kind.RELEASE, version.key))

    # What the engine says

    def on_frame(self, got: Frame) -> None:
        """See `Peer`."""
        waiting = self._waiting.get(got.number)
        if waiting is not None and waiting.answer.done():
            waiting = None
        if got.kind == ANSWER:
            answered = decode_answer(got)
            block = self._channel.take(answered.block)  # also if nobody waits: the ring is read in order
            if waiting is not None:
                layout = self._layouts.read(answered.layout, answered.block.size_bytes)
                _tell(waiting.spent, answered.spent)
                waiting.answer.set_result(get(block, layout, waiting.signature.outputs))
        elif got.kind == Kind.ERROR:
            if waiting is not None:
                error, told = decode_error(got)
                if told is not None:
                    _tell(waiting.spent, told)
                waiting.answer.set_exception(error)
        else:
            raise CorruptFrame(f"the engine sends no frame of kind {got.kind}")

    def on_call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """See `Peer`."""
        if name == "snapshot":
            self._learn(pickle.loads(arguments[0]))  # noqa: S301 - from this program's own other process
            return None
        if name == "counts":
            return self._metrics.take()
        assert self.on_stop is not None
        return self.on_stop()

    def _learn(self, snapshot: Snapshot) -> None:
        """Go by `snapshot` from now on; what is no longer in it is let go, once its requests have ended."""
        before, self._versions = self._versions, {}
        models = {}
        for listed in snapshot.models:
            ready = {number: self._known(before, version) for number, version in listed.ready.items()}
            models[listed.name] = RemoteModel(listed, ready)
            self._metrics.goal(listed.name, listed.config.slo_ms)
        for name in self._models.keys() - models.keys():
            self._metrics.goal(name, None)
        self._models = models
        self.draining = snapshot.draining
        self.is_ready = snapshot.is_ready
        for key in before.keys() - self._versions.keys():
            before[key].is_gone = True
            self.let_go(before[key])
        self._share(snapshot.shared)
        self.on_change()

    def _known(self, before: Mapping[int, RemoteVersion], listed: ListedVersion) -> RemoteVersion:
        version = before.get(listed.key) or RemoteVersion(listed)
        version.info = listed.info
        self._versions[listed.key] = version
        return version


def _tell(spent: Spent | None, told: Spent) -> None:
    if spent is not None:
        spent.queue_s, spent.fuse_s, spent.compute_s = told.queue_s, told.fuse_s, told.compute_s
        spent.rows, spent.runs = told.rows, told.runs
