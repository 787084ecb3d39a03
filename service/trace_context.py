"""Who asks, as far as the request says: its trace and its id. Carried beside the request, never passed through it.

Source of the form: W3C Trace Context.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import NamedTuple

_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 0x01
_LONGEST_ID = 256


class Caller(NamedTuple):
    """The ids that came with a request: of its trace (32 hexadecimal digits), of the span that asks (16), its own.

    Empty where there is none; `is_sampled` where the trace is recorded by whoever began it.
    """

    trace_id: str = ""
    span_id: str = ""
    is_sampled: bool = False
    request_id: str = ""

    @property
    def recorded_trace_id(self) -> str:
        """The trace id where the trace is recorded: one that nobody records cannot be looked up."""
        return self.trace_id if self.is_sampled else ""


NOBODY = Caller()
caller: ContextVar[Caller] = ContextVar("kiln_caller", default=NOBODY)
"""Of the request that the current task answers."""


def is_trace_parent(value: str) -> bool:
    """Whether `value` is a ``traceparent``."""
    return _PARENT.fullmatch(value) is not None


def is_request_id(value: str) -> bool:
    """Whether `value` is of a length that an id may have."""
    return 0 < len(value) <= _LONGEST_ID


def caller_of(trace_parent: str, request_id: str) -> Caller:
    """Who asks with these headers; what is not of their form is left out."""
    match = _PARENT.fullmatch(trace_parent)
    own = request_id if is_request_id(request_id) else ""
    if match is None:
        return Caller(request_id=own)
    return Caller(match[1], match[2], bool(int(match[3], 16) & _SAMPLED), own)


def follow(trace_parent: bytes | None, request_id: bytes | None) -> None:
    """From here on the current task answers a request with those headers, or with none."""
    if trace_parent is not None or request_id is not None:
        caller.set(caller_of((trace_parent or b"").decode("latin-1"), (request_id or b"").decode("latin-1")))
    elif caller.get() is not NOBODY:  # the same task answered another request before
        caller.set(NOBODY)
