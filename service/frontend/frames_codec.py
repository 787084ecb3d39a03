"""What front ends and engine send each other over their socket: frames, pure.

Requests and answers have the layout of their tensors with them, see `layout_codec`; the tensors' bytes lie
in a block of shared memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from service import errors
from service.batching.queue import Spent
from service.errors import Internal, KilnError, Overloaded

MAX_FRAME_BYTES = 2**28
_HEAD = struct.Struct("<IBBHQ")  # length, kind, where the block is, flags, number
_REQUEST = struct.Struct("<QdQQ")  # version, deadline, position and size of the block
_ANSWER = struct.Struct("<dddQQQ")  # queue, fuse, compute, rows; position and size of the block
_WHOLE_REQUEST = struct.Struct("<IBBHQQdQQ")  # head and all of that
_WHOLE_ANSWER = struct.Struct("<IBBHQdddQQQ")
_RETRY = struct.Struct("<d")
_IS_NAMED = 1
_ERRORS: dict[str, type[KilnError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, KilnError)
}


class CorruptFrame(Exception):
    """The other side does not speak this protocol, or its memory is damaged; what it sends is worth nothing."""


class Kind(IntEnum):
    """What a frame says; its `number` is that of a request, but where told otherwise."""

    REQUEST = 1
    ANSWER = 2
    ERROR = 3
    CANCEL = 4
    """The caller has gone."""
    FREED = 5
    """Blocks have been read up to the position `number`."""
    RELEASE = 6
    """Nobody holds the version `number` any more, which was told to be gone."""
    CALL = 7
    """A pickled name and arguments; `number` is that of the call."""
    RESULT = 8
    """A pickled result of the call `number`."""


class Place(IntEnum):
    """Where the block of a frame lies."""

    NOWHERE = 0
    RING = 1
    SEGMENT = 2
    """In a memory object of its own, whose descriptor comes with the frame."""


REQUEST, ANSWER = int(Kind.REQUEST), int(Kind.ANSWER)
"""Plain numbers where each request passes: looking one up in an enumeration takes longer than comparing it."""
_PLACES: dict[int, Place] = {place.value: place for place in Place}


class Frame(NamedTuple):
    """One frame; `body` is what follows its head."""

    kind: int
    place: int
    flags: int
    number: int
    body: bytes


class Block(NamedTuple):
    """Where the tensors of a frame lie: `size_bytes` at `position` of a ring, or from the start of a segment."""

    place: Place
    position: int
    size_bytes: int


class Asked(NamedTuple):
    """A request of a version; `deadline` is seconds of `time.monotonic`, which all processes share.

    `is_named` tells whether the caller named a version or label.
    """

    version: int
    deadline: float | None
    is_named: bool
    block: Block
    layout: bytes


class Answered(NamedTuple):
    """The answer to a request."""

    spent: Spent
    block: Block
    layout: bytes


class FrameReader:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with `data`; `CorruptFrame` for one that cannot be."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= _HEAD.size:
            length, kind, place, flags, number = _HEAD.unpack_from(data, at)
            if not _HEAD.size <= length <= MAX_FRAME_BYTES:
                raise CorruptFrame(f"a frame of {_HEAD.size} to {MAX_FRAME_BYTES} bytes expected, got {length}")
            if at + length > end:
                break
            yield Frame(kind, place, flags, number, data[at + _HEAD.size : at + length])
            at += length
        self._rest = data[at:]


def frame(kind: Kind, number: int, body: bytes = b"", *, place: Place = Place.NOWHERE, flags: int = 0) -> bytes:
    """One frame."""
    return _HEAD.pack(_HEAD.size + len(body), kind, place, flags, number) + body


def encode_request(number: int, asked: Asked) -> bytes:
    """The frame of a request, which its answer and its cancellation name by `number`."""
    version, deadline, is_named, (place, position, size_bytes), layout = asked
    length = _WHOLE_REQUEST.size + len(layout)
    due = math.inf if deadline is None else deadline
    head = (length, REQUEST, place, _IS_NAMED * is_named, number)
    return _WHOLE_REQUEST.pack(*head, version, due, position, size_bytes) + layout


def decode_request(got: Frame) -> Asked:
    """The inverse of `encode_request`; `CorruptFrame` if it cannot be one."""
    _, place, flags, _, body = got
    try:
        version, deadline, position, size_bytes = _REQUEST.unpack_from(body)
        block = Block(_PLACES[place], position, size_bytes)
    except (struct.error, KeyError):
        raise _corrupt(got) from None
    return Asked(version, None if deadline == math.inf else deadline, bool(flags), block, body[_REQUEST.size :])


def encode_answer(number: int, answered: Answered) -> bytes:
    """The frame of an answer to the request `number`."""
    spent, (place, position, size_bytes), layout = answered
    length = _WHOLE_ANSWER.size + len(layout)
    times = (spent.queue_s, spent.fuse_s, spent.compute_s, spent.rows)
    return _WHOLE_ANSWER.pack(length, ANSWER, place, 0, number, *times, position, size_bytes) + layout


def decode_answer(got: Frame) -> Answered:
    """The inverse of `encode_answer`; `CorruptFrame` if it cannot be one."""
    try:
        queue_s, fuse_s, compute_s, rows, position, size_bytes = _ANSWER.unpack_from(got.body)
        block = Block(_PLACES[got.place], position, size_bytes)
    except (struct.error, KeyError):
        raise _corrupt(got) from None
    return Answered(Spent(queue_s, fuse_s, compute_s, rows), block, got.body[_ANSWER.size :])


def encode_error(number: int, error: KilnError) -> bytes:
    """Its class, text, and when trying again makes sense."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    text = f"{type(error).__name__}\0{error}".encode(errors="surrogatepass")
    return frame(Kind.ERROR, number, _RETRY.pack(retry_after_s) + text)


def decode_error(got: Frame) -> KilnError:
    """The inverse of `encode_error`; of a class that is not known here, `Internal`."""
    try:
        (retry_after_s,) = _RETRY.unpack_from(got.body)
        name, _, text = got.body[_RETRY.size :].decode(errors="surrogatepass").partition("\0")
    except (struct.error, UnicodeDecodeError):
        raise _corrupt(got) from None
    kind = _ERRORS.get(name, Internal)
    return Overloaded(text, retry_after_s) if kind is Overloaded else kind(text)


def _corrupt(got: Frame) -> CorruptFrame:
    return CorruptFrame(f"no frame of kind {got.kind} has {len(got.body)} bytes and its block at place {got.place}")
