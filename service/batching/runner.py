"""The thread that runs a version's batches, one after another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol, TypeVar

T = TypeVar("T")


class Runner(Protocol):
    """Runs jobs in order, away from the event loop."""

    def start(self, job: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        """Queue `job`; `done` is called on the event loop with its result, or what it raised."""

    def close(self) -> None:
        """Stop after the jobs that were started."""


class ThreadRunner:
    """A `Runner` with one thread.

    A bare thread and a `SimpleQueue` rather than an executor: a batch costs one wake-up each way
    and no pair of linked futures.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def start(self, job: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        def work() -> None:
            result: T | Exception
            try:
                result = job()
            except Exception as error:  # noqa: BLE001 - handed to `done`, which decides
                result = error
            self._tell(done, result)

        self._jobs.put(work)

    def close(self) -> None:
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
