"""Counters and histograms as Prometheus reads them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from service.tallies import Counts, Sums, Tallies


def test_a_count_is_shown_under_its_labels():
    """Each combination of labels has a series of its own."""
    registry, counts = CollectorRegistry(), Counts("asked", "Text.", ("model", "code"))
    registry.register(counts)
    counts.labels("m", "ok").value += 2
    counts.labels("m", "late").value += 1
    assert counts.labels("m", "ok") is counts.labels("m", "ok")
    assert registry.get_sample_value("asked_total", {"model": "m", "code": "ok"}) == 2
    assert registry.get_sample_value("asked_total", {"model": "m", "code": "late"}) == 1


def test_a_histogram_has_cumulative_buckets():
    """A value on a bound belongs below it; infinity has them all."""
    registry, tallies = CollectorRegistry(), Tallies("took", "Text.", ("model",), (0.5, 1.0, 2.0))
    registry.register(tallies)
    for value in (0.5, 0.75, 1.0, 7.0):
        tallies.labels("m").observe(value)
    buckets = [
        registry.get_sample_value("took_bucket", {"model": "m", "le": le}) for le in ("0.5", "1.0", "2.0", "+Inf")
    ]
    assert buckets == [1, 3, 3, 4]
    assert registry.get_sample_value("took_sum", {"model": "m"}) == 9.25
    assert registry.get_sample_value("took_count", {"model": "m"}) == 4


def test_a_sum_tells_how_many_and_how_much():
    """Count and sum of each combination of labels."""
    registry, sums = CollectorRegistry(), Sums("took", "Text.", ("model",))
    registry.register(sums)
    for value in (0.5, 1.5):
        sums.labels("m").count += 1
        sums.labels("m").total += value
    assert registry.get_sample_value("took_count", {"model": "m"}) == 2
    assert registry.get_sample_value("took_sum", {"model": "m"}) == 2.0


@pytest.mark.parametrize("kind", [Counts, Sums, partial(Tallies, bounds=(1.0,))])
def test_series_are_forgotten_by_their_first_labels(kind: Any):
    """Those that begin so, whatever follows; the others stay."""
    family = kind("took", "Text.", ("model", "version", "code"))
    for labels in (("m", "1", "ok"), ("m", "1", "late"), ("m", "2", "ok"), ("n", "1", "ok")):
        family.labels(*labels)
    family.forget("m", "1")
    (metric,) = family.collect()
    left = {(sample.labels["model"], sample.labels["version"]) for sample in metric.samples}
    assert left == {("m", "2"), ("n", "1")}
