"""The batcher before a runner that runs several batches at once: one for each replica of the model."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.queue import Limits
from service.errors import DeadlineExceeded, Internal, Overloaded, Unavailable
from tests.unit.bench import Bench, firsts


async def test_a_runner_is_free_while_fewer_run_than_it_can():
    """Rule 9: what comes while one batch runs is run at once beside it, however small; the next waits."""
    bench = Bench(parallel=2)
    answers = []
    for value in range(3):
        answers.append(bench.submit(value))
        await bench.turn()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (2, 1)
    await bench.run_all()
    assert bench.ran() == [[0], [1], [2]]
    assert [firsts(await answer) for answer in answers] == [[0], [2], [4]]


async def test_what_came_together_is_one_batch_although_several_could_run():
    """Rule 9: rows that wait at the same time share a batch: they are not spread over free replicas."""
    bench = Bench(parallel=2)
    answers = [bench.submit(1), bench.submit(2, 3)]
    await bench.run_all()
    assert bench.ran() == [[1, 2, 3]]
    await asyncio.gather(*answers)


@pytest.mark.parametrize("parallel", [1, 2, 3])
async def test_as_many_run_as_can_and_one_full_batch_is_assembled_ahead(parallel: int):
    """Rule 10: beyond those that run, one more is handed over if it is full, and no other."""
    bench = Bench(Limits(4, 100, 1 << 20), parallel=parallel)
    answers = [bench.submit(*range(4)) for _ in range(parallel + 3)]
    await bench.turn()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (parallel + 1, 8)
    await bench.run()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (parallel + 1, 4)
    await bench.run_all()
    await asyncio.gather(*answers)


async def test_a_batch_that_could_still_grow_is_not_assembled_ahead():
    """Rule 10: with all replicas busy, rows short of a batch wait for company until one is free."""
    bench = Bench(parallel=2)
    answers = [bench.submit(*range(4)), bench.submit(*range(4)), bench.submit(1, 2, 3)]
    await bench.turn()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (2, 3)
    answers.append(bench.submit(4))
    await bench.turn()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (3, 0)
    await bench.run_all()
    assert bench.ran()[2] == [1, 2, 3, 4]
    await asyncio.gather(*answers)


async def test_batches_may_end_in_any_order():
    """Rule 6: each caller gets its own rows, whichever replica is done first, and the free one goes on."""
    bench = Bench(parallel=2)
    answers = [bench.submit(n) for n in range(1)]
    await bench.turn()
    answers.append(bench.submit(1))
    await bench.turn()
    answers.append(bench.submit(2))
    bench.runner.run_next(1)
    await bench.turn()
    assert not answers[0].done()
    assert firsts(await answers[1]) == [2]
    assert len(bench.runner.jobs) == 2
    await bench.run_all()
    assert bench.ran() == [[1], [0], [2]]
    assert [firsts(await answer) for answer in answers] == [[0], [2], [4]]


async def test_a_short_batch_runs_on_the_loop_while_no_other_runs():
    """Beside a batch in a thread a short one goes to another thread; alone it costs no hand-over."""
    bench = Bench(parallel=2)
    bench.model.seconds = 1e-6
    answer = bench.submit(1)
    await bench.turn()
    assert not bench.runner.jobs
    assert firsts(await answer) == [2]
    bench.model.seconds = 1.0
    long = bench.submit(2)
    await bench.turn()
    bench.model.seconds = 1e-6
    short = bench.submit(3)
    await bench.turn()
    assert len(bench.runner.jobs) == 2
    await bench.run_all()
    assert [firsts(await answer) for answer in (long, short)] == [[4], [6]]


async def test_the_halves_of_a_failed_batch_run_beside_each_other():
    """Rule 7: one bad row fails alone, and its retries use all replicas that are free."""
    bench = Bench(parallel=2)
    bench.model.poison = 3
    answers = [bench.submit(n) for n in range(4)]
    await bench.run()
    assert len(bench.runner.jobs) == 2
    await bench.run_all()
    results = await asyncio.gather(*answers, return_exceptions=True)
    assert isinstance(results[3], Internal)
    assert [firsts(r) for r in results if not isinstance(r, BaseException)] == [[0], [2], [4]]
    assert bench.observer.failures == 3


async def test_the_late_and_the_gone_are_dropped_before_the_run():
    """Rule 5: with a replica free as with none, nobody is run who has left or is late."""
    bench = Bench(parallel=2)
    running = [bench.submit(n) for n in range(1)]
    await bench.turn()
    running.append(bench.submit(1))
    await bench.turn()
    late, gone = bench.submit(2, deadline=103), bench.submit(3)
    gone.cancel()
    bench.clock.advance(4)
    await bench.run_all()
    with pytest.raises(DeadlineExceeded):
        await late
    assert bench.ran() == [[0], [1]]
    assert bench.observer.drops == {"cancelled": 1, "expired": 1}
    await asyncio.gather(*running)


async def test_a_wait_for_a_fuller_batch_is_kept_while_another_runs():
    """With `batch_wait_s` a free replica waits for company just as a lone one does."""
    bench = Bench(Limits(4, 16, 1 << 20, batch_wait_s=1.0), parallel=2)
    answers = [bench.submit(*range(4)), bench.submit(5)]
    await bench.turn()
    assert len(bench.runner.jobs) == 1
    await bench.advance(0.9)
    assert len(bench.runner.jobs) == 1
    await bench.advance(0.2)
    assert len(bench.runner.jobs) == 2
    await bench.run_all()
    assert bench.ran() == [[0, 1, 2, 3], [5]]
    await asyncio.gather(*answers)


async def test_stop_finishes_all_that_run():
    """Rule 11: every replica's batch and those that wait are answered before the runner is closed."""
    bench = Bench(parallel=2)
    answers = [bench.submit(*range(4)) for _ in range(4)]
    stopping = asyncio.create_task(bench.batcher.stop(10.0))
    await bench.turn()
    assert not stopping.done()
    await bench.run_all()
    assert await stopping
    assert [firsts(await answer) for answer in answers] == [[0, 2, 4, 6]] * 4
    assert bench.runner.closed


