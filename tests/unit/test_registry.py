"""The registry with models that are fakes: states, statuses, default versions, draining."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from service.batching.queue import Limits
from service.errors import InvalidArgument, KilnError, ModelLoadError, NotFound, Unavailable
from service.metrics import Metrics
from service.predictor import Handle, ModelRef
from service.registry.config import ModelConfig
from service.registry.lifecycle import State, VersionStatus
from service.registry.registry import Registry
from service.registry.repository import Kind, Problem, Repository, Source
from service.registry.version import RegistryOptions
from service.runtime.records import Chosen, SignatureRecord
from tests.fakes import DOUBLE, FakeModel, rows


class WatchedMetrics(Metrics):
    """Keeps every change of state that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[VersionStatus] = []
        self._events = {state: asyncio.Event() for state in State}

    def state_changed(self, status: VersionStatus) -> None:
        self.changes.append(status)
        self._events[status.state].set()
        super().state_changed(status)

    async def reached(self, state: State) -> None:
        """Wait until any version is in `state`."""
        await self._events[state].wait()

    def states(self, model: str) -> list[State]:
        return [change.state for change in self.changes if change.model == model]

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


class Warmed(FakeModel):
    """A model that is warm on a plan."""

    def warm_up(self) -> dict[str, SignatureRecord]:
        self.plans = {"serving_default": SignatureRecord({n: Chosen("signature", n, 0.01) for n in (1, 8)})}
        return self.plans


class Cold(FakeModel):
    """A model whose warm-up fails with `error`."""

    def warm_up(self) -> dict[str, SignatureRecord]:
        raise self.error


class Server:
    """A registry of fakes: `models` by ``name/version``; an exception stands for a load that fails."""

    def __init__(self, models: dict[str, FakeModel | Exception], *problems: Problem) -> None:
        self.models = models
        self.metrics = WatchedMetrics()
        self.materialized: list[Source] = []
        kinds = {"saved": Kind.SAVED_MODEL}
        sources = [
            Source(name, int(version), kinds.get(name, Kind.KERAS), Path(key))
            for key in models
            for name, _, version in [key.partition("/")]
        ]
        options = RegistryOptions(
            lambda source: self.materialize(source),  # noqa: PLW0108 - tests replace it
            self.load,
            Limits(8, 64, 1 << 20),
        )
        self.registry = Registry(Repository(tuple(sources), problems), options, self.metrics)

    def materialize(self, source: Source) -> Path:
        self.materialized.append(source)
        return Path("made") / source.path

    def load(self, path: Path, config: ModelConfig) -> Any:
        model = self.models[str(path.relative_to("made"))]
        if isinstance(model, Exception):
            raise model
        return model

    def unblock(self) -> None:
        for model in self.models.values():
            if isinstance(model, FakeModel):
                model.unblock()


Start = Callable[..., Any]


@pytest_asyncio.fixture
async def start() -> AsyncIterator[Start]:
    """Makes servers, loads them, and stops them at the end."""
    started: list[Server] = []

    async def start(models: dict[str, FakeModel | Exception], *problems: Problem) -> Server:
        server = Server(models, *problems)
        started.append(server)
        await server.registry.load_all()
        return server

    yield start
    for server in started:
        server.unblock()
        await server.registry.stop(5.0)


async def predict(handle: Handle, *values: float) -> list[float]:
    """Submit rows of `values` and give the handle back; the first number of each answered row."""
    try:
        outputs = await handle.submit(handle.signatures["serving_default"], rows(*values), None)
        return [float(row[0]) for row in outputs["y"]]
    finally:
        handle.release()


def version_held(server: Server, ref: ModelRef) -> int:
    """The version that a request for `ref` gets."""
    handle = server.registry.acquire(ref)
    handle.release()
    return handle.version


def refusal(error: type[KilnError], call: Callable[[ModelRef], object], ref: ModelRef) -> str:
    """What `call` raises for `ref`."""
    with pytest.raises(error) as caught:
        call(ref)
    assert type(caught.value) is error
    return str(caught.value)


