"""A front end that does not start is tried again, later each time, and a port that is taken is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.frontend.hub import Hub
from service.frontend.supervisor import FrontEnds
from service.metrics import Metrics
from service.settings import Settings


class FakeProcess:
    """Dies at once, and cannot be started anew for some times."""

    number = 1

    def __init__(self, failures: int) -> None:
        self.is_running = False
        self.failures = failures
        self.has_ended = False
        self.deaths = 0

    async def start(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("no more processes")
        self.is_running = True

    async def until_gone(self) -> str:
        self.deaths += 1
        if self.deaths > 1:
            await asyncio.Event().wait()
        return "signal 9"

    async def end(self) -> None:
        self.has_ended = True


async def test_one_that_does_not_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """After a wait that doubles up to a bound; each try is counted and told with the reason."""
    hub, process, waits = Hub(Metrics()), FakeProcess(failures=7), []
    front_ends = FrontEnds(Settings.model_validate({"models": "models"}), hub)
    keeping: asyncio.Task[None] | None = None

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("service.frontend.supervisor.asyncio.sleep", wait)
    fake: Any = process
    keeping = asyncio.create_task(front_ends._keep(fake))
    async with asyncio.timeout(10.0):
        while process.deaths < 2:
            await asyncio.wait([keeping], timeout=0)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert "kiln_frontend_restarts_total 8.0" in hub.metrics.render().decode()
    assert "front end 1 has died (signal 9); it is started anew" in caplog.text
    assert "front end 1 has died (no more processes); it is started anew" in caplog.text
    assert process.has_ended


async def test_none_is_started_anew_while_the_server_stops():
    """It was asked to go."""
    hub, process = Hub(Metrics()), FakeProcess(failures=0)
    front_ends = FrontEnds(Settings.model_validate({"models": "models"}), hub)
    front_ends.refuse_new()
    fake: Any = process
    await front_ends._keep(fake)
    assert not process.is_running
    assert process.has_ended
