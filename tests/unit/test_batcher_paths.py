"""What the batcher does besides its rules: timers, runs on the loop, padding, parts of a split request, faults."""

from __future__ import annotations

import asyncio
import gc
import itertools
from typing import Any

import numpy as np
import pytest

from service.batching.queue import Limits
from service.errors import DeadlineExceeded, Internal, Overloaded
from tests.unit.bench import TWO_D, Bench, firsts

WAIT = Limits(4, 16, 1 << 20, batch_wait_s=1.0)


# Waiting


@pytest.mark.parametrize(("run_s", "waited_s"), [(float("inf"), 2e-3), (0.01, 2e-4), (0.05, 1e-3), (1.0, 2e-3)])
async def test_a_busy_loop_holds_up_a_batch_for_little_of_its_run(run_s: float, waited_s: float):
    """While the loop has other work the batch for a free thread waits for company, but not long."""
    bench = Bench()
    bench.model.seconds = run_s
    turn_s = 5e-5
    answer = bench.submit(1)
    began = bench.clock()
    while not bench.runner.jobs:
        bench.clock.advance(turn_s)
        await asyncio.sleep(0)
    assert bench.clock() - began == pytest.approx(waited_s, abs=3 * turn_s)
    await bench.run_all()
    assert firsts(await answer) == [2]


async def test_a_batch_runs_when_its_wait_is_over():
    """With a batch wait a free runner waits that long for company, counted from the first request."""
    bench = Bench(WAIT)
    first = bench.submit(1)
    await bench.advance(0.5)
    second = bench.submit(2)
    await bench.advance(0.4)
    assert bench.runner.jobs == []
    await bench.advance(0.1)
    await bench.run_all()
    assert bench.ran() == [[1, 2]]
    assert bench.observer.waits == [pytest.approx(1.0), pytest.approx(0.5)]
    await asyncio.gather(first, second)


async def test_a_full_batch_does_not_wait_for_the_time_to_pass():
    """With a batch wait, rows enough for a batch run at once."""
    bench = Bench(WAIT)
    answers = [bench.submit(1, 2), bench.submit(3, 4)]
    await bench.turn()
    assert len(bench.runner.jobs) == 1
    await bench.run_all()
    await asyncio.gather(*answers)


async def test_a_full_lane_does_not_wait_behind_one_that_is_not():
    """An older lane that still waits for company does not hold a full one up, nor keep the loop busy."""
    bench = Bench(WAIT)
    older = bench.submit(signature=TWO_D, inputs={"x": np.ones((1, 2, 2), np.float32)})
    full = bench.submit(1, 2, 3, 4)
    await bench.run()
    assert firsts(await full) == [2, 4, 6, 8]
    assert bench.runner.jobs == []
    await bench.advance(1.0)
    await bench.run()
    assert older.done()


async def test_a_deadline_within_the_wait_is_kept():
    """A deadline that passes while a batch waits for company is told then, each one of several."""
    bench = Bench(Limits(4, 16, 1 << 20, batch_wait_s=10.0))
    answers = [bench.submit(n, deadline=100 + n) for n in (2, 3)]
    await bench.turn()
    await bench.advance(2)
    assert [answer.done() for answer in answers] == [True, False]
    await bench.advance(1)
    assert [answer.done() for answer in answers] == [True, True]
    for answer in answers:
        with pytest.raises(DeadlineExceeded):
            await answer
    assert await bench.batcher.stop(0.0)


async def test_a_deadline_is_kept_while_the_runner_is_busy():
    """A request whose deadline passes behind a long run is told at once, not when the run ends."""
    bench = Bench()
    long_run = bench.submit(0)
    await bench.turn()
    sooner, later = bench.submit(2, deadline=102), bench.submit(1, deadline=105)
    await bench.advance(2)
    assert (sooner.done(), later.done()) == (True, False)
    await bench.advance(3)
    assert later.done()
    assert bench.observer.drops == {"expired": 2}
    await bench.run_all()
    await long_run
    for answer in (sooner, later):
        with pytest.raises(DeadlineExceeded):
            await answer


