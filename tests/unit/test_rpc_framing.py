"""gRPC's wire without HTTP/2: frames, compression, timeouts and the texts of statuses."""

from __future__ import annotations

import gzip
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Internal, InvalidArgument, TooLarge, Unimplemented
from service.rpc.framing import Deframer, escape, frame, timeout_s


def compressed(data: bytes) -> bytes:
    """`data` behind a prefix that says it is compressed."""
    return b"\1" + frame(data)[1:]


def test_a_frame():
    """A flag, four bytes of length, the message."""
    assert frame(b"abc") == b"\0\0\0\0\3abc"


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 300)))
def test_frames_come_back_however_they_are_cut(messages: list[bytes], cuts: list[int]):
    """Messages do not depend on the pieces in which their bytes come."""
    data = b"".join(map(frame, messages))
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    deframer = Deframer(None, 40)
    got: list[bytes] = []
    for start, end in pairwise(edges):
        deframer.feed(data[start:end])
        got += deframer.messages()
    deframer.finish()
    assert got == messages


@pytest.mark.parametrize(("encoding", "compress"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
def test_compressed_and_plain_messages(encoding: bytes, compress):
    """Each message says for itself whether it is compressed."""
    deframer = Deframer(encoding, 1000)
    deframer.feed(compressed(compress(b"a" * 1000)) + frame(b"b"))
    assert list(deframer.messages()) == [b"a" * 1000, b"b"]


@pytest.mark.parametrize("encoding", [None, b"", b"identity"])
def test_a_compression_that_nobody_named(encoding: bytes | None):
    """INTERNAL, as ``compression.md`` has it."""
    deframer = Deframer(encoding, 1000)
    deframer.feed(compressed(gzip.compress(b"a")))
    with pytest.raises(Internal, match="header grpc-encoding names no compression"):
        next(deframer.messages())


def test_an_unknown_compression():
    """UNIMPLEMENTED, with those that are known."""
    with pytest.raises(Unimplemented, match="one of identity, deflate, gzip expected, got 'snappy'"):
        Deframer(b"snappy", 1000)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"garbage", "the compressed message is broken: "),
        (gzip.compress(b"a" * 100)[:-9], "the compressed message is cut off"),
    ],
)
def test_compressed_garbage(data: bytes, text: str):
    """Told apart from a message that ends too early."""
    deframer = Deframer(b"gzip", 1000)
    deframer.feed(compressed(data))
    with pytest.raises(InvalidArgument, match=text):
        next(deframer.messages())


def test_the_limit_holds_before_and_after_inflating():
    """Known from the prefix; and no more is inflated than it takes to see it."""
    deframer = Deframer(b"gzip", 1000)
    deframer.feed(frame(bytes(1001))[:5])
    with pytest.raises(TooLarge, match="the message has 1001 bytes, over the limit of 1000"):
        next(deframer.messages())
    deframer = Deframer(b"gzip", 1000)
    deframer.feed(compressed(gzip.compress(bytes(10_000_000))[:990]))
    with pytest.raises(TooLarge, match="the message has 1001 bytes, over the limit of 1000"):
        next(deframer.messages())


def test_a_body_that_ends_within_a_message():
    """Refused, with how much of it came."""
    deframer = Deframer(None, 1000)
    deframer.feed(frame(b"abc")[:-1])
    assert list(deframer.messages()) == []
    with pytest.raises(InvalidArgument, match="the message is cut off: 7 bytes of it came"):
        deframer.finish()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        (b"2H", 7200),
        (b"3M", 180),
        (b"4S", 4),
        (b"1500m", 1.5),
        (b"7u", 7e-6),
        (b"99999999n", 0.099999999),
        (b"0S", 0),
    ],
)
def test_timeouts(text: bytes | None, seconds: float | None):
    """All six units."""
    assert timeout_s(text) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("text", [b"", b"5", b"S", b"1s", b"-1S", b"1.5S", b"123456789S", b"1S ", "¹S".encode()])
def test_wrong_timeouts(text: bytes):
    """Refused, with what came."""
    with pytest.raises(InvalidArgument, match="header grpc-timeout: up to eight digits and one of H, M, S, m, u, n"):
        timeout_s(text)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ('all\'s "well" [/~]', b'all\'s "well" [/~]'),
        ("100 %", b"100 %25"),
        ("a\nü𝄞\x7f", b"a%0A%C3%BC%F0%9D%84%9E%7F"),
        ("\ud800", b"?"),
    ],
)
def test_escaped_texts(text: str, escaped: bytes):
    """Printable ASCII but for the percent sign stays as it is; lone surrogates cannot be sent."""
    assert escape(text) == escaped
