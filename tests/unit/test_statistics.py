"""Counts of one version, and how the statistics extension tells them."""

from __future__ import annotations

import asyncio

import pytest

from service.batching import statistics as module
from service.batching.batcher import Batcher
from service.batching.queue import Limits
from service.batching.statistics import BatchSize, Duration, Statistics, VersionStatistics
from service.errors import DeadlineExceeded, Internal, Overloaded
from service.extensions.statistics import statistics_of
from tests.fakes import DOUBLE, FakeClock, FakeModel, FakeObserver, FakeRunner, rows


def test_a_new_version_has_done_nothing():
    """All counts are 0."""
    statistics = Statistics()
    assert (statistics.inference_count, statistics.execution_count, statistics.last_inference_s) == (0, 0, 0.0)
    assert statistics.success == statistics.fail == statistics.queue == Duration(0, 0)
    assert statistics.batches == []


def test_each_request_of_a_batch_counts_the_whole_run():
    """Rows and batches are counted beside requests; a batch's own times once by its size."""
    clock = FakeClock(1000.5)
    statistics = Statistics(clock)
    statistics.executed(8, 3, 60, 5, 100, 7)
    statistics.executed(2, 1, 10, 1, 50, 1)
    statistics.executed(8, 2, 40, 5, 200, 7)
    assert (statistics.inference_count, statistics.execution_count) == (18, 3)
    assert statistics.queue == Duration(6, 110)
    assert statistics.compute_input == Duration(6, 26)
    assert statistics.compute_infer == Duration(6, 750)
    assert statistics.compute_output == Duration(6, 36)
    assert statistics.success == Duration(6, 110 + 26 + 750 + 36)
    assert statistics.last_inference_s == 1000.5
    assert statistics.batches == [
        BatchSize(2, Duration(1, 1), Duration(1, 50), Duration(1, 1)),
        BatchSize(8, Duration(2, 10), Duration(2, 300), Duration(2, 14)),
    ]


def test_failures_are_counted_apart():
    """With the time that they took."""
    statistics = Statistics()
    statistics.failed()
    statistics.failed(2, 30)
    assert statistics.fail == Duration(3, 30)
    assert statistics.success == Duration(0, 0)


def test_sizes_that_clients_choose_do_not_grow_without_bound(monkeypatch: pytest.MonkeyPatch):
    """Beyond a number of sizes further ones are only in the totals."""
    monkeypatch.setattr(module, "_MOST_SIZES", 2)
    statistics = Statistics()
    for size in (1, 2, 3, 2):
        statistics.executed(size, 1, 0, 0, 0, 0)
    assert [(size.rows, size.compute_infer.count) for size in statistics.batches] == [(1, 1), (2, 2)]
    assert (statistics.inference_count, statistics.execution_count) == (8, 4)


def test_they_are_told_in_the_words_of_the_extension():
    """Versions are text, the time is in milliseconds, memory is by kind and number of device."""
    statistics = Statistics(FakeClock(12.3456))
    statistics.executed(4, 2, 10, 1, 20, 3)
    statistics.failed(1, 5)
    (told,) = statistics_of([VersionStatistics("m", 3, statistics, {"GPU:1": 20, "CPU": 10})])["model_stats"]
    assert told == {
        "name": "m",
        "version": "3",
        "last_inference": 12345,
        "inference_count": 4,
        "execution_count": 1,
        "inference_stats": {
            "success": {"count": 2, "ns": 58},
            "fail": {"count": 1, "ns": 5},
            "queue": {"count": 2, "ns": 10},
            "compute_input": {"count": 2, "ns": 2},
            "compute_infer": {"count": 2, "ns": 40},
            "compute_output": {"count": 2, "ns": 6},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [
            {
                "batch_size": 4,
                "compute_input": {"count": 1, "ns": 1},
                "compute_infer": {"count": 1, "ns": 20},
                "compute_output": {"count": 1, "ns": 3},
            }
        ],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 10}, {"type": "GPU", "id": 1, "byte_size": 20}],
    }


class Setup:
    """A batcher among fakes."""

    def __init__(self) -> None:
        self.model, self.runner, self.clock = FakeModel(), FakeRunner(), FakeClock()
        self.batcher = Batcher(
            self.model, Limits(8, 8, 1 << 20), runner=self.runner, observer=FakeObserver(), clock=self.clock
        )
        self.statistics = self.batcher.statistics

    async def queued(self) -> None:
        while not self.runner.jobs:
            await asyncio.sleep(0)


async def test_a_batcher_counts_what_it_runs():
    """One batch of two requests: their rows, what they waited, and the run."""
    setup = Setup()
    first = setup.batcher.submit(DOUBLE, rows(1), None)
    setup.clock.advance(0.25)
    second = setup.batcher.submit(DOUBLE, rows(2, 3), None)
    setup.clock.advance(0.5)
    await setup.queued()
    setup.runner.run_next()
    await asyncio.gather(first, second)
    statistics = setup.statistics
    assert (statistics.inference_count, statistics.execution_count) == (3, 1)
    assert statistics.queue == Duration(2, 1_250_000_000)
    assert statistics.compute_infer.count == 2
    assert statistics.compute_infer.ns > 0
    assert statistics.compute_input.ns > 0
    assert statistics.compute_output.ns > 0
    assert [size.rows for size in statistics.batches] == [3]
    assert statistics.fail == Duration(0, 0)


async def test_a_batcher_counts_what_fails():
    """Refused by a full queue, expired in it, or failed by the model; parts that succeed are counted as such."""
    setup = Setup()
    setup.model.poison = 13
    good = setup.batcher.submit(DOUBLE, rows(1), None)
    bad = setup.batcher.submit(DOUBLE, rows(13), None)
    await setup.queued()
    setup.clock.advance(2.0)
    late = setup.batcher.submit(DOUBLE, rows(*range(8)), setup.clock.now + 1)
    with pytest.raises(Overloaded):
        setup.batcher.submit(DOUBLE, rows(1), None)
    assert setup.statistics.fail == Duration(1, 0)
    setup.clock.advance(1.0)
    setup.runner.run_next()
    while setup.runner.jobs:
        setup.runner.run_next()
        await asyncio.sleep(0)
    await good
    with pytest.raises(Internal):
        await bad
    with pytest.raises(DeadlineExceeded):
        await late
    assert setup.statistics.fail == Duration(3, 4_000_000_000)
    assert setup.statistics.success.count == 1
    assert setup.statistics.inference_count == 1
