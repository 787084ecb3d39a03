"""The HTTP server itself, over sockets: dates, draining, and rest while nothing is asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from email.utils import formatdate, parsedate_to_datetime

import pytest

from service.rest import server
from service.rest.http import Receive, Scope, Send, answer_json
from service.rest.server import RestServer

ASK = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await answer_json(send, 200, {})


class Started:
    """A server on a port of its own."""

    def __init__(self) -> None:
        self.server = RestServer(app, "127.0.0.1", 0)
        self.port = 0

    async def ask(self) -> dict[str, str]:
        """The headers of an answer; of several of one name, the last."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(ASK)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[1:-1]
        writer.close()
        return dict(line.lower().split(": ", 1) for line in lines)


@pytest.fixture
async def started(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Started]:
    monkeypatch.setattr(logging.getLogger("uvicorn.access"), "propagate", True)  # uvicorn turns it off for good
    one = Started()
    one.port = await one.server.start()
    yield one
    await one.server.stop()


async def test_answers_are_dated(started: Started):
    """By the second, though nothing was asked for a while."""
    for pause_s in (0.0, 1.5):
        await asyncio.sleep(pause_s)
        sent = parsedate_to_datetime((await started.ask())["date"]).timestamp()
        assert time.time() - sent < 2.1


async def test_while_draining_every_answer_closes_its_connection(started: Started):
    """However long it takes."""
    assert "connection" not in await started.ask()
    started.server.refuse_new()
    for pause_s in (0.0, 1.2):
        await asyncio.sleep(pause_s)
        assert (await started.ask())["connection"] == "close"


async def test_it_rests_while_nobody_is_connected_and_stops_at_once(started: Started, monkeypatch: pytest.MonkeyPatch):
    """The date is told anew each second while somebody is, and then no more."""
    dated = 0

    def formatted(now: float, *, usegmt: bool) -> str:
        nonlocal dated
        dated += 1
        return formatdate(now, usegmt=usegmt)

    monkeypatch.setattr(server, "formatdate", formatted)
    _, writer = await asyncio.open_connection("127.0.0.1", started.port)
    await asyncio.sleep(2.3)
    assert dated in (3, 4)
    writer.close()
    await asyncio.sleep(1.2)
    dated = 0
    await asyncio.sleep(1.2)
    assert dated == 0
    before = time.monotonic()
    await started.server.stop()
    assert time.monotonic() - before < 0.8
