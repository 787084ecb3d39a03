"""Which trace a request belongs to."""

from __future__ import annotations

import pytest

from service.trace_context import follow, sampled_trace_id, trace_id

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
    assert sampled_trace_id(value) == expected


def test_a_task_follows_one_request_after_the_other():
    """The next one, without a trace, is not taken for the one before."""
    follow(f"00-{TRACE}-00f067aa0ba902b7-01".encode())
    assert trace_id.get() == TRACE
    follow(None)
    assert trace_id.get() == ""
