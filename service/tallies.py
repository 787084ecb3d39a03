"""Counters and histograms that one thread fills: the event loop's.

prometheus_client's take a lock for each observation and walk its buckets in Python; counting took a
tenth of the CPU time of a small request. These are plain adds, read when the page is made.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Count:
    """One series of a `Counts`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


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

    def collect(self) -> Iterable[Metric]:
        name, text = self._form
        family = CounterMetricFamily(name, text, labels=self._labelnames)
        for values, count in list(self._series.items()):
            family.add_metric(values, count.value)
        return (family,)


class Tally:
    """One series of a `Tallies`."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count `value` in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


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

    def collect(self) -> Iterable[Metric]:
        name, text = self._form
        family = HistogramMetricFamily(name, text, labels=self._labelnames)
        for values, tally in list(self._series.items()):
            buckets = list(zip(self._names, accumulate(tally.counts), strict=True))
            family.add_metric(values, buckets=buckets, sum_value=tally.total)
        return (family,)
