"""Which trace a request belongs to."""

from __future__ import annotations

import pytest

from service.trace_context import NOBODY, Caller, caller, caller_of, follow

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"01-{TRACE}-00f067aa0ba902b7-03-more", TRACE),
        (f"00-{TRACE}-00f067aa0ba902b7-00", ""),
        (f"00-{TRACE}-00f067aa0ba902b7-02", ""),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", ""),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", ""),
        ("", ""),
    ],
)
def test_a_trace_counts_that_is_recorded(value: str, expected: str):
    """By the flag of ``traceparent``; one that is malformed, or that nobody records, is none."""
    assert caller_of(value, "").recorded_trace_id == expected


def test_what_a_caller_says_of_itself():
    """The trace, the span that asks, whether it is recorded, and the request's id if it has the length of one."""
    assert caller_of(f"00-{TRACE}-00f067aa0ba902b7-00", "r-1") == Caller(TRACE, "00f067aa0ba902b7", False, "r-1")
    assert caller_of("", "r" * 256) == Caller(request_id="r" * 256)
    assert caller_of("00-nothing", "r" * 257) == NOBODY


def test_a_task_follows_one_request_after_the_other():
    """The next one, without ids, is not taken for the one before."""
    follow(f"00-{TRACE}-00f067aa0ba902b7-01".encode(), None)
    assert caller.get().recorded_trace_id == TRACE
    follow(None, b"r-2")
    assert caller.get() == Caller(request_id="r-2")
    follow(None, None)
    assert caller.get() is NOBODY
