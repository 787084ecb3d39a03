"""JSON ↔ arrays, pure.

Numbers go through simdjson straight into a typed buffer (784 floats: 18 µs against 39 for a list
of Python floats), long lists of them piece by piece; strings are encoded as they are read. Whatever
that cannot take (booleans, base64, ``NaN`` tokens, mixed content) goes through plain Python objects,
which also make the precise error texts.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import orjson
import simdjson

from service.bounds import Bounds, too_many
from service.errors import InvalidArgument
from service.padding import PaddedInput, stack
from service.rest.json_elements import cast, from_python, may_have_integers, quote, too_deep
from service.rest.json_pieces import (
    NUMBER_BYTES,
    PROXY_COST_BYTES,
    NotPlainError,
    NumberText,
    count_commas,
    parse_around,
)
from service.rest.json_scan import fewest_elements, is_deeper
from service.tensors import MAX_DIMENSIONS, Array, DataType, Signature, TensorSpec

ARRAY = (simdjson.Array, list)
OBJECT = (simdjson.Object, dict)
"""What a list and an object of JSON may be: simdjson's proxies, or plain Python."""
LONG_BYTES = 2**20
"""Texts over this are read in pieces where they can be, and no parser is kept for them."""
_LONGEST_SHOWN = 60
_NESTING = {list, dict}
_PROXIES = {simdjson.Array, simdjson.Object}
_BUFFER_TYPES = {"f": "d", "V": "d", "i": "i", "u": "u"}
"""simdjson's element type by NumPy's kind (bfloat16 has the kind V)."""
_BUFFER_DTYPES = {"d": np.dtype(np.float64), "i": np.dtype(np.int64), "u": np.dtype(np.uint64)}


class Document:
    """A parsed JSON object; its values are simdjson's proxies, plain Python or, if so asked, `NumberText`."""

    def __init__(self, text: bytes, max_depth: int, *, is_header: bool = False) -> None:
        """Parse `text`, which must be an object; plain Python is cheaper for a header of few values.

        Raises:
            InvalidArgument: it is not JSON, not an object, or nested deeper than `max_depth`.
        """
        self.text = text
        self.number_texts: list[NumberText] = []
        root: Any
        try:
            if is_header and text.count(b"[") + text.count(b"{") <= max_depth:
                root = orjson.loads(text)
            else:
                root = _parse(text)
        except (ValueError, RuntimeError):  # RuntimeError: too deep, or an integer of over 64 bits
            root = _parse_leniently(text, max_depth)
        if not isinstance(root, OBJECT):
            raise InvalidArgument(f"JSON Value: {quote(root)} Is not object")
        self._root = root
        self.max_depth = max_depth
        self.keys = frozenset(root)

    @classmethod
    def in_pieces(cls, text: bytes, max_depth: int) -> Document | None:
        """A long text that is little but long lists of numbers, which are left as they are; None for any other.

        What asks more of them than `to_array` and `flat_array` do raises `NotPlainError`, as those may:
        then the text has to be parsed whole.
        """
        try:
            root, number_texts = parse_around(text, max_depth)
        except NotPlainError:
            return None
        document = cls.__new__(cls)
        document.text, document.number_texts = text, number_texts
        document._root, document.max_depth, document.keys = root, max_depth, frozenset(root)
        return document

    def check_read(self) -> None:
        """Raise `NotPlainError` if a list of numbers was not asked for: then nobody knows whether it is one."""
        if not all(one.is_read for one in self.number_texts):
            raise NotPlainError

    def get(self, key: str) -> Any:
        """The value at `key`, None if there is none."""
        return self._root[key] if key in self.keys else None


_kept_parser = simdjson.Parser()


def _parse(text: bytes) -> Any:
    """JSON as simdjson's proxies.

    A new parser's buffers are eleven times the text, in pages that the system has to clear first,
    which took as long as parsing: so one is kept for texts of usual size. It refuses to be used
    again while proxies of the last text live, as in the traceback of an error that is being told.
    """
    if len(text) <= LONG_BYTES:
        try:
            return _kept_parser.parse(text)
        except RuntimeError:
            pass  # in use; or too deep, which a new one will say again
    return simdjson.Parser().parse(text)


def _parse_leniently(text: bytes, max_depth: int) -> Any:
    """JSON with the bare tokens NaN, Infinity and -Infinity, which TensorFlow Serving takes."""
    if not text.strip():
        raise InvalidArgument("JSON Parse error: The document is empty")
    _check_depth(text, max_depth)
    try:
        return json.loads(text.decode(), parse_float=_finite)
    except json.JSONDecodeError as error:
        raise InvalidArgument(f"JSON Parse error: {error.msg} at offset: {error.pos}") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"JSON Parse error: {str(error)[:200]}") from None


