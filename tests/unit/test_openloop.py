"""The open-loop driver before a made-up server, in a loop whose time passes only while nothing is to be done."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram

from load_tests.openloop import report, text
from load_tests.traces import constant
from service.bench.clients import Answer, Connection
from service.bench.driving import Record, drive
from tests.fakes import FakeClock


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting it moves the clock."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self._clock.advance(timeout)
        return super().select(0)


class StallingServer:
    """Answers in a millisecond, one request at a time, but stands still from one second to another."""

    def __init__(self, stall: tuple[float, float], answer: Answer = Answer.OK) -> None:
        self._stall = stall
        self._answer = answer
        self._turn = asyncio.Lock()
        self._start = asyncio.get_running_loop().time()

    async def send(self, number: int) -> Answer:
        async with self._turn:
            now = asyncio.get_running_loop().time() - self._start
            begin, end = self._stall
            await asyncio.sleep(0.001 + (end - now if begin <= now < end else 0.0))
        return self._answer


async def closed_loop(seconds: float, gap_s: float, send: Callable[[int], Awaitable[Answer]]) -> Record:
    """What a closed loop writes down: the next request only after the answer."""
    loop = asyncio.get_running_loop()
    start, record = loop.time(), Record()
    while (sent := loop.time() - start) < seconds:
        record.answers.append(await send(0))
        record.due.append(sent)
        record.sent.append(sent)
        record.done.append(loop.time() - start)
        await asyncio.sleep(max(sent + gap_s - (loop.time() - start), 0.0))
    return record


def in_made_up_time(make: Callable[[], Any]) -> Any:
    """Run a coroutine to its end; sleeping costs no time."""
    clock = FakeClock()
    loop = asyncio.SelectorEventLoop(_JumpingSelector(clock))
    loop.time = clock  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(make())
    finally:
        loop.close()


def test_a_stall_is_not_hidden():
    """Of ten seconds at 100 requests/s the server stands still for one: a tenth waits, and p99 says so.

    A closed loop sends one request into the stall and then none, so its p99 is that of a healthy server.
    """

    async def both() -> tuple[Record, Record]:
        due = constant(100, 10)
        return (
            await drive(due, StallingServer((5.0, 6.0)).send),
            await closed_loop(10, 0.01, StallingServer((5.0, 6.0)).send),
        )

    opened, closed = (report(record, 10.0, 0.1) for record in in_made_up_time(both))
    assert opened.ok == 1000
    assert opened.from_due["p99"] == pytest.approx(910, abs=15)
    assert opened.from_due["p50"] == pytest.approx(1.0, abs=0.1)
    assert closed.from_due["p99"] < 2
    assert closed.from_due["max"] == pytest.approx(1001, abs=2)
    assert 1000 - 10 * opened.goodput_per_s == pytest.approx(100, abs=2)
    assert (closed.ok, 10 * closed.goodput_per_s) == (901, 900)


def test_requests_are_sent_when_they_are_due():
    """In order, however long answers take, and none before its time."""
    sent: list[tuple[int, float]] = []

    async def go() -> Record:
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def send(number: int) -> Answer:
            sent.append((number, loop.time() - start))
            await asyncio.sleep(3.0)
            return Answer.OK

        return await drive(np.array([0.0, 0.5, 0.5, 2.0]), send)

    record = in_made_up_time(go)
    assert [number for number, _ in sent] == [0, 1, 2, 3]
    assert [when for _, when in sent] == pytest.approx([0.0, 0.5, 0.5, 2.0], abs=1e-6)
    assert [done - due for done, due in zip(record.done, record.due, strict=True)] == pytest.approx([3.0] * 4)


def test_what_is_not_answered_in_time_is_given_up():
    """After so much patience, counted from when the last request was sent."""

    async def go() -> Record:
        async def send(number: int) -> Answer:
            await asyncio.sleep(100.0 if number == 1 else 0.1)
            return Answer.OK

        return await drive(np.array([0.0, 1.0, 2.0]), send, patience_s=5.0)

    record = in_made_up_time(go)
    assert record.answers == [Answer.OK, Answer.OK, Answer.UNANSWERED]
    assert (record.due, record.done) == ([0.0, 2.0, 1.0], pytest.approx([0.1, 2.1, 7.0], abs=1e-3))


def test_nothing_more_is_sent_once_it_is_hopeless():
    """What is under way is still waited for."""

    async def go() -> Record:
        async def send(number: int) -> Answer:
            await asyncio.sleep(0.1)
            return Answer.REFUSED

        return await drive(constant(1.0, 10.0), send, hopeless=lambda record: len(record.due) > 2)

    assert len(in_made_up_time(go).due) == 4


def test_what_sending_raises_is_raised_at_the_end():
    """A fault of the driver is no answer of the server."""

    async def go() -> Record:
        async def send(number: int) -> Answer:
            raise KeyError(number)

        return await drive(constant(1.0, 3.0), send)

    with pytest.raises(KeyError, match="0"):
        in_made_up_time(go)


def test_a_driver_that_is_late_says_so():
    """What it could not send in time counts from when it was due, and is told apart."""
    record = Record([0.0, 1.0], [0.0, 1.5], [0.1, 1.6], [Answer.OK, Answer.OK])
    found = report(record, 2.0, 0.3)
    assert found.from_due["max"] == pytest.approx(600, rel=0.01)
    assert found.from_sent["max"] == pytest.approx(100, rel=0.01)
    assert found.late_p99_ms == pytest.approx(500, rel=0.01)
    assert found.goodput_per_s == 0.5


def test_refusals_and_failures_are_no_latencies():
    """They are counted, and only answers are measured; the histogram is HdrHistogram's own."""
    answers = [Answer.OK, Answer.REFUSED, Answer.FAILED]
    found = report(Record([0.0] * 3, [0.0] * 3, [0.01, 5.0, 5.0], answers), 1.0, 0.1)
    assert (found.ok, found.refused, found.failed, found.goodput_per_s) == (1, 1, 1, 1.0)
    assert HdrHistogram.decode(found.histogram).get_total_count() == 1
    assert "1 answered, 1 refused, 1 failed" in text(found)


async def test_an_answer_may_come_in_pieces():
    """It is whole once as many bytes have come as its head says."""
    connection = Connection()

    class Transport(asyncio.Transport):
        def write(self, data: Any) -> None: ...

    connection.connection_made(Transport())
    asking = asyncio.create_task(connection.ask(b"GET"))
    await asyncio.sleep(0)
    for piece in (b"HTTP/1.1 200 OK\r\nContent-", b"Length: 4\r\n\r\nab", b"cd"):
        assert not asking.done()
        connection.data_received(piece)
        await asyncio.sleep(0)
    assert (await asking).startswith(b"HTTP/1.1 200 ")
    broken = asyncio.create_task(connection.ask(b"GET"))
    await asyncio.sleep(0)
    connection.connection_lost(None)
    with pytest.raises(ConnectionError, match="closed the connection"):
        await broken
