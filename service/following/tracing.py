"""Spans of requests for OpenTelemetry, made after the fact from the times that are known anyway.

``request`` has a ``queue`` for each part that waited; ``batch`` is a child of the first traced request in it and
linked to all of them, and ``execute``, the run of the plan, is a child of the batch. The only user of opentelemetry.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from service import __version__
from service.batching.queue import BatchRun, Spent
from service.errors import Code, FailedPrecondition, InvalidArgument
from service.following.followed import Followed, SpanIds

_FAULTS = frozenset({Code.INTERNAL, Code.UNAVAILABLE, Code.OVERLOADED, Code.DEADLINE_EXCEEDED})
"""Failures that make a span one of error: those that are the server's."""
_TRACES_PATH = "/v1/traces"
_Attributes = dict[str, str | int | float]


class _Ended(NamedTuple):
    """A request that has ended: what its spans are made of, without its tensors; `offset_s` is of the clock."""

    ids: SpanIds
    protocol: str
    model: str
    version: int | None
    code: Code | None
    rows: int
    request_id: str
    started: float
    ended: float
    decode_s: float | None
    answered: float | None
    spent: list[Spent]
    offset_s: float
    context: Any
    """What a processor looks at, to see whether a span is recorded."""


class _Exporter:
    """Makes the spans of requests where they are sent on, and hands them to `exporter`."""

    def __init__(self, exporter: Any, spans: Callable[[_Ended], list[Any]]) -> None:
        self._exporter = exporter
        self._spans = spans
        self.shutdown, self.force_flush = exporter.shutdown, exporter.force_flush

    def export(self, requests: Sequence[_Ended]) -> Any:
        return self._exporter.export([span for ended in requests for span in self._spans(ended)])


