"""Long lists of numbers in JSON text, read piece by piece straight into an array of their own type.

Parsed whole, a text of small numbers takes 19 times its size: simdjson's indexes, doubles, then the type asked
for. A list can be cut at any comma, if as many brackets as are open there close the piece before and open the
one after: all pieces are JSON exactly if the list is. Pieces need one small parser, which stays in the cache.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import simdjson

from service.rest.json_scan import is_deeper
from service.tensors import MAX_DIMENSIONS, Array

NUMBER_BYTES = b"0123456789.+-eE \t\r\n"
_BLANKS = b" \t\r\n"
_COMMA, _OPEN, _CLOSE = b",[]"
_PIECE_BYTES = 2**16
_LONG_BYTES = 2**16
PROXY_COST_BYTES = 80
"""Visiting one nested array costs about as much as stripping this many bytes of text."""
_MOST_BYTES_AROUND = 2**18
_MOST_STRINGS = 256
_PLACE_HOLDER = b"NaN"
"""What stands in the rest of the text where a list was: no JSON, but Python's parser asks us for its value."""
_TOKENS = {"Infinity": math.inf, "-Infinity": -math.inf}


class NotPlainError(Exception):
    """There is more to a text than long rectangular lists of numbers: it has to be parsed whole."""


class _Piece(NamedTuple):
    """A part of a list: how many lists are open before it, opened in it, and open after it; its marks, if known.

    Marks are the brackets and commas.
    """

    text: bytes
    depth: int
    opened: int
    left_open: int
    marks: bytes

    @property
    def has_brackets(self) -> bool:
        return self.opened > 0 or self.left_open != self.depth


class NumberText:
    """A long list of numbers that is still text; `is_read` tells whether its array was asked for."""

    def __init__(self, text: bytes, start: int, stop: int) -> None:
        self.is_read = False
        self._text = text
        self.start = start
        self.stop = stop

    def array(
        self, read: Callable[[simdjson.Array, bytes], Array | None], dtype: np.dtype[Any], max_depth: int
    ) -> Array:
        """The numbers as an array of `dtype` and of their own shape.

        `read` gives those of a part, ``(numbers,)``, from the parsed list and its text.

        Raises:
            NotPlainError: the list is ragged, too deep, no JSON, or `read` gave None.
        """
        self.is_read = True
        numbers = np.empty(count_commas(self._text, self.start, self.stop) + 1, dtype)
        marks, count = bytearray(), 0
        parser: Any = simdjson.Parser()
        with _refused_as_not_plain():
            for piece in self._pieces():
                text = b"[" * piece.depth + piece.text + b"]" * piece.left_open
                value = parser.parse(text)
                part = read(value, text)
                if part is None:
                    raise NotPlainError
                numbers[count : count + len(part)] = part
                count += len(part)
                marks += piece.marks or (_marks_of(value, piece) if piece.has_brackets else b"," * (len(part) - 1))
                marks += b"," * (piece.left_open > 0)
                del value  # the parser is not to be used while it lives
        shape = _shape_of(marks, min(max_depth, MAX_DIMENSIONS))
        if math.prod(shape) != count:  # a list is empty: marks cannot tell it from one of a single number
            raise NotPlainError
        return numbers[:count].reshape(shape)

    def head(self) -> Any:
        """The list's first elements as a list that is parsed; raises `NotPlainError` if they are no JSON."""
        with _refused_as_not_plain():
            piece = next(self._pieces())
            return simdjson.Parser().parse(piece.text + b"]" * piece.left_open)

    def _pieces(self) -> Iterator[_Piece]:
        """The list cut at commas."""
        at, depth, has_short_lists = self.start, 0, False
        while at < self.stop:
            end = self._text.find(b",", at + _PIECE_BYTES, self.stop)
            is_last = end < 0
            text = self._text[at : self.stop if is_last else end]
            marks = text.translate(None, NUMBER_BYTES) if has_short_lists else b""  # as in the piece before
            brackets = _brackets(marks or text)
            opened = int(np.count_nonzero(brackets == _OPEN))
            left_open = depth + 2 * opened - len(brackets)
            if is_last is (left_open > 0) or left_open > MAX_DIMENSIONS:  # the last, and only that, closes all
                raise NotPlainError
            has_short_lists = opened * PROXY_COST_BYTES > len(text)
            if has_short_lists and not marks:
                marks = text.translate(None, NUMBER_BYTES)
            yield _Piece(text, depth, opened, left_open, marks)
            at, depth = (self.stop if is_last else end + 1), left_open


