"""The spans of requests, with the exporter that OpenTelemetry has for tests."""

from __future__ import annotations

import builtins
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from service.batching.queue import BatchRun
from service.errors import Code, FailedPrecondition, InvalidArgument
from service.following.followed import Followed, Following
from service.following.tracing import Tracer, otlp_tracer
from service.trace_context import Caller
from tests.fakes import DOUBLE, rows

CALLER = Caller("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", True, "r-1")


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Tracer]:
    tracer = Tracer(exporter, 1.0, SimpleSpanProcessor)
    yield tracer
    tracer.close()


def begin(tracer: Tracer, caller: Caller = CALLER) -> Followed:
    """A request of two rows that took a second from 100.0 on."""
    followed = Following(tracer).begin(caller)
    assert followed is not None
    followed.model, followed.version, followed.protocol = "double", 7, "rest-v2"
    followed.started, followed.ended, followed.decode_s, followed.answered = 100.0, 101.0, 0.1, 100.9
    return followed


def batch_of(*requests: Followed) -> BatchRun:
    run = BatchRun(100.3, 100.4, 0.05, 0.3, 0.1, 2 * len(requests), 8)
    for followed in requests:
        asked = followed.asks(DOUBLE, rows(1, 2))
        asked.spent.queue_s = 0.2
        run.spans.append(asked.spent.span)
        asked.spent.runs = (run,)
    return run


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def seconds(span: ReadableSpan, origin: ReadableSpan) -> tuple[float, float]:
    """Its start and end after the start of `origin`."""
    assert origin.start_time is not None
    times = (span.start_time, span.end_time)
    return tuple(round((at - origin.start_time) / 1e9, 3) for at in times if at is not None)  # type: ignore[return-value]


def test_a_request_is_four_spans(tracer: Tracer, exporter: InMemorySpanExporter):
    """One in the other, in the caller's trace below the caller's span, each with its own time."""
    followed = begin(tracer)
    batch_of(followed)
    tracer.tell(followed)
    by_name = {span.name: span for span in exporter.get_finished_spans()}
    request, queue, batch, execute = (by_name[name] for name in ("request", "queue", "batch", "execute"))
    assert len(by_name) == 4
    assert request.parent is not None
    assert (request.parent.span_id, request.parent.is_remote) == (int(CALLER.span_id, 16), True)
    assert {span.context.trace_id for span in by_name.values() if span.context} == {int(CALLER.trace_id, 16)}
    assert queue.parent == batch.parent == request.context
    assert execute.parent == batch.context
    assert [link.context for link in batch.links] == [request.context]
    assert seconds(request, request) == (0.0, 1.0)
    assert seconds(queue, request) == (0.1, 0.3)
    assert seconds(batch, request) == (0.3, 0.8)
    assert seconds(execute, request) == (0.4, 0.7)


def test_what_spans_tell(tracer: Tracer, exporter: InMemorySpanExporter):
    """Who was asked by what, how it ended, how large; in milliseconds what has no span of its own."""
    followed = begin(tracer)
    batch_of(followed)
    tracer.tell(followed)
    (request,), (batch,), (execute,) = (named(exporter, name) for name in ("request", "batch", "execute"))
    told = dict(request.attributes or {})
    assert round(float(str(told.pop("kiln.decode_ms")))) == 100
    assert round(float(str(told.pop("kiln.encode_ms")))) == 100
    assert told == {
        "kiln.protocol": "rest-v2",
        "kiln.model": "double",
        "kiln.version": 7,
        "kiln.rows": 2,
        "kiln.request_id": "r-1",
    }
    assert (request.kind, request.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
    assert dict(batch.attributes or {}) == {"kiln.batch.rows": 2, "kiln.batch.given_rows": 8}
    assert not execute.attributes


def test_a_batch_is_told_of_once_and_linked_to_its_requests(tracer: Tracer, exporter: InMemorySpanExporter):
    """It lies in the trace of the first request, and every traced one of it is a link, whoever ends first."""
    first, second = begin(tracer), begin(tracer, Caller())
    batch_of(first, second)
    tracer.tell(second)
    tracer.tell(first)
    (batch,) = named(exporter, "batch")
    requests = named(exporter, "request")
    assert batch.parent == requests[1].context
    assert [link.context for link in batch.links] == [requests[1].context, requests[0].context]
    assert len(named(exporter, "queue")) == 2
    assert requests[0].parent is None


def test_requests_wait_without_their_tensors_until_they_are_sent(exporter: InMemorySpanExporter):
    """Then their spans are made, all of them at once."""
    waiting: list[Any] = []

    class Processor(SimpleSpanProcessor):
        def on_end(self, span: Any) -> None:
            waiting.append(span)

    tracer = Tracer(exporter, 1.0, Processor)
    followed = begin(tracer)
    batch_of(followed)
    tensor = weakref.ref(followed.asked[0].inputs["x"])
    tracer.tell(followed)
    del followed
    assert tensor() is None
    assert exporter.get_finished_spans() == ()
    tracer._processor.span_exporter.export(waiting)
    assert [span.name for span in exporter.get_finished_spans()] == ["request", "queue", "batch", "execute"]


def test_a_request_that_was_split_has_all_its_batches(tracer: Tracer, exporter: InMemorySpanExporter):
    """Each with the wait before it."""
    followed = begin(tracer)
    first, second = batch_of(followed), batch_of(followed)
    followed.asked.pop().spent.runs = ()
    followed.asked[0].spent.runs = (first, second)
    tracer.tell(followed)
    assert [len(named(exporter, name)) for name in ("request", "queue", "batch", "execute")] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("code", "status"), [(Code.DEADLINE_EXCEEDED, StatusCode.ERROR), (Code.NOT_FOUND, StatusCode.UNSET)]
)
def test_failures_are_told(tracer: Tracer, exporter: InMemorySpanExporter, code: Code, status: StatusCode):
    """What is the server's fault is an error; one that ended in the queue has waited until then."""
    followed = begin(tracer)
    followed.code, followed.version, followed.decode_s, followed.answered = code, None, None, None
    followed.asks(DOUBLE, rows(1)).spent.queue_s = 0.25
    tracer.tell(followed)
    (request,), (queue,) = named(exporter, "request"), named(exporter, "queue")
    assert request.status.status_code is status
    assert (request.attributes or {})["error.type"] == code.value
    assert seconds(queue, request) == (0.75, 1.0)
    assert len(exporter.get_finished_spans()) == 2


