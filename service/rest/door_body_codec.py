"""Bodies of ``/predict`` → records by field name, pure: JSON, CSV, forms; the values are not looked at yet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Any
from urllib.parse import parse_qsl

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from service.errors import InvalidArgument, UnsupportedType
from service.rest.json_elements import quote
from service.rest.json_scan import is_deeper

JSON_TYPE, CSV_TYPE, TEXT_TYPE = "application/json", "text/csv", "text/plain"
MULTIPART, URLENCODED, OCTETS = "multipart/form-data", "application/x-www-form-urlencoded", "application/octet-stream"
IMAGE_TYPES = ("image/png", "image/jpeg")
TYPES = (JSON_TYPE, CSV_TYPE, TEXT_TYPE, *IMAGE_TYPES, OCTETS, MULTIPART, URLENCODED)
"""What a body may be, in the order in which it is told."""
_MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""What the files begin with."""
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_ALIASES = {"text/json": JSON_TYPE, "application/csv": CSV_TYPE, "image/jpg": "image/jpeg"}
_FEW = 16
"""Names that are told back."""
_MAX_PARTS = 10_000
"""Of a form: each costs some hundred times the bytes that it takes to send it."""


class Text(str):
    """A value that came as text, whatever it means: a cell, or a field of a form."""

    __slots__ = ()


Record = dict[str, Any]
"""Values by field name: of JSON, or `Text`, or the `bytes` of a file."""
BARE = ""
"""The name under which a raw body stands."""


@dataclass(frozen=True)
class Records:
    """One record, or with `is_list` any number of them, which are answered by a list.

    With `is_bare` there is one value, `BARE`, of a field that the caller did not have to name.
    """

    records: list[Record]
    is_list: bool = False
    is_bare: bool = False


@dataclass(frozen=True)
class MediaType:
    """A ``Content-Type``: its name in lower case, and the parameters that matter; whether there was one."""

    name: str
    charset: str = "utf-8"
    boundary: bytes = b""
    is_said: bool = True


@dataclass(frozen=True)
class Columns:
    """What a CSV's columns may be called: the `known` names, and in `order` those of a line that has no header.

    An empty `order` means that there is none.
    """

    known: Set[str] = frozenset()
    order: Sequence[str] = ()


def media_type(header: bytes | None) -> MediaType:
    """What a body is; JSON, if nothing is said.

    Raises:
        UnsupportedType: it is of a type, or in an encoding, that no model takes.
    """
    if header is None or not header.strip():
        return MediaType(JSON_TYPE, is_said=False)
    name, parameters = parse_options_header(header.decode("latin-1"))
    text = name.decode("latin-1")
    text = _ALIASES.get(text, text)
    if text not in TYPES:
        raise UnsupportedType(f"header Content-Type: one of {', '.join(TYPES)} expected, got {text!r}")
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    try:
        "".encode(charset)
    except (LookupError, ValueError):
        raise UnsupportedType(f"header Content-Type: charset utf-8 expected, got {charset!r}") from None
    return MediaType(text, charset, parameters.get(b"boundary", b""))


def seen_type(media: MediaType, body: bytes) -> MediaType:
    """`media`; or where a client says nothing of its own, as curl of ``-d``, what `body` is by its first bytes."""
    if media.is_said and media.name != URLENCODED:
        return media
    for magic, name in _MAGIC.items():
        if body.startswith(magic):
            return MediaType(name)
    return MediaType(JSON_TYPE) if body.lstrip()[:1] in (b"{", b"[") else media


def decode_body(body: bytes, media: MediaType, max_depth: int, columns: Callable[[], Columns] = Columns) -> Records:
    """The records of a body; `columns` is asked where a CSV may have no header.

    Raises:
        InvalidArgument: it is not what its type says; tells the place.
    """
    if media.name == JSON_TYPE:
        return _json(body, max_depth)
    if not body:
        raise InvalidArgument(f"a body of type {media.name} expected, got nothing")
    if media.name == CSV_TYPE:
        return _csv(_decoded(body, media), columns)
    if media.name == TEXT_TYPE:
        return Records([{BARE: Text(_decoded(body, media))}], is_bare=True)
    if media.name == MULTIPART:
        return _columns(_multipart(body, media))
    if media.name == URLENCODED:
        return _columns(_urlencoded(body, media))
    return Records([{BARE: body}], is_bare=True)


def _decoded(body: bytes, media: MediaType) -> str:
    try:
        return body.decode("utf-8-sig" if media.charset.lower() in ("utf-8", "utf8") else media.charset)
    except UnicodeError as error:
        raise InvalidArgument(f"the body is no {media.charset}: {error}") from None