async def test_a_version_goes_through_its_states(start: Start) -> None:
    """Loading shows each state in order, and stopping the rest."""
    server = await start({"cat/1": FakeModel()})
    assert server.metrics.states("cat") == [State.LOADING, State.WARMING, State.READY]
    assert await server.registry.stop(5.0)
    assert server.metrics.states("cat")[3:] == [State.DRAINING, State.UNLOADED]
    assert server.metrics.value("kiln_model_state", model="cat", version="1", state="UNLOADED") == 1.0


async def test_a_loaded_version_answers(start: Start) -> None:
    """A handle submits to its version's batcher and shows name, version and signatures."""
    server = await start({"cat/3": FakeModel()})
    handle = server.registry.acquire(ModelRef("cat"))
    assert (handle.model, handle.version, handle.signatures) == ("cat", 3, {"serving_default": DOUBLE})
    assert await predict(handle, 1, 2) == [2.0, 4.0]


async def test_loading_is_measured_and_plans_are_shown(start: Start) -> None:
    """The metrics have the time to load, and the plan of each bucket."""
    server = await start({"cat/1": Warmed()})
    assert server.metrics.value("kiln_model_load_seconds", model="cat", version="1") is not None
    labels = {"model": "cat", "version": "1", "signature": "serving_default", "plan": "signature"}
    assert server.metrics.value("kiln_plan_info", bucket_rows="8", **labels) == 1.0
    assert server.metrics.value("kiln_queue_rows", model="cat", version="1") == 0.0


@pytest.mark.parametrize(
    ("broken", "states", "reason"),
    [
        (ModelLoadError("it is damaged"), [State.LOADING, State.FAILED], "it is damaged"),
        (OSError("no disk"), [State.LOADING, State.FAILED], "OSError: no disk"),
        (Cold(), [State.LOADING, State.WARMING, State.FAILED], "ValueError: poisoned"),
    ],
)
async def test_a_model_that_fails_does_not_keep_others_from_serving(
    start: Start, broken: FakeModel | Exception, states: list[State], reason: str
) -> None:
    """Whatever loading or warm-up raises is that version's state and reason; the next model is loaded."""
    server = await start({"a/1": broken, "b/1": FakeModel()})
    assert server.metrics.states("a") == states
    assert server.registry.statuses(ModelRef("a")) == [VersionStatus("a", 1, State.FAILED, reason)]
    assert server.metrics.value("kiln_model_failed", model="a", version="1", reason=reason) == 1.0
    text = refusal(Unavailable, server.registry.acquire, ModelRef("a"))
    assert text == f"model 'a' version 1 is FAILED, not READY: {reason}"
    assert await predict(server.registry.acquire(ModelRef("b")), 1) == [2.0]


async def test_a_version_that_cannot_be_imported_is_not_loaded(start: Start) -> None:
    """A refusal by the importer is the reason shown."""
    server = Server({"a/1": FakeModel()})
    server.materialize = _refuse  # type: ignore[method-assign]
    await server.registry.load_all()
    assert server.registry.all_statuses() == [VersionStatus("a", 1, State.FAILED, "layer 'l' is refused")]


def _refuse(source: Source) -> Path:
    raise ModelLoadError("layer 'l' is refused")


@pytest.mark.parametrize(("model", "is_closed"), [(Cold(), True), (FakeModel(), False)])
async def test_a_model_that_fails_to_warm_up_is_closed(start: Start, model: FakeModel, is_closed: bool) -> None:
    """What a failed version holds is given back; a version that serves keeps it."""
    await start({"cat/1": model})
    assert model.closed == is_closed


async def test_only_the_highest_version_is_loaded(start: Start) -> None:
    """Of several versions on disk the highest is served; lower ones are not even read."""
    server = await start({"cat/2": FakeModel(), "cat/10": FakeModel(), "cat/9": FakeModel(), "dog/1": FakeModel()})
    assert [(s.model, s.version) for s in server.materialized] == [("cat", 10), ("dog", 1)]
    assert version_held(server, ModelRef("cat")) == 10
    assert server.registry.describe(ModelRef("cat")).versions == (10,)


async def test_a_version_may_be_addressed(start: Start) -> None:
    """A request may name the version; one that is not there is told with those that are."""
    server = await start({"cat/3": FakeModel()})
    assert version_held(server, ModelRef("cat", 3)) == 3
    text = refusal(NotFound, server.registry.check, ModelRef("cat", 4))
    assert text == "Servable not found for request: Specific(cat, 4); model 'cat' has version 3"


