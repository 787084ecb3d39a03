"""The account of a shared buffer: blocks in order, never over what is unread, never around the end."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.frontend.ring import ALIGNMENT, Ring, aligned

SIZE = 16 * ALIGNMENT


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_sizes_are_rounded_up(size: int, expected: int):
    """To whole cache lines."""
    assert aligned(size) == expected


@pytest.mark.parametrize("size", [0, -64, 100])
def test_a_ring_has_whole_lines(size: int):
    """Any other size is refused."""
    with pytest.raises(ValueError, match="a multiple of 64 bytes expected"):
        Ring(size)


def test_a_block_does_not_wrap_around():
    """What is left at the end stays empty, and counts as used until it is passed."""
    ring = Ring(SIZE)
    first = ring.reserve(10 * ALIGNMENT)
    second = ring.reserve(4 * ALIGNMENT)
    assert (first, second) == (0, 10 * ALIGNMENT)
    ring.free(10 * ALIGNMENT)
    assert ring.reserve(4 * ALIGNMENT) == SIZE
    assert ring.used_bytes == 10 * ALIGNMENT
    assert repr(ring) == f"<Ring {10 * ALIGNMENT} of {SIZE} bytes>"


def test_a_full_ring_has_no_room():
    """Until something is read."""
    ring = Ring(SIZE)
    assert ring.reserve(SIZE) == 0
    assert ring.reserve(1) is None
    ring.free(SIZE)
    assert ring.reserve(1) == SIZE


def test_what_is_larger_than_the_ring_has_no_room():
    """Not even in an empty one."""
    assert Ring(SIZE).reserve(SIZE + 1) is None


def test_an_empty_ring_begins_at_its_start():
    """So that little traffic stays in the caches."""
    ring = Ring(SIZE)
    for _ in range(5):
        position = ring.reserve(3 * ALIGNMENT)
        assert position is not None
        assert position % SIZE == 0
        ring.free(position + 3 * ALIGNMENT)


@pytest.mark.parametrize("position", [63, 129])
def test_only_what_was_written_can_be_read(position: int):
    """A reader that says otherwise is not believed."""
    ring = Ring(SIZE)
    ring.reserve(128)
    ring.free(64)
    with pytest.raises(ValueError, match="a position of"):
        ring.free(position)


@given(st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 4)), max_size=200))
def test_no_block_is_written_over(steps: list[tuple[int, int]]):
    """Whatever is written and read, in whatever rhythm: blocks lie in the buffer and apart from each other."""
    ring = Ring(SIZE)
    unread: deque[tuple[int, int]] = deque()
    for size, reads in steps:
        position = ring.reserve(size)
        if position is None:
            assert unread, "an empty ring has room for all that it can hold"
        else:
            end = position + aligned(size)
            assert position % SIZE + aligned(size) <= SIZE
            assert not unread or position >= unread[-1][1]
            unread.append((position, end))
            assert end - unread[0][0] <= SIZE
        for _ in range(min(reads, len(unread))):
            ring.free(unread.popleft()[1])
