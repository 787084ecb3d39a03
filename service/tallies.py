"""Counters, sums and histograms that one thread fills: the event loop's.

prometheus_client's take a lock for each observation and walk its buckets in Python; counting took a
tenth of the CPU time of a small request. These are plain adds, read when the page is made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_T = TypeVar("_T")


class Count:
    """One series of a `Counts`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0


class Counts(Collector):
    """A counter with labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._form = (name, text)
        self._labelnames = tuple(labels)
        self._series: dict[tuple[str, ...], Count] = {}

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def labels(self, *values: str) -> Count:
        """The series of these labels, begun at 0."""
        return self._series.setdefault(values, Count())

    def forget(self, *first: str) -> None:
        """Drop every series whose labels begin with these values."""
        _forget(self._series, first)

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


class Sums(Collector):
    """A summary with labels: how many values there were, and their sum."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._form = (name, text)
        self._labelnames = tuple(labels)
        self._series: dict[tuple[str, ...], Sum] = {}

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def labels(self, *values: str) -> Sum:
        """The series of these labels, begun empty."""
        return self._series.setdefault(values, Sum())

    def forget(self, *first: str) -> None:
        """Drop every series whose labels begin with these values."""
        _forget(self._series, first)

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

    def exemplar(self, place: int) -> Exemplar | None:
        """What the bucket at `place` has to show."""
        found = self.exemplars.get(place)
        return None if found is None else Exemplar({"trace_id": found[0]}, found[1], found[2])


class Tallies(Collector):
    """A histogram with labels; `bounds` are the upper ones of its buckets, in order, without infinity."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._form = (name, text)
        self._labelnames = tuple(labels)
        self._bounds = tuple(bounds)
        self._names = [*map(floatToGoString, bounds), "+Inf"]
        self._series: dict[tuple[str, ...], Tally] = {}

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def labels(self, *values: str) -> Tally:
        """The series of these labels, begun empty."""
        return self._series.setdefault(values, Tally(self._bounds))

    def forget(self, *first: str) -> None:
        """Drop every series whose labels begin with these values."""
        _forget(self._series, first)

    def collect(self) -> Iterable[Metric]:
        name, text = self._form
        family = HistogramMetricFamily(name, text, labels=self._labelnames)
        for values, tally in list(self._series.items()):
            cumulative = zip(self._names, accumulate(tally.counts), strict=True)
            buckets = [(le, count, tally.exemplar(place)) for place, (le, count) in enumerate(cumulative)]
            family.add_metric(values, buckets=buckets, sum_value=tally.total)  # type: ignore[arg-type]  # None is taken
        return (family,)


def _forget(series: dict[tuple[str, ...], _T], first: tuple[str, ...]) -> None:
    for values in [values for values in series if values[: len(first)] == first]:
        del series[values]
