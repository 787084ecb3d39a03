"""Batching to a latency goal: the queue's policy where a model states `slo_ms`.

It never waits for a fuller batch, as the queue without it: batches grow because the runner is busy, which at
saturation gives those of the best size. What it adds is what keeps the goal when more comes than can be run:

- a request that by the curve cannot be answered in time is refused at once, so that those let in are in time
  (early refusal, as in Clockwork and Nexus);
- batches are no larger than lets a request wait for one and run in the next within the goal (Nexus: two batches
  fit into it), and no longer than lets the first of them be in time, by the spread of run times and not their mean
  alone (Orloj);
- of what waits, entries too late to be in time are refused first, rather than make the batch small for the rest
  (Nexus); but where all are late and no flood comes, they are run, for a late answer is worth more than none;
- what has the earlier deadline goes first, and what has a higher level before that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from service.batching.curve import Curve
from service.batching.queue import LONGEST_RETRY_S, NORMAL, Entry, Lane
from service.errors import Overloaded

_HEADROOM = 0.1
"""Share of the goal for what is not the batcher's: reading the request, writing the answer."""
_AS_GOOD = 0.99
"""Sizes that answer this share of the most are as good as the best, and the one that is easier on latency is taken."""
_EFFICIENT = 0.8
"""A batch that gives this share of the most rows a second is large enough not to be spared."""
_HEAD_START = 0.25
"""Share of the goal by which a request goes before those of the next lower level."""
_LEVELS = 3
_REFUSED_BEFORE_PROMOTED = 8
_PROBE_S = 1.0
"""After refusing for so long on an idle runner one request is let in: only a run corrects an estimate."""
_MOST_LANES = 1024
_HELD_MEMORY = 0.8
"""Weight of the past in what a batch waits for the device."""
_RELEARN = 16
"""Runs of a lane after which its batch sizes are chosen again."""
_EARLY = (4, 8)
"""At its first runs they are chosen sooner: a flood may come with the first request."""


@dataclass
class _Load:
    """What is known of one lane: its curve, the sizes of its batches, and its rows that wait, by level.

    It `is_flooded` where more rows come than can be run, counted over the last few runs.
    """

    curve: Curve
    most_rows: int
    best_rows: int = 1
    least_rows: int = 1
    is_flooded: bool = False
    runs: int = 0
    came: int = 0
    counted_since: float = 0.0
    waiting: list[int] = field(default_factory=lambda: [0] * _LEVELS)

    def choose_sizes(self, budget_s: float, rows_per_s: float, held_s: float = 0.0) -> None:
        """Set `best_rows`, which answers the most of `rows_per_s` within `budget_s`, and `least_rows`, nearly as good.

        Of what comes while a batch of t seconds runs, as much is in time as comes in its last ``budget - t`` seconds,
        for it needs that batch's end and another batch: all where two batches fit. While `rows_per_s` is 0 for not
        being known, they have to. Before each of them `held_s` seconds pass for which others have the device.
        """
        sizes = [1 << power for power in range(self.most_rows.bit_length())]
        if sizes[-1] != self.most_rows:
            sizes.append(self.most_rows)
        speeds, answered = {}, {}
        for rows in sizes:
            late_s = max(self.curve.late_s(rows) + held_s, 1e-9)
            speeds[rows] = rows / max(self.curve.expected_s(rows) + held_s, 1e-9)
            answered[rows] = min(speeds[rows], rows_per_s * min(max(budget_s / late_s - 1, 0.0), 1.0))
        near = [rows for rows in sizes if answered[rows] >= _AS_GOOD * max(answered.values())]
        calm = [rows for rows in near if 2 * (self.curve.late_s(rows) + held_s) <= budget_s]
        self.best_rows = max(calm, key=lambda rows: (speeds[rows], rows)) if calm else near[0]
        self.least_rows = next(rows for rows in sizes if speeds[rows] >= _EFFICIENT * speeds[self.best_rows])
        self.is_flooded = rows_per_s > speeds[self.best_rows]

    def came_per_s(self, now: float) -> float:
        """Rows a second that have come since this was asked last."""
        rate = self.came / max(now - self.counted_since, 1e-9)
        self.came, self.counted_since = 0, now
        return rate

    def waiting_s(self, levels: slice) -> float:
        """Seconds of what waits of these levels."""
        full, rest = divmod(sum(self.waiting[levels]), self.best_rows)
        return full * self.curve.expected_s(self.best_rows) + (self.curve.expected_s(rest) if rest else 0.0)


