"""TensorFlow Serving's ``:classify`` and ``:regress`` bodies ↔ examples and results, pure.

Source of the forms: TensorFlow Serving's RESTful API and ``json_tensor.cc``; of the bytes of an
example: TensorFlow's ``example.proto`` and ``feature.proto``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import InvalidArgument
from service.examples import Classes, Features, check_context
from service.rest.json_codec import Document, dumps, plain
from service.rest.json_elements import quote, to_bytes
from service.tensors import Array

_EXAMPLE_LEVELS = 3
"""Objects and lists from an example down to its values; base64 is an object in a list in an object."""
_KINDS = {bool: int, int: int, float: float, str: bytes, dict: bytes}
"""Which of the three lists of a feature holds a value; booleans are integers, as the original has it."""
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


class JsonExamples:
    """The examples of a body."""

    def __init__(self, rows: Sequence[Features]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def features(self) -> Sequence[Features]:
        return self._rows

    def serialized(self) -> Sequence[bytes]:
        return [_example_message(row) for row in self._rows]


def decode_examples_body(body: bytes, max_depth: int, bounds: Bounds = DEFAULT_BOUNDS) -> tuple[JsonExamples, str]:
    """The examples of a body, with its context merged into each, and the name of its signature (or ``""``).

    Raises:
        InvalidArgument: the body is wrong; names the feature, what was expected and what came.
    """
    document = Document(body, max_depth)
    name = document.get("signature_name")
    if name is not None and not isinstance(name, str):
        raise InvalidArgument(f"'signature_name' must be a string, got {quote(name)}")
    if "examples" not in document.keys:
        raise InvalidArgument("Missing 'examples' key: classify and regress take a list of examples")
    examples = plain(document.get("examples"), min(max_depth, 1 + _EXAMPLE_LEVELS))
    if not isinstance(examples, list):
        raise InvalidArgument(f"'examples' must be a list of objects, got {quote(examples)}")
    if not examples:
        raise InvalidArgument("'examples' is empty: at least one example is expected")
    context: Features = {}
    if "context" in document.keys:
        context = _features(plain(document.get("context"), min(max_depth, _EXAMPLE_LEVELS)), "'context'")
        check_context(context, len(examples), bounds)
    rows = [{**context, **_features(value, f"example {index}")} for index, value in enumerate(examples)]
    return JsonExamples(rows), name or ""


def _features(value: Any, where: str) -> Features:
    if not isinstance(value, dict):
        raise InvalidArgument(f"{where}: an object of features expected, got {quote(value)}")
    features = {}
    for name, values in value.items():
        if not _is_text(name):
            raise InvalidArgument(f"{where}: a feature's name has a lone surrogate")
        features[name] = _values(values, f"feature {name!r} of {where}")
    return features


def _is_text(name: str) -> bool:
    """Whether `name` can be written as UTF-8."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _values(value: Any, where: str) -> Array:
    """A scalar or a flat list as ``(values,)``; all of one kind."""
    values = value if isinstance(value, list) else [value]
    if not values:
        return np.empty(0, np.float32)
    kinds = {_KINDS.get(kind) for kind in set(map(type, values))}
    if None in kinds:
        raise _unexpected(next(item for item in values if type(item) not in _KINDS), where)
    if len(kinds) > 1:
        first = _KINDS[type(values[0])]
        other = next(item for item in values if _KINDS[type(item)] is not first)
        raise InvalidArgument(f"{where}: values of one kind expected, got {quote(values[0])} and {quote(other)}")
    if kinds == {bytes}:
        strings = np.empty(len(values), object)
        strings[:] = [_bytes(item, where) for item in values]
        return strings
    if kinds == {int}:
        try:
            return np.array(values, np.int64)
        except OverflowError:
            raise InvalidArgument(f"{where}: a number does not fit INT64") from None
    numbers = np.array(values)
    if (np.isfinite(numbers) & (np.abs(numbers) > _LARGEST_FLOAT)).any():
        raise InvalidArgument(f"{where}: a number does not fit FP32")
    return numbers.astype(np.float32)


def _unexpected(value: Any, where: str) -> InvalidArgument:
    return InvalidArgument(
        f'{where}: a number, a boolean, a string, {{"b64": "…"}} or a flat list of them expected, got {quote(value)}'
    )


def _bytes(value: str | dict[str, Any], where: str) -> bytes:
    data = to_bytes(value, where)
    if data is None:
        raise _unexpected(value, where)
    return data


def _example_message(features: Features) -> bytes:
    """A ``tf.Example``: ``Example{features=1}``, ``Features{map feature=1}``, entries of key 1 and value 2."""
    entries = [_field(1, _field(1, name.encode()) + _field(2, _feature_message(v))) for name, v in features.items()]
    return _field(1, b"".join(entries))


def _feature_message(values: Array) -> bytes:
    """A ``Feature``; one without values is of no kind, and so missing to whoever parses it."""
    if not len(values):
        return b""
    if values.dtype.kind == "O":
        return _field(_BYTES_LIST, b"".join(_field(1, item) for item in values))
    if values.dtype.kind == "f":
        return _field(_FLOAT_LIST, _field(1, values.astype("<f4").tobytes()))
    return _field(_INT64_LIST, _field(1, b"".join(_varint(item & 0xFFFF_FFFF_FFFF_FFFF) for item in values.tolist())))


def _field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    return bytes((number << 3 | 2,)) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


def encode_classes(classes: Classes) -> bytes:
    """``{"results": [[["label", score], …], …]}``, a list of classes for each example."""
    return dumps(
        {
            "results": [
                [[label, score] for label, score in zip(labels, scores, strict=True)]
                for labels, scores in zip(classes.labels, classes.scores, strict=True)
            ]
        }
    )


def encode_values(values: Array) -> bytes:
    """``{"results": [value, …]}``, a value for each example."""
    return dumps({"results": values})
