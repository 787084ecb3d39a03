"""Front ends before an engine, with sockets and shared memory between them, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from service.batching.queue import Limits, Spent
from service.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Overloaded,
    Unavailable,
)
from service.following.followed import SpanIds
from service.frontend.frames_codec import Asked, Block, Kind, Place, encode_request, frame
from service.frontend.hub import Hub
from service.frontend.remote import RemoteEngine, RemoteHandle
from service.logs import fields_of
from service.metrics import Metrics
from service.predictor import ModelRef, Predictor, Request
from service.registry.config import ModelConfig, Shadow
from service.registry.lifecycle import State
from service.registry.policy import All
from service.registry.registry import Registry
from service.registry.repository import Kind as SourceKind
from service.registry.repository import Repository, Source
from service.registry.version import RegistryOptions
from service.shared_memory import SharedMemory
from service.tensors import DataType, Signature, Tensors, TensorSpec
from service.trace_context import Caller
from tests.fakes import DOUBLE, FakeModel, rows
from tests.integration.loopback import RING_BYTES, FrontEnd

WORDS = Signature("words", (TensorSpec("x", DataType.BYTES, (None,)),), (TensorSpec("y", DataType.BYTES, (None,)),))
M = ModelRef("m")


@dataclass
class Server:
    """An engine with the model ``m`` in versions 1 and 2, and two front ends."""

    models: dict[int, FakeModel]
    registry: Registry
    hub: Hub
    front_ends: list[FrontEnd]
    configs: dict[str, ModelConfig]

    @property
    def remote(self) -> RemoteEngine:
        return self.front_ends[0].engine

    @property
    def model(self) -> FakeModel:
        return self.models[2]

    def hold(self, front_end: int = 0, ref: ModelRef = M) -> RemoteHandle:
        handle = self.front_ends[front_end].engine.acquire(ref)
        assert isinstance(handle, RemoteHandle)
        return handle

    async def ask(self, *values: float, deadline: float | None = None, front_end: int = 0) -> Tensors:
        handle = self.hold(front_end)
        try:
            return await handle.submit(DOUBLE, rows(*values), deadline)
        finally:
            handle.release()

    def asking(self, *values: float) -> asyncio.Task[Tensors]:
        return asyncio.create_task(self.ask(*values))

    def queued_rows(self, version: int = 2) -> int:
        ready = self.registry.routes["m"].ready[version]
        assert ready.batcher is not None
        return ready.batcher.queue.rows


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop go on until something holds."""
    async with asyncio.timeout(30.0):
        while not condition():
            await asyncio.sleep(0)


def memory_descriptors() -> int:
    """How many of this process's descriptors are of shared memory."""
    targets = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
    return sum("memfd:" in target for target in targets)


async def entered(model: FakeModel) -> None:
    assert await asyncio.to_thread(model.entered.acquire, timeout=30.0)


@contextlib.asynccontextmanager
async def serving(
    *, explicit: bool = False, config: ModelConfig | None = None, regions: Path | None = None, drain_s: float = 30.0
) -> AsyncIterator[Server]:
    models = {number: FakeModel({"serving_default": DOUBLE, "words": WORDS}) for number in (1, 2)}
    hub = Hub(Metrics())
    options = RegistryOptions(
        materialize=lambda source: source.path,
        load=lambda path, config: models[int(path.name)],
        limits=Limits(8, 64, 1 << 26),
        explicit=explicit,
        drain_s=drain_s,
    )
    sources = tuple(Source("m", number, SourceKind.KERAS, Path(f"m/{number}")) for number in models)
    configs = {"m": config or ModelConfig(versions=All(), labels={"stable": 1})}
    registry = Registry(Repository(sources), options, hub.metrics, configs=configs, follower=hub)
    hub.follow(registry, lambda: not registry.draining)
    front_ends = [
        FrontEnd(
            number,
            hub,
            SharedMemory(enabled=regions is not None, max_tensor_bytes=1 << 20, directory=regions or Path("/")),
        )
        for number in (1, 2)
    ]
    for each in front_ends:
        await each.join()
    await registry.load_all()
    await hub.settle()
    try:
        yield Server(models, registry, hub, front_ends, configs)
    finally:
        for model in models.values():
            model.unblock()
        await registry.stop(5.0)
        for each in front_ends:
            each.close()


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


