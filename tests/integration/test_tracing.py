"""Requests of every dialect as spans, in the log, and on their way to a collector."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import pytest_asyncio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from service import logs
from service.following.access_log import log_access
from service.following.followed import Following
from service.following.tracing import Tracer, otlp_tracer
from service.rpc._generated.inference import open_inference_pb2 as oip
from tests.fakes import FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln, start_kiln
from tests.integration.load import busy, queued
from tests.integration.rpc import INFER, OIP, PREDICT, Caller, infer_request, predict_request
from tests.integration.test_metrics import OIP_BODY, PROTOCOLS, TFS_BODY, ask_each_dialect, page

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"
INFER_PATH = "/v2/models/double/infer"
pytestmark = pytest.mark.usefixtures("placed")


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest_asyncio.fixture
async def kiln(exporter: InMemorySpanExporter) -> AsyncIterator[Kiln]:
    """As the usual one, with every request traced and in the access log."""
    model = FakeModel()
    tracer = Tracer(exporter, 1.0, SimpleSpanProcessor)
    kiln = await start_kiln({"double": model}, following=Following(tracer, access=log_access))
    yield kiln
    model.unblock()
    await kiln.stop(5.0, 0.5)


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def ids(contexts: Iterable[SpanContext | None]) -> set[int]:
    """Of spans."""
    return {context.span_id for context in contexts if context is not None}


def told(spans: list[ReadableSpan], name: str) -> list[Any]:
    """An attribute of each."""
    return [(span.attributes or {}).get(name) for span in spans]


async def test_each_dialect_makes_spans(kiln: Kiln, caller: Caller, exporter: InMemorySpanExporter):
    """The same ones, in REST and gRPC."""
    await ask_each_dialect(Client(kiln.app), caller)
    assert set(told(named(exporter, "request"), "kiln.protocol")) == PROTOCOLS
    for name in ("request", "queue", "batch", "execute"):
        assert len(named(exporter, name)) == 4
    assert len({span.context.trace_id for span in exporter.get_finished_spans() if span.context}) == 4
    for outer, inner in (("request", "queue"), ("request", "batch"), ("batch", "execute")):
        assert ids(span.context for span in named(exporter, outer)) == ids(
            span.parent for span in named(exporter, inner)
        )


async def test_times_lie_within_each_other(kiln: Kiln, exporter: InMemorySpanExporter):
    """A span begins and ends within the one that it is of, and the parts come one after the other."""
    await Client(kiln.app).post(INFER_PATH, OIP_BODY)
    (request,), (queue,), (batch,), (execute,) = (named(exporter, n) for n in ("request", "queue", "batch", "execute"))
    at: list[int] = []
    for time_ns in (request.start_time, queue.start_time, queue.end_time, batch.start_time, execute.start_time):
        assert time_ns is not None
        at.append(time_ns)
    for time_ns in (execute.end_time, batch.end_time, request.end_time):
        assert time_ns is not None
        at.append(time_ns)
    slack_ns = 1_000_000  # the batch's own times are taken by two clocks
    assert all(after - before > -slack_ns for before, after in itertools.pairwise(at))


async def test_requests_of_one_batch_are_its_links(kiln: Kiln, caller: Caller, exporter: InMemorySpanExporter):
    """Whatever protocol they came by."""
    client = Client(kiln.app)
    async with busy(kiln):
        waiting = [asyncio.ensure_future(client.post(INFER_PATH, OIP_BODY)) for _ in range(2)]
        waiting.append(asyncio.ensure_future(caller.start(INFER, infer_request())))
        await queued(kiln, 3)
    await asyncio.gather(*waiting)
    (batch,) = named(exporter, "batch")
    requests = named(exporter, "request")
    assert ids(link.context for link in batch.links) == ids(span.context for span in requests)
    assert len(batch.links) == 3
    assert told([batch], "kiln.batch.rows") == [3]
    assert len(named(exporter, "execute")) == 1
    assert len(named(exporter, "queue")) == 3


@pytest.mark.parametrize("sampled", [True, False])
async def test_the_callers_trace_is_followed(kiln: Kiln, transport: str, sampled: bool, exporter: InMemorySpanExporter):
    """Below its span if it is recorded, and not at all if not, over REST and gRPC and of a stream."""
    parent = PARENT if sampled else PARENT[:-1] + "0"
    await Client(kiln.app).post("/v1/models/double:predict", TFS_BODY, traceparent=parent)
    async with kiln.channel(transport) as channel:
        metadata = (("traceparent", parent), ("x-request-id", "r-1"))
        await channel.unary_unary(f"/{PREDICT}")(predict_request().SerializeToString(), metadata=metadata)
        call = channel.stream_stream(f"/{OIP}/ModelStreamInfer")(metadata=metadata)
        await call.write(infer_request().SerializeToString())
        await call.read()
        await call.done_writing()
    requests = named(exporter, "request")
    assert told(requests, "kiln.request_id") == ([None, "r-1", "r-1"] if sampled else [])
    assert {(span.parent.trace_id, span.parent.span_id) for span in requests if span.parent} == (
        {(int(TRACE, 16), int(SPAN, 16))} if sampled else set()
    )


async def test_failures_are_spans(kiln: Kiln, exporter: InMemorySpanExporter):
    """A model that is not there, a wrong input, one that the model fails on."""
    client = Client(kiln.app)
    await client.post("/v2/models/nothing/infer", OIP_BODY)
    await client.post(INFER_PATH, {"inputs": []})
    kiln.model.poison = 3.0
    await client.post(INFER_PATH, OIP_BODY)
    requests = named(exporter, "request")
    assert told(requests, "error.type") == ["not_found", "invalid_argument", "internal"]
    assert [span.status.status_code.name for span in requests] == ["UNSET", "UNSET", "ERROR"]
    assert [span.parent for span in named(exporter, "execute")] == [span.context for span in named(exporter, "batch")]
    assert [span.parent for span in named(exporter, "batch")] == [requests[2].context]


async def test_a_trace_that_kiln_begins_is_the_example_of_its_latency(kiln: Kiln, exporter: InMemorySpanExporter):
    """So that the metric leads to it."""
    client = Client(kiln.app)
    await client.post(INFER_PATH, OIP_BODY)
    (request,) = named(exporter, "request")
    assert request.context is not None
    assert f"{request.context.trace_id:032x}" in await page(client)


async def test_trace_settings_are_told(kiln: Kiln, caller: Caller):
    """In both protocols; what they are can be set, anything else is not implemented."""
    client = Client(kiln.app)
    present = {"trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_mode": "opentelemetry"}
    assert (await client.get("/v2/trace/setting")).json == present
    assert (await client.post("/v2/trace/setting", present)).json == present
    refused = await client.post("/v2/trace/setting", {"trace_level": ["OFF"]})
    assert (refused.status, refused.error) == (
        501,
        "trace setting trace_level: the server's start decides it; got ['OFF']",
    )
    answer = await caller.ask(f"{OIP}/TraceSetting", oip.TraceSettingRequest(), oip.TraceSettingResponse)
    assert {name: list(each.value) for name, each in answer.settings.items()} == {
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": ["1"],
        "trace_mode": ["opentelemetry"],
    }


@contextmanager
def json_log(capsys: pytest.CaptureFixture[str]) -> Iterator[list[dict[str, Any]]]:
    """The lines that are logged meanwhile."""
    root = logging.getLogger()
    handlers, level, access = root.handlers[:], root.level, logging.getLogger("kiln.access").level
    root.handlers = []
    lines: list[dict[str, Any]] = []
    try:
        logs.configure("info", "json", access=True)
        capsys.readouterr()
        yield lines
        lines += map(json.loads, capsys.readouterr().err.splitlines())
    finally:
        root.handlers, root.level = handlers, level
        logging.getLogger("kiln.access").setLevel(access)


async def test_the_access_log(kiln: Kiln, caller: Caller, capsys: pytest.CaptureFixture[str]):
    """A line for each request that asks to predict, and for nothing else; no header but the ids is in it."""
    client = Client(kiln.app)
    ids = {"traceparent": PARENT, "x_request_id": "r-1"}
    with json_log(capsys) as lines:
        await client.post(INFER_PATH, OIP_BODY, authorization="Bearer secret", **ids)
        await client.post("/v1/models/nothing:predict", TFS_BODY)
        await client.post("/v2/models/double/versions/first/infer", OIP_BODY)
        await client.get("/v2/models/double")
        await caller.refusal(INFER, b"\xff")
    answered, missing, versionless, unread = lines
    assert answered.pop("ms") > 0
    del answered["time"], answered["level"]
    assert answered == {
        "logger": "kiln.access",
        "message": "predict",
        "protocol": "rest-v2",
        "model": "double",
        "version": 1,
        "code": "ok",
        "rows": 1,
        "request_id": "r-1",
        "trace_id": TRACE,
    }
    assert (missing["model"], missing["code"], missing["rows"]) == ("nothing", "not_found", 0)
    assert (versionless["protocol"], versionless["code"]) == ("rest-v2", "not_found")
    assert (unread["protocol"], unread["code"]) == ("grpc-v2", "invalid_argument")


async def test_what_is_logged_of_a_request_has_its_ids(kiln: Kiln, capsys: pytest.CaptureFixture[str]):
    """A model's failure is that of the request whose row it was, though others were in the batch."""
    client = Client(kiln.app)
    kiln.model.poison = 7.0
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [7, 7, 7]}
    with json_log(capsys) as lines:
        async with busy(kiln):
            good = asyncio.ensure_future(client.post(INFER_PATH, OIP_BODY, x_request_id="good"))
            bad = asyncio.ensure_future(client.post(INFER_PATH, {"inputs": [tensor]}, x_request_id="bad"))
            await queued(kiln, 2)
        assert [answer.status for answer in await asyncio.gather(good, bad)] == [200, 500]
    (failure,) = [line for line in lines if line["message"] == "the model failed"]
    assert failure["request_id"] == "bad"
    assert "poisoned" in failure["exception"]


