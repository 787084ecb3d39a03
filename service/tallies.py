"""Counters, sums and histograms that one thread fills: the event loop's.

prometheus_client's take a lock for each observation and walk its buckets in Python; counting took a
tenth of the CPU time of a small request. These are plain adds, read when the page is made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

TakenTally = tuple[list[int], float, dict[int, tuple[str, float, float]]]
"""Counts by bucket, the sum of the values, and exemplars by bucket."""
Taken = dict[tuple[str, ...], Any]
"""What was counted in each series of a family, by its labels."""


class _Series(Protocol):
    def take(self) -> Any: ...
    def add(self, taken: Any, /) -> None: ...


_S = TypeVar("_S", bound=_Series)


class _Family(Collector, Generic[_S]):
    """All series of one name, by the values of their labels; `begin` makes a series that is empty."""

    def __init__(self, name: str, text: str, labels: Sequence[str], begin: Callable[[], _S]) -> None:
        self._form = (name, text)
        self._labelnames = tuple(labels)
        self._begin = begin
        self._series: dict[tuple[str, ...], _S] = {}

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def labels(self, *values: str) -> _S:
        """The series of these labels, begun empty."""
        return self._series.setdefault(values, self._begin())

    def forget(self, *first: str) -> None:
        """Drop every series whose labels begin with these values."""
        for values in [values for values in self._series if values[: len(first)] == first]:
            del self._series[values]

    def take(self) -> Taken:
        """What was counted since it was last taken, to be added elsewhere."""
        taken = {values: each.take() for values, each in self._series.items()}
        return {values: each for values, each in taken.items() if _is_some(each)}

    def add(self, taken: Taken) -> None:
        """Count what another process has."""
        for values, each in taken.items():
            self.labels(*values).add(each)


class Count:
    """One series of a `Counts`."""

    __slots__ = ("_taken", "value")

    def __init__(self) -> None:
        self.value: float = 0
        self._taken: float = 0

    def take(self) -> float:
        """What was counted since it was last taken; another thread may be counting meanwhile."""
        value, before = self.value, self._taken
        self._taken = value
        return value - before

    def add(self, value: float) -> None:
        """Count what another process has."""
        self.value += value


class Counts(_Family[Count]):
    """A counter with labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        super().__init__(name, text, labels, Count)

    def collect(self) -> Iterable[Metric]:
        name, text = self._form
        family = CounterMetricFamily(name, text, labels=self._labelnames)
        for values, count in list(self._series.items()):
            family.add_metric(values, count.value)
        return (family,)


class Sum:
    """One series of a `Sums`."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0

    def take(self) -> tuple[int, float]:
        """What was counted since it was last taken."""
        taken = self.count, self.total
        self.count, self.total = 0, 0.0
        return taken

    def add(self, taken: tuple[int, float]) -> None:
        """Count what another process has."""
        self.count += taken[0]
        self.total += taken[1]


class Sums(_Family[Sum]):
    """A summary with labels: how many values there were, and their sum."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        super().__init__(name, text, labels, Sum)

    def collect(self) -> Iterable[Metric]:
        name, text = self._form
        family = SummaryMetricFamily(name, text, labels=self._labelnames)
        for values, each in list(self._series.items()):
            family.add_metric(values, each.count, each.total)
        return (family,)


class Tally:
    """One series of a `Tallies`."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, tuple[str, float, float]] = {}
        """The latest traced value of each bucket, by its place: trace id, value, seconds since the epoch."""

    def observe(self, value: float) -> None:
        """Count `value` in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_traced(self, value: float, trace_id: str, at_s: float) -> None:
        """As `observe`; the trace becomes its bucket's example. `at_s` is seconds since the epoch."""
        place = bisect_left(self.bounds, value)
        self.counts[place] += 1
        self.total += value
        self.exemplars[place] = (trace_id, value, at_s)

    def take(self) -> TakenTally:
        """What was counted since it was last taken."""
        taken = self.counts, self.total, self.exemplars
        self.counts, self.total, self.exemplars = [0] * len(self.counts), 0.0, {}
        return taken

    def add(self, taken: TakenTally) -> None:
        """Count what another process has."""
        counts, total, exemplars = taken
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, counts, strict=True)]
        self.total += total
        self.exemplars |= exemplars

    def exemplar(self, place: int) -> Exemplar | None:
        """What the bucket at `place` has to show."""
        found = self.exemplars.get(place)
        return None if found is None else Exemplar({"trace_id": found[0]}, found[1], found[2])


class Tallies(_Family[Tally]):
    """A histogram with labels; `bounds` are the upper ones of its buckets, in order, without infinity."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        super().__init__(name, text, labels, partial(Tally, tuple(bounds)))
        self._names = [*map(floatToGoString, bounds), "+Inf"]

    def collect(self) -> Iterable[Metric]:
        name, text = self._form
        family = HistogramMetricFamily(name, text, labels=self._labelnames)
        for values, tally in list(self._series.items()):
            cumulative = zip(self._names, accumulate(tally.counts), strict=True)
            buckets = [(le, count, tally.exemplar(place)) for place, (le, count) in enumerate(cumulative)]
            family.add_metric(values, buckets=buckets, sum_value=tally.total)  # type: ignore[arg-type]  # None is taken
        return (family,)


def _is_some(taken: Any) -> bool:
    """Whether anything was counted."""
    first = taken[0] if isinstance(taken, tuple) else taken
    return any(first) if isinstance(first, list) else bool(first)
