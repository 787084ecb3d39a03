"""Room for models: what does not fit is refused with the numbers, what is idle goes, what is asked for comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from service.errors import Unavailable
from service.predictor import ModelRef, Predictor
from service.registry.config import ModelConfig
from service.registry.lifecycle import State
from service.registry.version import Memory
from service.runtime.memory import MemoryUse
from tests.fakes import FakeModel, rows
from tests.unit.test_registry_changes import World

MB = 2**20
Make = Callable[..., World]


class Sized(FakeModel):
    """Takes so many MiB of the CPU's memory."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.memory = {"CPU": MemoryUse(megabytes * MB, megabytes * MB)}


class Ledger:
    """Needs by path, a budget, and what was remembered."""

    def __init__(self, budget_mb: int) -> None:
        self.needs_mb: dict[str, int] = {}
        self.remembered: list[str] = []
        self.budget_mb = budget_mb

    def memory(self) -> Memory:
        return Memory(self._needs, self._remember, lambda memory: self.budget_mb * MB)

    def _needs(self, path: Path, config: ModelConfig) -> Mapping[str, int]:
        return {"CPU": self.needs_mb[str(path)] * MB}

    def _remember(self, path: Path, config: ModelConfig, use: Mapping[str, MemoryUse]) -> None:
        self.remembered.append(str(path))


@pytest_asyncio.fixture
async def world() -> AsyncIterator[Make]:
    """Makes worlds with a budget, and ends them."""
    made: list[World] = []

    def make(ledger: Ledger, sizes_mb: Mapping[str, int], *on_demand: str) -> World:
        configs = {name: ModelConfig(on_demand=True) for name in on_demand}
        w = World(configs, memory=ledger.memory())
        for key, size in sizes_mb.items():
            w.put(key, Sized(size))
            ledger.needs_mb[key] = size
        made.append(w)
        return w

    yield make
    for each in made:
        for _, model in each.files.values():
            if isinstance(model, FakeModel):
                model.unblock()
        await each.registry.stop(5.0)
        each.runner.close()


async def predict(w: World, name: str, timeout_s: float | None = 10.0) -> float:
    """As a front end asks: with a deadline."""
    predictor = Predictor(w.registry, w.metrics)
    with predictor.request(ModelRef(name), "rest-tfs") as request:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        prediction = await request.predict(deadline, _decode)
    return float(prediction.outputs["y"][0, 0])


def _decode(signatures: Any) -> Any:
    from service.predictor import Decoded

    return Decoded(signatures["serving_default"], rows(1))


async def test_what_does_not_fit_is_refused_with_the_numbers(world: Make):
    """Needed, free, the budget and who holds it; the others go on."""
    ledger = Ledger(budget_mb=100)
    w = world(ledger, {"a/1": 70, "b/1": 40})
    await w.follow()
    assert w.states("a") == {1: State.READY}
    (status,) = w.registry.statuses(ModelRef("b"))
    assert status.state is State.FAILED
    assert status.reason == (
        "it needs 40.0 MiB of CPU memory, but 30.0 MiB of the budget of 100.0 MiB are free; "
        "held by a v1 (70.0 MiB, not on demand)"
    )
    assert ledger.remembered == ["a/1"]
    assert w.value("kiln_model_memory_bytes", model="a", version="1", device="CPU") == 70 * MB
    assert w.value("kiln_memory_budget_bytes", device="CPU") == 100 * MB


async def test_a_replacement_that_fails_leaves_the_books_as_they_were(world: Make):
    """The version that goes on serving still counts with what it holds."""
    ledger = Ledger(budget_mb=100)
    w = world(ledger, {"a/1": 70})
    await w.follow()
    w.put("a/1", Cold(), "other files")
    await w.follow()
    assert w.value("kiln_model_memory_bytes", model="a", version="1", device="CPU") == 70 * MB
    assert await predict(w, "a") == 2.0


