"""The registry while things change: versions, labels, shares, shadows, failures, requests to load and unload."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from service.batching.queue import Limits
from service.batching.runner import ThreadRunner
from service.batching.slo import SloPolicy
from service.errors import FailedPrecondition, InvalidArgument, ModelLoadError, NotFound, Unavailable
from service.metrics import Metrics
from service.predictor import ModelRef
from service.registry.config import ModelConfig, ModelConfigs, Shadow
from service.registry.lifecycle import State
from service.registry.policy import All, Latest, Specific
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from service.registry.watch import Watcher
from tests.fakes import FakeModel, rows


class Tagged(FakeModel):
    """Adds its tag, so that an answer tells which version gave it."""

    def __init__(self, tag: float) -> None:
        super().__init__()
        self.tag = tag

    def run(self, lane: Any, inputs: Any) -> Any:
        return {"y": super().run(lane, inputs)["y"] + self.tag}


class World:
    """A repository that changes as the test says, and the registry that follows it."""

    def __init__(self, configs: ModelConfigs | None = None, **options: Any) -> None:
        self.files: dict[str, tuple[str, FakeModel | Exception]] = {}
        """By ``name/version``: the fingerprint, and what loading gives."""
        self.loads: list[str] = []
        self.metrics = Metrics()
        self.runner = ThreadRunner("watcher", asyncio.get_running_loop())
        self.watcher = Watcher(self.look, config_file=None, poll_s=None, quiet_s=0.0, runner=self.runner)
        self.options = RegistryOptions(
            lambda source: source.path, self.load, Limits(8, 1024, 1 << 20), drain_s=5.0, retry_s=60.0, **options
        )
        self.registry = Registry(Repository(), self.options, self.metrics, configs=configs or {}, watcher=self.watcher)

    def put(self, key: str, model: FakeModel | Exception | None = None, fingerprint: str = "first") -> FakeModel:
        made = model if model is not None else Tagged(float(key.partition("/")[2]) * 100)
        self.files[key] = (fingerprint, made)
        return made  # type: ignore[return-value]

    def look(self, configs: ModelConfigs) -> Repository:
        return Repository(
            tuple(
                Source(name, int(version), Kind.KERAS, Path(key), fingerprint)
                for key, (fingerprint, _) in sorted(self.files.items())
                for name, _, version in [key.partition("/")]
            )
        )

    def load(self, path: Path, config: ModelConfig) -> Any:
        self.loads.append(str(path))
        model = self.files[str(path)][1]
        if isinstance(model, Exception):
            raise model
        return model

    async def follow(self, configs: ModelConfigs | None = None) -> None:
        """One look at the repository, and all that comes of it."""
        await self.registry._look_again(configs)
        await asyncio.gather(*self.registry._tasks)

    async def ask(self, value: float, ref: ModelRef | None = None) -> float:
        handle = self.registry.acquire(ref or ModelRef("m"))
        try:
            outputs = await handle.submit(handle.signatures["serving_default"], rows(value), None)
            return float(outputs["y"][0, 0])
        finally:
            handle.release()

    def states(self, name: str = "m") -> dict[int, State]:
        return {s.version: s.state for s in self.registry.all_statuses() if s.model == name}

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


Make = Callable[..., World]


@pytest_asyncio.fixture
async def world() -> AsyncIterator[Make]:
    """Makes worlds, and ends them."""
    made: list[World] = []

    def make(configs: ModelConfigs | None = None, **options: Any) -> World:
        made.append(World(configs, **options))
        return made[-1]

    yield make
    for each in made:
        for _, model in each.files.values():
            if isinstance(model, FakeModel):
                model.unblock()
        await each.registry.stop(5.0)
        each.runner.close()


async def test_a_new_version_takes_over_and_the_old_one_is_let_go(world: Make):
    """The latest version is served; the one before it is drained, closed and forgotten."""
    w = world()
    old = w.put("m/1")
    await w.follow()
    assert await w.ask(1) == 102.0
    w.put("m/2")
    await w.follow()
    assert await w.ask(1) == 202.0
    assert w.states() == {2: State.READY}
    assert old.closed
    assert w.value("kiln_model_state", model="m", version="1", state="READY") is None


@pytest.mark.parametrize(
    ("policy", "expected"), [(Latest(2), {2, 3}), (All(), {1, 2, 3}), (Specific(frozenset({1, 3, 9})), {1, 3})]
)
async def test_policies_say_which_versions_are_served(world: Make, policy: Any, expected: set[int]):
    """Latest N, all, or those listed that are there; each can be asked by its number."""
    w = world({"m": ModelConfig(versions=policy)})
    for number in (1, 2, 3):
        w.put(f"m/{number}")
    await w.follow()
    assert w.states() == dict.fromkeys(expected, State.READY)
    for number in expected:
        assert await w.ask(0, ModelRef("m", number)) == number * 100


async def test_a_broken_new_version_leaves_the_old_one_serving(world: Make):
    """Its reason is shown; it is tried again when its files change, and then takes over."""
    w = world()
    w.put("m/1")
    await w.follow()
    w.put("m/2", ModelLoadError("it is cut off"))
    await w.follow()
    await w.follow()
    assert w.loads == ["m/1", "m/2"]
    assert await w.ask(1) == 102.0
    assert [(s.version, s.state, s.reason) for s in w.registry.statuses(ModelRef("m"))] == [
        (2, State.FAILED, "it is cut off"),
        (1, State.READY, ""),
    ]
    with pytest.raises(Unavailable, match="version 2 is FAILED, not READY: it is cut off"):
        w.registry.check(ModelRef("m", 2))
    w.put("m/2", fingerprint="whole")
    await w.follow()
    assert await w.ask(1) == 202.0


async def test_a_failed_version_is_tried_again_after_a_while(world: Make):
    """Each wait is twice the one before; after five retries only a change of its files helps."""
    w = world()
    w.put("m/1", ModelLoadError("no room"))
    model_waits = []
    await w.follow()
    model = w.registry._models["m"]
    for _ in range(7):
        failure = model._failures[1]
        model_waits.append(failure.retry_at)
        clock_now = failure.retry_at
        model._bench = replace(model._bench, clock=lambda now=clock_now: now)  # type: ignore[misc]
        await w.follow()
    assert len(w.loads) == 6
    assert w.metrics.registry.get_sample_value("kiln_model_failed", {"model": "m", "version": "1", "reason": "no room"})
    steps = [round(b - a) for a, b in itertools.pairwise(model_waits[:6])]
    assert steps == [60, 60, 60, 60, 60]  # the longest wait is a minute


async def test_a_version_that_is_tried_again_shows_why_it_failed(world: Make):
    """Its state does not flap between loading and failed; with other files it is shown as loading."""
    w = world()
    w.put("m/1", ModelLoadError("no room"))
    await w.follow()
    model = w.registry._models["m"]
    model.retry_now()
    seen: list[State] = []

    def load(path: Path, config: ModelConfig) -> Any:
        seen.append(w.states()[1])
        raise ModelLoadError("still none")

    object.__setattr__(w.options, "load", load)
    await w.follow()
    w.put("m/1", ModelLoadError("other"), "other files")
    await w.follow()
    assert seen == [State.FAILED, State.LOADING]
    assert [s.reason for s in w.registry.statuses(ModelRef("m"))] == ["still none"]


async def test_a_version_replaced_in_place_is_swapped(world: Make):
    """The same number with other files: the new one is loaded first, then the old one goes."""
    w = world()
    old = w.put("m/1", Tagged(1000))
    await w.follow()
    assert await w.ask(1) == 1002.0
    w.put("m/1", ModelLoadError("half"), "broken")
    await w.follow()
    assert await w.ask(1) == 1002.0
    w.put("m/1", Tagged(5000), "second")
    await w.follow()
    assert await w.ask(1) == 5002.0
    assert old.closed
    assert w.states() == {1: State.READY}


async def test_a_version_or_model_that_is_deleted_is_let_go(world: Make):
    """What is no longer there is drained; a model with nothing left is unknown."""
    w = world({"m": ModelConfig(versions=All())})
    w.put("m/1")
    w.put("m/2")
    await w.follow()
    del w.files["m/2"]
    await w.follow()
    assert await w.ask(1) == 102.0
    del w.files["m/1"]
    await w.follow()
    with pytest.raises(NotFound, match=r"Latest\(m\); no model is loaded"):
        w.registry.check(ModelRef("m"))
    assert w.registry.model_names() == []


async def test_an_old_version_finishes_what_it_has_begun(world: Make):
    """A request that holds the old version is answered by it, after the new one has taken over."""
    w = world()
    old = w.put("m/1")
    await w.follow()
    old.block()
    held = asyncio.create_task(w.ask(1))
    await asyncio.to_thread(old.entered.acquire)
    w.put("m/2")
    following = asyncio.create_task(w.follow())
    while w.states().get(2) is not State.READY:
        await asyncio.sleep(0)
    assert await w.ask(1) == 202.0
    assert not old.closed
    old.unblock()
    assert await held == 102.0
    await following
    assert old.closed


async def test_labels_are_addressed_and_move_to_ready_versions_only(world: Make):
    """A label whose new version fails stays where it is; one that is gone is an error."""
    config = ModelConfig(versions=All(), labels={"stable": 1, "canary": 2})
    w = world({"m": config})
    w.put("m/1")
    w.put("m/2")
    w.put("m/3", ModelLoadError("no"))
    await w.follow()
    assert await w.ask(0, ModelRef("m", label="stable")) == 100.0
    assert await w.ask(0, ModelRef("m", label="canary")) == 200.0
    assert [s.version for s in w.registry.statuses(ModelRef("m", label="canary"))] == [2]
    await w.follow({"m": config.model_copy(update={"labels": {"stable": 3}})})
    assert await w.ask(0, ModelRef("m", label="stable")) == 100.0
    with pytest.raises(InvalidArgument, match="Unrecognized servable version label: canary; model 'm' has stable"):
        w.registry.check(ModelRef("m", label="canary"))
    await w.follow({"m": config.model_copy(update={"labels": {"stable": 2}})})
    assert await w.ask(0, ModelRef("m", label="stable")) == 200.0


async def test_requests_are_shared_out_by_weight(world: Make):
    """Those that name no version go to the versions of the split; a share of nothing gets nothing."""
    w = world({"m": ModelConfig(versions=All(), labels={"canary": 2}, split={1: 3, "canary": 1, 3: 0})})
    for number in (1, 2, 3):
        w.put(f"m/{number}")
    await w.follow()
    counts = Counter([await w.ask(0) for _ in range(400)])
    assert set(counts) == {100.0, 200.0}
    assert 240 < counts[100.0] < 360
    assert await w.ask(0, ModelRef("m", 3)) == 300.0


async def test_a_split_without_ready_versions_falls_back_to_the_default(world: Make):
    """The highest READY version answers where none of the split can."""
    w = world({"m": ModelConfig(versions=All(), split={8: 1})})
    w.put("m/1")
    await w.follow()
    assert await w.ask(0) == 100.0


@pytest.mark.parametrize(("tag", "outcome"), [(100.0, "agree"), (777.0, "differ"), (None, "error")])
async def test_a_shadow_is_asked_compared_and_never_answers(world: Make, tag: float | None, outcome: str):
    """The version on trial gets a copy; its answers are counted, and the caller sees nothing of it."""
    w = world({"m": ModelConfig(versions=All(), labels={"trial": 2}, split={1: 1}, shadow=Shadow(to="trial"))})
    w.put("m/1")
    trial = w.put("m/2", Tagged(tag or 0))
    if tag is None:
        trial.poison = 1.0
    await w.follow()
    assert await w.ask(1) == 102.0
    while w.value("kiln_shadow_requests_total", model="m", version="2", outcome=outcome) != 1:
        await asyncio.sleep(0)
    assert len(trial.batches) == 1


async def test_a_share_of_requests_is_shadowed(world: Make):
    """About as many as asked for, and none that name a version."""
    w = world({"m": ModelConfig(versions=All(), split={1: 1}, shadow=Shadow(to=2, share=0.5))})
    w.put("m/1")
    trial = w.put("m/2")
    await w.follow()
    await asyncio.gather(*(w.ask(1) for _ in range(200)))
    await asyncio.gather(*(w.ask(1, ModelRef("m", 1)) for _ in range(50)))
    while w.registry._models["m"].resolve(2).lifecycle.handles:  # type: ignore[union-attr]
        await asyncio.sleep(0)
    asked = sum(len(batch["x"]) for batch in trial.batches)
    assert 60 < asked < 140


async def test_with_resource_transition_the_old_version_goes_first(world: Make):
    """Both never need room at once; requests wait for the new one instead of failing."""
    w = world({"m": ModelConfig(transition="resource")})
    old = w.put("m/1")
    await w.follow()
    loading = asyncio.Event()
    seen: list[bool] = []
    new = Tagged(200)

    def load(path: Path, config: ModelConfig) -> Any:
        seen.append(old.closed)
        loop.call_soon_threadsafe(loading.set)
        assert new.released.wait(10)
        return new

    loop = asyncio.get_running_loop()
    new.block()
    w.load = load  # type: ignore[method-assign]
    object.__setattr__(w.options, "load", load)
    w.put("m/2", new)
    following = asyncio.create_task(w.follow())
    await loading.wait()
    assert seen == [True]
    ref = ModelRef("m")
    with pytest.raises(Unavailable):
        w.registry.check(ref)
    assert w.registry.is_coming(ref)
    waiting = asyncio.create_task(w.registry.wait(ref, None))
    new.unblock()
    await waiting
    assert await w.ask(1) == 202.0
    await following


async def test_stopping_while_a_version_is_loaded_is_told(world: Make):
    """What is ready is drained; a thread that still loads is not waited for, but told."""
    w = world()
    w.put("m/1")
    await w.follow()
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    new = Tagged(200)
    new.block()

    def load(path: Path, config: ModelConfig) -> Any:
        loop.call_soon_threadsafe(begun.set)
        assert new.released.wait(10)
        return new

    object.__setattr__(w.options, "load", load)
    w.put("m/2", new)
    following = asyncio.create_task(w.follow())
    await begun.wait()
    assert not await w.registry.stop(5.0)
    assert w.states()[1] is State.UNLOADED
    new.unblock()
    await asyncio.gather(following, return_exceptions=True)


async def test_models_are_loaded_and_unloaded_by_request(world: Make):
    """With explicit control nothing is served until it is asked for; errors say why."""
    w = world(explicit=True)
    w.put("m/1")
    w.put("bad/1", ModelLoadError("layer 'l' is refused"))
    await w.follow()
    assert w.loads == []
    assert w.registry.can_serve()
    with pytest.raises(Unavailable, match="model 'm' is not loaded"):
        w.registry.check(ModelRef("m"))
    await w.registry.load("m")
    assert await w.ask(1) == 102.0
    with pytest.raises(FailedPrecondition, match="'bad' version 1 could not be loaded: layer 'l' is refused"):
        await w.registry.load("bad")
    with pytest.raises(NotFound, match="no model 'x' to load; there are bad, m"):
        await w.registry.load("x")
    with pytest.raises(NotFound, match="no model 'x' to unload; there are bad, m"):
        await w.registry.unload("x")
    w.put("m/2")
    await w.registry.load("m")
    assert await w.ask(1) == 202.0
    await w.registry.unload("m")
    assert w.states("m") == {}
    with pytest.raises(Unavailable, match="model 'm' is not loaded"):
        w.registry.check(ModelRef("m"))


async def test_loading_by_request_is_refused_where_the_folder_decides(world: Make):
    """Unless control is explicit, load and unload are refused, and say what to set."""
    w = world()
    w.put("m/1")
    await w.follow()
    for call in (w.registry.load, w.registry.unload):
        with pytest.raises(Unavailable, match="by request only with --model-control explicit"):
            await call("m")


async def test_a_client_may_say_what_is_served(world: Make, tmp_path: Path):
    """A new config replaces the old one whole: what it does not name goes, also what is found later."""
    w = world(root=str(tmp_path))
    for key in ("m/1", "m/2", "other/1"):
        w.put(key)
    await w.follow()
    config = ModelConfig(versions=Specific(frozenset({1, 2})), labels={"stable": 1})
    await w.registry.configure({"m": config})
    assert await w.ask(0, ModelRef("m", label="stable")) == 100.0
    assert w.states("other") == {}
    w.put("late/1")
    await w.follow()
    assert w.states("late") == {}
    with pytest.raises(FailedPrecondition, match="label 'canary' cannot move to version 7, which is not READY"):
        await w.registry.configure({"m": config.model_copy(update={"labels": {"canary": 7}})})
    with pytest.raises(NotFound, match="there is no model 'nowhere'"):
        await w.registry.configure({"m": config, "nowhere": ModelConfig()})
    for path in ("/etc", str(tmp_path / ".." / "x"), "s3://bucket/x"):
        with pytest.raises(InvalidArgument, match="model 'm': a base_path below"):
            await w.registry.configure({"m": ModelConfig(path=path)})
    assert await w.ask(0) == 200.0


async def test_a_goal_is_followed_as_it_changes(world: Make):
    """A version batches to the goal of its config: from its load on, and to another or none without a new load."""
    w = world({"m": ModelConfig(slo_ms=50)})
    w.put("m/1")
    await w.follow()

    def goal_s() -> float | None:
        batcher = w.registry._models["m"].versions[0].batcher
        assert batcher is not None
        policy = batcher.queue.policy
        return policy.slo_s if isinstance(policy, SloPolicy) else None

    assert goal_s() == 0.05
    for slo_ms, expected in ((20.0, 0.02), (None, None), (None, None), (10.0, 0.01)):
        await w.registry.configure({"m": ModelConfig(slo_ms=slo_ms)})
        assert goal_s() == expected
    assert w.loads == ["m/1"]


async def test_nothing_changes_where_nothing_may(world: Make):
    """With control none neither a client nor a signal changes what is served."""
    w = world(fixed=True)
    w.watcher.poke()
    await w.registry.watch()  # returns: there is nothing to follow
    with pytest.raises(Unavailable, match="do not change with --model-control none"):
        await w.registry.configure({})


async def test_swaps_under_load_lose_nothing(world: Make):
    """Two hundred new versions while callers ask without pause: every answer is right, and of one version."""
    w = world()
    w.put("m/1")
    await w.follow()
    answers: list[float] = []
    done = asyncio.Event()

    async def caller(value: float) -> None:
        while not done.is_set():
            got = await w.ask(value)
            assert (got - 2 * value) % 100 == 0
            answers.append(got)
            await asyncio.sleep(0)

    callers = [asyncio.create_task(caller(float(n))) for n in range(8)]
    for number in range(2, 202):
        del w.files[f"m/{number - 1}"]
        w.put(f"m/{number}")
        await w.follow()
    done.set()
    await asyncio.gather(*callers)
    assert len(answers) > 200
    assert w.states() == {201: State.READY}
