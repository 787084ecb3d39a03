"""What front ends and engine send each other over their socket: frames, pure.

Requests and answers have the layout of their tensors with them, see `layout_codec`; the tensors' bytes lie
in a block of shared memory.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from service import errors
from service.batching.queue import Spent
from service.errors import Internal, KilnError, Overloaded
from service.trace_context import NOBODY

MAX_FRAME_BYTES = 2**28
_HEAD = struct.Struct("<IBBHQ")  # length, kind, where the block is, flags, number
_REQUEST = struct.Struct("<QdQQHH")  # version, deadline, position and size of the block, priority, bytes of `asker`
_ANSWER = struct.Struct("<dddQQQI")  # queue, fuse, compute, rows; position and size of the block; bytes of `runs`
_WHOLE_REQUEST = struct.Struct("<IBBHQQdQQHH")  # head and all of that
_WHOLE_ANSWER = struct.Struct("<IBBHQdddQQQI")
_ERROR = struct.Struct("<dI")  # when to try again, bytes of `spent`
_MOST_PRIORITY = 2**16 - 1
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

    `is_named` tells whether the caller named a version or label, `priority` is as in `Batcher.submit`,
    `asker` as `encode_asker` has it.
    """

    version: int
    deadline: float | None
    is_named: bool
    block: Block
    layout: bytes
    priority: int = 0
    asker: bytes = b""


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
    version, deadline, is_named, (place, position, size_bytes), layout, priority, asker = asked
    length = _WHOLE_REQUEST.size + len(layout) + len(asker)
    due = math.inf if deadline is None else deadline
    head = (length, REQUEST, place, _IS_NAMED * is_named, number)
    level = min(priority, _MOST_PRIORITY)  # 3 and all above it are alike
    return _WHOLE_REQUEST.pack(*head, version, due, position, size_bytes, level, len(asker)) + asker + layout


def decode_request(got: Frame) -> Asked:
    """The inverse of `encode_request`; `CorruptFrame` if it cannot be one."""
    _, place, flags, _, body = got
    try:
        version, deadline, position, size_bytes, priority, asker_bytes = _REQUEST.unpack_from(body)
        block = Block(_PLACES[place], position, size_bytes)
    except (struct.error, KeyError):
        raise _corrupt(got) from None
    due = None if deadline == math.inf else deadline
    start = _REQUEST.size + asker_bytes
    return Asked(version, due, bool(flags), block, body[start:], priority, body[_REQUEST.size : start])


def encode_answer(number: int, answered: Answered) -> bytes:
    """The frame of an answer to the request `number`."""
    spent, (place, position, size_bytes), layout = answered
    runs = pickle.dumps(spent.runs) if spent.runs else b""
    length = _WHOLE_ANSWER.size + len(runs) + len(layout)
    times = (spent.queue_s, spent.fuse_s, spent.compute_s, spent.rows)
    return _WHOLE_ANSWER.pack(length, ANSWER, place, 0, number, *times, position, size_bytes, len(runs)) + runs + layout


def decode_answer(got: Frame) -> Answered:
    """The inverse of `encode_answer`; `CorruptFrame` if it cannot be one."""
    try:
        queue_s, fuse_s, compute_s, rows, position, size_bytes, runs_bytes = _ANSWER.unpack_from(got.body)
        block = Block(_PLACES[got.place], position, size_bytes)
    except (struct.error, KeyError):
        raise _corrupt(got) from None
    spent = Spent(queue_s, fuse_s, compute_s, rows)
    start = _ANSWER.size + runs_bytes
    if runs_bytes:
        spent.runs = _unpickled(got, _ANSWER.size, start)
    return Answered(spent, block, got.body[start:])


def encode_asker(spent: Spent) -> bytes:
    """Whose request it is, and the span of one that is traced; empty if nothing is known of that."""
    if spent.span is None and spent.caller in (None, NOBODY):
        return b""
    return pickle.dumps((spent.caller, spent.span))


def decode_asker(got: Frame, asked: Asked) -> Spent:
    """The inverse of `encode_asker`: nothing is spent yet."""
    if not asked.asker:
        return Spent()
    caller, span = _unpickled(got, _REQUEST.size, _REQUEST.size + len(asked.asker))
    return Spent(caller=caller, span=span)


def encode_error(number: int, error: KilnError, spent: Spent | None = None) -> bytes:
    """Its class, text, and when trying again makes sense; and what was spent on a request that is traced."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    text = f"{type(error).__name__}\0{error}".encode(errors="surrogatepass")
    told = b"" if spent is None or spent.span is None else pickle.dumps(spent)
    return frame(Kind.ERROR, number, _ERROR.pack(retry_after_s, len(told)) + told + text)


def decode_error(got: Frame) -> tuple[KilnError, Spent | None]:
    """The inverse of `encode_error`; of a class that is not known here, `Internal`."""
    try:
        retry_after_s, spent_bytes = _ERROR.unpack_from(got.body)
        start = _ERROR.size + spent_bytes
        name, _, text = got.body[start:].decode(errors="surrogatepass").partition("\0")
    except (struct.error, UnicodeDecodeError):
        raise _corrupt(got) from None
    spent: Spent | None = _unpickled(got, _ERROR.size, start) if spent_bytes else None
    kind = _ERRORS.get(name, Internal)
    return Overloaded(text, retry_after_s) if kind is Overloaded else kind(text), spent


def _unpickled(got: Frame, start: int, end: int) -> Any:
    """What this program's own other process has put there."""
    try:
        return pickle.loads(got.body[start:end])  # noqa: S301 - from this program's own other process
    except Exception:  # noqa: BLE001 - a pickle that is damaged raises whatever it likes
        raise _corrupt(got) from None


def _corrupt(got: Frame) -> CorruptFrame:
    return CorruptFrame(f"no frame of kind {got.kind} has {len(got.body)} bytes and its block at place {got.place}")
