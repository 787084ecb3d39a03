"""The order in which a start brings models in: what takes long holds up nothing else."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from service.batching.queue import Limits
from service.metrics import Metrics
from service.registry.lifecycle import State
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from tests.fakes import FakeModel

HANGS = "hangs"


class Start:
    """A registry of `HANGS`, whose conversion waits for `go`, and of the models in `others`."""

    def __init__(self, others: dict[str, Kind], **options: Any) -> None:
        self.go = threading.Event()
        self.model = FakeModel()
        sources = tuple(Source(name, 1, kind, Path(name)) for name, kind in {HANGS: Kind.KERAS, **others}.items())
        options_ = RegistryOptions(self._materialize, lambda *_: self.model, Limits(8, 64, 1 << 20), **options)
        self.registry = Registry(Repository(sources), options_, Metrics())
        self.loading = asyncio.create_task(self.registry.load_all())

    def _materialize(self, source: Source) -> Path:
        assert source.model != HANGS or self.go.wait(20)
        return source.path

    def state(self, name: str) -> State:
        return next(status.state for status in self.registry.all_statuses() if status.model == name)

    async def until_ready(self, name: str) -> None:
        async with asyncio.timeout(20):
            while self.state(name) is not State.READY:
                await asyncio.sleep(0)

    async def finish(self) -> None:
        self.go.set()
        await self.loading
        await self.registry.stop(1.0)


@pytest.mark.parametrize(
    ("kind", "fetches"),
    [pytest.param(Kind.SAVED_MODEL, 1, id="what needs no conversion"), pytest.param(Kind.KERAS, 2, id="its neighbour")],
)
async def test_a_slow_conversion_does_not_hold_up_others(kind: Kind, fetches: int) -> None:
    """A SavedModel that is at hand takes no turn; other conversions run beside."""
    start = Start({"quick": kind}, parallel_fetches=fetches)
    await start.until_ready("quick")
    assert start.state(HANGS) is State.LOADING
    await start.finish()
    assert start.state(HANGS) is not State.FAILED


async def test_conversions_are_bounded() -> None:
    """With one turn, the second file waits for the first."""
    start = Start({"next": Kind.KERAS, "quick": Kind.SAVED_MODEL}, parallel_fetches=1)
    await start.until_ready("quick")
    assert (start.state(HANGS), start.state("next")) == (State.LOADING, State.NEW)
    await start.finish()


async def test_plans_are_looked_for_when_all_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring beside conversions would disturb both."""
    planned = asyncio.Event()
    monkeypatch.setattr(FakeModel, "needs_planning", property(lambda _: True))
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(FakeModel, "plan", lambda *_: loop.call_soon_threadsafe(planned.set) is None)
    start = Start({"quick": Kind.SAVED_MODEL})
    await start.until_ready("quick")
    for _ in range(100):
        await asyncio.sleep(0)
    assert not planned.is_set()
    start.go.set()
    await start.loading
    await asyncio.wait_for(planned.wait(), 20)
    await start.finish()
