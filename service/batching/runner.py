"""Threads that run blocking jobs, one after another: a version's batches, or the loading of models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeVar

T = TypeVar("T")


class Runner(Protocol):
    """Runs jobs away from the event loop, begun in order, `parallel` at once."""

    parallel: int

    def start(self, job: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        """Queue `job`; `done` is called on the event loop with its result, or what it raised."""

    def widen(self, parallel: int) -> None:
        """Run `parallel` jobs at once from now on, if that is more than before."""

    def close(self) -> None:
        """Stop after the jobs that were started."""


async def result_of(runner: Runner, job: Callable[[], T]) -> T:
    """Run `job` and wait for it; raises what it raises."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def done(result: T | Exception) -> None:
        if future.done():
            return  # nobody waits any more
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    runner.start(job, done)
    return await future


class ThreadRunner:
    """A `Runner` with `parallel` threads.

    A bare thread and a `SimpleQueue` rather than an executor: a batch costs one wake-up each way
    and no pair of linked futures, and a job that hangs does not keep the process from ending.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, parallel: int = 1) -> None:
        self.parallel = parallel
        self._name = name
        self._loop = loop
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        names = [name] if parallel == 1 else [f"{name}-{number}" for number in range(parallel)]
        self._threads = [threading.Thread(target=self._work, name=each, daemon=True) for each in names]
        for thread in self._threads:
            thread.start()

    def start(self, job: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        def work() -> None:
            result: T | Exception
            try:
                result = job()
            except Exception as error:  # noqa: BLE001 - handed to `done`, which decides
                result = error
            self._tell(done, result)

        self._jobs.put(work)

    def widen(self, parallel: int) -> None:
        """Run `parallel` jobs at once from now on, if that is more than before."""
        for number in range(self.parallel, parallel):
            thread = threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self.parallel = max(self.parallel, parallel)

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)

    def _tell(self, done: Callable[[T | Exception], None], result: T | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(done, result)
        except RuntimeError:
            if not self._loop.is_closed():
                raise  # a closed loop has no one left to tell

    def _work(self) -> None:
        while (work := self._jobs.get()) is not None:
            work()