class Tracer:
    """Keeps the requests that it is told of, and makes spans of them and sends these from a thread of its own.

    There the code that makes them runs many times in a row; between the answers to requests each line of it would be
    run with cold caches, at several times the cost. They are made as what the SDK exports, past its `Tracer`: that
    would make each twice.
    """

    def __init__(self, exporter: Any, share: float, processor: Callable[[Any], Any]) -> None:
        """`exporter`, one of the SDK's, takes spans, through a `processor` of the SDK's made for it.

        `share` is of the requests without a trace of their own.
        """
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

        self.share = share
        self._processor = processor(_Exporter(exporter, self._spans))
        scope = InstrumentationScope("kiln", __version__)
        self._make = partial(ReadableSpan, resource=_resource(), instrumentation_scope=scope)
        self._context = partial(SpanContext, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        self._recorded = self._context(1, 1, is_remote=False)
        self._link = Link
        self._server = {"kind": SpanKind.SERVER}
        self._failed = {"kind": SpanKind.SERVER, "status": Status(StatusCode.ERROR)}

    def tell(self, followed: Followed) -> None:
        """Keep what the spans of a request that has ended are made of."""
        assert followed.ids is not None
        ended = _Ended(
            followed.ids,
            followed.protocol,
            followed.model,
            followed.version,
            followed.code,
            followed.rows,
            followed.caller.request_id,
            followed.started,
            followed.ended,
            followed.decode_s,
            followed.answered,
            [asked.spent for asked in followed.asked],
            time.time() - time.monotonic(),
            self._recorded,
        )
        self._processor.on_end(ended)

    def close(self) -> None:
        """Send what there is still to send; blocks for as long as the exporter takes for it."""
        self._processor.shutdown()

    def _spans(self, ended: _Ended) -> list[Any]:
        """All spans of a request: its own, the waits, and the batches in which it was the first that is traced."""
        ids = ended.ids
        parent = self._context(ids.trace_id, ids.parent_id, is_remote=True) if ids.parent_id else None
        own = self._context(ids.trace_id, ids.span_id, is_remote=False)
        kind = self._server if ended.code not in _FAULTS else self._failed
        times = ended.started, ended.ended
        found = [self._span(ended, "request", own, parent, times, _attributes(ended), **kind)]
        for spent in ended.spent:
            if not spent.runs and spent.queue_s:  # it ended in the queue
                found.append(self._child(ended, "queue", own, (ended.ended - spent.queue_s, ended.ended)))
            for run in spent.runs:
                enqueued = spent.runs[-1].taken - spent.queue_s
                found.append(self._child(ended, "queue", own, (enqueued, run.taken)))
                if run.spans[0] == ids:
                    found += self._batch(ended, run, own)
        return found

    def _batch(self, ended: _Ended, run: BatchRun, own: Any) -> tuple[Any, Any]:
        done = run.started + run.compute_s
        links = [
            self._link(self._context(ids.trace_id, ids.span_id, is_remote=False))
            for ids in run.spans
            if isinstance(ids, SpanIds)
        ]
        sizes: _Attributes = {"kiln.batch.rows": run.rows, "kiln.batch.given_rows": run.given}
        batch = self._child(ended, "batch", own, (run.taken, done + run.cut_s), sizes, links=links)
        return batch, self._child(ended, "execute", batch.context, (run.started, done))

    def _child(
        self, ended: _Ended, name: str, parent: Any, times: tuple[float, float], *more: Any, **other: Any
    ) -> Any:
        """A span below `parent`, in its trace."""
        context = self._context(parent.trace_id, random.getrandbits(64) or 1, is_remote=False)
        return self._span(ended, name, context, parent, times, *more, **other)

    def _span(
        self,
        ended: _Ended,
        name: str,
        context: Any,
        parent: Any,
        times: tuple[float, float],
        attributes: _Attributes | None = None,
        **more: Any,
    ) -> Any:
        """`times`, its start and end, are in seconds of `time.monotonic`."""
        start_ns, end_ns = (int((at + ended.offset_s) * 1e9) for at in times)
        given = attributes or {}
        return self._make(name, context, parent, attributes=given, start_time=start_ns, end_time=end_ns, **more)


def otlp_tracer(endpoint: str, share: float) -> Tracer:
    """A tracer that sends its spans over HTTP to an OTLP collector at `endpoint`, a URL.

    Raises:
        InvalidArgument: it is no such URL.
        FailedPrecondition: what sends them is not installed.
    """
    url = urlsplit("")
    with contextlib.suppress(ValueError):
        url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise InvalidArgument(f"otlp_endpoint: a URL as http://host:4318 expected, got {endpoint!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise FailedPrecondition(
            f"otlp_endpoint: the packages of OpenTelemetry are needed, install kiln[otel] ({error})"
        ) from None
    whole = url if url.path not in ("", "/") else url._replace(path=_TRACES_PATH)
    return Tracer(OTLPSpanExporter(whole.geturl()), share, BatchSpanProcessor)


def _attributes(ended: _Ended) -> _Attributes:
    """What is told of a request; what is not known is left out."""
    found: _Attributes = {"kiln.protocol": ended.protocol, "kiln.model": ended.model, "kiln.rows": ended.rows}
    if ended.version is not None:
        found["kiln.version"] = ended.version
    if ended.request_id:
        found["kiln.request_id"] = ended.request_id
    if ended.decode_s is not None:
        found["kiln.decode_ms"] = ended.decode_s * 1e3
    if ended.answered is not None:
        found["kiln.encode_ms"] = (ended.ended - ended.answered) * 1e3
    if ended.code is not None:
        found["error.type"] = ended.code.value
    return found


def _resource() -> Any:
    """Who sends the spans: ``kiln``, unless OpenTelemetry's own environment variables name it otherwise."""
    from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource

    found = Resource.create({SERVICE_VERSION: __version__})
    if str(found.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: "kiln"}))
    own_hash = hash(found)

    class Known(Resource):
        """The exporter asks each span for its resource's hash, which costs as much as to encode the span."""

        def __hash__(self) -> int:
            return own_hash

    return Known(dict(found.attributes), found.schema_url)
