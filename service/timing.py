"""Where a request's time went, as the caller is told.

Source of the form: W3C Server Timing; durations are in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.batching.queue import Spent
from service.trace_context import is_request_id, is_trace_parent

RETURNED = ("traceparent", "x-request-id")
"""Headers, or metadata of a gRPC call, that a caller gets back as it sent them."""


def server_timing(spent: Spent) -> str:
    """``queue`` is waiting for a batch, ``batch`` fusing it and cutting it, ``compute`` the model; then its rows."""
    return "queue;dur=%.3f, batch;dur=%.3f, compute;dur=%.3f, rows;desc=%d" % (  # noqa: UP031 - the fastest form
        spent.queue_s * 1e3,
        spent.fuse_s * 1e3,
        spent.compute_s * 1e3,
        spent.rows,
    )


def longest(spent: Sequence[Spent]) -> Spent:
    """Of the runs of one request the one that took longest: they run side by side, so its caller waited for that."""
    return max(spent, key=lambda one: one.queue_s + one.fuse_s + one.compute_s)


def is_returned(name: str, value: str) -> bool:
    """Whether a value under one of `RETURNED` is given back: a ``traceparent`` only if W3C Trace Context has such."""
    return is_trace_parent(value) if name == "traceparent" else is_request_id(value)