class Collector:
    """What an OpenTelemetry collector is to its clients: takes OTLP over HTTP, and here keeps it."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


async def test_spans_reach_a_collector():
    """As OTLP's messages over HTTP, what waits at the latest when the server stops."""
    collector = Collector()
    try:
        tracer = otlp_tracer(collector.url, 0.0)
        kiln = await start_kiln({"double": FakeModel()}, following=Following(tracer))
        client = Client(kiln.app)
        await client.post(INFER_PATH, OIP_BODY)
        await client.post(INFER_PATH, OIP_BODY, traceparent=PARENT)
        await kiln.stop(5.0, 0.5)
        await asyncio.to_thread(tracer.close)
    finally:
        collector.close()
    assert {path for path, _ in collector.requests} == {"/v1/traces"}
    of_resource = [each for _, request in collector.requests for each in request.resource_spans]
    names = {a.value.string_value for each in of_resource for a in each.resource.attributes if a.key == "service.name"}
    assert names == {"kiln"}
    spans = {span.name: span for each in of_resource for scope in each.scope_spans for span in scope.spans}
    assert set(spans) == {"request", "queue", "batch", "execute"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    request, batch = spans["request"], spans["batch"]
    assert request.parent_span_id.hex() == SPAN
    assert [link.span_id for link in batch.links] == [request.span_id]
    assert spans["execute"].parent_span_id == batch.span_id
