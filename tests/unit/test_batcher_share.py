"""Batchers of several models on one device: whose turn it is, and that nobody is held up for good."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from service.batching.batcher import Result
from service.batching.devices import Devices
from service.batching.queue import Limits
from service.errors import DeadlineExceeded, Internal, Unavailable
from service.tensors import Tensors
from tests.fakes import FakeClock
from tests.unit.bench import LIMITS, Bench, firsts

MANY = Limits(4, 1000, 1 << 20)


class Benches:
    """A bench for each model, all with one clock and on one device; each batch takes 10 ms."""

    def __init__(self, *models: str, limits: Limits = LIMITS, parallel: int = 1) -> None:
        self.clock = FakeClock()
        self.devices = Devices(self.clock)
        self.of = {model: self._make(model, limits, parallel) for model in models}

    def _make(self, model: str, limits: Limits, parallel: int) -> Bench:
        bench = Bench(limits, parallel=parallel)
        bench.batcher._clock = bench.clock = self.clock
        asyncio.get_running_loop().time = self.clock  # type: ignore[method-assign]
        bench.batcher.share(partial(self.devices.join, ["CPU"], model))
        return bench

    async def run(self, bench: Bench, seconds: float = 0.01) -> None:
        """Let a batch of `bench` end after so many seconds."""
        self.clock.advance(seconds)
        job, done = bench.runner.jobs.pop(0)
        result = job()
        done(Result(result.outputs, result.started, seconds))
        await bench.turn()

    async def fill(self, bench: Bench, batches: int) -> list[asyncio.Future[Tensors]]:
        answers = [bench.submit(*range(4)) for _ in range(batches)]
        await bench.turn()
        return answers


@pytest.mark.parametrize(("weight", "ratio"), [(1.0, 1), (3.0, 3)])
async def test_hot_models_take_turns_by_weight(weight: float, ratio: int):
    """Rule 14: of two with the same batches one of weight 3 runs three for each of the other."""
    benches = Benches("a", "b", limits=MANY)
    benches.devices.weigh("a", weight)
    a, b = benches.of.values()
    waiting = await benches.fill(a, 30) + await benches.fill(b, 30)
    for _ in range(24):
        (running,) = [bench for bench in (a, b) if bench.runner.jobs][:1]
        await benches.run(running)
    assert len(a.model.batches) == pytest.approx(24 * ratio / (ratio + 1), abs=2)
    await drain(benches, waiting)


async def test_a_weight_changes_while_both_are_hot():
    """Rule 14: from the next batches on, without anything loaded anew."""
    benches = Benches("a", "b", limits=MANY)
    a, b = benches.of.values()
    waiting = await benches.fill(a, 40) + await benches.fill(b, 40)
    benches.devices.weigh("b", 4.0)
    for _ in range(20):
        (running,) = [bench for bench in (a, b) if bench.runner.jobs][:1]
        await benches.run(running)
    assert len(b.model.batches) == pytest.approx(16, abs=2)
    await drain(benches, waiting)


async def drain(benches: Benches, waiting: list[asyncio.Future[Tensors]]) -> None:
    """Run until all of `waiting` are answered: nobody may be left without a turn."""
    bench = next(iter(benches.of.values()))
    await bench.turn()
    while running := [each for each in benches.of.values() if each.runner.jobs]:
        await benches.run(running[0])
    assert all(answer.done() for answer in waiting)
    await asyncio.gather(*waiting)


async def test_what_waits_for_the_device_grows_in_its_queue():
    """Rule 14: requests that come meanwhile share the batch, and it begins as soon as the device is free."""
    benches = Benches("a", "b")
    a, b = benches.of.values()
    first = await benches.fill(a, 1)
    answers = [b.submit(1)]
    await b.turn()
    answers.append(b.submit(2, 3))
    await b.turn()
    assert (len(b.runner.jobs), b.batcher.queue.rows) == (0, 3)
    await benches.run(a)
    assert (len(b.runner.jobs), b.batcher.queue.rows) == (1, 0)
    await benches.run(b)
    assert [firsts(await answer) for answer in answers] == [[2], [4, 6]]
    assert b.observer.device_s == pytest.approx(0.01)
    await asyncio.gather(*first)


async def test_nothing_is_assembled_ahead_while_another_waits():
    """Rule 14: it would run before its turn; one that is alone does so as ever."""
    benches = Benches("a", "b", limits=MANY)
    a, b = benches.of.values()
    waiting = await benches.fill(a, 3)
    assert len(a.runner.jobs) == 2
    waiting += await benches.fill(b, 1)
    await benches.run(a)
    assert (len(a.runner.jobs), len(b.runner.jobs)) == (1, 0)
    await benches.run(a)
    assert (len(a.runner.jobs), len(b.runner.jobs)) == (0, 1)
    await drain(benches, waiting)


async def test_a_deadline_passes_while_the_device_is_another_models():
    """Rule 14 with rule 5: it fails in time, and its turn goes to nobody else's harm."""
    benches = Benches("a", "b")
    a, b = benches.of.values()
    first = await benches.fill(a, 1)
    late = b.submit(1, deadline=benches.clock.now + 0.5)
    await b.turn()
    await b.advance(0.6)
    with pytest.raises(DeadlineExceeded):
        await late
    first += await benches.fill(a, 1)
    await benches.run(a)
    assert len(a.runner.jobs) == 1
    assert not b.runner.jobs
    await drain(benches, first)


