"""Memory that two processes share: a ring each way, and segments for what is too large for one.

All of it is anonymous (``memfd_create``): nothing is left behind, whichever process dies.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

from service.frontend.frames_codec import Block, CorruptFrame, Place
from service.frontend.layout_codec import Written, put
from service.frontend.ring import Ring, aligned

RING_BYTES = 8 * 2**20
LARGE_BYTES = 2**20
"""Blocks from this size on have a segment of their own: making one costs less than copying so much once more."""


def create(size_bytes: int) -> int:
    """The descriptor of a new memory object of `size_bytes`, all zero."""
    descriptor = os.memfd_create("kiln", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size_bytes)
    return descriptor


class Outbox:
    """Where blocks for the other process are put."""

    def __init__(self, descriptor: int, ring_bytes: int = RING_BYTES) -> None:
        """`descriptor` is of a memory object of `ring_bytes`; it stays the caller's."""
        self.ring = Ring(ring_bytes)
        self._buffer = mmap.mmap(descriptor, ring_bytes)

    def put(self, written: Written) -> tuple[Block, int | None] | None:
        """Where `written` lies now, with the descriptor of its segment if it has one; None if the ring is full.

        The descriptor is the caller's to close.
        """
        if written.size_bytes >= min(LARGE_BYTES, self.ring.size_bytes):
            return segment(written)
        position = self.ring.reserve(written.size_bytes)
        if position is None:
            return None
        put(self._buffer, position % self.ring.size_bytes, written)
        return Block(Place.RING, position, written.size_bytes), None


def segment(written: Written) -> tuple[Block, int]:
    """`written` in a memory object of its own: where it lies, and the descriptor, which is the caller's to close."""
    descriptor = create(max(written.size_bytes, 1))
    put(mmap.mmap(descriptor, max(written.size_bytes, 1)), 0, written)
    return Block(Place.SEGMENT, 0, written.size_bytes), descriptor


class Inbox:
    """Where blocks of the other process are found."""

    def __init__(self, descriptor: int, ring_bytes: int = RING_BYTES) -> None:
        """`descriptor` is of a memory object of `ring_bytes`; it stays the caller's."""
        self.position = 0
        """Up to here the ring has been read."""
        self.size_bytes = ring_bytes
        self._buffer = mmap.mmap(descriptor, ring_bytes)

    def take(self, block: Block, descriptor: Callable[[], int]) -> bytes | mmap.mmap:
        """The bytes of a block: a copy out of the ring, which is free again then, or a segment's own memory.

        A copy, for one slow model must not keep the ring from being used by the others. `descriptor`
        gives that of the segment, which is closed here.

        Raises:
            CorruptFrame: there can be no such block.
        """
        place, position, size_bytes = block
        if place is Place.RING:
            start = position % self.size_bytes
            if position < self.position or start + size_bytes > self.size_bytes:
                raise CorruptFrame(f"a ring of {self.size_bytes} bytes, read up to {self.position}, has no {block}")
            self.position = position + aligned(size_bytes)
            return self._buffer[start : start + size_bytes]
        if place is Place.NOWHERE:
            raise CorruptFrame("a block expected, got none")
        given = descriptor()
        try:
            return mmap.mmap(given, size_bytes)
        except (OSError, ValueError) as error:
            raise CorruptFrame(f"a segment of {size_bytes} bytes cannot be mapped: {error}") from None
        finally:
            os.close(given)