def _finite(text: str) -> float:
    """A number that was written out; one that only infinity is near to is refused, as TensorFlow Serving does."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"number too big to be stored in double: {text[:_LONGEST_SHOWN]}")
    return value


def _check_depth(text: bytes, max_depth: int) -> None:
    """Bound the nesting by the bytes alone, before a recursive parser sees them."""
    if is_deeper(text, max_depth):
        raise too_deep(max_depth)


def plain(value: Any, max_depth: int = MAX_DIMENSIONS) -> Any:
    """A value as Python lists and dicts; `InvalidArgument` if nested deeper than `max_depth`."""
    if isinstance(value, NumberText):
        raise NotPlainError

    def convert(value: Any, left: int) -> Any:
        if isinstance(value, simdjson.Object):
            value = dict(value.items())  # plain all the way down
            _bound(value, left, max_depth)
        if not isinstance(value, simdjson.Array):
            return value
        if left <= 0:
            raise too_deep(max_depth)
        if value and type(value[0]) in _PROXIES:
            return [convert(item, left - 1) for item in value]  # no more proxies at a time than one
        items = list(value)
        return items if _PROXIES.isdisjoint(map(type, items)) else [convert(item, left - 1) for item in items]

    return convert(value, max_depth)


def _bound(value: Any, left: int, max_depth: int) -> None:
    """Raise `InvalidArgument` if a list or dict of plain Python has more than `left` levels."""
    if left <= 0:
        raise too_deep(max_depth)
    items = value.values() if isinstance(value, dict) else value
    if not _NESTING.isdisjoint(map(type, items)):
        for item in items:
            if type(item) in _NESTING:
                _bound(item, left - 1, max_depth)


def check_elements(text: bytes, signature: Signature, bounds: Bounds) -> None:
    """Raise `InvalidArgument` where lists have more elements than all inputs together may have.

    Only a text that is long enough for so many is looked at.
    """
    if not bounds.may_exceed(len(text)):
        return
    most = bounds.most_of(signature)
    if count_commas(text) > most:
        count = fewest_elements(text)
        if count > most:
            raise too_many(", ".join(sorted(signature.input_by_name)), most, f"{count} or more")


def count_lists(text: bytes) -> int:
    """How many lists `text` has at most; brackets within strings are counted too."""
    return text.count(b"[", 0, text.rfind(b"[") + 1)  # memrchr is faster than counting past the last


def to_array(
    value: Any,
    spec: TensorSpec,
    text: bytes = b"",
    max_depth: int = MAX_DIMENSIONS,
    most_lists: int | None = None,
    *,
    exact: bool = False,
) -> Array:
    """A nested JSON value as an array of `spec`'s type and its own shape.

    `text` is the body that `value` is the only array of, if so: then whether it is rectangular
    is told from its brackets and commas alone. `most_lists` is how many lists there can be in
    `value`, itself included, where that is known. With `exact`, integers are refused that a floating
    type would have to round.

    Raises:
        InvalidArgument: ragged, nested deeper than `max_depth`, or with elements of another type;
            names the input and the place.
        NotPlainError: as `NumberText.array`.
    """
    if isinstance(value, NumberText):
        return _from_text(value, spec, max_depth, exact=exact)
    if isinstance(value, simdjson.Array):
        if spec.dtype is DataType.BYTES:
            array = _strings(value, min(max_depth, MAX_DIMENSIONS))
        else:
            if text:
                most_lists = count_lists(text)
            array = _numeric(value, spec, text, min(max_depth, MAX_DIMENSIONS), most_lists, exact=exact)
        if array is not None:
            return array
    return from_python(plain(value, max_depth), spec, exact=exact)


def rows_of(text: bytes, spec: TensorSpec) -> Array | None:
    """A JSON list of numbers that are rows just as `spec` has them, as an array of its type; None for any other text.

    What is asked most often, read with the least that tells it from all else; integers are as with `exact`.
    """
    row_elements = spec.row_elements
    if not row_elements or (numbers := _numbers(text, spec)) is None:
        return None
    value, buffer = numbers
    rows, odd = divmod(len(buffer), row_elements)
    if odd or not rows:
        return None
    shape = (rows, *spec.shape[1:])  # type: ignore[index]  # it has `row_elements`
    inner_lists = len(buffer) // shape[-1]
    if inner_lists * PROXY_COST_BYTES > len(text):
        is_rectangular = text.translate(None, NUMBER_BYTES) == _skeleton(shape)
    elif inner_lists == 1:  # one list in another, if all open at the beginning and close at the end
        depth = len(shape)
        is_rectangular = count_lists(text) == depth and text.startswith(b"[" * depth) and text.endswith(b"]" * depth)
    else:
        is_rectangular = _rectangular(value, shape, text, count_lists(text))
    if not is_rectangular:
        return None
    return cast(buffer, spec, partial(_elements, value, text)).reshape(shape)


def flat_numbers(text: bytes, spec: TensorSpec, shape: tuple[int, ...]) -> Array | None:
    """A flat JSON list of numbers as an array of `spec`'s type and of exactly `shape`; None for any other text.

    As `flat_array`, with the least that tells it from all else.
    """
    numbers = _numbers(text, spec)
    if numbers is None or len(numbers[1]) != math.prod(shape) or text.find(b"[", 1) >= 0:
        return None
    return cast(numbers[1], spec).reshape(shape)


def _numbers(text: bytes, spec: TensorSpec) -> tuple[simdjson.Array, Array] | None:
    """A JSON list of numbers, however nested, and all of them in order; None for any other text, and a long one."""
    if len(text) > LONG_BYTES:
        return None
    try:
        value = _parse(text)
    except (ValueError, RuntimeError):
        return None
    buffer = _buffer(value, spec) if isinstance(value, simdjson.Array) else None
    return None if buffer is None else (value, buffer)


def ragged_rows(
    value: Any, spec: TensorSpec, how: PaddedInput, max_depth: int, bounds: Bounds
) -> tuple[Array, list[int]] | None:
    """Rows of different lengths as one array, each padded to the longest, and their lengths; integers as with `exact`.

    None where `value` is no list of rows that differ in just that.

    Raises:
        InvalidArgument: as `to_array`, of a row; it has another shape; or all together would be too large.
    """
    if not isinstance(value, ARRAY):
        return None
    rows = []
    for index, row in enumerate(value):
        try:
            rows.append(to_array(row, spec, max_depth=max_depth - 1, exact=True))
        except InvalidArgument as error:
            raise InvalidArgument(f"row {index}: {error}") from None
        if not spec.admits((1, *rows[-1].shape)):
            expected, received = spec.wire_shape()[1:], list(rows[-1].shape)
            raise InvalidArgument(f"row {index}: input {spec.name!r}: {expected} expected, got {received}")
    return stack(rows, how, partial(bounds.check_shape, spec=spec))


def _from_text(value: NumberText, spec: TensorSpec, max_depth: int, *, exact: bool) -> Array:
    if spec.dtype.numpy.kind not in _BUFFER_TYPES:
        to_array(value.head(), spec, max_depth=max_depth)  # which tells what was expected instead of numbers
        raise NotPlainError

    def read(part: simdjson.Array, text: bytes) -> Array | None:
        buffer = _buffer(part, spec)
        return None if buffer is None else cast(buffer, spec, partial(_elements, part, text) if exact else None)

    return value.array(read, spec.dtype.numpy, max_depth)


def _elements(value: simdjson.Array, text: bytes) -> Iterator[Any]:
    """All that is in nested arrays, in row-major order; nothing where their `text`, if known, has no integers."""
    if text and not may_have_integers(text):
        return
    for item in value:
        if isinstance(item, simdjson.Array):
            yield from _elements(item, b"")
        else:
            yield item


def _strings(value: simdjson.Array, max_depth: int) -> Array | None:
    """Texts as objects of bytes, none of which is there as text for longer than it takes; None if not all are."""
    shape, first = _first(value, max_depth)
    if not isinstance(first, str | simdjson.Array):
        return None
    items: Iterator[Any] = chain.from_iterable(_leaves(value, shape))
    try:
        return np.fromiter(map(str.encode, items), object).reshape(shape)
    except (TypeError, ValueError):  # no string, no UTF-8, or ragged
        return None


def _leaves(value: Any, shape: tuple[int, ...]) -> Iterator[simdjson.Array]:
    """The innermost arrays; ValueError if one at whatever level has not the length that `shape` has."""
    if not isinstance(value, simdjson.Array) or len(value) != shape[0]:
        raise ValueError("ragged")
    if len(shape) == 1:
        yield value
    else:
        for item in value:
            yield from _leaves(item, shape[1:])


def flat_array(
    value: Any,
    spec: TensorSpec,
    shape: tuple[int, ...],
    max_depth: int = MAX_DIMENSIONS,
    most_lists: int | None = None,
) -> Array:
    """JSON data, flat or nested, row-major, as an array of exactly `shape`; for the rest see `to_array`."""
    count = math.prod(shape)
    if isinstance(value, simdjson.Array):
        buffer = _buffer(value, spec)
        if buffer is not None and count == len(buffer) and _rectangular(value, (count,), b"", most_lists):
            return cast(buffer, spec).reshape(shape)
    array = to_array(value, spec, max_depth=max_depth, most_lists=most_lists)
    if array.size != count or (array.ndim > 1 and array.shape != shape):
        raise InvalidArgument(
            f"input {spec.name!r}: shape {list(shape)} has {count} elements, "
            f"the data has {array.size} in shape {list(array.shape)}"
        )
    return array.reshape(shape)


def _numeric(
    value: simdjson.Array, spec: TensorSpec, text: bytes, max_depth: int, most_lists: int | None, *, exact: bool
) -> Array | None:
    """The fast way; None where Python must look closer."""
    buffer = _buffer(value, spec)
    if buffer is None:
        return None
    shape, _ = _first(value, max_depth)
    if len(buffer) != math.prod(shape) or not _rectangular(value, shape, text, most_lists):
        return None
    return cast(buffer, spec, partial(_elements, value, text) if exact else None).reshape(shape)


def _first(value: simdjson.Array, max_depth: int) -> tuple[tuple[int, ...], Any]:
    """The shape that the first elements suggest, and the first one, or the first list if that is empty."""
    shape: list[int] = []
    inner: Any = value
    while isinstance(inner, simdjson.Array):
        shape.append(len(inner))
        if len(shape) > max_depth:
            raise too_deep(max_depth)
        if not shape[-1]:
            break
        inner = inner[0]
    return tuple(shape), inner


def _buffer(value: simdjson.Array, spec: TensorSpec) -> Array | None:
    kind: Any = _BUFFER_TYPES.get(spec.dtype.numpy.kind)
    if kind is None:
        return None
    try:
        return np.frombuffer(value.as_buffer(of_type=kind), _BUFFER_DTYPES[kind])
    except (TypeError, ValueError):
        return None  # something in it is not such a number


def _rectangular(value: simdjson.Array, shape: tuple[int, ...], text: bytes, most_lists: int | None) -> bool:
    """Whether every nested array at one level has the same length, and the innermost hold no arrays."""
    inner_arrays = math.prod(shape[:-1])
    if inner_arrays == 1 and most_lists == len(shape):
        return True  # one list at each level, so none to differ from
    if text and inner_arrays > 1 and inner_arrays * PROXY_COST_BYTES > len(text):
        start, stop = text.find(b"["), text.rfind(b"]") + 1
        return text[start:stop].translate(None, NUMBER_BYTES) == _skeleton(shape)
    lists = sum(math.prod(shape[:axis]) for axis in range(len(shape)))
    return _same_lengths(value, shape, look_inside=lists != most_lists)


def _same_lengths(value: Any, shape: tuple[int, ...], *, look_inside: bool) -> bool:
    """`look_inside` the innermost arrays where it is not known that all their elements are numbers."""
    if not isinstance(value, simdjson.Array) or len(value) != shape[0]:
        return False
    if len(shape) == 1:
        return not (look_inside and simdjson.Array in set(map(type, value)))
    return all(_same_lengths(item, shape[1:], look_inside=look_inside) for item in value)


@lru_cache(maxsize=16)
def _skeleton(shape: tuple[int, ...]) -> bytes:
    """The brackets and commas of a rectangular array: ``[[,],[,]]`` for (2, 2)."""
    text = b""
    for size in reversed(shape):
        text = b"[" + (text + b",") * (size - 1) + text * (size > 0) + b"]"
    return text


def dumps(value: object) -> bytes:
    """JSON of nested dicts, lists and arrays (see `jsonable`).

    orjson has no tokens for NaN and the infinities and writes ``null``; where that word appears,
    all is written again with the bare tokens that TensorFlow Serving uses.
    """
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return _dumps_with_tokens(value) if b"null" in text else text


def jsonable(array: Array, *, as_base64: bool = False) -> Any:
    """An array as `dumps` takes it, or as nested lists where JSON needs special forms.

    Strings become text, or ``{"b64": …}`` where `as_base64` or they are no UTF-8.
    """
    kind = array.dtype.kind
    if kind in "OSU":
        return _map_nested(array.tolist(), lambda item: _string(item, as_base64=as_base64))
    if kind == "V":  # bfloat16, whose values float32 holds exactly
        array = array.astype(np.float32)
    if array.ndim == 0:
        return array.item()
    return np.ascontiguousarray(array)


def _dumps_with_tokens(value: object) -> bytes:
    return json.dumps(value, default=_shortest, ensure_ascii=False).encode()


def _shortest(value: Any) -> Any:
    """NumPy values for the standard library's encoder, with float32 as short as orjson writes it."""
    if isinstance(value, np.ndarray):
        return [_shortest(item) for item in value]
    if isinstance(value, np.floating):
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _string(item: Any, *, as_base64: bool) -> Any:
    data = item.encode() if isinstance(item, str) else bytes(item)
    if not as_base64:
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(data).decode()}


def _map_nested(value: Any, change: Any) -> Any:
    if isinstance(value, list):
        return [_map_nested(item, change) for item in value]
    return change(value)
