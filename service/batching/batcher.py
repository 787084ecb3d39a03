"""The thin loop around `BatchQueue`: it waits, hands batches to the runner, and resolves replies.

All of it runs on the event loop's thread; only the model runs elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from service.batching.devices import Place
from service.batching.queue import NORMAL, BatchQueue, BatchRun, Entry, Lane, Limits, Spent, Taken, level_of
from service.batching.runner import Runner
from service.batching.share import Hold
from service.batching.slo import Begun, SloPolicy
from service.batching.statistics import Statistics
from service.errors import DeadlineExceeded, Internal, InvalidArgument, KilnError, Overloaded, Unavailable
from service.tensors import (
    Signature,
    Tensors,
    check_shape,
    concatenate,
    count_rows,
    size_bytes,
    split,
)

_log = logging.getLogger("kiln.batcher")
_INLINE_S = 300e-6
"""Batches expected to be shorter than this run on the event loop itself.

Handing one to a thread and back costs about as much, most of it waiting for the interpreter lock:
a 784-128-10 model answered 2.3 × the requests/s inline.
"""
_INLINE_MISJUDGED = 20
_INLINE_STRIKES = 3
"""So many batches on end that took `_INLINE_MISJUDGED` × `_INLINE_S` end it for their version."""
_QUIET_TURN_S = 10e-6
_QUIET_TURNS = 12
_LONGEST_SETTLE_S = 2e-3
"""The loop counts as idle after so many turns of less than that; it is not waited for any longer."""
_SETTLE_SHARE = 0.02
"""Nor for longer than this share of a run in a thread: turns take the core from runs that go on."""
_MAX_LANES = 1024
_RATE_MEMORY = 0.8
"""Weight of the past in the running estimate of rows per second."""


class Model(Protocol):
    """What runs the batches."""

    def bucket_rows(self, lane: Lane, rows: int) -> int:
        """How many rows the plan for this lane wants to be given, at least `rows`."""

    def expected_s(self, lane: Lane, rows: int) -> float:
        """Measured seconds of a batch of `rows` rows; infinite where it is not known."""

    def most_rows(self, signature: str) -> int:
        """How many rows a batch has at most: fusing more gives no more rows a second."""

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        """Run one batch, ``(rows, …)`` in and out; called from the runner's thread, or inline."""


class Result(NamedTuple):
    """What a run gave: outputs, when it started in seconds of the batcher's clock, and how long it took."""

    outputs: Tensors
    started: float
    seconds: float


@dataclass(eq=False, slots=True)
class Run:
    """One batch on its way through the model, of `rows` rows; the plan is given `given`, padding included.

    `began` is when it was taken, in seconds of the batcher's clock; `fuse_s` how long fusing its inputs took;
    `begun` is what the goal's policy knows it by, and `hold` its place on the device.
    """

    entries: list[Entry]
    rows: int
    began: float
    given: int = 0
    fuse_s: float = 0.0
    begun: Begun | None = None
    hold: Hold | None = None
    traced: BatchRun | None = None

    def tell(self, entry: Entry, result: Result, cut_s: float) -> None:
        """Fill in what `entry` spent."""
        spent = entry.spent
        if spent is not None:
            spent.queue_s = self.began - entry.enqueued
            spent.fuse_s = self.fuse_s + cut_s
            spent.compute_s = result.seconds
            spent.rows = self.rows
            if spent.span is not None:
                self._trace(spent, result, cut_s)

    def _trace(self, spent: Spent, result: Result, cut_s: float) -> None:
        """One `BatchRun` is shared by all traced requests of the batch."""
        run = self.traced
        if run is None:
            given = self.given or self.rows
            run = self.traced = BatchRun(
                self.began, result.started, self.fuse_s, result.seconds, cut_s, self.rows, given
            )
        run.spans.append(spent.span)
        spent.runs += (run,)


class Observer(Protocol):
    """Where the batcher reports; see `service.metrics.VersionMetrics`."""

    def waited(self, seconds: float) -> None: ...
    def executed(self, rows: int, given: int, seconds: float) -> None: ...
    def failed(self) -> None: ...
    def used(self, device_s: float) -> None: ...
    def dropped(self, reason: str, count: int) -> None: ...