def test_spans_of_one_process_are_sent_together(
    tracer: Tracer, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
):
    """All have one resource, which the exporter asks each span for without a cost."""
    for _ in range(2):
        tracer.tell(begin(tracer))
    spans = exporter.get_finished_spans()
    resource = spans[0].resource
    assert resource == Resource(dict(resource.attributes), resource.schema_url)
    monkeypatch.setattr(Resource, "__hash__", None)  # which writes it as JSON
    (group,) = encode_spans(spans).resource_spans
    assert sum(len(scope.spans) for scope in group.scope_spans) == len(spans)


@pytest.mark.parametrize(("variable", "name"), [("", "kiln"), ("digits-eu", "digits-eu")])
def test_the_name_of_the_service(variable: str, name: str, monkeypatch: pytest.MonkeyPatch):
    """Kiln's own, unless OpenTelemetry's variable gives another."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", variable)
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, 1.0, SimpleSpanProcessor)
    tracer.tell(begin(tracer))
    (request,) = exporter.get_finished_spans()
    assert request.resource.attributes["service.name"] == name
    assert request.instrumentation_scope is not None
    assert request.instrumentation_scope.name == "kiln"


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", "", "http://[::"])
def test_an_endpoint_that_is_none(endpoint: str):
    """The setting is named, what was expected and what came."""
    with pytest.raises(InvalidArgument) as refused:
        otlp_tracer(endpoint, 1.0)
    assert str(refused.value) == f"otlp_endpoint: a URL as http://host:4318 expected, got {endpoint!r}"


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("http://collector:4318/", "http://collector:4318/v1/traces"),
        ("https://collector/of/ours", "https://collector/of/ours"),
    ],
)
def test_where_spans_go(endpoint: str, url: str, monkeypatch: pytest.MonkeyPatch):
    """To OTLP's own path, unless another is given."""
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    asked: list[str] = []

    class Exporter(InMemorySpanExporter):
        def __init__(self, endpoint: str) -> None:
            super().__init__()
            asked.append(endpoint)

    monkeypatch.setattr(trace_exporter, "OTLPSpanExporter", Exporter)
    otlp_tracer(endpoint, 0.5).close()
    assert asked == [url]


@pytest.mark.parametrize(
    ("variables", "sizes"),
    [
        ({}, (2048, 512)),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "1000"}, (1000, 512)),
        ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "100"}, (2048, 100)),
    ],
)
def test_how_many_requests_are_sent_at_once(
    variables: dict[str, str], sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    """Many, unless OpenTelemetry's own variables say how many are kept or sent."""
    from opentelemetry.sdk.trace import export

    made: list[BatchSpanProcessor] = []

    class Processor(BatchSpanProcessor):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setattr(export, "BatchSpanProcessor", Processor)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    otlp_tracer("http://collector:4318", 1.0).close()
    inner = made[0]._batch_processor
    assert (inner._max_queue_size, inner._max_export_batch_size) == sizes


def test_what_sends_them_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    """The text says what to install."""
    real = builtins.__import__

    def fake(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(FailedPrecondition, match=r"otlp_endpoint: .* install kiln\[otel\]"):
        otlp_tracer("http://collector:4318", 1.0)