async def test_a_caller_who_leaves_keeps_nobody_waiting():
    """Rule 14: the turn of a model whose callers have all gone passes on at once."""
    benches = Benches("a", "b", "c")
    a, b, c = benches.of.values()
    waiting = await benches.fill(a, 1)
    gone = b.submit(1)
    await b.turn()
    waiting += await benches.fill(c, 1)
    gone.cancel()
    await benches.run(a)
    assert (len(b.runner.jobs), len(c.runner.jobs)) == (0, 1)
    await drain(benches, waiting)


async def test_a_batch_that_fails_gives_the_device_back():
    """Rule 14 with rule 7: each run again takes its turn, and the other model goes on."""
    benches = Benches("a", "b", limits=MANY)
    a, b = benches.of.values()
    a.model.poison = 1
    bad, good = a.submit(1), a.submit(2)
    await a.turn()
    waiting = await benches.fill(b, 2)
    for _ in range(8):
        for bench in (a, b):
            if bench.runner.jobs:
                benches.clock.advance(0.01)
                bench.runner.run_next()
                await bench.turn()
    with pytest.raises(Internal):
        await bad
    assert firsts(await good) == [4]
    assert all(answer.done() for answer in waiting)
    assert a.observer.device_s > 0
    await asyncio.gather(*waiting)


async def test_a_batch_that_cannot_be_assembled_holds_nothing(monkeypatch: pytest.MonkeyPatch):
    """Rule 14: it never had the device, so nobody waits for it."""
    benches = Benches("a", "b")
    a, b = benches.of.values()

    def bucket_rows(lane: object, rows: int) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(a.model, "bucket_rows", bucket_rows)
    bad = a.submit(1)
    await a.turn()
    waiting = await benches.fill(b, 1)
    assert len(b.runner.jobs) == 1
    with pytest.raises(Internal):
        await bad
    await drain(benches, waiting)


async def test_a_run_that_hangs_does_not_hold_up_the_others_for_long():
    """Rule 14: after a second another model begins beside it, and is not held up by it again."""
    benches = Benches("hangs", "b")
    hangs, b = benches.of.values()
    stuck = await benches.fill(hangs, 1)
    waiting = await benches.fill(b, 1)
    await b.advance(0.9)
    assert not b.runner.jobs
    await b.advance(0.2)
    assert len(b.runner.jobs) == 1
    await benches.run(b)
    waiting += await benches.fill(b, 1)
    await benches.run(b)
    assert all(answer.done() for answer in waiting)
    await drain(benches, stuck + waiting)