def _json(body: bytes, max_depth: int) -> Records:
    if body.count(b"[") + body.count(b"{") > max_depth and is_deeper(body, max_depth):
        raise InvalidArgument(f"JSON Parse error: nested deeper than {max_depth} levels")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"JSON Parse error: {error}") from None
    if isinstance(value, dict):
        return Records([value])
    if not isinstance(value, list):
        raise InvalidArgument(f"an object by field name, or a list of them, expected, got {quote(value)}")
    for index, record in enumerate(value):
        if not isinstance(record, dict):
            raise InvalidArgument(f"record {index}: an object by field name expected, got {quote(record)}")
    return Records(value, is_list=True)


def _csv(text: str, columns: Callable[[], Columns]) -> Records:
    """A header with the names of fields, then a record for each line; or such lines alone."""
    head = text.split("\n", 1)[0]
    delimiter = ";" if ";" in head and "," not in head else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        lines: Iterable[list[str]] = reader
        if any(map(_NUMBER.fullmatch, names)):  # of which few names are made
            first, names = names, _names(names, columns())
            lines = reader if first is names else chain([first], reader)
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidArgument(f"line 1: each field once expected, got {twice!r} twice")
        records: list[Record] = []
        for cells in lines:
            if len(cells) not in (0, len(names)):
                raise InvalidArgument(f"line {reader.line_num}: {len(names)} cells expected, got {len(cells)}")
            if cells:
                records.append(dict(zip(names, map(Text, cells), strict=True)))
    except csv.Error as error:
        raise InvalidArgument(f"line {reader.line_num}: CSV expected: {error}") from None
    if not records:
        raise InvalidArgument("a header with the names of the fields and a line for each record expected")
    return Records(records, is_list=True)


def _names(first: list[str], columns: Columns) -> list[str]:
    """The names of a CSV's columns: `first`, its first line, if that has a name; else in their order."""
    if not columns.known.isdisjoint(first):
        return first
    is_count = len(first) > 1 and first == [str(index) for index in range(len(first))]
    if not columns.order or is_count:  # which is what a table has for a header whose columns have no names
        raise InvalidArgument(f"line 1: a header with the names of the fields expected, got {', '.join(first)[:100]!r}")
    if len(first) != len(columns.order):
        few = ", ".join(columns.order[:_FEW]) + (", …" if len(columns.order) > _FEW else "")
        raise InvalidArgument(f"line 1: a header, or {len(columns.order)} cells ({few}) expected, got {len(first)}")
    return list(columns.order)


def _columns(parts: list[tuple[str, Any]]) -> Records:
    """A form as records: a field that is given several times has a value for each of so many records."""
    by_name: dict[str, list[Any]] = {}
    for name, value in parts:
        by_name.setdefault(name, []).append(value)
    counts = {name: len(values) for name, values in by_name.items()}
    if len(set(counts.values())) > 1:
        raise InvalidArgument(f"each field as often as the others expected, got {counts}")
    rows = max(counts.values(), default=0)
    records = [{name: values[row] for name, values in by_name.items()} for row in range(rows)]
    return Records(records or [{}], is_list=rows > 1)


def _urlencoded(body: bytes, media: MediaType) -> list[tuple[str, Any]]:
    try:
        parts = parse_qsl(
            _decoded(body, media),
            keep_blank_values=True,
            strict_parsing=True,
            encoding=media.charset,
            errors="strict",
            max_num_fields=_MAX_PARTS,
        )
    except ValueError as error:
        raise InvalidArgument(f"a form of name=value pairs expected: {error}") from None
    return [(name, Text(value)) for name, value in parts]


def _multipart(body: bytes, media: MediaType) -> list[tuple[str, Any]]:
    """Names and values of a form's parts, in order: `Text`, or the bytes of a file."""
    if not media.boundary:
        raise InvalidArgument("header Content-Type: multipart/form-data with its boundary expected")
    parts: list[tuple[str, Any]] = []
    ends: list[bool] = []

    def keep(name: bytes | None, value: Any) -> None:
        if len(parts) == _MAX_PARTS:
            raise InvalidArgument(f"at most {_MAX_PARTS} parts of a form expected")
        parts.append((_decoded(name or b"", MediaType(MULTIPART)), value))

    def on_field(field: Field) -> None:
        keep(field.field_name, Text(_decoded(field.value or b"", MediaType(MULTIPART))))

    def on_file(file: File) -> None:
        file.file_object.seek(0)
        keep(file.field_name, file.file_object.read())
        file.close()

    options = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # nothing is written to disk: the body is bounded already
    try:
        parser = FormParser(
            MULTIPART, on_field, on_file, lambda: ends.append(True), boundary=media.boundary, config=options
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidArgument(f"a multipart form expected: {error}") from None
    if not ends:
        raise InvalidArgument("the multipart form is cut off: its last boundary is missing")
    return parts
