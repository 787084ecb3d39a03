"""Planning beside serving: when it is a version's turn, what changes then, and what happens when it goes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from service.batching.queue import Limits
from service.metrics import Metrics
from service.predictor import ModelRef
from service.registry.lifecycle import State
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from service.runtime.memory import MemoryUse
from service.runtime.records import Chosen, Difference, SignatureRecord
from tests.fakes import FakeModel, rows


class Planned(FakeModel):
    """A model that finds better plans once it is let; `parallel` batches run at once by those."""

    needs_planning = True
    is_planned = False

    def __init__(self) -> None:
        super().__init__()
        self.plans = {"serving_default": SignatureRecord({8: Chosen("signature", 8, 0.1)})}
        self.may_plan = threading.Event()
        self.planning = asyncio.Event()
        self.finds = True
        self.fault: Exception | None = None
        self.cancelled = 0
        self._loop = asyncio.get_running_loop()

    def warm_up(self) -> dict[str, SignatureRecord]:
        return dict(self.plans)

    def plan(self, tell: Callable[[str], None] = lambda line: None) -> bool:
        self._loop.call_soon_threadsafe(self.planning.set)
        assert self.may_plan.wait(30), "nobody let it plan"
        if self.fault is not None:
            raise self.fault
        if not self.finds or self.cancelled:
            return False
        self.plans = {
            "serving_default": SignatureRecord(
                {8: Chosen("xla", 8, 0.01)}, invariance=Difference(1e-7, 2e-7), best_rows=2
            )
        }
        self.best_rows, self.parallel = 2, 2
        self.memory = {"CPU": MemoryUse(700, 900)}
        return True

    def cancel_planning(self) -> None:
        self.cancelled += 1
        self.may_plan.set()


class Served:
    """A registry that serves models by name, each as version 1."""

    def __init__(self, models: Mapping[str, FakeModel]) -> None:
        self.metrics = Metrics()
        sources = tuple(Source(name, 1, Kind.SAVED_MODEL, Path(name)) for name in models)
        options = RegistryOptions(
            lambda source: source.path, lambda path, config: models[path.name], Limits(8, 64, 1 << 20)
        )
        self.registry = Registry(Repository(sources), options, self.metrics)

    def plans(self) -> set[str]:
        """Those that a scrape shows."""
        families = self.metrics.registry.collect()
        return {s.labels["plan"] for f in families for s in f.samples if s.name == "kiln_plan_info"}

    async def answers(self, name: str = "cat") -> bool:
        handle = self.registry.acquire(ModelRef(name))
        try:
            outputs = await handle.submit(handle.signatures["serving_default"], rows(1.0), None)
            return bool((outputs["y"] == 2.0).all())
        finally:
            handle.release()

    async def unload(self, name: str) -> None:
        """Let a model go, within 30 s."""
        model = self.registry._models[name]
        model.is_enabled = False
        await asyncio.wait_for(model.reconcile(), 30)

    async def planned(self, name: str = "cat") -> None:
        """Wait until the planning of a model is over."""
        task = self.registry._models[name].versions[0]._planning
        assert task is not None
        await asyncio.wait_for(asyncio.shield(task), 30)


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Callable[..., Served]]:
    started: list[tuple[Served, Mapping[str, FakeModel]]] = []

    def serve(**models: FakeModel) -> Served:
        started.append((Served(models), models))
        return started[-1][0]

    yield serve
    for served, models in started:
        for model in models.values():
            if isinstance(model, Planned):
                model.may_plan.set()
        await served.registry.stop(5.0)


async def test_what_plans_take_is_counted_as_the_versions_memory(serve: Callable[..., Served]) -> None:
    """Once they are in use; in the status, the budget and the metric."""
    model = Planned()
    model.memory = {"CPU": MemoryUse(500, 500)}
    served = serve(cat=model)
    await served.registry.load_all()

    def held() -> list[int | None]:
        (status,) = served.registry.statuses(ModelRef("cat"))
        value = served.metrics.registry.get_sample_value(
            "kiln_model_memory_bytes", {"model": "cat", "version": "1", "device": "CPU"}
        )
        return [status.memory_bytes, int(value or 0)]

    assert held() == [500, 500]
    model.may_plan.set()
    await served.planned()
    assert held() == [700, 700]


@pytest.mark.parametrize(
    ("is_known", "text"),
    [(False, "looking for its fastest plans"), (True, "loading TensorFlow, which it did not wait for")],
)
async def test_the_log_says_what_is_done_behind(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture, is_known: bool, text: str
) -> None:
    """Finding plans takes a minute; those that are known need only what they left for later."""
    caplog.set_level(logging.INFO, "kiln.registry")
    model = Planned()
    model.is_known = is_known
    model.may_plan.set()
    served = serve(cat=model)
    await served.registry.load_all()
    await served.planned()
    assert [m for m in caplog.messages if text in m] == [f"cat v1: {text}"]


async def test_a_version_serves_while_it_is_planned(serve: Callable[..., Served]) -> None:
    """It is ready before planning begins, answers while it goes on, and runs by the new plans after it."""
    model = Planned()
    served = serve(cat=model)
    await served.registry.load_all()
    await model.planning.wait()
    assert served.plans() == {"signature"}
    assert await served.answers()
    model.may_plan.set()
    await served.planned()
    (status,) = served.registry.statuses(ModelRef("cat"))
    assert (status.state, status.plans, status.batch_difference) == (State.READY, "xla", 1e-7)
    assert served.plans() == {"xla"}
    batcher = served.registry._models["cat"].versions[0].batcher
    assert batcher is not None
    assert batcher._runner.parallel == 2
    assert await served.answers()


async def test_what_finds_nothing_changes_nothing(serve: Callable[..., Served]) -> None:
    """A child that died leaves the signature plan in use."""
    model = Planned()
    model.finds = False
    model.may_plan.set()
    served = serve(cat=model)
    await served.registry.load_all()
    await served.planned()
    assert served.plans() == {"signature"}
    assert await served.answers()


async def test_a_fault_in_planning_is_logged(serve: Callable[..., Served], caplog: pytest.LogCaptureFixture) -> None:
    """The version is served as before."""
    model = Planned()
    model.fault = RuntimeError("a bug")
    model.may_plan.set()
    served = serve(cat=model)
    await served.registry.load_all()
    await served.planned()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.getMessage() == "cat v1: unexpected error while planning; it is served as before"
    assert await served.answers()


async def test_a_model_that_needs_none_is_not_planned(serve: Callable[..., Served]) -> None:
    """One whose plans are known, or that has only one."""
    model = Planned()
    model.needs_planning = False
    served = serve(cat=model)
    await served.registry.load_all()
    assert served.registry._models["cat"].versions[0]._planning is None


async def test_models_are_planned_one_after_another(serve: Callable[..., Served]) -> None:
    """Two at once would disturb each other's measurements."""
    first, second = Planned(), Planned()
    served = serve(cat=first, dog=second)
    await served.registry.load_all()
    await asyncio.wait(
        [asyncio.ensure_future(m.planning.wait()) for m in (first, second)], return_when="FIRST_COMPLETED"
    )
    begun, other = (first, second) if first.planning.is_set() else (second, first)
    assert not other.planning.is_set()
    begun.may_plan.set()
    await other.planning.wait()
    other.may_plan.set()
    await served.planned("cat")
    await served.planned("dog")


async def test_a_version_that_goes_ends_its_planning(serve: Callable[..., Served]) -> None:
    """Its child is ended, and the model is closed only when nobody is in it any more."""
    model = Planned()
    served = serve(cat=model)
    await served.registry.load_all()
    await model.planning.wait()
    await served.unload("cat")
    assert (model.cancelled, model.closed) == (1, True)
    assert served.plans() == set()


async def test_a_version_that_goes_does_not_wait_for_its_turn(serve: Callable[..., Served]) -> None:
    """While another model is planned one that waits for it is unloaded at once, and never planned."""
    models = {"cat": Planned(), "dog": Planned()}
    served = serve(**models)
    await served.registry.load_all()
    await asyncio.wait(
        [asyncio.ensure_future(m.planning.wait()) for m in models.values()], return_when="FIRST_COMPLETED"
    )
    (begun,) = [name for name, model in models.items() if model.planning.is_set()]
    (other,) = models.keys() - {begun}
    await served.unload(other)
    assert models[other].closed
    models[begun].may_plan.set()
    await served.planned(begun)
    assert not models[other].planning.is_set()
