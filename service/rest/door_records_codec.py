"""Records by field name → tensors, pure: each value is checked against what its input means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import orjson

from service.bounds import Bounds
from service.errors import InvalidArgument
from service.meaning import is_one_value
from service.padding import stack
from service.predictor import Decoded
from service.rest.door_body_codec import BARE, Record, Records, Text
from service.rest.door_fields import FieldSpec, fields_of, shown
from service.rest.door_images import Budget, checked_file, image_row, is_file_tensor
from service.rest.json_codec import to_array
from service.rest.json_elements import decode_base64, is_base64, quote
from service.tensors import Array, DataType, Signature, Tensors

MAX_RUNS = 1024
"""Records of one request to a signature that cannot be batched, each of which is a run of its own."""
_ELEMENT = re.compile(r"(.+?)(?:\[(\d{1,8})\]|[._](\d{1,8}))")
"""``x[3]``, ``x.3`` or ``x_3``: a column that has one element of a vector."""
_DATA_URI = re.compile(r"data:[^,;]*(?:;[^,;]*)*?;base64,", re.IGNORECASE)
_FEW = 16
"""Names that are told back."""
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def decode_records(given: Records, signature: Signature, bounds: Bounds, body_bytes: int) -> list[Decoded]:
    """Records as tensors ``(rows, …)``: one request, or where rows cannot be fused one for each record.

    Raises:
        InvalidArgument: a field is missing, unknown, of another type or shape, or not among its values.
    """
    fields = fields_of(signature)
    budget = Budget(bounds)
    rows: list[list[Array]] = []
    for index, record in enumerate(given.records):
        try:
            rows.append(_row(record, fields, len(given.records), budget, is_bare=given.is_bare))
        except InvalidArgument as error:
            where = f"record {index}: " if given.is_list else ""
            raise InvalidArgument(f"{where}{error}") from None
    if not rows:
        raise InvalidArgument("at least one record is expected, got none")
    if not signature.batched and len(rows) > MAX_RUNS:
        raise InvalidArgument(f"at most {MAX_RUNS} records expected, for each is run alone; got {len(rows)}")
    parts = [rows] if signature.batched else [[row] for row in rows]
    decoded = []
    for part in parts:
        inputs, lengths = _tensors(part, fields, signature, bounds)
        bounds.check_inputs(inputs, body_bytes)
        decoded.append(Decoded(signature, inputs, lengths=lengths))
    return decoded


def _tensors(
    rows: Sequence[Sequence[Array]], fields: Sequence[FieldSpec], signature: Signature, bounds: Bounds
) -> tuple[Tensors, dict[str, list[int]] | None]:
    """Arrays by input, and the lengths of rows that were padded; those of an input without rows stay as they are."""
    inputs: Tensors = {}
    lengths: dict[str, list[int]] = {}
    for place, field in enumerate(fields):
        arrays = [row[place] for row in rows]
        shapes = {array.shape for array in arrays}
        how = signature.padding.of(field.name) if signature.padding is not None and len(shapes) > 1 else None
        padded = None if how is None else stack(arrays, how, partial(bounds.check_shape, spec=field.spec))
        if padded is not None:
            inputs[field.name], lengths[field.name] = padded
            continue
        if len(shapes) > 1:
            first, other = sorted(shapes)[:2]
            raise InvalidArgument(f"field {field.name!r}: records differ in shape: {shown(first)} and {shown(other)}")
        inputs[field.name] = np.stack(arrays) if field.spec.is_batched else arrays[0]
    return inputs, lengths or None


def _row(record: Record, fields: Sequence[FieldSpec], rows: int, budget: Budget, *, is_bare: bool) -> list[Array]:
    """One array for each field."""
    record = {fields[0].name: record[BARE]} if is_bare else _gathered(record, fields)
    names = [field.name for field in fields]
    for name in record:
        if name not in names:
            raise InvalidArgument(f"unknown field {quote(name)}: {_known(fields)} expected")
    for field in fields:
        if field.name not in record:
            received = ", ".join(map(quote, list(record)[:_FEW])) or "none"
            raise InvalidArgument(f"field {field.name!r} is missing: {field.wanted} expected; got {received}")
    return [_value(record[field.name], field, rows, budget) for field in fields]


def _known(fields: Iterable[FieldSpec]) -> str:
    return ", ".join(", ".join(field.meaning.columns) or field.name for field in fields) or "none"


def _gathered(record: Record, fields: Sequence[FieldSpec]) -> Record:
    """`record` with the elements of vectors that came as fields of their own put together."""
    by_name = {field.name: field for field in fields}
    places = {name: (field, index) for field in fields for index, name in enumerate(field.meaning.columns)}
    parts: dict[str, dict[int, Any]] = {}
    whole: Record = {}
    for name, value in record.items():
        if name in by_name:
            whole[name] = value
        elif name in places:
            field, index = places[name]
            parts.setdefault(field.name, {})[index] = value
        elif (match := _ELEMENT.fullmatch(name)) and match[1] in by_name:
            parts.setdefault(match[1], {})[int(match[2] or match[3])] = value
        else:
            whole[name] = value
    for name, elements in parts.items():
        if name in whole:
            raise InvalidArgument(f"field {name!r}: whole or by its elements expected, got both")
        whole[name] = _vector(by_name[name], elements)
    return whole


def _vector(field: FieldSpec, elements: dict[int, Any]) -> list[Any]:
    """The elements in order, each as JSON has it."""
    columns = field.meaning.columns
    count = len(columns) or max(elements) + 1
    sizes = field.spec.row_sizes
    if sizes is not None and None not in sizes:
        count = math.prod(size for size in sizes if size is not None)
    for index in range(count):
        if index not in elements:
            raise InvalidArgument(f"field {columns[index] if columns else f'{field.name}[{index}]'!r} is missing")
    if len(elements) > count:
        raise InvalidArgument(f"field {field.name!r}: {count} elements expected, got {len(elements)}")
    given = [elements[index] for index in range(count)]
    return [_parsed(_text_of_file(each, field) if isinstance(each, bytes) else each, field) for each in given]


def _value(value: Any, field: FieldSpec, rows: int, budget: Budget) -> Array:
    """One value as a row of its input."""
    if field.kind == "image" and not isinstance(value, list):
        data = _file(value, field)
        if is_file_tensor(field.spec):
            return _fitted(_bytes_array(checked_file(data, field.name, budget)), field)
        return image_row(data, field.spec, field.meaning, rows, budget)
    if isinstance(value, bytes):
        value = _of_file(value, field)
    value = _parsed(value, field)
    if value is None:
        raise InvalidArgument(f"field {field.name!r}: {field.wanted} expected, got null")
    if isinstance(value, bytes):
        return _fitted(_bytes_array(value), field)
    array = _fitted(_array(value, field), field)
    _check_values(array, field)
    return array


def _array(value: Any, field: FieldSpec) -> Array:
    if field.spec.dtype.is_integer:
        value = _whole(value)
    try:
        return to_array(value, field.spec)
    except InvalidArgument as error:
        if isinstance(value, list):
            raise InvalidArgument(str(error).replace("input", "field", 1)) from None
        if "does not fit" in str(error):
            raise InvalidArgument(
                f"field {field.name!r}: {quote(value)} does not fit {field.spec.dtype.value}"
            ) from None
        raise InvalidArgument(f"field {field.name!r}: {field.wanted} expected, got {quote(value)}") from None


def _whole(value: Any) -> Any:
    """Whole numbers that were written with a point, as integers."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _bytes_array(data: bytes) -> Array:
    array = np.empty((), object)
    array[()] = data
    return array