async def test_an_unknown_model_is_told_what_is_loaded(start: Start) -> None:
    """`NotFound` names the models that can be asked; those that failed are not among them."""
    server = await start({"b/1": FakeModel(), "a/1": FakeModel(), "c/1": ValueError("x")})
    text = refusal(NotFound, server.registry.check, ModelRef("half"))
    assert text == "Servable not found for request: Latest(half); loaded are a, b"
    text = refusal(NotFound, server.registry.check, ModelRef("half", 99))
    assert text == "Servable not found for request: Specific(half, 99); loaded are a, b"
    text = refusal(NotFound, server.registry.statuses, ModelRef("half"))
    assert text == "Could not find any versions of model half; loaded are a, b"


async def test_an_empty_repository_is_told(start: Start) -> None:
    """Without any model the texts say so, and stopping is no work."""
    server = await start({})
    text = refusal(NotFound, server.registry.check, ModelRef("half"))
    assert text == "Servable not found for request: Latest(half); no model is loaded"
    assert server.registry.model_names() == []
    assert await server.registry.stop(5.0)


@pytest.mark.parametrize("method", ["check", "acquire", "describe", "statuses"])
async def test_labels_are_refused(start: Start, method: str) -> None:
    """There are no labels, so that any is unknown."""
    server = await start({"cat/1": FakeModel()})
    text = refusal(InvalidArgument, getattr(server.registry, method), ModelRef("cat", label="stable"))
    assert text == "Unrecognized servable version label: stable"


async def test_folder_problems_are_told(start: Start) -> None:
    """A folder that could not be a version shows as FAILED in status and metrics, and in the refusal."""
    problems = (Problem("bad", None, "no version"), Problem("cat", 2, "nothing in it"))
    server = await start({"cat/1": FakeModel()}, *problems)
    assert server.registry.model_names() == ["bad", "cat"]
    assert server.registry.statuses(ModelRef("bad")) == [VersionStatus("bad", 0, State.FAILED, "no version")]
    assert server.metrics.value("kiln_model_failed", model="bad", version="", reason="no version") == 1.0
    assert server.metrics.value("kiln_model_failed", model="cat", version="2", reason="nothing in it") == 1.0
    text = refusal(Unavailable, server.registry.check, ModelRef("bad"))
    assert text == "model 'bad' could not be loaded: no version"
    assert version_held(server, ModelRef("cat")) == 1


async def test_statuses_are_newest_first(start: Start) -> None:
    """All versions of a model are told from the highest on; one may be asked for."""
    server = await start({"cat/2": FakeModel()}, Problem("cat", 3, "x"), Problem("cat", 1, "y"))
    ready = VersionStatus("cat", 2, State.READY)
    failed = [VersionStatus("cat", 3, State.FAILED, "x"), VersionStatus("cat", 1, State.FAILED, "y")]
    assert server.registry.statuses(ModelRef("cat")) == [failed[0], ready, failed[1]]
    assert server.registry.statuses(ModelRef("cat", 2)) == [ready]
    assert server.registry.statuses(ModelRef("cat", 1)) == [failed[1]]
    assert server.registry.all_statuses() == [failed[0], ready, failed[1]]
    text = refusal(NotFound, server.registry.statuses, ModelRef("cat", 7))
    assert text == "Could not find version 7 of model cat"


@pytest.mark.parametrize(("name", "platform"), [("cat", "keras"), ("saved", "tensorflow_savedmodel")])
async def test_a_model_is_described(start: Start, name: str, platform: str) -> None:
    """The metadata say in which form the model was handed over, and what it takes."""
    server = await start({f"{name}/4": FakeModel()})
    info = server.registry.describe(ModelRef(name))
    assert (info.name, info.version, info.versions, info.platform) == (name, 4, (4,), platform)
    assert info.signatures == {"serving_default": DOUBLE}


async def test_nothing_is_asked_before_it_is_loaded() -> None:
    """A version that waits for its turn is `Unavailable`, with its state."""
    server = Server({"cat/1": FakeModel()})
    assert server.registry.all_statuses() == [VersionStatus("cat", 1, State.NEW)]
    text = refusal(Unavailable, server.registry.check, ModelRef("cat"))
    assert text == "model 'cat' version 1 is NEW, not READY"