def count_commas(text: bytes, start: int = 0, stop: int | None = None) -> int:
    """How many commas there are: `bytes.count` takes six times as long where there are many."""
    codes = np.frombuffer(text, np.uint8)[start:stop]
    pieces = (codes[at : at + _PIECE_BYTES] for at in range(0, len(codes), _PIECE_BYTES))
    return sum(int(np.count_nonzero(piece == _COMMA)) for piece in pieces)


def parse_around(text: bytes, max_depth: int) -> tuple[Any, list[NumberText]]:
    """The text as plain Python in which each long list of numbers is a `NumberText`, and all of those.

    Raises:
        NotPlainError: there is none, or what is around them is long, deep, ambiguous or no JSON.
    """
    lists = list(_long_lists(text))
    stops = [0, *(one.stop for one in lists)]
    starts = [*(one.start for one in lists), len(text)]
    parts = [text[stop:start] for stop, start in zip(stops, starts, strict=True)]
    if not lists or sum(map(len, parts)) > _MOST_BYTES_AROUND or any(_PLACE_HOLDER in part for part in parts):
        raise NotPlainError
    rest = _PLACE_HOLDER.join(parts)
    if is_deeper(rest, max_depth):
        raise NotPlainError
    left = iter(lists)
    try:
        root = json.loads(
            rest.decode(),
            parse_constant=lambda token: _TOKENS[token] if token in _TOKENS else next(left),
            object_pairs_hook=_object,
        )
    except ValueError:
        raise NotPlainError from None
    return root, lists


def _long_lists(text: bytes) -> Iterator[NumberText]:
    """What follows a key and a colon, is long, starts as a list, and has no strings in it nor an object's end."""
    at = 0
    for _ in range(_MOST_STRINGS):
        quote = text.find(b'"', at)
        end = len(text) if quote < 0 else quote
        if end - at > _LONG_BYTES:
            start = text.find(b"[", at, end)
            brace = text.find(b"}", at, end)
            stop = text.rfind(b"]", at, end if brace < 0 else brace) + 1
            if stop - start > _LONG_BYTES and start >= 0 and text[at:start].strip(_BLANKS) == b":":
                yield NumberText(text, start, stop)
        if quote < 0:
            return
        close = text.find(b'"', quote + 1)
        if close < 0 or text[close - 1 : close] == b"\\":
            return
        at = close + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):  # which of two with the same key counts is the other parser's to say
        raise ValueError("a key comes twice")
    return value


@contextlib.contextmanager
def _refused_as_not_plain() -> Iterator[None]:
    """What simdjson refuses is not plain."""
    try:
        yield
    except (ValueError, RuntimeError):
        raise NotPlainError from None


def _brackets(text: bytes) -> npt.NDArray[np.uint8]:
    """The codes of all brackets; what is neither these nor a number is refused by the parser."""
    codes = np.frombuffer(text if b"[" in text or b"]" in text else b"", np.uint8)  # most pieces of long rows have none
    above = codes[np.flatnonzero(codes >= _OPEN)]
    return above[above <= _CLOSE]


def _marks_of(value: Any, piece: _Piece) -> bytes:
    """The marks of a piece that is parsed as `value`: cheap where it has few lists in it.

    Raises:
        NotPlainError: lists are beside numbers.
    """

    def marks_of(value: Any) -> bytes:
        if not isinstance(value, simdjson.Array):
            raise NotPlainError
        if len(value) and isinstance(value[0], simdjson.Array):
            return b"[" + b",".join(map(marks_of, value)) + b"]"
        return b"[" + b"," * (len(value) - 1) + b"]"

    marks = marks_of(value)
    if marks.count(b"[") != piece.depth + piece.opened:
        raise NotPlainError
    return marks[piece.depth : len(marks) - piece.left_open]


def _shape_of(marks: bytearray, max_depth: int) -> tuple[int, ...]:
    """The shape of a list by its brackets and commas: ``[[,],[,]]`` is (2, 2), if no list is empty.

    Raises:
        NotPlainError: it is ragged, or deeper than `max_depth`.
    """
    depth = 0
    while marks[depth : depth + 1] == b"[":
        depth += 1
        if depth > max_depth:
            raise NotPlainError
    codes = np.frombuffer(marks, np.uint8)
    sizes, unit = [], 0
    for level in range(1, depth + 1):
        start = depth - level
        end = marks.find(b"]" * level, start)  # of the first list of that level
        stop = end + level - 1
        inner = codes[start + 1 : stop]
        size, odd = divmod(len(inner) + 1, unit + 1)
        # each element is like the first if what is between the brackets repeats itself
        is_same = size < 2 or (inner[unit] == _COMMA and np.array_equal(inner[unit + 1 :], inner[: -unit - 1]))
        if end < 0 or odd or not is_same:
            raise NotPlainError
        sizes.append(size)
        unit = stop - start + 1
    if unit != len(marks):
        raise NotPlainError
    return tuple(reversed(sizes))