def _file(value: Any, field: FieldSpec) -> bytes:
    """The bytes of an image that came as a file, as base64 or as a data URI."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict) and is_base64(value):
        value = value["b64"]
    if not isinstance(value, str):
        raise InvalidArgument(f"field {field.name!r}: {field.wanted} expected, got {quote(value)}")
    match = _DATA_URI.match(value)
    try:
        return decode_base64(value[match.end() :] if match else value)
    except ValueError as error:
        raise InvalidArgument(f"field {field.name!r}: base64 of a PNG or JPEG image expected: {error}") from None


def _of_file(data: bytes, field: FieldSpec) -> Any:
    """A file given for a field that is no image: its text, or for a tensor of strings its bytes."""
    if field.spec.dtype is DataType.BYTES and field.meaning.kind is None:
        return data
    return _text_of_file(data, field)


def _text_of_file(data: bytes, field: FieldSpec) -> Text:
    try:
        return Text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"field {field.name!r}: a file of text expected: {error}") from None


def _parsed(value: Any, field: FieldSpec) -> Any:
    """`Text` as the value that it means; anything else is as it was."""
    if not isinstance(value, Text):
        return value
    stripped = value.strip()
    if stripped.startswith("[") and not is_one_value(field.spec.row_sizes):
        try:
            return orjson.loads(stripped)
        except orjson.JSONDecodeError as error:
            raise InvalidArgument(f"field {field.name!r}: a list as JSON expected: {error}") from None
    if field.spec.dtype is DataType.BYTES:
        return str(value)
    if field.spec.dtype is DataType.BOOL:
        return _TRUTHS.get(stripped.lower(), str(value))
    for number in (int, float) if "_" not in stripped else ():
        try:
            return number(stripped)
        except ValueError:  # also an integer of thousands of digits
            continue
    return str(value)


def _fitted(array: Array, field: FieldSpec) -> Array:
    """`array` in the shape of a row; flat elements, and sizes of 1 left out or added, are put right."""
    sizes = field.spec.row_sizes
    if sizes is None or _admits(sizes, array.shape):
        return array
    is_flat = array.ndim <= 1
    like = [size for size in sizes if size != 1]
    if is_flat or (len(like) == len([s for s in array.shape if s != 1]) and array.size):
        known = math.prod(size for size in sizes if size is not None)
        is_open = sizes.count(None)
        if (not is_open and known == array.size) or (is_open == 1 and known and array.size % known == 0):
            shaped = array.reshape([-1 if size is None else size for size in sizes])
            if is_flat or [s for s in shaped.shape if s != 1] == [s for s in array.shape if s != 1]:
                return shaped
    raise InvalidArgument(f"field {field.name!r}: shape {shown(sizes)} expected, got {shown(array.shape)}")


def _admits(sizes: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(sizes) == len(shape) and all(want in (None, got) for want, got in zip(sizes, shape, strict=True))


def _check_values(array: Array, field: FieldSpec) -> None:
    """Raise `InvalidArgument` for what is not finite, not among the values, or out of range."""
    meaning = field.meaning
    is_number = field.spec.dtype.is_float or field.spec.dtype.is_integer
    if field.spec.dtype.is_float and not np.isfinite(array.astype(np.float64)).all():
        raise InvalidArgument(f"field {field.name!r}: a finite number expected, got {_shown_value(array)}")
    if meaning.values:
        known = {value.encode() if isinstance(value, str) else value for value in meaning.values}
        if field.spec.dtype.is_float:
            known = {field.spec.dtype.numpy.type(value).item() for value in known}
        for item in array.flat:
            plain = item if isinstance(item, bytes) else item.item()
            if plain not in known:
                expected = ", ".join(map(str, meaning.values))
                got = plain.decode(errors="replace") if isinstance(plain, bytes) else plain
                raise InvalidArgument(f"field {field.name!r}: one of {expected} expected, got {quote(got)}")
    if is_number and array.size:
        for limit, extreme, word in ((meaning.min, array.min(), "least"), (meaning.max, array.max(), "most")):
            if limit is not None and (extreme < limit if word == "least" else extreme > limit):
                unit = f" {meaning.unit}" if meaning.unit else ""
                raise InvalidArgument(f"field {field.name!r}: at {word} {limit:g}{unit} expected, got {extreme}")


def _shown_value(array: Array) -> str:
    values = array.astype(np.float64)
    return str(values[~np.isfinite(values)].flat[0])
