"""The decisions of the batcher as a plain object: no clock, no lock, no event loop.

Requests wait in lanes. All entries of a lane have the same signature and trailing shapes, so any
of them can be concatenated; one queue holds all lanes of a model version, so its bounds cover
them together.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from service.errors import InvalidArgument, Overloaded
from service.tensors import Signature, Tensors

LONGEST_RETRY_S = 60.0
"""The latest time that a caller is told to come back after."""
NORMAL = 1
"""The level of a request that states no priority."""
HEAD_START_S = 1.0
"""By so much a request goes before those of the next lower level that came earlier: none waits for ever."""


class Reply(Protocol):
    """The slot that an entry's answer goes into (an `asyncio.Future`, or a fake)."""

    def done(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


@dataclass(frozen=True)
class Lane:
    """What must agree between entries that share a batch.

    `shapes` are the inputs' shapes without their rows; `conforms` tells whether they are what
    the signature asks for (only the signature plan may run others); without `fuses` each entry
    runs alone.
    """

    signature: Signature
    shapes: tuple[tuple[int, ...], ...]
    conforms: bool
    fuses: bool

    @cached_property
    def key(self) -> tuple[str, tuple[tuple[int, ...], ...]]:
        """Identity within one version: cheap to hash, unlike the lane itself."""
        return (self.signature.name, self.shapes)


@dataclass(eq=False, slots=True)
class BatchRun:
    """One run of a batch with traced requests in it, whose `spans` are told in order.

    `taken` from the queue and `started` in the plan are in seconds of the batcher's clock; `rows` are those
    of callers, of `given` that the plan got.
    """

    taken: float
    started: float
    fuse_s: float
    compute_s: float
    cut_s: float
    rows: int
    given: int
    spans: list[object] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Spent:
    """Where the time of an answered request went, in seconds; `rows` is what its batch had.

    `fuse_s` is fusing the batch and cutting it again. Of a request that was split, its last part counts.
    `caller` says whose it is, for the log; of a request that is traced, `span` is its span, and `runs` are
    the batches that it was in. Neither means anything to the batcher.
    """

    queue_s: float = 0.0
    fuse_s: float = 0.0
    compute_s: float = 0.0
    rows: int = 0
    caller: object = None
    span: object = None
    runs: tuple[BatchRun, ...] = ()


@dataclass(eq=False, slots=True)
class Entry:
    """One request in the queue: `enqueued` and `deadline` are seconds of the caller's clock.

    `level` is 0 for what goes first, then 1, then 2; `rank` is the place that the queue gave it, the least first.
    """

    lane: Lane
    payload: Tensors
    rows: int
    size_bytes: int
    enqueued: float
    deadline: float | None
    reply: Reply
    spent: Spent | None = None
    level: int = NORMAL
    rank: float = 0.0


@dataclass(frozen=True)
class Limits:
    """Bounds of one version's queue and batches."""

    max_batch_rows: int
    max_queue_rows: int
    max_queue_bytes: int
    batch_wait_s: float = 0.0


@dataclass
class Taken:
    """What one look at the queue yields.

    `entries` are to be run together; `expired` are to be failed; `late` would be answered too late to be of use,
    and are to be refused; `cancelled` counts those whose caller had gone.
    """

    entries: list[Entry] = field(default_factory=list)
    expired: list[Entry] = field(default_factory=list)
    cancelled: int = 0
    late: list[Entry] = field(default_factory=list)


class Policy(Protocol):
    """What decides beyond the queue's own rules who is let in, who goes first, and how much runs together."""

    def admit(self, entries: Sequence[Entry]) -> None:
        """Let a request of these `entries` in, or raise `Overloaded`; may change their level."""

    def joined(self, entry: Entry) -> None:
        """An entry is in the queue from now on."""

    def rank(self, entry: Entry) -> float:
        """Its place: the least goes first."""

    def left(self, entry: Entry) -> None:
        """An entry is in the queue no more, for whatever reason."""

    def begins(self, lane: Sequence[Entry]) -> float:
        """From when on a batch of `lane`, which is in order, may begin."""

    def choose(self, lane: Sequence[Entry], now: float) -> tuple[int, int]:
        """How many entries at the front of `lane` are too late, and the most rows of a batch of the others."""


class BatchQueue:
    """Bounded queue of one model version."""

    def __init__(self, limits: Limits, policy: Policy | None = None) -> None:
        self.limits = limits
        self.policy = policy
        self.rows = 0
        self.size_bytes = 0
        self._lanes: dict[tuple[str, tuple[tuple[int, ...], ...]], deque[Entry]] = {}
        self._most_rows: dict[str, int] = {}
        self._least_full = limits.max_batch_rows
        """Fewer rows than that are no full batch of any signature."""

    def __repr__(self) -> str:
        return f"<BatchQueue {len(self)} entries, {self.rows} rows in {len(self._lanes)} lanes>"

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def has_room(self, entries: Sequence[Entry]) -> bool:
        """Whether `offer` would take `entries`; where not, a `sweep` may make room."""
        return not self._over_limit(*_sizes(entries))

    def offer(self, entries: Sequence[Entry], rows_per_s: float = 0.0) -> None:
        """Queue all of `entries`, or none; never waits.

        `rows_per_s` is the measured rate behind an honest ``Retry-After``.

        Raises:
            Overloaded: there is no room for them, or the policy does not let them in.
            InvalidArgument: there never can be.
        """
        rows, size = _sizes(entries)
        if self._over_limit(rows, size):
            limit = f"{self.limits.max_queue_rows} rows ({self.limits.max_queue_bytes} bytes)"
            if rows > self.limits.max_queue_rows or size > self.limits.max_queue_bytes:
                raise InvalidArgument(f"{rows} rows ({size} bytes) in one request, but the queue holds {limit}")
            raise Overloaded(
                "The batch scheduling queue to which this task was submitted is full: "
                f"{self.rows} rows ({self.size_bytes} bytes) wait, {rows} rows ({size} bytes) came, "
                f"the limit is {limit}",
                min(self.rows / rows_per_s, LONGEST_RETRY_S) if rows_per_s else 1.0,
            )
        if self.policy is not None:
            self.policy.admit(entries)
        for entry in entries:
            entry.rank = (
                entry.enqueued + (entry.level - NORMAL) * HEAD_START_S
                if self.policy is None
                else self.policy.rank(entry)
            )
            lane = self._lanes.get(entry.lane.key)
            if lane is None:
                lane = self._lanes[entry.lane.key] = deque()
            if lane and entry.rank < lane[-1].rank:
                lane.insert(bisect_right(lane, entry.rank, key=_rank), entry)
            else:
                lane.append(entry)
            if self.policy is not None:
                self.policy.joined(entry)
        self.rows += rows
        self.size_bytes += size

    def take(self, now: float) -> Taken:
        """Remove the next batch: of the lanes that are due, the one whose first entry ranks first, in order.

        Entries whose caller has gone are skipped, and those past their deadline are set apart, as are those that
        the policy finds too late, all before the run. Nothing is taken while `next_look` lies ahead.
        """
        taken = Taken()
        while not taken.entries:
            due = [key for key, lane in self._lanes.items() if self._is_due(lane, now)]
            if not due:
                break
            key = due[0] if len(due) == 1 else min(due, key=lambda k: self._lanes[k][0].rank)
            lane = self._lanes[key]
            self._take_from(lane, now, taken)
            if not lane:
                del self._lanes[key]
        return taken

    def next_look(self) -> float | None:
        """When `take` is next worth a call, on the caller's clock; None while empty."""
        if not self._lanes:
            return None
        return min(map(self._begins, self._lanes.values()))

    def follow(self, policy: Policy | None) -> None:
        """Go by another policy from now on; what waits already was let in."""
        self.policy = policy
        if policy is not None:
            for lane in self._lanes.values():
                for entry in lane:
                    policy.joined(entry)

    def set_most_rows(self, signature: str, rows: int) -> None:
        """Let batches of a signature have at most `rows` rows; a request that has more runs alone."""
        self._most_rows[signature] = min(rows, self.limits.max_batch_rows)
        self._least_full = min(self._most_rows.values())

    def has_full_batch(self) -> bool:
        """Whether the next batch could not grow by waiting, so that it may be assembled ahead."""
        if self.rows < self._least_full or not self._lanes:
            return False
        oldest = min(self._lanes.values(), key=lambda lane: lane[0].rank)
        return self._is_full(oldest)

    def earliest_deadline(self) -> float | None:
        """The first deadline among all entries; a scan, made only when a timer is to be set."""
        deadlines = (e.deadline for lane in self._lanes.values() for e in lane if e.deadline is not None)
        return min(deadlines, default=None)

    def sweep(self, now: float) -> Taken:
        """Remove all entries that are cancelled or past their deadline."""
        swept = Taken()
        for key, lane in list(self._lanes.items()):
            kept = deque(entry for entry in lane if not self._drop(entry, now, swept))
            if kept:
                self._lanes[key] = kept
            else:
                del self._lanes[key]
        return swept

    def clear(self) -> list[Entry]:
        """Remove everything."""
        entries = [entry for lane in self._lanes.values() for entry in lane]
        self._lanes.clear()
        for entry in entries:
            self._forget(entry)
        return entries

    def _over_limit(self, rows: int, size: int) -> bool:
        limits = self.limits
        return self.rows + rows > limits.max_queue_rows or self.size_bytes + size > limits.max_queue_bytes

    def _is_full(self, lane: deque[Entry]) -> bool:
        if not lane[0].lane.fuses:
            return True
        most = self._most(lane[0])
        rows = 0
        for entry in lane:
            rows += entry.rows
            if rows >= most:
                return True
        return False

    def _most(self, entry: Entry) -> int:
        return self._most_rows.get(entry.lane.signature.name, self.limits.max_batch_rows)

    def _begins(self, lane: deque[Entry]) -> float:
        """From when on a batch of `lane` may be taken."""
        if self.policy is not None:
            return self.policy.begins(lane)
        return lane[0].enqueued + (0.0 if self._is_full(lane) else self.limits.batch_wait_s)

    def _is_due(self, lane: deque[Entry], now: float) -> bool:
        if self.policy is None and not self.limits.batch_wait_s:
            return True
        return now >= self._begins(lane)

    def _take_from(self, lane: deque[Entry], now: float, taken: Taken) -> None:
        most = self._most(lane[0])
        if self.policy is not None:
            most = min(most, self._choose(lane, now, taken))
        rows = 0
        while lane:
            entry = lane[0]
            if self._drop(entry, now, taken):
                lane.popleft()
                continue
            if taken.entries and (not entry.lane.fuses or rows + entry.rows > most):
                return
            lane.popleft()
            self._forget(entry)
            taken.entries.append(entry)
            rows += entry.rows

    def _choose(self, lane: deque[Entry], now: float, taken: Taken) -> int:
        """Set apart what the policy finds too late; the most rows that it wants in the batch."""
        assert self.policy is not None
        late, most = self.policy.choose(lane, now)
        for _ in range(late):
            entry = lane.popleft()
            if not self._drop(entry, now, taken):
                self._forget(entry)
                taken.late.append(entry)
        return most

    def _drop(self, entry: Entry, now: float, taken: Taken) -> bool:
        """Account for an entry that must not run; the caller removes it from its lane."""
        if entry.reply.done():
            taken.cancelled += 1
        elif entry.deadline is not None and now >= entry.deadline:
            taken.expired.append(entry)
        else:
            return False
        self._forget(entry)
        return True

    def _forget(self, entry: Entry) -> None:
        self.rows -= entry.rows
        self.size_bytes -= entry.size_bytes
        if self.policy is not None:
            self.policy.left(entry)


def level_of(priority: int) -> int:
    """The level of a ``priority`` as Triton has it: 1 goes first, 0 states none and is 2, 3 and more go last."""
    return min(priority, 3) - 1 if priority else NORMAL


def _rank(entry: Entry) -> float:
    return entry.rank


def _sizes(entries: Sequence[Entry]) -> tuple[int, int]:
    """Rows and bytes of a request, which has one entry but where it was split."""
    if len(entries) == 1:
        return entries[0].rows, entries[0].size_bytes
    return sum(entry.rows for entry in entries), sum(entry.size_bytes for entry in entries)