async def test_an_earlier_deadline_moves_the_timer():
    """The timer is set for whichever deadline comes first, in whatever order they were submitted."""
    bench = Bench()
    long_run = bench.submit(0)
    await bench.turn()
    late, early = bench.submit(1, deadline=110), bench.submit(2, deadline=101)
    await bench.advance(1)
    assert (late.done(), early.done()) == (False, True)
    await bench.run_all()
    assert firsts(await late) == [2]
    with pytest.raises(DeadlineExceeded):
        await early
    await long_run


async def test_a_batcher_whose_waiters_all_left_comes_to_rest():
    """When every waiting request was cancelled nothing runs, and a stop finds nothing to wait for."""
    bench = Bench()
    gone = [bench.submit(n) for n in range(2)]
    for answer in gone:
        answer.cancel()
    await bench.turn()
    assert bench.observer.drops == {"cancelled": 2}
    assert await bench.batcher.stop(0.0)
    assert bench.ran() == []


async def test_an_idle_batcher_stops_without_any_time_to_drain(caplog: pytest.LogCaptureFixture):
    """A drain time of zero is enough where there is nothing to finish, and nothing is said of it."""
    assert await Bench().batcher.stop(0.0)
    assert caplog.text == ""


async def test_a_retry_whose_callers_all_left_leaves_the_next_batch_its_turn():
    """Halves of a failed batch whose callers have gone are dropped, and the queue goes on."""
    bench = Bench()
    bench.model.poison = 0
    left = [bench.submit(0), bench.submit(0)]
    await bench.turn()
    left[0].cancel()
    left[1].cancel()
    waiting = bench.submit(5)
    await bench.run()
    await bench.run_all()
    assert firsts(await waiting) == [10]
    assert bench.observer.drops == {"cancelled": 2}


async def _busy_turn(bench: Bench) -> None:
    """A turn of the loop that takes some time, as one does that reads requests."""
    bench.clock.advance(100e-6)
    await asyncio.sleep(0)


async def test_what_a_busy_loop_still_reads_is_fused():
    """While the loop is busy with other requests a batch is not begun, so that they are in it."""
    bench = Bench()
    answers = [bench.submit(1)]
    for value in (2, 3):
        for _ in range(4):
            await _busy_turn(bench)
        assert bench.runner.jobs == []
        answers.append(bench.submit(value))
    await bench.run_all()
    assert bench.ran() == [[1, 2, 3]]
    await asyncio.gather(*answers)


async def test_a_loop_that_is_never_idle_is_not_waited_for():
    """After two milliseconds a batch is begun, however busy the loop."""
    bench = Bench()
    answer = bench.submit(1)
    turns = 0
    while not bench.runner.jobs:
        await _busy_turn(bench)
        turns += 1
    assert turns == pytest.approx(20, abs=2)
    await bench.run_all()
    await answer


async def test_a_full_batch_does_not_wait_for_the_loop():
    """Rows enough for a batch are taken at the next turn, busy or not."""
    bench = Bench()
    answer = bench.submit(1, 2, 3, 4)
    await _busy_turn(bench)
    assert len(bench.runner.jobs) == 1
    await bench.run_all()
    await answer


# On the loop itself


async def test_a_batch_that_is_expected_to_be_short_runs_on_the_loop():
    """What costs less than a hand-over to the thread is run inline, batch after batch."""
    bench = Bench()
    bench.model.seconds = 1e-4
    answers = [bench.submit(*range(4)), bench.submit(7)]
    await bench.turn()
    assert bench.runner.jobs == []
    assert bench.ran() == [[0, 1, 2, 3], [7]]
    assert [firsts(await answer) for answer in answers] == [[0, 2, 4, 6], [14]]
    assert await bench.batcher.stop(0.0)


async def test_a_batch_that_fails_on_the_loop_is_bisected_too():
    """An inline run that raises is treated as one in the thread: only the bad row fails."""
    bench = Bench()
    bench.model.seconds = 1e-4
    bench.model.poison = 1
    bad, good = bench.submit(1), bench.submit(2)
    await bench.turn()
    with pytest.raises(Internal, match="poisoned"):
        await bad
    assert firsts(await good) == [4]


