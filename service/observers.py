"""What follows requests, built as the settings say, and closed at the end."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from service.errors import FailedPrecondition
from service.following.access_log import log_access
from service.following.followed import Following
from service.following.record_folder import WHOLE, FolderBounds, Part, RecordFolder
from service.following.request_log import RequestLog
from service.following.tracing import Tracer, otlp_tracer
from service.metrics import Metrics
from service.rpc.request_log_codec import encode_line, encode_record
from service.runtime.record_file import TfRecordFile
from service.settings import Settings

_log = logging.getLogger("kiln.server")


@dataclass(frozen=True)
class Observers:
    """Those that there are."""

    following: Following
    tracer: Tracer | None = None
    request_log: RequestLog | None = None

    def close(self) -> None:
        """Send and write what there is still; blocks for some seconds at most."""
        if self.tracer is not None:
            self.tracer.close()
        if self.request_log is not None:
            self.request_log.close()


def observers(settings: Settings, metrics: Metrics, part: Part = WHOLE) -> Observers:
    """All that `settings` ask for, in the process that is `part` of the server.

    Raises:
        InvalidArgument: the endpoint is no URL.
        FailedPrecondition: what spans need is not installed, or the request log's folder cannot be used.
    """
    tracer = None if settings.otlp_endpoint is None else otlp_tracer(settings.otlp_endpoint, settings.trace_share)
    if tracer is not None:
        _log.info("spans of %g of the requests are sent over OTLP", settings.trace_share)
    request_log = _request_log(settings, metrics, part)
    following = Following(tracer, request_log, log_access if settings.access_log else None)
    return Observers(following, tracer, request_log)


def _request_log(settings: Settings, metrics: Metrics, part: Part) -> RequestLog | None:
    if settings.request_log is None:
        return None
    total_bytes = settings.request_log_total_bytes // max(1, part.count)
    bounds = FolderBounds(min(settings.request_log_file_bytes, total_bytes), total_bytes)
    form = settings.request_log_format
    try:
        if form == "jsonl":
            folder = RecordFolder(settings.request_log, form, bounds, part=part)
        else:
            folder = RecordFolder(settings.request_log, form, bounds, TfRecordFile, part)
    except OSError as error:
        raise FailedPrecondition(f"request_log: {settings.request_log} cannot be used: {error}") from None
    _log.info("%g of the requests are kept in %s", settings.request_log_share, settings.request_log)
    encode = encode_line if form == "jsonl" else encode_record
    return RequestLog(folder, encode, metrics.request_log(), share=settings.request_log_share)
