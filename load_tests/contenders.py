"""Ways to batch, all on Kiln's own queue, for the simulator to compare.

Each follows what was published in its own words; what it decides it decides through the queue's limits and policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from service.batching.queue import BatchQueue, Entry, Lane, Limits
from service.batching.slo import Begun, SloPolicy

_MANY_BYTES = 1 << 60
_DEFAULT_QUEUE_ROWS = 4096


class Contender(Protocol):
    """A queue, and what it learns from the batches that are run."""

    queue: BatchQueue

    def begun(self, lane: Lane, rows: int, now: float) -> None:
        """A batch begins; one runs at a time."""

    def ended(self, rows: int, seconds: float, now: float) -> None:
        """It has ended, after so many seconds."""


class Fixed:
    """A largest batch, a time to wait for it and a bound of the queue: TensorFlow Serving's three knobs.

    Without a wait it is Kiln without a goal, and with batches of one row no batching at all.
    """

    def __init__(self, max_batch_rows: int, wait_s: float = 0.0, queue_rows: int = _DEFAULT_QUEUE_ROWS) -> None:
        self.queue = BatchQueue(Limits(max_batch_rows, queue_rows, _MANY_BYTES, wait_s))

    def begun(self, lane: Lane, rows: int, now: float) -> None: ...
    def ended(self, rows: int, seconds: float, now: float) -> None: ...


class Aimd(Fixed):
    """Clipper's: the largest batch grows by two rows after each that kept the goal, else shrinks by a tenth."""

    def __init__(self, max_batch_rows: int, slo_s: float, signature: str) -> None:
        super().__init__(max_batch_rows)
        self._slo_s, self._signature = slo_s, signature
        self._rows = 1.0
        self.queue.set_most_rows(signature, 1)

    def ended(self, rows: int, seconds: float, now: float) -> None:
        del rows, now
        self._rows = self._rows + 2 if seconds <= self._slo_s else max(self._rows * 0.9, 1.0)
        self._rows = min(self._rows, self.queue.limits.max_batch_rows)
        self.queue.set_most_rows(self._signature, int(self._rows))


class _Open:
    """A policy that lets everyone in and keeps them in order of arrival."""

    def admit(self, entries: Sequence[Entry]) -> None: ...
    def joined(self, entry: Entry) -> None: ...
    def left(self, entry: Entry) -> None: ...

    def rank(self, entry: Entry) -> float:
        return entry.enqueued


class Line(_Open):
    """BentoML's: batches take ``a·n + b`` seconds, learned by least squares, and that decides how long to wait.

    A batch of n waits on while n times what another request would add (the time since the last one came, and a) is
    less than what requests wait on the average; requests that would be answered after the goal are dropped.
    """

    _KEPT = 100
    _DECAY = 0.95

    def __init__(self, max_batch_rows: int, slo_s: float) -> None:
        self.queue = BatchQueue(Limits(max_batch_rows, _DEFAULT_QUEUE_ROWS, _MANY_BYTES), self)
        self._slo_s = slo_s
        self._runs: deque[tuple[int, float]] = deque(maxlen=self._KEPT)
        self._a, self._b, self._wait_s = 0.0, 0.0, 0.01
        self._ends = 0.0

    def begins(self, lane: Sequence[Entry]) -> float:
        count = len(lane)
        if count >= self.queue.limits.max_batch_rows:
            return lane[0].enqueued
        return lane[-1].enqueued + max(self._wait_s * self._DECAY / count - self._a, 0.0)

    def choose(self, lane: Sequence[Entry], now: float) -> tuple[int, int]:
        most = self.queue.limits.max_batch_rows
        needed_s = self._a * min(len(lane), most) + self._b
        late = 0
        while late < len(lane) - 1 and now - lane[late].enqueued + needed_s > self._slo_s:
            late += 1
        waited_s = now - lane[late].enqueued
        self._wait_s = 0.95 * self._wait_s + 0.05 * (waited_s + needed_s)
        return late, most

    def begun(self, lane: Lane, rows: int, now: float) -> None: ...

    def ended(self, rows: int, seconds: float, now: float) -> None:
        del now
        self._runs.append((rows, seconds))
        counts, times = np.array(self._runs).T
        if len(set(counts)) > 1:
            self._a, self._b = (max(float(x), 0.0) for x in np.polyfit(counts, times, 1))
        else:
            self._a, self._b = 0.0, float(times.mean())


class Goal:
    """Kiln with `slo_ms`."""

    def __init__(self, policy: SloPolicy, max_batch_rows: int) -> None:
        self.queue = BatchQueue(Limits(max_batch_rows, _DEFAULT_QUEUE_ROWS, _MANY_BYTES), policy)
        self._policy = policy
        self._run: Begun | None = None

    def begun(self, lane: Lane, rows: int, now: float) -> None:
        self._run = self._policy.begun(lane, rows, now)

    def ended(self, rows: int, seconds: float, now: float) -> None:
        del rows, seconds
        assert self._run is not None
        self._policy.ended(self._run, now)


class Deferred(SloPolicy):
    """Kiln's, but a batch that is not full begins at the latest moment for its first entry: Symphony's idea."""

    def begins(self, lane: Sequence[Entry]) -> float:
        load = self._load(lane[0].lane)
        waiting = sum(load.waiting)
        if waiting >= load.best_rows:
            return lane[0].enqueued
        return max(self._due(lane[0]) - load.curve.late_s(waiting), lane[0].enqueued)
