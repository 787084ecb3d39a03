"""JSON ↔ arrays, pure.

Numbers go through simdjson straight into a typed buffer (784 floats: 18 µs against 39 for a list
of Python floats); whatever that cannot take (strings, booleans, ``NaN`` tokens, mixed content) goes
through plain Python objects, which also make the precise error texts.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import simdjson

from service.bounds import Bounds, too_many
from service.errors import InvalidArgument
from service.rest.json_scan import fewest_elements, is_deeper
from service.tensors import MAX_DIMENSIONS, Array, DataType, Signature, TensorSpec, integers_fit

_NUMBER_BYTES = b"0123456789.+-eE \t\r\n"
_PROXY_COST_BYTES = 80
"""Visiting one nested array costs about as much as stripping this many bytes of text."""
ARRAY = (simdjson.Array, list)
OBJECT = (simdjson.Object, dict)
"""What a list and an object of JSON may be: simdjson's proxies, or plain Python."""
_LONGEST_QUOTE = 60
_KEPT_BYTES = 2**18
_NESTING = {list, dict}
_BUFFER_TYPES = {"f": "d", "V": "d", "i": "i", "u": "u"}
"""simdjson's element type by NumPy's kind (bfloat16 has the kind V)."""
_BUFFER_DTYPES = {"d": np.dtype(np.float64), "i": np.dtype(np.int64), "u": np.dtype(np.uint64)}
_FEW_ELEMENTS = 8192


class Document:
    """A parsed JSON object; its values are simdjson's proxies or plain Python."""

    def __init__(self, text: bytes, max_depth: int, *, is_header: bool = False) -> None:
        """Parse `text`, which must be an object; plain Python is cheaper for a header of few values.

        Raises:
            InvalidArgument: it is not JSON, not an object, or nested deeper than `max_depth`.
        """
        self.text = text
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
    if len(text) <= _KEPT_BYTES:
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
        raise ValueError(f"number too big to be stored in double: {text[:_LONGEST_QUOTE]}")
    return value


def _check_depth(text: bytes, max_depth: int) -> None:
    """Bound the nesting by the bytes alone, before a recursive parser sees them."""
    if is_deeper(text, max_depth):
        raise _too_deep(max_depth)


def _too_deep(max_depth: int) -> InvalidArgument:
    return InvalidArgument(f"JSON Parse error: nested deeper than {max_depth} levels")


def plain(value: Any, max_depth: int = MAX_DIMENSIONS) -> Any:
    """A value as Python lists and dicts; `InvalidArgument` if nested deeper than `max_depth`."""

    def convert(value: Any, left: int) -> Any:
        if isinstance(value, simdjson.Object):
            value = dict(value.items())  # plain all the way down
            bound(value, left)
        if not isinstance(value, simdjson.Array):
            return value
        if left <= 0:
            raise _too_deep(max_depth)
        return [convert(item, left - 1) for item in value]

    def bound(value: Any, left: int) -> None:
        if left <= 0:
            raise _too_deep(max_depth)
        items = value.values() if isinstance(value, dict) else value
        if not _NESTING.isdisjoint(map(type, items)):
            for item in items:
                if type(item) in _NESTING:
                    bound(item, left - 1)

    return convert(value, max_depth)


def check_elements(text: bytes, signature: Signature, bounds: Bounds) -> None:
    """Raise `InvalidArgument` where lists have more elements than all inputs together may have.

    Only a text that is long enough for so many is looked at.
    """
    if not bounds.may_exceed(len(text)):
        return
    most = bounds.most_of(signature)
    if text.count(b",") > most:
        count = fewest_elements(text)
        if count > most:
            raise too_many(", ".join(sorted(signature.input_by_name)), most, f"{count} or more")


def count_lists(text: bytes) -> int:
    """How many lists `text` has at most; brackets within strings are counted too."""
    return text.count(b"[", 0, text.rfind(b"[") + 1)  # memrchr is faster than counting past the last


def to_array(
    value: Any, spec: TensorSpec, text: bytes = b"", max_depth: int = MAX_DIMENSIONS, most_lists: int | None = None
) -> Array:
    """A nested JSON value as an array of `spec`'s type and its own shape.

    `text` is the body that `value` is the only array of, if so: then whether it is rectangular
    is told from its brackets and commas alone. `most_lists` is how many lists there can be in
    `value`, itself included, where that is known.

    Raises:
        InvalidArgument: ragged, nested deeper than `max_depth`, or with elements of another type;
            names the input and the place.
    """
    if isinstance(value, simdjson.Array):
        if text:
            most_lists = count_lists(text)
        array = _numeric(value, spec, text, min(max_depth, MAX_DIMENSIONS), most_lists)
        if array is not None:
            return array
    return _from_python(plain(value, max_depth), spec)


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
            return _cast(buffer, spec).reshape(shape)
    array = to_array(value, spec, max_depth=max_depth, most_lists=most_lists)
    if array.size != count or (array.ndim > 1 and array.shape != shape):
        raise InvalidArgument(
            f"input {spec.name!r}: shape {list(shape)} has {count} elements, "
            f"the data has {array.size} in shape {list(array.shape)}"
        )
    return array.reshape(shape)