async def test_two_runs_that_hang_are_both_given_up():
    """Rule 14: the look for one that is overdue is made again while somebody waits."""
    benches = Benches("one", "two", "b")
    one, two, b = benches.of.values()
    stuck = await benches.fill(one, 1) + await benches.fill(two, 1)
    waiting = await benches.fill(b, 1)
    await b.advance(1.1)
    assert (len(two.runner.jobs), len(b.runner.jobs)) == (1, 0)
    await b.advance(1.1)
    assert len(b.runner.jobs) == 1
    await drain(benches, stuck + waiting)


async def test_an_unload_gives_up_what_still_runs():
    """Rule 14 with rule 11: what did not end within the drain time holds nobody up, and may still end."""
    benches = Benches("goes", "b")
    goes, b = benches.of.values()
    (stuck,) = await benches.fill(goes, 1)
    waiting = await benches.fill(b, 1)
    stopping = asyncio.create_task(goes.batcher.stop(0.1))
    await goes.turn()
    await goes.advance(0.2)
    assert not await stopping
    with pytest.raises(Unavailable):
        await stuck
    await b.turn()
    assert len(b.runner.jobs) == 1
    await benches.run(goes)
    await drain(benches, waiting)
    assert repr(benches.devices._devices[("CPU",)].share) == "<Share 0.00 used, 0 running, 0 waiting>"


async def test_an_unload_while_it_waits_leaves_the_turn_to_others():
    """Rule 14 with rule 11: what was queued is failed, and the model after it begins."""
    benches = Benches("a", "goes", "c")
    a, goes, c = benches.of.values()
    waiting = await benches.fill(a, 1)
    (left,) = await benches.fill(goes, 1)
    waiting += await benches.fill(c, 1)
    stopping = asyncio.create_task(goes.batcher.stop(0.1))
    await goes.turn()
    await goes.advance(0.2)
    assert not await stopping
    with pytest.raises(Unavailable):
        await left
    await benches.run(a)
    assert len(c.runner.jobs) == 1
    await drain(benches, waiting)


async def test_a_tiny_batch_waits_for_nobody_but_is_counted():
    """Rule 14: what runs on the event loop needs no turn; its first batch tells that it is so."""
    benches = Benches("tiny", "b")
    tiny, b = benches.of.values()
    tiny.model.seconds = 1e-5
    assert firsts(await tiny.submit(1)) == [2]
    waiting = await benches.fill(b, 1)
    assert firsts(await tiny.submit(2)) == [4]
    assert tiny.observer.device_s > 0
    await drain(benches, waiting)


async def test_plans_that_run_several_batches_at_once_take_a_part_each():
    """Rule 14: after a refresh to two at once, a batch leaves half of the device to another."""
    benches = Benches("a", "b")
    a, b = benches.of.values()
    a.batcher.refresh(2)
    b.batcher.refresh(2)
    waiting = [a.submit(1)]
    await a.turn()
    waiting.append(b.submit(1))
    await b.turn()
    assert (len(a.runner.jobs), len(b.runner.jobs)) == (1, 1)
    waiting.append(a.submit(1))
    await a.turn()
    assert len(a.runner.jobs) == 1
    await drain(benches, waiting)


async def test_a_goal_reckons_with_the_turns_of_others():
    """A queue that would be in time on a device of its own is not beside a model that has it half of the time."""
    benches = Benches("a", "b", limits=MANY)
    a, b = benches.of.values()
    for bench in (a, b):
        bench.model.seconds = 0.1
    a.batcher.hold_to(4.0)
    policy = a.batcher._policy
    assert policy is not None
    waiting = await benches.fill(b, 20)
    for _ in range(18):
        waiting.append(a.submit(1))
        await a.turn()
        (running,) = [bench for bench in (a, b) if bench.runner.jobs][:1]
        await benches.run(running, 0.1)
    assert 0.05 < policy._held_s < 0.15
    await drain(benches, waiting)
