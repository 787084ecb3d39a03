"""Spans of requests for OpenTelemetry, made after the fact from the times that are known anyway.

``request`` has a ``queue`` for each part that waited; ``batch`` is a child of the first traced request in it and
linked to all of them, and ``execute``, the run of the plan, is a child of the batch. The only user of opentelemetry.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from service import __version__
from service.batching.queue import BatchRun
from service.errors import Code, FailedPrecondition, InvalidArgument
from service.following.followed import Asked, Followed, SpanIds

_FAULTS = frozenset({Code.INTERNAL, Code.UNAVAILABLE, Code.OVERLOADED, Code.DEADLINE_EXCEEDED})
"""Failures that make a span one of error: those that are the server's."""
_TRACES_PATH = "/v1/traces"
_MOST_KEPT, _MOST_SENT = 8192, 2048
"""Spans kept, and sent at once: four times OpenTelemetry's own, for sending costs as much as encoding 200 of them."""
_Attributes = dict[str, str | int | float]


class Tracer:
    """Makes spans of the requests it is told of, and sends them on from a thread of its own.

    They are made as what the SDK exports, past its `Tracer`: that would make each twice, at four times the cost.
    """

    def __init__(self, processor: Any, share: float) -> None:
        """`processor`, one of the SDK's, takes spans; `share` is of the requests without a trace of their own."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

        self.share = share
        self._processor = processor
        scope = InstrumentationScope("kiln", __version__)
        self._make = partial(ReadableSpan, resource=_resource(), instrumentation_scope=scope)
        self._context = partial(SpanContext, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        self._link = Link
        self._server = {"kind": SpanKind.SERVER}
        self._failed = {"kind": SpanKind.SERVER, "status": Status(StatusCode.ERROR)}

    def tell(self, followed: Followed) -> None:
        """Make the spans of a request that has ended."""
        ids = followed.ids
        assert ids is not None
        parent = self._context(ids.trace_id, ids.parent_id, is_remote=True) if ids.parent_id else None
        own = self._context(ids.trace_id, ids.span_id, is_remote=False)
        offset_s = time.time() - time.monotonic()
        kind = self._server if followed.code not in _FAULTS else self._failed
        self._end(
            "request", own, parent, _ns(followed.started, followed.ended, offset_s), _attributes(followed), **kind
        )
        for asked in followed.asked:
            self._batches(asked, followed, own, offset_s)

    def _batches(self, asked: Asked, followed: Followed, own: Any, offset_s: float) -> None:
        """The spans of what `asked` waited for, and of the batches in which it was the first that is traced."""
        spent = asked.spent
        if not spent.runs and spent.queue_s:  # it ended in the queue
            waited = _ns(followed.ended - spent.queue_s, followed.ended, offset_s)
            self._end("queue", self._new(own), own, waited)
        for run in spent.runs:
            enqueued = spent.runs[-1].taken - spent.queue_s
            self._end("queue", self._new(own), own, _ns(enqueued, run.taken, offset_s))
            if run.spans[0] == followed.ids:
                self._batch(run, followed, own, offset_s)

    def _batch(self, run: BatchRun, followed: Followed, own: Any, offset_s: float) -> None:
        ended = run.started + run.compute_s
        batch = self._new(own)
        links = [
            self._link(self._context(ids.trace_id, ids.span_id, is_remote=False))
            for ids in run.spans
            if isinstance(ids, SpanIds)
        ]
        sizes: _Attributes = {"kiln.batch.rows": run.rows, "kiln.batch.given_rows": run.given}
        self._end("batch", batch, own, _ns(run.taken, ended + run.cut_s, offset_s), sizes, links=links)
        self._end("execute", self._new(own), batch, _ns(run.started, ended, offset_s))

    def _new(self, parent: Any) -> Any:
        """A span in the trace of `parent`."""
        return self._context(parent.trace_id, random.getrandbits(64) or 1, is_remote=False)

    def _end(
        self,
        name: str,
        context: Any,
        parent: Any,
        from_until_ns: tuple[int, int],
        attributes: _Attributes | None = None,
        **more: Any,
    ) -> None:
        start_ns, end_ns = from_until_ns
        self._processor.on_end(
            self._make(name, context, parent, attributes=attributes or {}, start_time=start_ns, end_time=end_ns, **more)
        )

    def close(self) -> None:
        """Send what there is still to send; blocks for as long as the exporter takes for it."""
        self._processor.shutdown()


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
    is_sized = any(name.startswith("OTEL_BSP_MAX_") for name in os.environ)
    most = (None, None) if is_sized else (_MOST_KEPT, _MOST_SENT)
    exporter = OTLPSpanExporter(whole.geturl())
    return Tracer(BatchSpanProcessor(exporter, max_queue_size=most[0], max_export_batch_size=most[1]), share)


def _ns(start: float, end: float, offset_s: float) -> tuple[int, int]:
    """Seconds of `time.monotonic` as nanoseconds since the epoch, which was at `-offset_s`."""
    return int((start + offset_s) * 1e9), int((end + offset_s) * 1e9)


def _attributes(followed: Followed) -> _Attributes:
    """What is told of a request; what is not known is left out."""
    found: _Attributes = {
        "kiln.protocol": followed.protocol,
        "kiln.model": followed.model,
        "kiln.rows": followed.rows,
    }
    if followed.version is not None:
        found["kiln.version"] = followed.version
    if followed.caller.request_id:
        found["kiln.request_id"] = followed.caller.request_id
    if followed.decode_s is not None:
        found["kiln.decode_ms"] = followed.decode_s * 1e3
    if followed.answered is not None:
        found["kiln.encode_ms"] = (followed.ended - followed.answered) * 1e3
    if followed.code is not None:
        found["error.type"] = followed.code.value
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