class Cold(Sized):
    """Fails at warm-up."""

    def __init__(self) -> None:
        super().__init__(10)

    def warm_up(self) -> Any:
        raise ValueError("cold")


async def test_a_model_on_demand_is_loaded_by_its_first_request(world: Make):
    """Not before; the request waits for it, and the status says that it is waited for."""
    ledger = Ledger(budget_mb=100)
    w = world(ledger, {"a/1": 10}, "a")
    await w.follow()
    assert w.loads == []
    assert w.registry.can_serve()
    (status,) = w.registry.statuses(ModelRef("a"))
    assert (status.state, status.reason) == (State.UNLOADED, "it is loaded at its next request")
    assert await predict(w, "a") == 2.0
    assert w.loads == ["a/1"]
    await w.follow()
    assert await predict(w, "a") == 2.0
    assert w.loads == ["a/1"]


async def test_the_least_recently_used_idle_model_goes_for_room(world: Make):
    """As few as suffice; one that went comes back at its next request."""
    ledger = Ledger(budget_mb=100)
    w = world(ledger, {"a/1": 40, "b/1": 40, "c/1": 40}, "a", "b", "c")
    await w.follow()
    for name in ("a", "b", "a"):
        assert await predict(w, name) == 2.0
    assert await predict(w, "c") == 2.0
    assert w.states("b") == {1: State.UNLOADED}
    assert w.states("a") == w.states("c") == {1: State.READY}
    assert w.files["b/1"][1].closed  # type: ignore[union-attr]
    assert w.value("kiln_model_memory_bytes", model="b", version="1", device="CPU") is None
    assert await predict(w, "b") == 2.0
    assert w.states("a") == {1: State.UNLOADED}


async def test_a_model_in_use_does_not_go(world: Make):
    """The one that needs room is refused while the other answers."""
    ledger = Ledger(budget_mb=50)
    w = world(ledger, {"a/1": 40, "b/1": 40}, "a", "b")
    await w.follow()
    assert await predict(w, "a") == 2.0
    busy: FakeModel = w.files["a/1"][1]  # type: ignore[assignment]
    busy.block()
    held = asyncio.create_task(predict(w, "a"))
    await asyncio.to_thread(busy.entered.acquire)
    await asyncio.to_thread(busy.entered.acquire)
    with pytest.raises(Unavailable, match=r"needs 40.0 MiB .*held by a v1 \(40.0 MiB, in use\)"):
        await predict(w, "b")
    busy.unblock()
    assert await held == 2.0


async def test_a_request_waits_for_its_model_only_until_its_deadline(world: Make):
    """Then it is refused, while the load goes on for the next one."""
    ledger = Ledger(budget_mb=100)
    w = world(ledger, {"a/1": 10}, "a")
    await w.follow()
    loading, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    model = w.files["a/1"][1]

    def load(path: Path, config: ModelConfig) -> Any:
        loop.call_soon_threadsafe(loading.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
        return model

    object.__setattr__(w.options, "load", load)
    with pytest.raises(Unavailable, match="version 1 is LOADING, not READY"):
        await predict(w, "a", timeout_s=0.05)
    assert loading.is_set()
    go_on.set()
    assert await predict(w, "a") == 2.0


async def test_many_requests_for_a_sleeping_model_load_it_once(world: Make):
    """All of them are answered."""
    ledger = Ledger(budget_mb=100)
    w = world(ledger, {"a/1": 10}, "a")
    await w.follow()
    assert await asyncio.gather(*(predict(w, "a") for _ in range(20))) == [2.0] * 20
    assert w.loads == ["a/1"]


async def test_a_sleeping_model_that_cannot_be_loaded_tells_why(world: Make):
    """Its requests get the reason, and do not wait for ever."""
    ledger = Ledger(budget_mb=5)
    w = world(ledger, {"a/1": 10}, "a")
    await w.follow()
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"needs 10\.0 MiB of CPU memory, but 5\.0 MiB of the budget"):
            await predict(w, "a", timeout_s=None)
