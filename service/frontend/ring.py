"""Where the next block lies in a buffer that is filled and emptied in order: a plain object, without the buffer.

Whoever writes keeps it; whoever reads says from time to time up to where it is done. Positions count on
for ever, so that none is ever met twice; the place of a position in the buffer is its rest.
"""

from __future__ import annotations

ALIGNMENT = 64
"""Blocks begin at multiples of this: a cache line, and what vector units like."""


def aligned(size_bytes: int) -> int:
    """`size_bytes`, rounded up to a multiple of `ALIGNMENT`."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


class Ring:
    """The writer's account of a buffer of `size_bytes` bytes.

    A block never wraps around: where it would, the rest of the buffer is left empty and it begins
    at the start. A buffer that has been emptied begins at the start too, so that little traffic
    stays in the processor's caches.
    """

    def __init__(self, size_bytes: int) -> None:
        """`size_bytes` is a multiple of `ALIGNMENT`."""
        if size_bytes <= 0 or size_bytes % ALIGNMENT:
            raise ValueError(f"a multiple of {ALIGNMENT} bytes expected, got {size_bytes}")
        self.size_bytes = size_bytes
        self._head = 0
        self._tail = 0

    def __repr__(self) -> str:
        return f"<Ring {self.used_bytes} of {self.size_bytes} bytes>"

    @property
    def used_bytes(self) -> int:
        """What is written and not read, with what was left empty."""
        return self._head - self._tail

    def reserve(self, size_bytes: int) -> int | None:
        """The position of a block of `size_bytes`; None while there is no room for it."""
        size_bytes = aligned(size_bytes)
        start = self._head
        place = start % self.size_bytes
        if place and start == self._tail:
            start += self.size_bytes - place
            self._head = self._tail = start
            place = 0
        if place + size_bytes > self.size_bytes:
            start += self.size_bytes - place
        if start + size_bytes - self._tail > self.size_bytes:
            return None
        self._head = start + size_bytes
        return start

    def free(self, position: int) -> None:
        """All up to `position` has been read.

        Raises:
            ValueError: that is less than was read before, or more than was written.
        """
        if not self._tail <= position <= self._head:
            raise ValueError(f"a position of {self._tail} to {self._head} expected, got {position}")
        self._tail = position