async def test_a_version_shows_its_state(start: Start) -> None:
    """`repr` tells the state, for logs and tests."""
    server = await start({"cat/1": FakeModel()})
    assert repr(server.registry._models["cat"]) == "<ServedModel cat: [<Version <cat v1 READY, 0 handles>>]>"


async def test_stop_finishes_what_was_accepted(start: Start) -> None:
    """A request under way is answered while the server stops; new ones are refused."""
    model = FakeModel()
    server = await start({"cat/1": model, "dog/1": ValueError("x")})
    model.block()
    request = asyncio.create_task(predict(server.registry.acquire(ModelRef("cat")), 4))
    await asyncio.to_thread(model.entered.acquire)
    stopping = asyncio.create_task(server.registry.stop(5.0))
    await server.metrics.reached(State.DRAINING)
    text = refusal(Unavailable, server.registry.acquire, ModelRef("cat"))
    assert text == "the server is stopping and takes no new requests"
    model.unblock()
    assert await request == [8.0]
    assert await stopping
    assert server.metrics.value("kiln_queue_rows", model="cat", version="1") is None


async def test_stop_gives_up_what_takes_too_long(start: Start) -> None:
    """Past the drain time the callers are told `Unavailable`, and stop says that it was not enough."""
    model = FakeModel()
    server = await start({"cat/1": model})
    model.block()
    request = asyncio.create_task(predict(server.registry.acquire(ModelRef("cat")), 4))
    await asyncio.to_thread(model.entered.acquire)
    assert not await server.registry.stop(0.01)
    with pytest.raises(Unavailable, match="the server stopped before this request was finished"):
        await request
    assert server.metrics.states("cat")[-1] is State.UNLOADED


async def test_answers_of_one_version_do_not_wait_for_another(start: Start) -> None:
    """Each version has its own thread: one that is busy does not delay the others."""
    slow, quick = FakeModel(), FakeModel()
    server = await start({"slow/1": slow, "quick/1": quick})
    slow.block()
    held = asyncio.create_task(predict(server.registry.acquire(ModelRef("slow")), 1))
    await asyncio.to_thread(slow.entered.acquire)
    assert await predict(server.registry.acquire(ModelRef("quick")), 5) == [10.0]
    assert not held.done()
    slow.unblock()
    assert await held == [2.0]


async def test_a_refused_request_is_counted(start: Start) -> None:
    """The batcher reports to the metrics of its version."""
    server = await start({"cat/1": FakeModel()})
    with pytest.raises(InvalidArgument):
        await predict(server.registry.acquire(ModelRef("cat")), *np.ones(65))
    await predict(server.registry.acquire(ModelRef("cat")), *np.ones(3))
    assert server.metrics.value("kiln_batch_rows_sum", model="cat", version="1") == 3.0


async def test_version_0_means_the_default_where_there_is_none(start: Start):
    """As OpenVINO Model Server's clients ask; every question about the model is taken so."""
    server = await start({"a/1": FakeModel(), "a/2": FakeModel()})
    registry, ref = server.registry, ModelRef("a", 0)
    registry.check(ref)
    assert version_held(server, ref) == 2
    assert registry.describe(ref).version == 2
    assert [status.version for status in registry.statuses(ref)] == [2]
    assert [each.version for each in registry.statistics(ref)] == [2]
    assert not registry.is_coming(ref)


async def test_version_0_is_that_version_where_there_is_one(start: Start):
    """And stays so while it cannot be asked."""
    server = await start({"a/0": FakeModel(), "b/0": ModelLoadError("broken"), "c/0": FakeModel(), "c/1": FakeModel()})
    assert version_held(server, ModelRef("a", 0)) == 0
    assert "model 'b' version 0 is FAILED" in refusal(Unavailable, server.registry.acquire, ModelRef("b", 0))
    assert "Specific(c, 0)" in refusal(NotFound, server.registry.acquire, ModelRef("c", 0))


async def test_version_0_of_an_unknown_model(start: Start):
    """Is told as the latest."""
    server = await start({"a/1": FakeModel()})
    for ask in (server.registry.acquire, server.registry.check, server.registry.describe):
        assert "Latest(no)" in refusal(NotFound, ask, ModelRef("no", 0))
