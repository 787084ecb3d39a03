"""JSON as plain Python → arrays: whole lists where all is as expected, else element by element for the place.

Also what both ways of reading do with elements: cast them, take base64 for bytes, and quote what is refused.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import simdjson

from service.errors import InvalidArgument
from service.rest.json_pieces import NotPlainError, NumberText
from service.tensors import MAX_DIMENSIONS, Array, DataType, TensorSpec, integers_fit

_LONGEST_QUOTE = 60
_INTEGER_BYTES = b"0123456789+- \t\r\n"
_FEW_ELEMENTS = 8192
_MOST_EXACT = {DataType.FP32: 2**24 - 1, DataType.FP64: 2**53 - 1}
"""The largest integers that TensorFlow Serving takes for a floating type: up to there each has a number of its own."""
_INTEGERS = range(-(2**63), 2**64)
"""What is written without a point and is in here is an integer to TensorFlow Serving's parser, else a float."""

_TYPES = {
    "O": frozenset((str,)),
    "b": frozenset((bool,)),
    "i": frozenset((int,)),
    "u": frozenset((int,)),
    "f": frozenset((int, float)),
    "V": frozenset((int, float)),
}
"""What an element may be that needs no closer look, by NumPy's kind (bfloat16 has the kind V)."""


class RaggedError(InvalidArgument):
    """Lists at one level differ in length, which only an input that is padded may have."""


def cast(buffer: Array, spec: TensorSpec, written: Callable[[], Iterable[Any]] | None = None) -> Array:
    """To the input's type; a number that the type cannot hold is refused.

    `written` gives the elements as they came, where integers are to be refused that a floating type rounds.
    """
    dtype = spec.dtype.numpy
    if dtype.kind in "iu":
        return integers_fit(buffer, spec)
    if buffer.dtype == dtype and written is None:
        return buffer
    if buffer.size <= _FEW_ELEMENTS and np.vdot(buffer, buffer) < spec.dtype.safe_square:
        return buffer.astype(dtype, copy=False)  # the sum of all squares bounds each: cheaper than `errstate`
    if written is not None:
        _check_exact(buffer, spec, written)
    try:
        with np.errstate(over="raise"):
            return buffer.astype(dtype, copy=False)
    except FloatingPointError:
        largest = max((float(v) for v in buffer), key=lambda v: abs(v) if math.isfinite(v) else 0.0)
        raise InvalidArgument(f"input {spec.name!r}: {largest} does not fit {spec.dtype.value}") from None


def _check_exact(buffer: Array, spec: TensorSpec, written: Callable[[], Iterable[Any]]) -> None:
    """Raise `InvalidArgument` for an integer that has no place of its own among the floats of `spec`.

    Source: ``IsLosslessDecimal`` of TensorFlow Serving's ``json_tensor.cc``.
    """
    most = _MOST_EXACT.get(spec.dtype)
    if most is None or not buffer.size or (buffer.max() <= most and buffer.min() >= -most):  # not so if there is a NaN
        return
    for value in written():
        if type(value) is int and not -most <= value <= most and value in _INTEGERS:
            kind = "float" if spec.dtype is DataType.FP32 else "double"
            raise InvalidArgument(
                f"input {spec.name!r}: Cannot convert JSON value: {value} to {kind} without loss of precision: "
                f"an integer of at most {most} expected, or {value}.0 to have it rounded"
            )


def may_have_integers(text: bytes) -> bool:
    """Whether a list in JSON `text` may have a number without point and exponent."""
    marks = text.translate(None, _INTEGER_BYTES)
    return any(pair in marks for pair in (b",,", b"[,", b",]", b"[]"))


def from_python(value: Any, spec: TensorSpec, *, exact: bool) -> Array:
    """A nested list of plain Python as an array of `spec`'s type; see `to_array`."""
    shape = _shape_of(value)
    items: list[Any] = []
    _flatten(value, shape, spec, [], items)
    if spec.dtype is DataType.BYTES:
        array = np.empty(len(items), object)
        array[:] = items
        return array.reshape(shape)
    if spec.dtype is DataType.BOOL:
        return np.array(items, np.bool_).reshape(shape)
    wide: np.dtype[Any] = np.dtype(np.float64)
    if spec.dtype.is_integer:
        wide = np.dtype(np.uint64 if spec.dtype.numpy.kind == "u" else np.int64)
    try:
        buffer = np.array(items, wide)
    except OverflowError:
        raise InvalidArgument(f"input {spec.name!r}: a number does not fit {spec.dtype.value}") from None
    return cast(buffer, spec, (lambda: items) if exact else None).reshape(shape)


