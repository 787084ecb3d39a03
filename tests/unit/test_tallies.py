"""Counters and histograms as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from service.tallies import Counts, Tallies


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
