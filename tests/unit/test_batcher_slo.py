"""The batcher with a goal, and with priorities: who is answered, who is refused, and what is counted."""

from __future__ import annotations

import asyncio

import pytest

from service.batching.queue import Limits
from service.errors import Overloaded
from tests.unit.bench import Bench, firsts


def goal_bench(parallel: int = 1) -> Bench:
    """Batches of four rows that are expected to take a second, and a goal of four."""
    bench = Bench(Limits(4, 1000, 1 << 20), parallel=parallel)
    bench.model.seconds = 1.0
    bench.batcher.hold_to(4.0)
    return bench


async def run_one(bench: Bench, seconds: float = 1.0) -> None:
    """Let a batch end after so many seconds."""
    await bench.turn()
    bench.clock.advance(seconds)
    bench.runner.run_next()
    await bench.turn()


async def test_more_than_can_be_in_time_is_refused_at_once():
    """With a batch running and one behind it, a third would be too late: `Overloaded` from `submit` itself, counted."""
    bench = goal_bench()
    answers = [bench.submit(*range(4))]
    await bench.turn()
    answers.append(bench.submit(*range(4)))
    answers.append(bench.submit(1))
    with pytest.raises(Overloaded, match="answered within 4000 ms") as refused:
        bench.submit(*range(4))
    assert 0 < refused.value.retry_after_s <= 1.5
    assert bench.observer.drops == {"overloaded": 1}
    while bench.runner.jobs:
        await run_one(bench)
    assert len(await asyncio.gather(*answers)) == 3
    assert bench.clock.now - 100 <= 4.0


async def test_without_a_goal_nobody_is_refused_for_time():
    """And a goal that is taken away does so no more."""
    bench = goal_bench()
    bench.batcher.hold_to(None)
    answers = [bench.submit(*range(4)) for _ in range(50)]
    await bench.run_all()
    assert len(await asyncio.gather(*answers)) == 50


async def test_what_a_stall_made_hopeless_is_refused_before_the_rest():
    """Those behind it are answered; it is told to come back, and counted as late."""
    bench = goal_bench()
    first = bench.submit(0)
    await bench.turn()
    old = bench.submit(1)
    bench.clock.advance(2.9)
    young = bench.submit(2)
    await run_one(bench, 0.5)
    with pytest.raises(Overloaded, match="after 3400 ms in the queue this request could no longer be answered in time"):
        await old
    await run_one(bench)
    assert [firsts(await answer) for answer in (first, young)] == [[0], [4]]
    assert bench.observer.drops == {"late": 1}
    assert bench.batcher.statistics.fail.count == 1


async def test_new_plans_keep_the_goal():
    """After a change of plans what waits is known, and what runs may end."""
    bench = goal_bench()
    answers = [bench.submit(*range(4))]
    await bench.turn()
    answers.append(bench.submit(*range(4)))
    bench.model.seconds = 10.0
    bench.batcher.refresh(1)
    with pytest.raises(Overloaded):
        bench.submit(1)
    await bench.run_all()
    assert len(await asyncio.gather(*answers)) == 2


async def test_a_batch_that_cannot_be_made_is_no_run():
    """One whose fusing fails is told, and the next is let in."""
    bench = goal_bench()
    bench.model.poison = 7.0
    bad = bench.submit(7)
    await bench.run_all()
    with pytest.raises(Exception, match="poisoned"):
        await bad
    good = bench.submit(1)
    await bench.run_all()
    assert firsts(await good) == [2]


async def test_priorities_choose_who_goes_first_without_a_goal_too():
    """1 before none, none before 3; within one level as they came."""
    bench = Bench(Limits(1, 100, 1 << 20))
    running = bench.submit(0)
    await bench.turn()
    answers = [bench.submit(value, priority=priority) for value, priority in ((1, 3), (2, 0), (3, 1), (4, 2), (5, 1))]
    await bench.run_all()
    await asyncio.gather(running, *answers)
    assert bench.ran() == [[0], [3], [5], [2], [4], [1]]
