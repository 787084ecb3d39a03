"""The trace that a request belongs to, as its caller told it: carried beside the request, never passed through it.

Source of the form: W3C Trace Context.
"""

from __future__ import annotations

import re
from contextvars import ContextVar

_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = 0x01

trace_id: ContextVar[str] = ContextVar("kiln_trace_id", default="")
"""Of the request that the current task answers, 32 hexadecimal digits; empty where there is none, or none is kept."""


def is_trace_parent(value: str) -> bool:
    """Whether `value` is a ``traceparent``."""
    return _PARENT.fullmatch(value) is not None


def sampled_trace_id(value: str) -> str:
    """The trace id of a ``traceparent`` whose trace is recorded; empty for any other value.

    A trace that nobody records cannot be looked up, so there is no use in pointing at it.
    """
    match = _PARENT.fullmatch(value)
    return match[1] if match is not None and int(match[2], 16) & _SAMPLED else ""


def follow(value: bytes | None) -> None:
    """From here on the current task answers a request with that ``traceparent``, or with none."""
    if value is not None:
        trace_id.set(sampled_trace_id(value.decode("latin-1")))
    elif trace_id.get():  # the same task answered another request before
        trace_id.set("")