# Requests


async def test_a_request_is_answered_with_where_its_time_went(server: Server):
    """By the version that the front end's snapshot has as the default."""
    handle, spent = server.hold(), Spent()
    outputs = await handle.submit(DOUBLE, rows(1.0, 2.0), None, spent)
    handle.release()
    assert (handle.model, handle.version) == ("m", 2)
    assert np.array_equal(outputs["y"], rows(2.0, 4.0)["x"])
    assert spent.rows == 2
    assert spent.compute_s > 0


async def test_requests_of_two_front_ends_share_a_batch(server: Server):
    """There is one queue, whoever asks."""
    server.model.block()
    first = server.asking(1.0)
    await entered(server.model)
    others = [asyncio.create_task(server.ask(value, front_end=int(value) % 2)) for value in (2.0, 3.0)]
    await until(lambda: server.queued_rows() == 2)
    server.model.unblock()
    await asyncio.gather(first, *others)
    assert [len(batch["x"]) for batch in server.model.batches] == [1, 2]


async def test_large_tensors_have_memory_of_their_own(server: Server):
    """Larger than the ring, both ways, of numbers and of strings; no descriptor is left over."""
    await server.ask(1.0)
    gc.collect()  # of tests before
    before = memory_descriptors()
    for _ in range(3):
        large = np.random.default_rng(0).random((RING_BYTES // 8, 3), np.float32)[:64]
        outputs = await server.hold().submit(DOUBLE, {"x": large}, None)
        assert np.array_equal(outputs["y"], large * 2)
        words = np.array([b"w" * RING_BYTES, b""], object)
        outputs = await server.hold().submit(WORDS, {"x": words}, None)
        assert outputs["y"].tolist() == [b"w" * RING_BYTES * 2, b""]
        del outputs
    await until(lambda: memory_descriptors() <= before)


async def test_the_ring_is_gone_around(server: Server):
    """More bytes than it has pass through it, each block where the one before it ended."""
    row = np.zeros((8, 3), np.float32)
    for number in range(3 * RING_BYTES // row.nbytes // 8):
        tasks = [server.asking(*[float(number + other)] * 8) for other in range(8)]
        for other, outputs in enumerate(await asyncio.gather(*tasks)):
            assert np.all(outputs["y"] == 2.0 * (number + other))


async def test_a_full_ring_refuses_at_once(server: Server):
    """With the bytes that wait, came and fit; what was accepted is answered."""
    ring = server.front_ends[0].channel.outbox.ring
    words = np.array([b"w" * (RING_BYTES // 4)], object)
    handle = server.hold()
    accepted = [asyncio.ensure_future(handle.submit(WORDS, {"x": words}, None)) for _ in range(3)]
    await asyncio.sleep(0)
    assert ring.used_bytes > RING_BYTES // 2
    with pytest.raises(Overloaded, match=rf"^the memory shared with the engine is full: {ring.used_bytes} bytes wait"):
        await handle.submit(WORDS, {"x": words}, None)
    for outputs in await asyncio.gather(*accepted):
        assert outputs["y"][0] == words[0] * 2
    handle.release()


async def test_answers_find_a_way_past_a_full_ring(server: Server):
    """The engine never waits for a front end: what has no room has memory of its own."""
    ring = server.front_ends[0].link._channel.outbox.ring
    taken = ring.reserve(RING_BYTES)
    assert taken is not None
    outputs = await server.ask(3.0)
    assert np.array_equal(outputs["y"], rows(6.0)["x"])


async def test_no_memory_for_a_request(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Is an overload, with the system's reason."""

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(server.front_ends[0].channel.outbox, "put", fail)
    with pytest.raises(Overloaded, match="no memory can be shared with the engine: Too many open files"):
        await server.ask(1.0)


async def test_no_memory_for_an_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Is told its caller as a fault, and logged."""

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(server.front_ends[0].link._channel.outbox, "put", fail)
    with pytest.raises(Internal, match="an internal error occurred"):
        await server.ask(1.0)
    assert "Too many open files" in caplog.text


async def test_what_the_batcher_refuses(server: Server):
    """Comes back as what it was: a full queue with when to come again, a deadline, a request that is too large."""
    server.model.block()
    first = server.asking(1.0)
    await entered(server.model)
    ahead = server.asking(*[1.0] * 8)  # a full batch is assembled while another runs
    await until(lambda: len(server.registry.routes["m"].ready[2].batcher._running) == 2)  # type: ignore[union-attr]
    waiting = [ahead, *(server.asking(*[1.0] * 8) for _ in range(8))]
    await until(lambda: server.queued_rows() == 64)
    with pytest.raises(Overloaded) as refused:
        await server.ask(1.0)
    assert refused.value.retry_after_s == 1.0
    with pytest.raises(InvalidArgument, match="72 rows"):
        await server.ask(*[1.0] * 72)
    server.model.unblock()
    await asyncio.gather(first, *waiting)
    with pytest.raises(DeadlineExceeded):
        await server.ask(1.0, deadline=time.monotonic() - 1.0)


async def test_a_request_that_is_split(server: Server):
    """Is answered whole."""
    outputs = await server.ask(*range(20))
    assert outputs["y"][:, 0].tolist() == [2.0 * value for value in range(20)]


async def test_a_model_that_fails(server: Server):
    """Fails the row at fault alone."""
    server.model.poison = 5.0
    server.model.block()
    first = server.asking(1.0)
    await entered(server.model)
    tasks = [server.asking(value) for value in (2.0, 5.0, 3.0)]
    await until(lambda: server.queued_rows() == 3)
    server.model.unblock()
    await first
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [dict, Internal, dict]
    assert str(results[1]) == "the model failed: ValueError: poisoned"


async def test_a_model_that_answers_something_else(server: Server, caplog: pytest.LogCaptureFixture):
    """Outputs that the signature has not cannot be sent; the caller is told, and nobody else harmed."""
    run = server.model.run
    server.model.run = lambda lane, inputs: {"other": run(lane, inputs)["y"]}  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match="tensor 'other': y expected"):
        await server.ask(1.0)


async def test_a_caller_who_leaves(server: Server):
    """The request leaves the queue unrun; an answer that comes too late is passed over."""
    server.model.block()
    first, late = server.asking(1.0), None
    await entered(server.model)
    late = server.asking(2.0)
    await until(lambda: server.queued_rows() == 1)
    for task in (first, late):
        task.cancel()
    link = server.front_ends[0].link
    await until(lambda: not link._running)
    server.model.unblock()
    await server.ask(3.0)
    assert [batch["x"][0, 0] for batch in server.model.batches] == [1.0, 3.0]
    await asyncio.gather(first, late, return_exceptions=True)
    assert first.cancelled()
    assert late.cancelled()


async def test_an_answer_that_nobody_waits_for_leaves_the_ring(server: Server):
    """It was on its way when the caller left."""
    task = server.asking(1.0)
    await until(lambda: server.model.batches)
    task.cancel()
    for value in range(100):
        await server.ask(float(value))
    inbox = server.front_ends[0].channel.inbox
    ring = server.front_ends[0].link._channel.outbox.ring
    assert inbox.position == ring._head


async def test_a_shadow_sees_requests_that_name_no_version():
    """As where front ends and engine are one process."""
    config = ModelConfig(versions=All(), shadow=Shadow(to=1))
    async with serving(config=config) as server:
        named = server.hold(ref=ModelRef("m", 2))
        await named.submit(DOUBLE, rows(1.0), None)
        named.release()
        await server.ask(2.0)
        await until(lambda: server.models[1].batches)
        assert [batch["x"][0, 0] for batch in server.models[1].batches] == [2.0]


# What is looked up


async def test_questions_are_answered_from_the_snapshot(server: Server):
    """As the engine itself answers them."""
    remote, registry = server.remote, server.registry
    for ref in (M, ModelRef("m", 1), ModelRef("m", None, "stable"), ModelRef("m", 0)):
        assert remote.describe(ref) == registry.describe(ref)
        assert remote.statuses(ref) == registry.statuses(ref)
        remote.check(ref)
    assert remote.model_names() == ["m"]
    assert remote.all_statuses() == registry.all_statuses()
    assert [(each.model, each.version) for each in remote.statistics(None)] == [("m", 1), ("m", 2)]
    assert not remote.is_coming(M)


@pytest.mark.parametrize(
    ("ref", "kind", "text"),
    [
        (ModelRef("no"), NotFound, "Servable not found for request: Latest(no); loaded are m"),
        (ModelRef("m", 9), NotFound, "Servable not found for request: Specific(m, 9); model 'm' has version 1, 2"),
        (ModelRef("m", None, "no"), InvalidArgument, "Unrecognized servable version label: no; model 'm' has stable"),
    ],
)
async def test_what_is_not_there(server: Server, ref: ModelRef, kind: type[Exception], text: str):
    """Is refused here, without asking, in the engine's words."""
    with pytest.raises(kind) as refused:
        server.remote.check(ref)
    assert str(refused.value) == text


async def test_statistics_are_as_of_now(server: Server):
    """After a refresh they have all that was answered before it."""
    await server.ask(1.0)
    await server.front_ends[1].engine.refresh()
    (_, latest) = server.front_ends[1].engine.statistics(M)
    assert latest.statistics.inference_count == 1


async def test_a_refresh_that_nobody_answers(server: Server, monkeypatch: pytest.MonkeyPatch):
    """Is given up: what was known before is told."""
    monkeypatch.setattr("service.frontend.remote._REFRESH_S", 0.0)
    await server.remote.refresh()
    assert server.remote.model_names() == ["m"]


# Changes


async def test_loading_is_known_everywhere_when_it_is_answered():
    """A client that loads at one front end finds the model at the other; so with unloading."""
    async with serving(explicit=True) as server:
        here, there = (each.engine for each in server.front_ends)
        with pytest.raises(Unavailable):
            there.check(M)
        await here.load("m")
        there.check(M)
        await there.unload("m")
        with pytest.raises(Unavailable):
            here.check(M)
        with pytest.raises(NotFound, match="there is no model 'no' to load"):
            await here.load("no")


async def test_a_configuration_is_known_everywhere(server: Server):
    """With its labels and goals; a model that is gone takes its goal along."""
    config = ModelConfig(versions=All(), labels={"canary": 2}, slo_ms=5.0)
    await server.remote.configure({"m": config})
    there = server.front_ends[1]
    assert there.engine.describe(ModelRef("m", None, "canary")).version == 2
    assert there.metrics._goals_s == {"m": 0.005}
    with pytest.raises(FailedPrecondition):
        await server.remote.configure({"m": ModelConfig(versions=All(), labels={"canary": 9})})
    server.registry.routes.clear()
    await server.hub.settle()
    assert there.metrics._goals_s == {}


async def test_a_version_that_goes_waits_for_requests_that_have_not_arrived():
    """A request that was let in by a snapshot is answered, though the engine did not know of it when it drained."""
    async with serving(explicit=True) as server:
        await server.remote.load("m")
        handle = server.hold()
        unloading = asyncio.create_task(server.front_ends[1].engine.unload("m"))
        await until(lambda: server.remote.statuses(M)[0].state is State.DRAINING)
        with pytest.raises(Unavailable):
            server.hold()
        outputs = await handle.submit(DOUBLE, rows(4.0), None)
        assert np.array_equal(outputs["y"], rows(8.0)["x"])
        assert not unloading.done()
        handle.release()
        await unloading
        assert server.model.closed


async def test_a_request_for_a_version_that_is_gone():
    """One that comes after the time for draining is refused as unavailable."""
    async with serving(explicit=True, drain_s=0.01) as server:
        await server.remote.load("m")
        handle = server.hold()
        await server.remote.unload("m")
        with pytest.raises(Unavailable):
            await handle.submit(DOUBLE, rows(4.0), None)
        handle.release()


async def test_a_model_on_demand_is_waited_for():
    """The front end has the engine load it, and goes on with its request."""
    async with serving(config=ModelConfig(versions=All(), on_demand=True)) as server:
        predictor = Predictor(server.remote, server.front_ends[0].metrics)
        assert server.remote.is_coming(M)
        with predictor.request(M, "rest-v2") as request:
            assert isinstance(request, Request)
            handle = await request._hold(None)
        assert handle.version == 2
        handle.release()


async def test_a_server_that_stops_refuses_everywhere(server: Server):
    """Once the engine drains, and before anything else is asked."""
    await server.registry.stop(5.0)
    for each in server.front_ends:
        with pytest.raises(Unavailable, match="the server is stopping"):
            each.engine.check(M)
        assert not each.engine.is_ready


# What clients change


async def test_the_log_level_is_one(server: Server):
    """Changed at one front end, before its client is answered."""
    log = logging.getLogger("kiln")
    before = log.level
    try:
        log.setLevel(logging.ERROR)
        await server.remote.settle()
        assert server.hub._shared.log_level == logging.ERROR
        assert server.front_ends[1].engine._shared.log_level == logging.ERROR
        server.remote._share(replace(server.remote._shared, log_level=logging.DEBUG))
        assert log.level == logging.DEBUG
    finally:
        log.setLevel(before)


async def test_regions_of_shared_memory_are_known_everywhere(tmp_path: Path):
    """Registered and let go at either front end; one whose object is gone is left out."""
    (tmp_path / "input").write_bytes(bytes(64))
    (tmp_path / "gone").write_bytes(bytes(64))
    async with serving(regions=tmp_path) as server:
        here, there = server.front_ends
        here.memory.register("in", "/input", 16, 32)
        here.memory.register("gone", "/gone", 0, 64)
        (tmp_path / "gone").unlink()
        await here.engine.settle()
        (region,) = there.memory.status()
        assert (region.name, region.key, region.offset, region.byte_size) == ("in", "/input", 16, 32)
        there.memory.unregister("in")
        await there.engine.settle()
        assert [region.name for region in here.memory.status()] == ["gone"]


# Metrics


async def test_the_page_has_the_requests_of_all_front_ends(server: Server):
    """Counts, sums, histograms and what is in flight add up, whoever is asked for the page."""
    for each in server.front_ends:
        observed = each.metrics.request("m", "rest-v2", "trace")
        observed.version, observed.decode_s = 2, 0.5
        observed.done(None)
    server.front_ends[0].metrics.request("m", "rest-v2")
    page, content_type = await server.front_ends[1].engine.whole_page("")
    assert content_type.startswith("text/plain")
    labels = '{code="ok",model="m",protocol="rest-v2",version="2"}'
    text = page.decode()
    assert f"kiln_requests_total{labels} 2.0" in text
    assert 'kiln_decode_seconds_sum{model="m",protocol="rest-v2",version="2"} 1.0' in text
    assert 'kiln_request_duration_seconds_count{model="m",protocol="rest-v2",version="2"} 2.0' in text
    assert "kiln_requests_in_flight 1.0" in text
    assert "kiln_frontends 2.0" in text
    again = (await server.front_ends[0].engine.whole_page("application/openmetrics-text"))[0].decode()
    assert f"kiln_requests_total{labels} 2.0" in again
    assert 'trace_id="trace"' in again


async def test_goals_refusals_and_kept_records_are_one_total():
    """What either front end has met or missed, what the queue refused, and what became of kept requests."""
    async with serving(config=ModelConfig(versions=All(), slo_ms=1e6)) as server:
        for each in server.front_ends:
            count = each.metrics.request_log()
            for code in (None, Code.INTERNAL):
                observed = each.metrics.request("m", "grpc-v2")
                observed.version, observed.decode_s, observed.answered = 2, 0.25, observed.started
                observed.done(code)
                count("written")
        server.model.block()
        first = server.asking(1.0)
        await entered(server.model)
        late = server.asking(1.0)
        await until(lambda: server.queued_rows() == 1)
        late.cancel()
        await until(lambda: len(server.front_ends[0].link._running) == 1)
        server.model.unblock()
        await first
        for each in server.front_ends:  # whoever is asked, and however often
            text = (await each.engine.whole_page(""))[0].decode()
            for outcome in ("met", "missed"):
                assert f'kiln_slo_requests_total{{model="m",outcome="{outcome}",version="2"}} 2.0' in text
            for name, value in (("decode", "4.0"), ("encode", "4.0")):
                labels = 'model="m",protocol="grpc-v2",version="2"'
                assert f"kiln_{name}_seconds_count{{{labels}}} {value}" in text
            assert 'kiln_dropped_requests_total{model="m",reason="cancelled",version="2"} 1.0' in text
            assert 'kiln_request_log_records_total{outcome="written"} 4.0' in text


# Who asks


async def test_a_priority_is_kept(server: Server):
    """As where front ends and engine are one process: 1 goes first, 3 last."""
    await entered_full(server)
    tasks = []
    for value, priority in ((20.0, 3), (21.0, 0), (22.0, 1)):
        tasks.append(asyncio.create_task(server.hold().submit(DOUBLE, rows(*[value] * 8), None, None, priority)))
        await until(lambda: server.queued_rows() == 8 * len(tasks))
    server.model.unblock()
    await asyncio.gather(*tasks)
    assert [batch["x"][0, 0] for batch in server.model.batches][2:] == [22.0, 21.0, 20.0]


async def entered_full(server: Server) -> None:
    """The model runs, and a full batch is assembled for the time after that."""
    server.model.block()
    running = server.asking(1.0)
    await entered(server.model)
    ahead = server.asking(*[2.0] * 8)
    await until(lambda: len(server.registry.routes["m"].ready[2].batcher._running) == 2)  # type: ignore[union-attr]
    server.hub.registry._keep(asyncio.create_task(_both(running, ahead)))


async def _both(*tasks: asyncio.Task[Tensors]) -> None:
    await asyncio.gather(*tasks)


async def test_a_batch_of_two_front_ends_is_traced(server: Server):
    """Each of its requests learns of the batch and of the spans in it, those of the other front end too."""
    server.model.block()
    first = server.asking(1.0)
    await entered(server.model)
    spans = [SpanIds(7, number, 0) for number in (1, 2)]
    spent = [Spent(caller=Caller(request_id=f"r-{span.span_id}"), span=span) for span in spans]
    tasks = [
        asyncio.create_task(server.hold(place).submit(DOUBLE, rows(2.0), None, each))
        for place, each in enumerate(spent)
    ]
    await until(lambda: server.queued_rows() == 2)
    server.model.unblock()
    await asyncio.gather(first, *tasks)
    for each in spent:
        (run,) = each.runs
        assert (run.rows, set(run.spans)) == (2, set(spans))
        assert each.caller in (Caller(request_id="r-1"), Caller(request_id="r-2"))


async def test_a_traced_request_that_expires(server: Server):
    """Tells how long it waited."""
    server.model.block()
    first = server.asking(1.0)
    await entered(server.model)
    spent = Spent(span=SpanIds(7, 1, 0))
    late = asyncio.create_task(server.hold().submit(DOUBLE, rows(2.0), time.monotonic() + 0.01, spent))
    with pytest.raises(DeadlineExceeded):
        await late
    server.model.unblock()
    await first
    assert spent.queue_s > 0
    assert spent.runs == ()


async def test_what_fails_is_logged_with_its_callers_ids(server: Server, caplog: pytest.LogCaptureFixture):
    """In the engine, which has not seen the request itself."""
    server.model.poison = 5.0
    spent = Spent(caller=Caller(request_id="r-1"))
    with pytest.raises(Internal):
        await server.hold().submit(DOUBLE, rows(5.0), None, spent)
    (record,) = [record for record in caplog.records if record.getMessage() == "the model failed"]
    assert fields_of(record) == {"request_id": "r-1"}


# What goes wrong between the two


async def test_a_front_end_that_dies_costs_its_own_requests_alone(server: Server):
    """They are cancelled in the queue; what it held is let go; the other one's are answered."""
    server.model.block()
    mine = server.asking(1.0)
    await entered(server.model)
    lost = server.asking(2.0)
    theirs = asyncio.create_task(server.ask(3.0, front_end=1))
    await until(lambda: server.queued_rows() == 2)
    server.front_ends[0].channel.close()
    await until(lambda: server.front_ends[0].has_ended)
    server.model.unblock()
    assert np.array_equal((await theirs)["y"], rows(6.0)["x"])
    assert [batch["x"][0, 0] for batch in server.model.batches] == [1.0, 3.0]
    assert list(server.hub.links) == [2]
    assert "kiln_frontends 1.0" in server.hub.metrics.render().decode()
    for task in (mine, lost):
        task.cancel()
    with pytest.raises(Unavailable, match="the engine has gone"):
        await server.ask(1.0)
    with pytest.raises(Unavailable, match="have lost each other"):
        await server.remote.load("m")


async def test_a_front_end_that_dies_while_a_version_drains():
    """Does not hold it up."""
    async with serving(explicit=True) as server:
        await server.remote.load("m")
        server.hold()
        unloading = asyncio.create_task(server.front_ends[1].engine.unload("m"))
        await until(lambda: server.front_ends[0].link._leases)
        assert repr(server.front_ends[0].link) == "<Link 1: 0 running, 1 leases>"
        server.front_ends[0].channel.close()
        await unloading


async def test_calls_fail_when_the_engine_goes(server: Server):
    """Whoever waits is told, and so is the process."""

    async def load(name: str) -> None:
        await asyncio.Event().wait()

    server.hub.registry.load = load  # type: ignore[method-assign]
    loading = asyncio.create_task(server.remote.load("m"))
    await until(lambda: server.front_ends[0].link._channel._tasks)
    server.front_ends[0].link.close()
    with pytest.raises(Unavailable):
        await loading
    await until(lambda: server.front_ends[0].engine_is_gone)


async def test_a_fault_in_a_call_is_logged_and_told(server: Server, caplog: pytest.LogCaptureFixture):
    """Without what it was."""

    async def explode(name: str) -> None:
        raise RuntimeError("secret")

    server.hub.registry.load = explode  # type: ignore[method-assign]
    with pytest.raises(Internal) as told:
        await server.remote.load("m")
    assert "secret" not in str(told.value)
    assert "secret" in caplog.text


LAYOUT = b"\0\0\0\0"
"""Of no tensors."""


@pytest.mark.parametrize(
    "sent",
    [
        bytes(16),
        frame(Kind.REQUEST, 1, b"short"),
        frame(Kind.ANSWER, 1, bytes(48), place=Place.RING),
        frame(Kind.FREED, 1 << 40),
        encode_request(1, Asked(1, None, False, Block(Place.RING, RING_BYTES - 64, 128), LAYOUT)),
        encode_request(1, Asked(1, None, False, Block(Place.NOWHERE, 0, 0), LAYOUT)),
        encode_request(1, Asked(1, None, False, Block(Place.SEGMENT, 0, 64), LAYOUT)),
        encode_request(1, Asked(1, None, False, Block(Place.RING, 0, 64), LAYOUT)),
        frame(99, 1),  # type: ignore[arg-type]
    ],
    ids=["length", "short", "answer", "freed", "past the end", "nowhere", "no descriptor", "size", "kind"],
)
async def test_a_front_end_that_sends_nonsense_is_cut_off(
    server: Server, sent: bytes, caplog: pytest.LogCaptureFixture
):
    """Nothing that it sends is believed any more; the others go on."""
    server.front_ends[0].channel.send(sent)
    await until(lambda: server.front_ends[0].has_ended)
    assert "the connection between front end and engine is given up" in caplog.text
    assert np.array_equal((await server.ask(1.0, front_end=1))["y"], rows(2.0)["x"])


async def test_a_signature_that_the_version_has_not(server: Server):
    """Is nonsense as well."""
    key = next(iter(server.hub.served))
    asked = Asked(key, None, False, Block(Place.RING, 0, 0), b"\x09\0\0\0")
    server.front_ends[0].channel.send(encode_request(1, asked))
    await until(lambda: server.front_ends[0].has_ended)


@pytest.mark.parametrize("sent", [frame(Kind.REQUEST, 1), frame(Kind.ANSWER, 1)])
async def test_an_engine_that_sends_nonsense_is_left(server: Server, sent: bytes):
    """The front end ends, and is started anew."""
    server.front_ends[0].link._channel.send(sent)
    await until(lambda: server.front_ends[0].engine_is_gone)


async def test_a_segment_that_is_too_short(server: Server):
    """Cannot be mapped: nonsense."""
    descriptor = os.memfd_create("short")
    asked = Asked(1, None, False, Block(Place.SEGMENT, 0, 1 << 20), LAYOUT)
    server.front_ends[0].channel.send(encode_request(1, asked), descriptor)
    await until(lambda: server.front_ends[0].has_ended)


async def test_frames_to_a_closed_channel_go_nowhere(server: Server):
    """Nor does a descriptor stay open."""
    channel = server.front_ends[0].channel
    channel.close()
    channel.close()
    descriptor = os.memfd_create("late")
    channel.send(frame(Kind.CANCEL, 1), descriptor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


async def test_more_than_the_socket_takes(server: Server):
    """Waits until it is read, whole and in order; segments among it."""
    names = [f"{number}" * 300_000 for number in range(8)]
    loads = [asyncio.create_task(server.remote.load(name)) for name in names]
    large = np.ones((64, 3), np.float32)
    words = np.array([b"w" * RING_BYTES], object)
    asked = [asyncio.create_task(server.hold().submit(WORDS, {"x": words}, None)) for _ in range(4)]
    outputs = await server.hold().submit(DOUBLE, {"x": large}, None)
    assert np.all(outputs["y"] == 2.0)
    for each in await asyncio.gather(*asked):
        assert each["y"][0] == words[0] * 2
    results = await asyncio.gather(*loads, return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)


async def test_a_side_that_reads_nothing_counts_as_gone(server: Server, monkeypatch: pytest.MonkeyPatch):
    """What waits for it does not grow without bounds."""
    monkeypatch.setattr("service.frontend.channel._MOST_WAITING_BYTES", 1 << 20)
    channel = server.front_ends[0].link._channel
    front_end = server.front_ends[0].channel
    front_end._loop.remove_reader(front_end._socket)
    data = frame(Kind.ERROR, 1, bytes(1 << 19))
    for _ in range(8):
        channel.send(data)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert server.front_ends[0].has_ended


def test_a_snapshot_can_be_pickled_with_every_error():
    """Errors go through calls as they are."""
    error = pickle.loads(pickle.dumps(Overloaded("full", 3.0)))
    assert (str(error), error.retry_after_s) == ("full", 3.0)
