"""The thread that runs blocking jobs for the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from service.batching.runner import ThreadRunner, result_of
from tests.fakes import FakeRunner


@pytest_asyncio.fixture
async def runner() -> AsyncIterator[ThreadRunner]:
    """A runner that is closed at the end, and whose thread then ends."""
    runner = ThreadRunner("kiln-test", asyncio.get_running_loop())
    yield runner
    runner.close()
    await asyncio.to_thread(runner._threads[0].join, 10)
    assert not runner._threads[0].is_alive()


async def test_a_result_comes_back_from_the_thread(runner: ThreadRunner):
    """A job runs in the runner's own thread, and its result is awaited on the loop."""
    assert await result_of(runner, lambda: threading.current_thread().name) == "kiln-test"
    assert threading.current_thread().name != "kiln-test"


async def test_done_is_called_on_the_loop(runner: ThreadRunner):
    """The result is reported in the event loop's thread, where everything else happens."""
    reported: asyncio.Future[tuple[Any, int]] = asyncio.get_running_loop().create_future()
    runner.start(lambda: 7, lambda result: reported.set_result((result, threading.get_ident())))
    assert await reported == (7, threading.get_ident())


async def test_jobs_run_one_after_another_in_order(runner: ThreadRunner):
    """Jobs do not overlap, and finish in the order in which they were started."""
    running, seen = [0], []

    def job(number: int) -> int:
        running[0] += 1
        assert running[0] == 1
        seen.append(number)
        running[0] -= 1
        return number

    results = await asyncio.gather(*(result_of(runner, lambda n=n: job(n)) for n in range(20)))  # type: ignore[misc]
    assert results == seen == list(range(20))


async def test_what_a_job_raises_is_raised_to_its_waiter_and_the_next_job_runs(runner: ThreadRunner):
    """A job that fails ends neither the thread nor anyone else's job."""

    def fail() -> None:
        raise ValueError("no such weight")

    with pytest.raises(ValueError, match="no such weight"):
        await result_of(runner, fail)
    assert await result_of(runner, lambda: 1) == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_a_result_that_nobody_waits_for_any_more_is_let_go(fails: bool):
    """When the waiter is cancelled the job's result, or error, disturbs nobody."""
    runner = FakeRunner()
    waiting = asyncio.ensure_future(result_of(runner, lambda: 1 // (0 if fails else 1)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    runner.run_next()
    assert waiting.cancelled()


async def test_close_lets_started_jobs_finish():
    """After `close` the thread ends, but first it does what was started."""
    runner = ThreadRunner("kiln-test", asyncio.get_running_loop())
    may_run = threading.Event()
    answers = [asyncio.ensure_future(result_of(runner, may_run.wait)) for _ in range(2)]
    await asyncio.sleep(0)
    runner.close()
    may_run.set()
    assert await asyncio.gather(*answers) == [True, True]
    await asyncio.to_thread(runner._threads[0].join, 10)
    assert not runner._threads[0].is_alive()


def test_a_job_that_outlives_its_loop_is_not_reported():
    """A result for a loop that is closed already has no one to go to: it is dropped, the thread goes on."""
    loop = asyncio.new_event_loop()
    loop.close()
    runner = ThreadRunner("kiln-test", loop)
    ran = threading.Event()
    runner.start(lambda: 1, lambda _: None)
    runner.start(ran.set, lambda _: None)
    assert ran.wait(10)
    runner.close()
    runner._threads[0].join(10)
    assert not runner._threads[0].is_alive()


async def test_a_loop_that_is_open_and_refuses_is_a_fault(monkeypatch: pytest.MonkeyPatch, runner: ThreadRunner):
    """Only a closed loop is an excuse for a result that cannot be told."""

    def refuse(*args: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", refuse)
    with pytest.raises(RuntimeError, match="no"):
        runner._tell(lambda _: None, 1)
    monkeypatch.undo()


async def test_a_runner_is_a_daemon(runner: ThreadRunner):
    """A job that hangs does not keep the process from ending."""
    assert runner._threads[0].daemon


async def test_a_runner_with_several_threads_runs_as_many_jobs_at_once():
    """With two threads two jobs run beside each other, a third waits; both threads end after `close`."""
    runner = ThreadRunner("kiln-test", asyncio.get_running_loop(), parallel=2)
    assert runner.parallel == 2
    both_run = threading.Barrier(3)
    may_end = threading.Event()

    def job() -> str:
        both_run.wait(10)
        assert may_end.wait(10)
        return threading.current_thread().name

    answers = [asyncio.ensure_future(result_of(runner, job)) for _ in range(2)]
    third = asyncio.ensure_future(result_of(runner, may_end.is_set))
    await asyncio.to_thread(both_run.wait, 10)
    assert not third.done()
    may_end.set()
    assert sorted(await asyncio.gather(*answers)) == ["kiln-test-0", "kiln-test-1"]
    assert await third
    runner.close()
    for thread in runner._threads:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


async def test_a_runner_that_is_widened_runs_more_at_once():
    """Jobs that were started before go on; it is never narrowed, and all of its threads end."""
    runner = ThreadRunner("kiln-test", asyncio.get_running_loop())
    barrier = threading.Barrier(3)
    waiting = [asyncio.ensure_future(result_of(runner, lambda: barrier.wait(30))) for _ in range(3)]
    runner.widen(3)
    runner.widen(2)
    assert runner.parallel == 3
    assert sorted(await asyncio.gather(*waiting)) == [0, 1, 2]
    assert [thread.name for thread in runner._threads] == ["kiln-test", "kiln-test-1", "kiln-test-2"]
    runner.close()
    for thread in runner._threads:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
