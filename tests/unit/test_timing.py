"""What callers are told of their requests' time, and which of their ids they get back."""

from __future__ import annotations

import pytest

from service.batching.queue import Spent
from service.timing import is_returned, longest, server_timing

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_durations_are_in_milliseconds():
    """As W3C Server Timing has them."""
    assert server_timing(Spent(0.0012, 0.00004, 0.25, 7)) == (
        "queue;dur=1.200, batch;dur=0.040, compute;dur=250.000, rows;desc=7"
    )


def test_of_several_runs_the_longest_is_told():
    """In all: waiting, fusing and computing."""
    runs = [Spent(0.1, 0.0, 0.2, 1), Spent(0.3, 0.05, 0.0, 2), Spent(0.0, 0.1, 0.1, 3)]
    assert longest(runs) is runs[1]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("traceparent", TRACE, True),
        ("traceparent", "cc" + TRACE[2:] + "-more", True),
        ("traceparent", "ff" + TRACE[2:], False),
        ("traceparent", TRACE.upper(), False),
        ("traceparent", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", False),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", False),
        ("x-request-id", "anything", True),
        ("x-request-id", "", False),
        ("x-request-id", "x" * 257, False),
    ],
)
def test_ids_are_returned_if_they_are_some(name: str, value: str, expected: bool):
    """A trace parent must have the form of W3C Trace Context, a request id a reasonable length."""
    assert is_returned(name, value) is expected