class Batcher:
    """Fuses the requests of one model version into batches.

    A free runner takes what is there at once; batches grow because the runner is busy. It is free
    while fewer batches run than it can run at once. When it is busy, the next batch is assembled
    ahead only if it is full already, for then waiting could not make it larger.
    """

    def __init__(
        self,
        model: Model,
        limits: Limits,
        *,
        runner: Runner,
        observer: Observer,
        split_oversize: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = BatchQueue(limits)
        self.statistics = Statistics()
        self._model = model
        self._runner = runner
        self._observer = observer
        self._split_oversize = split_oversize
        self._clock = clock
        self._lanes: dict[tuple[str, tuple[tuple[int, ...], ...]], Lane] = {}
        self._retries: deque[list[Entry]] = deque()
        self._running: list[list[Entry]] = []
        self._rows_per_s = 0.0
        self.rows_served = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closed = False
        self._inline_strikes = 0
        self._place: Place | None = None
        self._asks = True
        """Whether its batches are to wait for the device; those that run on the event loop are not."""
        self._held_since: float | None = None
        self._pump_planned = False
        self._slo_s: float | None = None
        self._policy: SloPolicy | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Batcher {self.queue!r}, {len(self._running)} running, {len(self._retries)} to retry>"

    def submit(
        self,
        signature: Signature,
        inputs: Tensors,
        deadline: float | None,
        spent: Spent | None = None,
        priority: int = 0,
    ) -> Awaitable[Tensors]:
        """Queue one validated request; the answer has as many rows as `inputs`, and `spent` is filled in before it.

        `priority` 1 goes before what states none (0) or 2, and 3 and more after that, by a head start: none waits for
        ever.

        Raises:
            Unavailable: the version is stopping.
            InvalidArgument: more rows than a batch may have, where splitting is off, or more
                rows or bytes than the queue can ever hold.
            Overloaded: the queue is full, or too long for the goal.
        """
        if self._closed:
            raise Unavailable("the model is stopping")
        rows = count_rows(signature, inputs)
        lane = self._lane(signature, inputs)
        now = self._clock()
        loop = asyncio.get_running_loop()
        level = level_of(priority) if priority else NORMAL
        entries = [
            Entry(lane, part, part_rows, size_bytes(part), now, deadline, loop.create_future(), spent, level)
            for part, part_rows in self._cut(lane, inputs, rows)
        ]
        if not self.queue.has_room(entries):
            self._dispose(self.queue.sweep(now))
        try:
            self.queue.offer(entries, self._rows_per_s * self._runner.parallel)
        except Overloaded:
            self._observer.dropped("overloaded", 1)
            self.statistics.failed()
            raise
        self._idle.clear()
        if deadline is not None:
            self._set_timer(deadline)
        self._plan_pump(lane, rows)
        if len(entries) == 1:
            reply: Awaitable[Tensors] = entries[0].reply  # type: ignore[assignment]
            return reply
        return _join([entry.reply for entry in entries])  # type: ignore[misc]

    def refresh(self, parallel: int) -> None:
        """The model runs by other plans from now on, `parallel` batches at once."""
        self._runner.widen(parallel)
        if self._place is not None:
            self._place.widen(self._runner.parallel)
        self._lanes.clear()
        self.hold_to(self._slo_s)
        self._plan_pump()

    def share(self, join: Callable[[int, Callable[[], None]], Place]) -> None:
        """From now on batches take turns with those of other models; see `Devices.join` for the rest of its arguments.

        What must wait stays in the queue, where it grows, expires, and is refused as ever.
        """
        self._place = join(self._runner.parallel, self._pump)

    def hold_to(self, slo_s: float | None) -> None:
        """From now on batch to a goal of `slo_s` seconds for each request; None for no goal."""
        self._slo_s = slo_s
        self._policy = None
        if slo_s is not None:
            limit = self.queue.limits.max_batch_rows
            self._policy = SloPolicy(
                slo_s,
                self._model.expected_s,
                lambda signature: min(self._model.most_rows(signature), limit),
                parallel=self._runner.parallel,
            )
        self.queue.follow(self._policy)

    async def stop(self, drain_s: float) -> bool:
        """Refuse new requests, finish the taken ones within `drain_s`, fail what is left.

        Returns whether nothing was left.
        """
        self._closed = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_s)
        left = self.queue.clear() + [e for batch in (*self._retries, *self._running) for e in batch]
        self._retries.clear()
        if self._place is not None:
            self._place.leave()  # a run that hangs, too, holds up nobody from now on
            self._place = None
        if left:
            _log.warning("%d requests were not finished within %.1f s", len(left), drain_s)
            for entry in left:
                _fail(entry, Unavailable("the server stopped before this request was finished"))
        if self._timer is not None:
            self._timer.cancel()
        self._runner.close()
        return not left

    def _lane(self, signature: Signature, inputs: Tensors) -> Lane:
        """The lane of such inputs; made once, for making one costs as much as queueing an entry."""
        fuses = signature.batched
        shapes = tuple([inputs[spec.name].shape[fuses:] for spec in signature.inputs])
        lane = self._lanes.get((signature.name, shapes))
        if lane is None:
            conforms = all(spec.admits(inputs[spec.name].shape) for spec in signature.inputs)
            lane = Lane(signature, shapes, conforms, fuses)
            if len(self._lanes) >= _MAX_LANES:
                self._lanes.clear()  # callers choose the shapes
            self.queue.set_most_rows(signature.name, self._model.most_rows(signature.name))
            self._lanes[lane.key] = lane
        return lane

    def _cut(self, lane: Lane, inputs: Tensors, rows: int) -> list[tuple[Tensors, int]]:
        limits = self.queue.limits
        if rows <= limits.max_batch_rows or not lane.fuses:
            return [(inputs, rows)]
        if not self._split_oversize:
            raise InvalidArgument(f"at most {limits.max_batch_rows} rows per request are taken, got {rows}")
        full, rest = divmod(rows, limits.max_batch_rows)
        counts = [limits.max_batch_rows] * full + [rest] * bool(rest)
        return list(zip(split(inputs, counts), counts, strict=True))

    def _plan_pump(self, lane: Lane | None = None, rows: int = 1) -> None:
        """Pump once all that arrived together has been queued, so that it is fused; `rows` of `lane` came last."""
        if self._pump_planned or not self._has_place():
            return
        self._pump_planned = True
        now = self._clock()
        longest_s = _LONGEST_SETTLE_S
        if self._asks and lane is not None:
            longest_s = min(longest_s, _SETTLE_SHARE * self._model.expected_s(lane, rows))
        asyncio.get_running_loop().call_soon(self._settle, now + longest_s, now, 0)

    def _settle(self, until: float, last_turn: float, quiet_turns: int) -> None:
        """Pump once the loop has nothing else to do.

        A short batch runs on the loop, so the loop is its runner, and that is not free while
        requests are still being read: what they bring is fused. An idle turn takes a microsecond.
        """
        now = self._clock()
        quiet_turns = quiet_turns + 1 if now - last_turn < _QUIET_TURN_S else 0
        is_settled = quiet_turns >= _QUIET_TURNS or now >= until
        if is_settled or self._is_busy() or self.queue.has_full_batch():
            self._pump()
        else:
            asyncio.get_running_loop().call_soon(self._settle, until, now, quiet_turns)

    def _pump(self) -> None:
        """Hand the runner what is worth running now; look again later where it is not yet."""
        self._pump_planned = False
        while self._has_place():
            if not self._may_begin():
                return
            if self._retries:
                taken = self._recheck(self._retries.popleft())
            else:
                now = self._clock()
                taken = self.queue.take(now)
                for entry in taken.entries:
                    self._observer.waited(now - entry.enqueued)
            self._dispose(taken)
            if taken.entries:
                self._start(taken.entries)
                if not self._running:  # it ran inline: let its callers, and new ones, come first
                    self._plan_pump()
                    return
            elif not self._retries:
                self._rest()
                return

    def _is_busy(self) -> bool:
        return len(self._running) >= self._runner.parallel

    def _has_place(self) -> bool:
        """Whether a batch may be handed over: to run at once, or as the one that is assembled ahead."""
        place = self._place
        if place is not None and place.is_waiting:
            return False
        if not self._is_busy():
            return True
        if len(self._running) > self._runner.parallel or (place is not None and place.is_contended):
            return False
        return bool(self._retries) or self.queue.has_full_batch()

    def _may_begin(self) -> bool:
        """Whether the device is free for what waits here; if not `_pump` is called when it is."""
        if self._place is None or not self._asks or not (self._retries or self.queue.rows):
            return True
        if self._place.may_begin():
            return True
        if self._held_since is None:
            self._held_since = self._clock()
        return False

    def _recheck(self, entries: list[Entry]) -> Taken:
        """Entries to be run again, less those whose caller has gone or whose deadline passed."""
        now = self._clock()
        taken = Taken()
        for entry in entries:
            if entry.reply.done():
                taken.cancelled += 1
            elif entry.deadline is not None and now >= entry.deadline:
                taken.expired.append(entry)
            else:
                taken.entries.append(entry)
        return taken

    def _rest(self) -> None:
        """Nothing can be taken now: idle, or a batch is worth waiting for."""
        look = self.queue.next_look()
        if look is not None:
            self._set_timer(look)
        elif not self._running:
            self._idle.set()

    def _start(self, entries: list[Entry]) -> None:
        lane = entries[0].lane
        self._running.append(entries)
        rows = 0
        for entry in entries:
            rows += entry.rows
        run = Run(entries, rows, self._clock())
        held_s = 0.0 if self._held_since is None else run.began - self._held_since
        self._held_since = None
        if self._policy is not None:
            run.begun = self._policy.begun(lane, rows, run.began, held_s)
        start = time.perf_counter()
        try:
            batch = entries[0].payload
            if lane.fuses:
                run.given = self._model.bucket_rows(lane, rows)
                batch = concatenate([entry.payload for entry in entries], run.given)
            inline = self._may_inline(lane, run.given)
        except Exception as error:  # noqa: BLE001 - no memory for the batch, say: its callers must be told
            self._resolve(run, error)
            return
        run.fuse_s = time.perf_counter() - start
        job = partial(self._run, lane, batch)
        self._asks = not inline
        if inline:
            self._run_inline(job, run)
        else:
            if self._place is not None:
                run.hold = self._place.begin()
            self._runner.start(job, partial(self._finish, run))

    def _may_inline(self, lane: Lane, given: int) -> bool:
        if len(self._running) > 1 or self._inline_strikes >= _INLINE_STRIKES:
            return False
        return self._model.expected_s(lane, given) < _INLINE_S

    def _run_inline(self, job: Callable[[], Result], run: Run) -> None:
        result: Result | Exception
        try:
            result = job()
        except Exception as error:  # noqa: BLE001 - resolved like a runner's
            result = error
        else:
            misjudged = result.seconds > _INLINE_MISJUDGED * _INLINE_S
            self._inline_strikes = self._inline_strikes + 1 if misjudged else 0
        self._resolve(run, result)

    def _run(self, lane: Lane, batch: Tensors) -> Result:
        """On the runner's thread."""
        started = self._clock()
        start = time.perf_counter()
        outputs = self._model.run(lane, batch)
        return Result(outputs, started, time.perf_counter() - start)

    def _finish(self, run: Run, result: Result | Exception) -> None:
        """A run in the thread has ended."""
        self._resolve(run, result)
        self._pump()

    def _resolve(self, run: Run, result: Result | Exception) -> None:
        """Resolve every entry of a run."""
        entries = run.entries
        self._running.remove(entries)
        if run.begun is not None and self._policy is not None:
            self._policy.ended(run.begun, self._clock(), ran=not isinstance(result, Exception))
        if self._place is not None:
            self._account(self._place, run, result)
        if isinstance(result, Exception):
            self._bisect(run, result)
            return
        outputs, _, seconds = result
        self._observer.executed(run.rows, run.given or run.rows, seconds)
        self._learn(run.rows, seconds)
        self.rows_served += run.rows
        start = time.perf_counter()
        try:
            parts = _parts(entries, run.given, outputs)
        except Internal as error:
            self._bisect(run, error)
            return
        cut_s = time.perf_counter() - start
        waited_s = 0.0
        for entry, part in zip(entries, parts, strict=True):
            waited_s += run.began - entry.enqueued
            if not entry.reply.done():
                run.tell(entry, result, cut_s)
                entry.reply.set_result(part)
        self.statistics.executed(
            run.rows, len(entries), int(waited_s * 1e9), int(run.fuse_s * 1e9), int(seconds * 1e9), int(cut_s * 1e9)
        )

    def _account(self, place: Place, run: Run, result: Result | Exception) -> None:
        """Give the device back, and count what was had of it."""
        seconds = max(self._clock() - run.began, 0.0) if isinstance(result, Exception) else result.seconds
        self._observer.used(place.charge(seconds) if run.hold is None else place.end(run.hold, seconds))

    def _bisect(self, run: Run, error: Exception) -> None:
        """A batch that failed is run again in halves, so that only the rows at fault fail."""
        entries = run.entries
        self._observer.failed()
        if len(entries) == 1:
            started = run.began + run.fuse_s
            run.tell(entries[0], Result({}, started, max(self._clock() - started, 0.0)), 0.0)
            _fail(entries[0], _error_for(entries[0], error))
            self.statistics.failed(1, int((self._clock() - entries[0].enqueued) * 1e9))
            return
        middle = len(entries) // 2
        self._retries.append(entries[:middle])
        self._retries.append(entries[middle:])

    def _dispose(self, taken: Taken) -> None:
        if not (taken.cancelled or taken.expired or taken.late):
            return
        self._observer.dropped("cancelled", taken.cancelled)
        self._observer.dropped("expired", len(taken.expired))
        for entry in taken.expired:
            waited_ms = (self._clock() - entry.enqueued) * 1e3
            self.statistics.failed(1, int(waited_ms * 1e6))
            if entry.spent is not None:
                entry.spent.queue_s = waited_ms / 1e3
            _fail(entry, DeadlineExceeded(f"the deadline passed after {waited_ms:.0f} ms in the queue"))
        self._observer.dropped("late", len(taken.late))
        for entry in taken.late:
            waited_ms = (self._clock() - entry.enqueued) * 1e3
            self.statistics.failed(1, int(waited_ms * 1e6))
            text = f"after {waited_ms:.0f} ms in the queue this request could no longer be answered in time"
            _fail(entry, Overloaded(text, self._slo_s or 1.0))

    def _learn(self, rows: int, seconds: float) -> None:
        rate = rows / max(seconds, 1e-9)
        self._rows_per_s = _RATE_MEMORY * self._rows_per_s + (1 - _RATE_MEMORY) * rate if self._rows_per_s else rate

    def _set_timer(self, at: float) -> None:
        """Look again at `at`, or earlier if that was planned already."""
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        delay = max(at - self._clock(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        """A deadline or the end of a wait has come."""
        self._timer = None
        self._dispose(self.queue.sweep(self._clock()))
        self._pump()
        if (deadline := self.queue.earliest_deadline()) is not None:
            self._set_timer(deadline)


def _parts(entries: list[Entry], given: int, outputs: Tensors) -> list[Tensors]:
    """Each caller's rows; `Internal` if the model answered with another number of rows."""
    if not entries[0].lane.fuses:
        return [outputs]
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != given:
            got = array.shape[0] if array.ndim else "a scalar"
            raise Internal(f"output {name!r}: the model was given {given} rows and answered {got}")
    return split(outputs, [entry.rows for entry in entries])


async def _join(replies: list[asyncio.Future[Tensors]]) -> Tensors:
    """The answers of a split request as one; when one part fails, the others are given up."""
    try:
        return concatenate([await reply for reply in replies])
    finally:
        for reply in replies:
            if not reply.done():
                reply.cancel()
            elif not reply.cancelled():
                reply.exception()  # retrieved, so that asyncio does not warn


def _fail(entry: Entry, error: KilnError) -> None:
    if not entry.reply.done():
        entry.reply.set_exception(error.again())


def _error_for(entry: Entry, error: Exception) -> KilnError:
    """What the caller of an entry that failed alone is told."""
    if not entry.lane.conforms:
        try:
            for spec in entry.lane.signature.inputs:
                check_shape(spec, entry.payload[spec.name].shape)
        except InvalidArgument as mismatch:
            return mismatch  # the graph was let try and refused: the shape is the reason to give
    if isinstance(error, KilnError):
        return error
    caller = None if entry.spent is None else entry.spent.caller
    _log.error("the model failed", exc_info=error, extra={"caller": caller})
    return Internal(f"the model failed: {type(error).__name__}: {error}")
