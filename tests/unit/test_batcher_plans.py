"""The batcher before a model whose plans change while it serves."""

from __future__ import annotations

import asyncio

from tests.unit.bench import Bench, firsts


async def test_batches_have_no_more_rows_than_the_plan_gains_from():
    """A model that answers one row at a time fastest is given one row at a time; a larger request stays whole."""
    bench = Bench()
    bench.model.best_rows = 1
    answers = [bench.submit(1), bench.submit(2), bench.submit(3, 4, 5), bench.submit(6)]
    await bench.run_all()
    assert bench.ran() == [[1], [2], [3, 4, 5], [6]]
    assert [firsts(await answer) for answer in answers] == [[2], [4], [6, 8, 10], [12]]


async def test_a_small_full_batch_is_assembled_ahead():
    """Rule 10 holds for the most rows that the plan gains from."""
    bench = Bench()
    bench.model.best_rows = 2
    answers = [bench.submit(value) for value in range(5)]
    await bench.turn()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (2, 1)
    await bench.run_all()
    assert bench.ran() == [[0, 1], [2, 3], [4]]
    await asyncio.gather(*answers)


async def test_new_plans_count_from_the_next_batch():
    """After a refresh batches have the new plan's rows; what waits is taken by them, and nothing fails."""
    bench = Bench()
    first = [bench.submit(value) for value in range(2)]
    await bench.turn()
    waiting = [bench.submit(value) for value in range(2, 6)]
    await bench.turn()
    bench.model.best_rows = 2
    bench.batcher.refresh(1)
    waiting += [bench.submit(value) for value in range(6, 9)]
    await bench.run_all()
    assert bench.ran() == [[0, 1], [2, 3, 4, 5], [6, 7], [8]]
    assert [firsts(await answer)[0] for answer in first + waiting] == [2.0 * value for value in range(9)]


async def test_more_batches_run_at_once_after_a_refresh():
    """A plan that runs in two streams is given two batches, from the moment that it is there."""
    bench = Bench()
    answers = [bench.submit(*range(4)), bench.submit(1), bench.submit(2)]
    await bench.turn()
    assert len(bench.runner.jobs) == 1
    bench.batcher.refresh(2)
    await bench.turn()
    assert (bench.runner.parallel, len(bench.runner.jobs)) == (2, 2)
    await bench.run_all()
    assert bench.ran() == [[0, 1, 2, 3], [1, 2]]
    await asyncio.gather(*answers)


async def test_a_plan_that_became_short_runs_inline():
    """What a batch is expected to take is asked of the plans in use."""
    bench = Bench()
    slow = bench.submit(1)
    await bench.run_all()
    await slow
    bench.model.seconds = 1e-4
    bench.batcher.refresh(1)
    quick = bench.submit(2)
    await bench.turn()
    assert firsts(await quick) == [4]
    assert bench.runner.jobs == []