def _numeric(
    value: simdjson.Array, spec: TensorSpec, text: bytes, max_depth: int, most_lists: int | None
) -> Array | None:
    """The fast way; None where Python must look closer."""
    buffer = _buffer(value, spec)
    if buffer is None:
        return None
    shape: list[int] = []
    inner: Any = value
    while isinstance(inner, simdjson.Array):
        shape.append(len(inner))
        if len(shape) > max_depth:
            raise _too_deep(max_depth)
        if not shape[-1]:
            break
        inner = inner[0]
    if len(buffer) != math.prod(shape) or not _rectangular(value, tuple(shape), text, most_lists):
        return None
    return _cast(buffer, spec).reshape(shape)


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
    if text and inner_arrays > 1 and inner_arrays * _PROXY_COST_BYTES > len(text):
        start, stop = text.find(b"["), text.rfind(b"]") + 1
        return text[start:stop].translate(None, _NUMBER_BYTES) == _skeleton(shape)
    lists = sum(math.prod(shape[:axis]) for axis in range(len(shape)))
    return _same_lengths(value, shape, look_inside=lists != most_lists)


def _same_lengths(value: Any, shape: tuple[int, ...], *, look_inside: bool) -> bool:
    """`look_inside` the innermost arrays where it is not known that all their elements are numbers."""
    if not isinstance(value, simdjson.Array) or len(value) != shape[0]:
        return False
    if len(shape) == 1:
        return not (look_inside and simdjson.Array in set(map(type, value)))
    return all(_same_lengths(item, shape[1:], look_inside=look_inside) for item in value)


def _skeleton(shape: tuple[int, ...]) -> bytes:
    """The brackets and commas of a rectangular array: ``[[,],[,]]`` for (2, 2)."""
    text = b""
    for size in reversed(shape):
        text = b"[" + (text + b",") * (size - 1) + text * (size > 0) + b"]"
    return text


def _cast(buffer: Array, spec: TensorSpec) -> Array:
    """To the input's type; a number that the type cannot hold is refused."""
    dtype = spec.dtype.numpy
    if buffer.dtype == dtype:
        return buffer
    if dtype.kind in "iu":
        return integers_fit(buffer, spec)
    if buffer.size <= _FEW_ELEMENTS and np.vdot(buffer, buffer) < spec.dtype.safe_square:
        return buffer.astype(dtype)  # the sum of all squares bounds each: cheaper than `errstate`
    try:
        with np.errstate(over="raise"):
            return buffer.astype(dtype)
    except FloatingPointError:
        largest = max((float(v) for v in buffer), key=lambda v: abs(v) if math.isfinite(v) else 0.0)
        raise InvalidArgument(f"input {spec.name!r}: {largest} does not fit {spec.dtype.value}") from None


def _from_python(value: Any, spec: TensorSpec) -> Array:
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
    return _cast(buffer, spec).reshape(shape)


def _shape_of(value: Any) -> tuple[int, ...]:
    """The shape that the first elements suggest."""
    shape = []
    while isinstance(value, list):
        shape.append(len(value))
        if len(shape) > MAX_DIMENSIONS:
            raise _too_deep(MAX_DIMENSIONS)
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
        raise InvalidArgument(
            f"input {spec.name!r} is ragged: {shape[0]} elements expected at {_place(place)}, got {got}"
        )
    for index, item in enumerate(value):
        place.append(index)
        _flatten(item, shape[1:], spec, place, out)
        place.pop()


def _element(value: Any, spec: TensorSpec, place: list[int]) -> Any:
    if isinstance(value, list):
        raise InvalidArgument(f"input {spec.name!r} is ragged: a value expected at {_place(place)}, got a list")
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
    return _bytes_of(value, spec, place) if spec.dtype is DataType.BYTES else value


def _bytes_of(value: Any, spec: TensorSpec, place: list[int]) -> bytes:
    """A string's UTF-8, or what ``{"b64": "…"}`` decodes to."""
    try:
        if isinstance(value, str):
            return value.encode()
        if is_base64(value):
            return decode_base64(value["b64"])
    except UnicodeEncodeError:
        raise InvalidArgument(f"input {spec.name!r}: text expected at {_place(place)}, got a lone surrogate") from None
    except ValueError as error:
        raise InvalidArgument(f"input {spec.name!r}: base64 expected at {_place(place)}: {error}") from None
    raise InvalidArgument(
        f'input {spec.name!r}: a string or {{"b64": "…"}} expected at {_place(place)}, got {quote(value)}'
    )


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
