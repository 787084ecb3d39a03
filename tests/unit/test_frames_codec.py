"""What front ends and engine send each other: there and back, in any pieces, and nothing that is corrupt."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import errors
from service.batching.queue import BatchRun, Spent, level_of
from service.errors import Internal, KilnError, NotFound, Overloaded
from service.following.followed import SpanIds
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
    decode_asker,
    decode_error,
    decode_request,
    encode_answer,
    encode_asker,
    encode_error,
    encode_request,
    frame,
)
from service.trace_context import NOBODY, Caller

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KilnError)]
BLOCK = st.builds(Block, st.sampled_from(Place), st.integers(0, 2**63), st.integers(0, 2**40))


def only(data: bytes) -> Frame:
    (got,) = FrameReader().feed(data)
    return got


@given(
    st.integers(0, 2**64 - 1),
    st.builds(
        Asked,
        st.integers(0, 2**40),
        st.none() | st.floats(0, 1e12),
        st.booleans(),
        BLOCK,
        st.binary(),
        st.integers(0, 2**16 - 1),
        st.binary(max_size=1000),
    ),
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
    error, spent = decode_error(only(encode_error(1, kind("input 'é\ud800': 1\0 expected"), Spent(1.0))))
    assert spent is None, "nobody follows it"
    assert type(error) is kind
    assert str(error) == "input 'é\ud800': 1\0 expected"


def test_an_overload_tells_when_to_come_again():
    """As the queue has measured it."""
    error, _ = decode_error(only(encode_error(1, Overloaded("full", 2.5))))
    assert isinstance(error, Overloaded)
    assert (str(error), error.retry_after_s) == ("full", 2.5)


def test_an_error_of_an_unknown_class_is_internal():
    """With its text."""
    data = encode_error(1, NotFound("no")).replace(b"NotFound", b"NotThere")
    error, _ = decode_error(only(data))
    assert (type(error), str(error)) == (Internal, "no")


@given(st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 2**64 - 1), st.binary(max_size=50))), st.data())
def test_frames_come_in_any_pieces(frames: list[tuple[Kind, int, bytes]], data: st.DataObject):
    """A stream has no borders: each frame is whole and in order wherever it was cut."""
    stream = b"".join(frame(kind, number, body) for kind, number, body in frames)
    reader = FrameReader()
    got: list[Frame] = []
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
        decode_error(Frame(Kind.ERROR, 0, 0, 1, bytes(12) + b"\xff\xfe"))


RUN = BatchRun(1.0, 2.0, 0.1, 0.5, 0.2, 3, 4, [SpanIds(1 << 127, 2, 3)])


@given(st.integers(0, 2**63 - 1))
def test_a_priority_stays_on_its_level(priority: int):
    """However large it is."""
    asked = Asked(1, None, False, Block(Place.RING, 0, 0), b"layout", priority)
    assert level_of(decode_request(only(encode_request(1, asked))).priority) == level_of(priority)


@pytest.mark.parametrize(
    ("caller", "span"),
    [(NOBODY, SpanIds(1, 2, 0)), (Caller(request_id="é"), None), (Caller("1" * 32, "2" * 16, True), SpanIds(1, 2, 3))],
)
def test_who_asks(caller: Caller, span: SpanIds | None):
    """Goes with the request if anything is known of it, and its layout with it."""
    asker = encode_asker(Spent(caller=caller, span=span))
    got = only(encode_request(1, Asked(1, None, False, Block(Place.RING, 0, 0), b"layout", 0, asker)))
    asked = decode_request(got)
    spent = decode_asker(got, asked)
    assert (spent.caller, spent.span, spent.runs, asked.layout) == (caller, span, (), b"layout")


@pytest.mark.parametrize("caller", [None, NOBODY])
def test_nobody_asks(caller: Caller | None):
    """Which takes no room in the frame."""
    assert encode_asker(Spent(caller=caller)) == b""


def test_batches_of_a_traced_request():
    """Come with its answer, and its layout with them."""
    answered = decode_answer(only(encode_answer(1, Answered(Spent(runs=(RUN,)), Block(Place.RING, 0, 0), b"layout"))))
    (run,) = answered.spent.runs
    assert (run.taken, run.started, run.fuse_s, run.compute_s, run.cut_s) == (1.0, 2.0, 0.1, 0.5, 0.2)
    assert (run.rows, run.given, run.spans, answered.layout) == (3, 4, RUN.spans, b"layout")


def test_a_traced_request_that_fails():
    """Tells where its time went all the same."""
    spent = Spent(queue_s=1.5, span=SpanIds(1, 2, 0), runs=(RUN,))
    error, told = decode_error(only(encode_error(1, NotFound("no"), spent)))
    assert isinstance(error, NotFound)
    assert str(error) == "no"
    assert told is not None
    assert (told.queue_s, len(told.runs)) == (1.5, 1)


def test_what_is_no_pickle():
    """Is refused."""
    got = only(encode_request(1, Asked(1, None, False, Block(Place.RING, 0, 0), b"", 0, b"no")))
    with pytest.raises(CorruptFrame):
        decode_asker(got, decode_request(got))
