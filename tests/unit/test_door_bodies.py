"""Bodies of ``/predict`` as records: what each media type means, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidArgument, KilnError, UnsupportedType
from service.rest.door_body_codec import (
    BARE,
    MULTIPART,
    TYPES,
    Columns,
    MediaType,
    Text,
    decode_body,
    media_type,
    seen_type,
)

JSON, CSV, FORM, URLENCODED = (
    MediaType(name) for name in ("application/json", "text/csv", MULTIPART, "application/x-www-form-urlencoded")
)


UNSAID = MediaType("application/json", is_said=False)


def form(*parts: tuple[str, str | None, bytes], end: bytes = b"--x--\r\n") -> bytes:
    """Of (name, file name, value)."""
    text = b""
    for name, file_name, value in parts:
        more = f'; filename="{file_name}"' if file_name is not None else ""
        text += f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"
    return text + end


def decode(body: bytes, media: MediaType = JSON) -> Any:
    return decode_body(body, media, 10)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, UNSAID),
        (b" ", UNSAID),
        (b"Application/JSON; charset=UTF-8", MediaType("application/json", "UTF-8")),
        (b"text/json", JSON),
        (b"image/jpg", MediaType("image/jpeg")),
        (b"application/csv", CSV),
        (b'multipart/form-data; boundary="a b"', MediaType(MULTIPART, boundary=b"a b")),
    ],
)
def test_media_types(header: bytes | None, expected: MediaType):
    """In any case; JSON if nothing is said."""
    assert media_type(header) == expected


@pytest.mark.parametrize(
    "header", [b"image/webp", b"x", b"text/plain; charset=base64", b"text/csv; charset=none", b"text/csv; charset=\xff"]
)
def test_unknown_media_types(header: bytes):
    """The text has those that are known."""
    with pytest.raises(UnsupportedType, match=r"header Content-Type: .* expected, got "):
        media_type(header)


def test_json():
    """One record, or a list of them."""
    one, many = decode(b'{"a": 1}'), decode(b'[{"a": 1}, {}]')
    assert (one.records, one.is_list) == ([{"a": 1}], False)
    assert (many.records, many.is_list) == ([{"a": 1}, {}], True)


def test_forms_of_texts():
    """Values in order; each several times is several records."""
    assert decode(b"a=%20x&b=&a=y&b=2", URLENCODED).records == [{"a": " x", "b": ""}, {"a": "y", "b": "2"}]


@pytest.mark.parametrize(
    ("media", "body", "expected"),
    [
        (URLENCODED, b' {"a": 1}', JSON),
        (URLENCODED, b"[{}]", JSON),
        (URLENCODED, b"a=1", URLENCODED),
        (URLENCODED, b"\x89PNG\r\n\x1a\nx", MediaType("image/png")),
        (UNSAID, b"\xff\xd8\xff\xe0", MediaType("image/jpeg")),
        (UNSAID, b"a=1", UNSAID),
        (JSON, b"\xff\xd8\xff\xe0", JSON),
        (CSV, b"[1]", CSV),
    ],
)
def test_what_a_client_does_not_say_is_seen(media: MediaType, body: bytes, expected: MediaType):
    """To curl all that comes with ``-d`` is a form, and many libraries say nothing; what is said counts."""
    assert seen_type(media, body) == expected


def test_csv():
    """A table is a list, whatever its length; cells are text, whatever they mean."""
    table = decode('\ufeffa, b\r\n1,"x, y"\r\n\r\n,\n'.encode(), CSV)
    assert (table.records, table.is_list) == ([{"a": "1", "b": "x, y"}, {"a": "", "b": ""}], True)
    assert all(isinstance(cell, Text) for record in table.records for cell in record.values())
    assert decode(b"a;b\n1,5;2\n", CSV).records == [{"a": "1,5", "b": "2"}]
    assert decode("a\né\n".encode("latin-1"), MediaType("text/csv", "latin-1")).records == [{"a": "é"}]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"1.5, yes\n", [{"a": "1.5", "b": "yes"}]),
        (b"-1,no\r\n2e3,yes\r\n", [{"a": "-1", "b": "no"}, {"a": "2e3", "b": "yes"}]),
        (b".5;yes", [{"a": ".5", "b": "yes"}]),
        (b"b,7\nno,1\n", [{"b": "no", "7": "1"}]),  # a column may be called so
    ],
)
def test_csv_without_a_header(body: bytes, expected: list[dict[str, str]]):
    """A line with a number and no field's name in it is a record; its cells are in the model's order."""
    columns = Columns(frozenset(("a", "b")), ("a", "b"))
    given = decode_body(body, CSV, 10, lambda: columns)
    assert (given.records, given.is_list) == (expected, True)
    assert isinstance(given.records[0]["b"], Text)


@pytest.mark.parametrize(
    ("order", "body", "reason"),
    [
        ((), b"1,yes\n", "line 1: a header with the names of the fields expected, got '1, yes'"),
        (("a", "b"), b"0,1\n3,4\n", "line 1: a header with the names of the fields expected, got '0, 1'"),
        (("a", "b"), b"1\n", r"line 1: a header, or 2 cells \(a, b\) expected, got 1"),
        (tuple(map(str, range(20, 50))), b"1\n", r"a header, or 30 cells \(20, .*35, …\) expected, got 1"),
        (("a", "b"), b"1,2\n3\n", "line 2: 2 cells expected, got 1"),
    ],
)
def test_csv_whose_columns_are_not_told(order: tuple[str, ...], body: bytes, reason: str):
    """Never guessed."""
    with pytest.raises(InvalidArgument, match=reason):
        decode_body(body, CSV, 10, lambda: Columns(frozenset(order), order))


def test_forms():
    """Fields are text, files are bytes; each field several times makes several records."""
    one = decode(form(("a", None, b"1"), ("f", "f.png", b"\x89PNG\r\n")), MediaType(MULTIPART, boundary=b"x"))
    assert (one.records, one.is_list) == ([{"a": "1", "f": b"\x89PNG\r\n"}], False)
    assert isinstance(one.records[0]["a"], Text)
    many = decode(form(("f", "1", b"1"), ("f", "2", b"2" * 2**21)), MediaType(MULTIPART, boundary=b"x"))
    assert (many.records, many.is_list) == ([{"f": b"1"}, {"f": b"2" * 2**21}], True)


@pytest.mark.parametrize("name", ["text/plain", "image/png", "application/octet-stream"])
def test_raw_bodies(name: str):
    """The value of the only field."""
    given = decode(b"abc", MediaType(name))
    assert (given.is_bare, given.is_list) == (True, False)
    assert given.records == [{BARE: "abc" if name == "text/plain" else b"abc"}]


@pytest.mark.parametrize(
    ("media", "body", "reason"),
    [
        (JSON, b"", "JSON Parse error"),
        (JSON, b"{", "JSON Parse error"),
        (JSON, b'{"a": NaN}', "JSON Parse error"),
        (JSON, b"[" * 11 + b"]" * 11, "nested deeper than 10 levels"),
        (JSON, b"1", "an object by field name, or a list of them, expected, got 1"),
        (JSON, b"[{}, 2]", "record 1: an object by field name expected, got 2"),
        (CSV, b"", "a body of type text/csv expected, got nothing"),
        (CSV, b"a,b\n", "a line for each record expected"),
        (CSV, b"a,b\n1\n", "line 2: 2 cells expected, got 1"),
        (CSV, b"a,a\n1,2\n", "line 1: each field once expected, got 'a' twice"),
        (CSV, b'a\n"1', "line 2: CSV expected"),
        (CSV, b"a\n\xff\n", "the body is no utf-8"),
        (FORM, b"x", "with its boundary expected"),
        (MediaType(MULTIPART, boundary=b"x"), b"zzz", "a multipart form expected"),
        (MediaType(MULTIPART, boundary=b"x"), form(("a", None, b"1"), end=b""), "cut off"),
        (MediaType(MULTIPART, boundary=b"x"), form(("a", None, b"1"))[:-8], "cut off"),
        (MediaType(MULTIPART, boundary=b"x"), form(("a", None, b"\xff")), "no utf-8"),
        (
            MediaType(MULTIPART, boundary=b"x"),
            form(*[("a", None, b"1")] * 2, ("b", None, b"1")),
            "each field as often as the others expected, got {'a': 2, 'b': 1}",
        ),
        (MediaType(MULTIPART, boundary=b"x"), form(*[("a", None, b"")] * 10_001), "at most 10000 parts"),
        (URLENCODED, b"zz", "a form of name=value pairs expected"),
        (URLENCODED, b"a=%ff", "a form of name=value pairs expected"),
        (URLENCODED, b"a=&" * 10_001, "a form of name=value pairs expected"),
    ],
)
def test_bodies_that_are_refused(media: MediaType, body: bytes, reason: str):
    """With the place."""
    with pytest.raises(InvalidArgument) as caught:
        decode(body, media)
    assert reason in str(caught.value)


def test_an_empty_form():
    """Has one record, whose fields are missing."""
    assert decode(form(), MediaType(MULTIPART, boundary=b"x")).records == [{}]


@given(body=st.binary(), name=st.sampled_from(TYPES), boundary=st.sampled_from([b"", b"x"]))
def test_whatever_comes(body: bytes, name: str, boundary: bytes):
    """There are records, or a reason."""
    try:
        given = decode(body, MediaType(name, boundary=boundary))
    except KilnError:
        return
    assert all(isinstance(record, dict) for record in given.records)