async def test_stop_gives_up_what_is_not_finished_in_time():
    """Rule 11: after the drain time each of the batches that still run is told."""
    bench = Bench(parallel=2)
    answers = [bench.submit(*range(4)) for _ in range(4)]
    stopping = asyncio.create_task(bench.batcher.stop(2.0))
    await bench.turn()
    await bench.advance(2.1)
    assert await stopping is False
    for answer in answers:
        with pytest.raises(Unavailable):
            await answer
    await bench.run_all()


async def test_the_rate_counts_all_replicas(monkeypatch: pytest.MonkeyPatch):
    """Rule 3: a full queue of a model with two replicas is worked off in half the time."""
    bench = Bench(Limits(4, 8, 1 << 20), parallel=2)
    seconds = itertools.count(step=2)  # each run takes two seconds
    monkeypatch.setattr("service.batching.batcher.time.perf_counter", lambda: next(seconds))
    bench.submit(1, 2, 3, 4)
    await bench.run_all()
    running = []
    for value in range(2):
        running.append(bench.submit(value))
        await bench.turn()
    running += [bench.submit(1, 2, 3), bench.submit(4, 5, 6)]
    with pytest.raises(Overloaded) as refused:
        bench.submit(1, 2, 3)
    assert refused.value.retry_after_s == pytest.approx(6 / (2 * 4 / 2))
    await bench.run_all()
    await asyncio.gather(*running)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    parallel=st.integers(1, 4),
    order=st.lists(st.integers(0, 4), min_size=1, max_size=10),
)
def test_answers_are_the_same_however_many_run_and_whichever_ends_first(
    sizes: list[int], parallel: int, order: list[int]
):
    """Rule 12: with any number of replicas, done in any order, every caller gets its own rows, once."""

    async def run() -> None:
        bench = Bench(Limits(4, 100, 1 << 20), parallel=parallel)
        values = itertools.count()
        requests = [[float(next(values)) for _ in range(size)] for size in sizes]
        answers = []
        for request in requests:
            answers.append(bench.submit(*request))
            await bench.turn()
        picks = itertools.cycle(order)
        while bench.runner.jobs:
            assert len(bench.runner.jobs) <= parallel + 1
            bench.runner.run_next(next(picks) % min(parallel, len(bench.runner.jobs)))
            await bench.turn()
        for request, answer in zip(requests, answers, strict=True):
            assert firsts(await answer) == [2 * value for value in request]
        assert len(bench.batcher.queue) == 0
        assert await bench.batcher.stop(0.0)

    asyncio.run(run())
