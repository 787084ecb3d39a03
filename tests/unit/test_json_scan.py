"""Depth and number of elements, told from bytes alone, whatever piece of the text they are in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rest.json_scan import _PIECE_BYTES, fewest_elements, is_deeper

VALUES = st.recursive(
    st.integers(0, 9) | st.text(st.sampled_from('[]{}",:\\a'), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "]", '"', "\\"]), inner),
)


def depth_of(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, items), default=0)


@given(value=VALUES, blanks=st.integers(0, 40))
def test_depth_is_that_of_the_value(value: Any, blanks: int):
    """Brackets, quotes and backslashes within strings do not count, nor does where one piece ends."""
    text = b" " * (_PIECE_BYTES - blanks) + json.dumps(value).encode()
    depth = depth_of(value)
    assert not is_deeper(text, depth)
    assert depth == 0 or is_deeper(text, depth - 1)


@pytest.mark.parametrize("blanks", range(8))
def test_an_escape_stays_whole_between_pieces(blanks: int):
    """A quote that is escaped ends no string, although its backslash ends a piece."""
    text = b" " * (_PIECE_BYTES - blanks) + rb'["\\\"[[[[", "\\", "]"]'
    assert is_deeper(text, 0)
    assert not is_deeper(text, 1)


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ({"instances": [0] * 100_000}, 99_998),
        ({"instances": [[0] * 10] * 10}, 98),
        ({"instances": [",,,:"] * 100}, 98),
        ({"instances": [{"x": 1, "y": 2}] * 10}, -2),
    ],
)
def test_elements_are_never_overrated(value: Any, count: int):
    """As many commas, less the colons: what is refused for its elements has them."""
    assert fewest_elements(json.dumps(value).encode()) == count


@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_json_are_no_trouble(data: bytes):
    """They are scanned before they are parsed."""
    is_deeper(data, 3)
    fewest_elements(data)