def _shape_of(value: Any) -> tuple[int, ...]:
    """The shape that the first elements suggest."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(shape) > MAX_DIMENSIONS:
            raise too_deep(MAX_DIMENSIONS)
        if not value:
            break
        value = value[0]
    return tuple(shape)


def _flatten(value: Any, shape: tuple[int, ...], spec: TensorSpec, place: list[int], out: list[Any]) -> None:
    """Append the elements of `value` to `out` in row-major order, checking shape and type."""
    if not shape:
        out.append(_element(value, spec, place))
        return
    if not isinstance(value, list) or len(value) != shape[0]:
        got = f"{len(value)} elements" if isinstance(value, list) else quote(value)
        raise RaggedError(f"input {spec.name!r} is ragged: {shape[0]} elements expected at {_place(place)}, got {got}")
    if len(shape) == 1 and _TYPES[spec.dtype.numpy.kind].issuperset(map(type, value)) and _extend(out, value, spec):
        return
    for index, item in enumerate(value):
        place.append(index)
        _flatten(item, shape[1:], spec, place, out)
        place.pop()


def _extend(out: list[Any], values: list[Any], spec: TensorSpec) -> bool:
    """Append elements of the right type all at once; False, and nothing appended, where a text is no UTF-8."""
    if spec.dtype is not DataType.BYTES:
        out += values
        return True
    try:
        out += list(map(str.encode, values))
    except UnicodeEncodeError:
        return False
    return True


def _element(value: Any, spec: TensorSpec, place: list[int]) -> Any:
    if isinstance(value, list):
        raise RaggedError(f"input {spec.name!r} is ragged: a value expected at {_place(place)}, got a list")
    if spec.dtype is DataType.BYTES:
        fits = isinstance(value, str | dict)
    elif spec.dtype is DataType.BOOL:
        fits = isinstance(value, bool)
    elif spec.dtype.is_integer:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits:
        raise InvalidArgument(
            f"input {spec.name!r}: {spec.dtype.value} expected at {_place(place)}, got {quote(value)}"
        )
    if spec.dtype is not DataType.BYTES:
        return value
    data = to_bytes(value, f"input {spec.name!r}", f" at {_place(place)}")
    if data is None:
        raise InvalidArgument(
            f'input {spec.name!r}: a string or {{"b64": "…"}} expected at {_place(place)}, got {quote(value)}'
        )
    return data


def to_bytes(value: str | dict[str, Any], where: str, place: str = "") -> bytes | None:
    """A string's UTF-8, or what ``{"b64": "…"}`` decodes to; None for any other object.

    Raises:
        InvalidArgument: no text, or no base64; told of `where`, and of the `place` in it.
    """
    try:
        if isinstance(value, str):
            return value.encode()
        if is_base64(value):
            return decode_base64(value["b64"])
    except UnicodeEncodeError:
        raise InvalidArgument(f"{where}: text expected{place}, got a lone surrogate") from None
    except ValueError as error:
        raise InvalidArgument(f"{where}: base64 expected{place}: {error}") from None
    return None


def is_base64(value: Any) -> bool:
    """Whether an object is ``{"b64": "…"}``, which stands for bytes; ``{"b64": 1}`` does not."""
    return list(value.keys()) == ["b64"] and isinstance(value["b64"], str)


def decode_base64(text: str) -> bytes:
    """What `text` stands for; its padding may be left out, as TensorFlow Serving lets it.

    Raises:
        ValueError: it is no base64.
    """
    padding = "" if "=" in text else "=" * (-len(text) % 4)
    return base64.b64decode(text + padding, validate=True)


def _place(place: list[int]) -> str:
    return "".join(f"[{index}]" for index in place) or "the top"


def quote(value: Any) -> str:
    """A value as the caller wrote it, cut short; no more of it is looked at than is shown."""
    if isinstance(value, NumberText):
        raise NotPlainError
    text = ""
    for word in _words(value):
        text += word
        if len(text) > _LONGEST_QUOTE:
            return text[:_LONGEST_QUOTE] + "…"
    return text


def _words(value: Any) -> Iterator[str]:
    """The words of a value's JSON, one by one."""
    if isinstance(value, simdjson.Object | dict):
        for index, key in enumerate(value):
            yield ("{" if not index else ", ") + json.dumps(key[: _LONGEST_QUOTE + 1]) + ": "
            yield from _words(value[key])
        yield "}" if len(value) else "{}"
    elif isinstance(value, simdjson.Array | list):
        for index, item in enumerate(value):
            yield "[" if not index else ", "
            yield from _words(item)
        yield "]" if len(value) else "[]"
    else:
        yield json.dumps(value[: _LONGEST_QUOTE + 1] if isinstance(value, str) else value)


def too_deep(max_depth: int) -> InvalidArgument:
    """The refusal of what is nested deeper than that."""
    return InvalidArgument(f"JSON Parse error: nested deeper than {max_depth} levels")