async def _run_taking(bench: Bench, seconds: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Answer one request in a run of `seconds`; whether it ran inline."""
    clock = itertools.count(step=seconds)
    monkeypatch.setattr("service.batching.batcher.time.perf_counter", lambda: next(clock))
    answer = bench.submit(1)
    await bench.turn()
    inline = not bench.runner.jobs
    await bench.run_all()
    await answer
    return inline


@pytest.mark.parametrize(
    ("durations", "still_inline"),
    [((1, 1, 1), False), ((1, 1, 0, 1, 1), True), ((0.005,) * 5, True)],
    ids=["three on end", "a short one between", "not misjudged enough"],
)
async def test_misjudged_batches_end_the_runs_on_the_loop(
    durations: tuple[float, ...], still_inline: bool, monkeypatch: pytest.MonkeyPatch
):
    """Three inline runs on end that took far longer than expected send all later ones to the thread."""
    bench = Bench()
    bench.model.seconds = 1e-4
    for seconds in durations:
        assert await _run_taking(bench, seconds, monkeypatch)
    assert await _run_taking(bench, 0, monkeypatch) is still_inline


# Padding and parts


async def test_a_batch_is_padded_to_its_bucket_and_the_padding_cut_off():
    """The model is given as many rows as its plan wants, copies of the first; no caller sees them."""
    bench = Bench()
    bench.model.bucket = 4
    answers = [bench.submit(5), bench.submit(6, 7)]
    await bench.run_all()
    assert bench.ran() == [[5, 6, 7, 5]]
    assert [firsts(await answer) for answer in answers] == [[10], [12, 14]]
    assert bench.observer.runs == [3]


async def test_a_split_request_fails_as_one_when_a_part_of_it_fails():
    """With one part in error the whole request is, and what is left of it is not run."""
    bench = Bench()
    bench.model.poison = 1
    answer = bench.submit(*range(16))
    await bench.run_all()
    with pytest.raises(Internal, match="poisoned"):
        await answer
    assert [batch[0] for batch in bench.ran()] == [0, 4, 8]  # two were on their way already
    assert bench.observer.drops == {"cancelled": 1}


async def test_every_error_of_a_split_request_is_looked_at():
    """Where several parts fail, the first is raised and none is reported as never retrieved."""
    bench = Bench()
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    answer = bench.submit(*range(8), deadline=101)
    bench.clock.advance(2)
    await bench.run_all()
    with pytest.raises(DeadlineExceeded):
        await answer
    del answer
    gc.collect()  # an error that nobody looked at is reported when its future goes
    assert complaints == []
    assert bench.observer.drops == {"expired": 2}


async def test_a_split_request_that_is_cancelled_gives_up_all_its_parts():
    """When the caller of a split request leaves, none of the parts that wait is run."""
    bench = Bench()
    answer = bench.submit(*range(12))
    await bench.turn()
    answer.cancel()
    await bench.run_all()
    assert answer.cancelled()
    assert bench.ran() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert bench.observer.drops == {"cancelled": 1}


async def test_a_split_request_is_queued_as_a_whole_or_not_at_all():
    """A request of several batches for which only some room is left is refused, and leaves nothing behind."""
    bench = Bench()
    waiting = bench.submit(*range(8))
    with pytest.raises(Overloaded):
        bench.submit(*range(12))
    assert bench.batcher.queue.rows == 8
    await bench.run_all()
    await waiting


async def test_a_full_queue_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch):
    """Rule 3: the time to retry is that which the rows waiting take, at the measured rate."""
    bench = Bench(Limits(4, 8, 1 << 20))
    seconds = itertools.count(step=2)  # each run takes two seconds
    monkeypatch.setattr("service.batching.batcher.time.perf_counter", lambda: next(seconds))
    for _ in range(2):
        bench.submit(1, 2, 3, 4)
        await bench.run_all()
    first = bench.submit(1)
    await bench.turn()
    waiting = [bench.submit(1, 2, 3), bench.submit(4, 5, 6)]
    with pytest.raises(Overloaded) as refused:
        bench.submit(1, 2, 3)
    assert refused.value.retry_after_s == pytest.approx(6 / (4 / 2))
    await bench.run_all()
    await asyncio.gather(first, *waiting)