@dataclass(eq=False)
class Begun:
    """A batch that was handed to the runner: when it began or should begin, and when it should end."""

    lane: Lane
    rows: int
    starts: float
    ends: float


class SloPolicy:
    """Holds the requests of one version to `slo_s` seconds; all times are of the caller's clock.

    `measured` and `most_rows` are the plan's: see `service.batching.batcher.Model`. `parallel` batches run at once.
    """

    def __init__(
        self,
        slo_s: float,
        measured: Callable[[Lane, int], float],
        most_rows: Callable[[str], int],
        *,
        parallel: int = 1,
    ) -> None:
        self.slo_s = slo_s
        self._measured = measured
        self._most_rows = most_rows
        self._parallel = parallel
        self._budget_s = slo_s * (1 - _HEADROOM)
        self._loads: dict[tuple[str, tuple[tuple[int, ...], ...]], _Load] = {}
        self._waited_for: dict[tuple[str, tuple[tuple[int, ...], ...]], _Load] = {}
        """The lanes in which something waits."""
        self._rows = [0] * _LEVELS
        self._running: list[Begun] = []
        self._held_s = 0.0
        """What a batch waits for other models to leave the device, of late."""
        self._refused = [0] * _LEVELS
        self._refusing_since: float | None = None

    # The queue's policy

    def admit(self, entries: Sequence[Entry]) -> None:
        """Refuse a request that by the curve would be answered after its goal, or its own deadline.

        With nothing ahead of it, it is let in whatever the goal says: no wait would make it faster. Each eighth
        that is refused of a lower level is tried again on the terms of the highest, so that none starves.

        Raises:
            Overloaded: says when it is worth another try.
        """
        first = entries[0]
        now = first.enqueued
        self._load(first.lane).came += sum(entry.rows for entry in entries)
        excess_s = self._excess_s(entries, now)
        if excess_s > 0 and first.level and sum(self._rows[: first.level]):
            self._refused[first.level] += 1
            if self._refused[first.level] >= _REFUSED_BEFORE_PROMOTED:
                self._refused[first.level] = 0
                for entry in entries:
                    entry.level = 0
                excess_s = self._excess_s(entries, now)
        if excess_s > 0:
            raise Overloaded(
                f"the queue is too long for this request to be answered within {self._limit_ms(first):.0f} ms: by the "
                f"time that batches take it would be {excess_s * 1e3:.0f} ms late",
                min(excess_s, LONGEST_RETRY_S),
            )

    def rank(self, entry: Entry) -> float:
        """Deadlines in order, each level by its head start before the next."""
        return self._due(entry) + (entry.level - NORMAL) * _HEAD_START * self.slo_s

    def joined(self, entry: Entry) -> None:
        self._rows[entry.level] += entry.rows
        load = self._waited_for[entry.lane.key] = self._load(entry.lane)
        load.waiting[entry.level] += entry.rows

    def left(self, entry: Entry) -> None:
        self._rows[entry.level] -= entry.rows
        load = self._load(entry.lane)
        load.waiting[entry.level] -= entry.rows
        if not any(load.waiting):
            self._waited_for.pop(entry.lane.key, None)

    def begins(self, lane: Sequence[Entry]) -> float:
        """At once: a free runner does not wait."""
        return lane[0].enqueued

    def choose(self, lane: Sequence[Entry], now: float) -> tuple[int, int]:
        """Entries too late for a batch of efficient size, and most rows so that the first of the others is in time.

        Where all are late none is dropped, unless more comes than can be run, so that the next will be in time.
        """
        load = self._load(lane[0].lane)
        start = self._free_at(now)
        least = min(load.least_rows, sum(load.waiting))
        end = start + load.curve.expected_s(least)
        late = next((place for place, entry in enumerate(lane) if self._due(entry) >= end), None)
        if late is None:
            return (len(lane) if load.is_flooded else 0), load.best_rows
        due = self._due(lane[late])
        rows = load.best_rows
        while rows > least and start + load.curve.late_s(rows) > due:
            rows //= 2
        return late, max(rows, least)

    # What the loop around the queue tells it

    def begun(self, lane: Lane, rows: int, now: float, held_s: float = 0.0) -> Begun:
        """A batch has been handed to the runner; to be given back to `ended`.

        It could have been `held_s` seconds earlier, had other models not been on the device.
        """
        self._held_s = _HELD_MEMORY * self._held_s + (1 - _HELD_MEMORY) * held_s if self._held_s or held_s else 0.0
        starts = self._free_at(now)
        run = Begun(lane, rows, starts, starts + self._load(lane).curve.expected_s(rows))
        self._running.append(run)
        return run

    def ended(self, run: Begun, now: float, *, ran: bool = True) -> None:
        """That batch has ended at `now`; it teaches nothing unless it `ran` to its end.

        One that began under another goal is not known here.
        """
        if run not in self._running:
            return
        place = self._running.index(run)
        del self._running[place]
        if place < self._parallel <= len(self._running):  # the one that waited for the runner begins now
            next_run = self._running[self._parallel - 1]
            next_run.starts, next_run.ends = now, now + next_run.ends - next_run.starts
        self._refusing_since = None
        if ran:
            load = self._load(run.lane)
            load.curve.learn(run.rows, max(now - run.starts, 0.0))
            load.runs += 1
            if load.runs % _RELEARN == 0 or load.runs in _EARLY:
                load.choose_sizes(self._budget_s, load.came_per_s(now), self._held_s)

    # What follows from all that

    def _due(self, entry: Entry) -> float:
        """By when the answer has to leave the batcher."""
        due = entry.enqueued + self._budget_s
        return due if entry.deadline is None else min(due, entry.deadline)

    def _free_at(self, now: float) -> float:
        """When a batch handed over next would begin."""
        waiting = len(self._running) - self._parallel
        if waiting < 0:
            return now
        # a run that is overdue is expected to take as long again as it is late already
        return sorted(run.ends if run.ends > now else 2 * now - run.ends for run in self._running)[waiting]

    def _excess_s(self, entries: Sequence[Entry], now: float) -> float:
        """By how much the last of `entries` would be answered too late; 0 for what is to be let in."""
        first = entries[0]
        rows = sum(entry.rows for entry in entries)
        free_s = self._free_at(now) - now
        if not free_s and not any(self._rows):
            return self._excess_alone_s(first, rows, now)
        load = self._load(first.lane)
        levels = slice(first.level + 1)
        own = sum(load.waiting[levels])
        others_s = sum(other.waiting_s(levels) for other in self._waited_for.values() if other is not load)
        full, rest = divmod(max(own + rows, 1) - 1, load.best_rows)
        run_s = load.curve.expected_s(load.best_rows)
        spread_s = (load.curve.late_s(load.best_rows) - run_s) * math.sqrt(full)
        batch_s = run_s + self._held_s
        before_s = free_s + self._held_s + (others_s + full * batch_s + spread_s) / self._parallel
        due = self._due(first)
        if load.is_flooded:  # a queue longer than the next batch answers no more, and suffers more from a stall
            due = min(
                due, now + 2 * (load.curve.late_s(load.best_rows) + self._held_s) + rows // load.best_rows * batch_s
            )
        return max(now + before_s + load.curve.late_s(rest + 1) - due, 0.0)

    def _excess_alone_s(self, entry: Entry, rows: int, now: float) -> float:
        """With nothing ahead only a deadline of its own counts, and not for ever where nothing runs."""
        if entry.deadline is None:
            return 0.0
        excess_s = now + self._load(entry.lane).curve.expected_s(rows) - entry.deadline
        if excess_s <= 0:
            return 0.0
        if self._refusing_since is None:
            self._refusing_since = now
        return excess_s if now - self._refusing_since < _PROBE_S else 0.0

    def _load(self, lane: Lane) -> _Load:
        load = self._loads.get(lane.key)
        if load is None:
            if len(self._loads) >= _MOST_LANES:  # callers choose the shapes
                self._loads = dict(self._waited_for)
            most = self._most_rows(lane.signature.name) if lane.fuses else 1
            load = self._loads[lane.key] = _Load(Curve(partial(self._measured, lane)), most)
            load.choose_sizes(self._budget_s, 0.0, self._held_s)
        return load

    def _limit_ms(self, entry: Entry) -> float:
        own_s = self.slo_s if entry.deadline is None else min(self.slo_s, entry.deadline - entry.enqueued)
        return own_s * 1e3
