"""What front ends and engine send each other: there and back, in any pieces, and nothing that is corrupt."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import errors
from service.batching.queue import Spent
from service.errors import Internal, KilnError, NotFound, Overloaded
from service.frontend.frames_codec import (
    MAX_FRAME_BYTES,
    Answered,
    Asked,
    Block,
    CorruptFrame,
    Frame,
    FrameReader,
    Kind,
    Place,
    decode_answer,
    decode_error,
    decode_request,
    encode_answer,
    encode_error,
    encode_request,
    frame,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KilnError)]
BLOCK = st.builds(Block, st.sampled_from(Place), st.integers(0, 2**63), st.integers(0, 2**40))


def only(data: bytes) -> Frame:
    (got,) = FrameReader().feed(data)
    return got


@given(
    st.integers(0, 2**64 - 1),
    st.builds(Asked, st.integers(0, 2**40), st.none() | st.floats(0, 1e12), st.booleans(), BLOCK, st.binary()),
)
def test_requests(number: int, asked: Asked):
    """There and back, with a deadline or without."""
    got = only(encode_request(number, asked))
    assert (got.kind, got.number) == (Kind.REQUEST, number)
    assert decode_request(got) == asked


@given(st.tuples(*[st.floats(0, 1e6)] * 3, st.integers(0, 2**40)), BLOCK, st.binary())
def test_answers(spent: tuple[float, float, float, int], block: Block, layout: bytes):
    """There and back, with where the time went."""
    got = only(encode_answer(7, Answered(Spent(*spent), block, layout)))
    assert (got.kind, got.number) == (Kind.ANSWER, 7)
    answered = decode_answer(got)
    told = answered.spent
    assert (told.queue_s, told.fuse_s, told.compute_s, told.rows) == spent
    assert (answered.block, answered.layout) == (block, layout)


@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind: type[KilnError]):
    """Each class with its text, whatever characters that has."""
    error = decode_error(only(encode_error(1, kind("input 'é\ud800': 1\0 expected"))))
    assert type(error) is kind
    assert str(error) == "input 'é\ud800': 1\0 expected"


def test_an_overload_tells_when_to_come_again():
    """As the queue has measured it."""
    error = decode_error(only(encode_error(1, Overloaded("full", 2.5))))
    assert isinstance(error, Overloaded)
    assert (str(error), error.retry_after_s) == ("full", 2.5)


def test_an_error_of_an_unknown_class_is_internal():
    """With its text."""
    data = encode_error(1, NotFound("no")).replace(b"NotFound", b"NotThere")
    error = decode_error(only(data))
    assert (type(error), str(error)) == (Internal, "no")


@given(st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.binary(max_size=50))), st.data())
def test_frames_come_in_any_pieces(frames: list[tuple[Kind, int, bytes]], data: st.DataObject):
    """A stream has no borders: each frame is whole and in order wherever it was cut."""
    stream = b"".join(frame(kind, number, body) for kind, number, body in frames)
    reader, got = FrameReader(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        got += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert [(each.kind, each.number, each.body) for each in got] == frames


@pytest.mark.parametrize("length", [0, 15, MAX_FRAME_BYTES + 1])
def test_a_frame_of_impossible_length(length: int):
    """Ends the conversation: where the next frame begins is not known."""
    with pytest.raises(CorruptFrame, match=f"got {length}$"):
        list(FrameReader().feed(struct.pack("<I", length) + bytes(12)))


@pytest.mark.parametrize("decode", [decode_request, decode_answer, decode_error])
def test_a_frame_that_is_cut_short(decode):
    """Is refused, with its kind and size."""
    with pytest.raises(CorruptFrame, match="no frame of kind 1 has 3 bytes"):
        decode(Frame(1, Place.RING, 0, 1, b"abc"))


@pytest.mark.parametrize("decode", [decode_request, decode_answer])
def test_a_block_at_no_place(decode):
    """Is refused."""
    with pytest.raises(CorruptFrame, match="its block at place 9"):
        decode(Frame(1, 9, 0, 1, bytes(100)))


def test_an_error_that_is_no_text():
    """Is refused."""
    with pytest.raises(CorruptFrame):
        decode_error(Frame(Kind.ERROR, 0, 0, 1, bytes(8) + b"\xff\xfe"))
