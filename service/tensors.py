"""Tensors on their way to and from a model: types, signatures, validation, fusing and cutting.

Pure NumPy; no clock, no thread, no transport.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from service.errors import InvalidArgument
from service.meaning import ModelMeaning
from service.padding import Padding

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
"""Named arrays; for a batched signature each is ``(rows, …)`` with the same number of rows."""

DEFAULT_SIGNATURE = "serving_default"
MAX_DIMENSIONS = 64
"""NumPy's limit."""


_LARGEST = {"FP16": 65504.0, "BF16": 3.3895e38, "FP32": 2.0**24 - 1, "FP64": 2.0**53 - 1}
"""Numbers up to which a floating type overflows nowhere; up to those of FP32 and FP64 it holds each integer too."""


class DataType(Enum):
    """Element types, under the names of each wire.

    ``value`` is the Open Inference Protocol's name, `tensorflow` the name and `number` the
    enum number in TensorFlow's ``types.proto``. Numbers whose squares are below `safe_square` need no
    closer look when they become a floating type.
    """

    BOOL = ("BOOL", "DT_BOOL", 10, np.bool_)
    UINT8 = ("UINT8", "DT_UINT8", 4, np.uint8)
    UINT16 = ("UINT16", "DT_UINT16", 17, np.uint16)
    UINT32 = ("UINT32", "DT_UINT32", 22, np.uint32)
    UINT64 = ("UINT64", "DT_UINT64", 23, np.uint64)
    INT8 = ("INT8", "DT_INT8", 6, np.int8)
    INT16 = ("INT16", "DT_INT16", 5, np.int16)
    INT32 = ("INT32", "DT_INT32", 3, np.int32)
    INT64 = ("INT64", "DT_INT64", 9, np.int64)
    FP16 = ("FP16", "DT_HALF", 19, np.float16)
    BF16 = ("BF16", "DT_BFLOAT16", 14, ml_dtypes.bfloat16)
    FP32 = ("FP32", "DT_FLOAT", 1, np.float32)
    FP64 = ("FP64", "DT_DOUBLE", 2, np.float64)
    BYTES = ("BYTES", "DT_STRING", 7, np.object_)

    tensorflow: str
    number: int
    numpy: np.dtype[Any]
    safe_square: float

    def __new__(cls, oip: str, tensorflow: str, number: int, numpy: type) -> DataType:
        member = object.__new__(cls)
        member._value_ = oip
        member.tensorflow = tensorflow
        member.number = number
        member.numpy = np.dtype(numpy)
        member.safe_square = _LARGEST.get(oip, 0.0) ** 2 * 0.99
        return member

    @property
    def is_float(self) -> bool:
        return self in (DataType.FP16, DataType.BF16, DataType.FP32, DataType.FP64)

    @property
    def is_integer(self) -> bool:
        return bool(self.numpy.kind in "iu")


BY_TENSORFLOW_NUMBER = {t.number: t for t in DataType}
_BY_NUMPY = {t.numpy: t for t in DataType}


def data_type_of(array: Array) -> DataType:
    """The wire type of an array; `InvalidArgument` if no wire can carry it (complex, say)."""
    if array.dtype.kind in "OSU":
        return DataType.BYTES
    try:
        return _BY_NUMPY[array.dtype]
    except KeyError:
        raise InvalidArgument(f"tensors of type {array.dtype} cannot be sent") from None


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a signature.

    `shape` has None for a dimension of any size, and is None where even the rank is open.
    `graph_name` is the tensor's name inside the graph (``serving_default_x:0``); `labels` are the
    names of an output's classes, if there are any.
    """

    name: str
    dtype: DataType
    shape: tuple[int | None, ...] | None
    graph_name: str = ""
    labels: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def is_batched(self) -> bool:
        return bool(self.shape) and self.shape is not None and self.shape[0] is None

    @property
    def row_sizes(self) -> tuple[int | None, ...] | None:
        """The shape of one row, or of the whole tensor where it has no rows; None where the rank is open."""
        return self.shape[1:] if self.shape is not None and self.is_batched else self.shape

    @cached_property
    def row_elements(self) -> int | None:
        """Elements of one row; None where a size is open, or there are no rows."""
        if not self.is_batched or self.shape is None:
            return None
        sizes = [size for size in self.shape[1:] if size is not None]
        return math.prod(sizes) if len(sizes) == len(self.shape) - 1 else None

    def wire_shape(self) -> list[int]:
        """The shape with -1 for an open dimension (an open rank shows as ``[-1]``)."""
        return [-1] if self.shape is None else [-1 if d is None else d for d in self.shape]

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of `shape` fits."""
        if self.shape is None:
            return True
        if len(shape) != len(self.shape):
            return False
        for want, got in zip(self.shape, shape, strict=True):  # noqa: SIM110 - a generator would cost as much again
            if want != got and want is not None:
                return False
        return True


@dataclass(frozen=True)
class Signature:
    """A named function of a model: what goes in and what comes out.

    `takes_other_shapes` tells that the graph may be tried with shapes that it does not declare:
    it then answers or refuses. Other graphs must not be, for some operations abort the process.
    `stateful` tells that each run changes the model's variables: every request runs alone, once.
    `meaning` is what ``model.yaml`` says of the model, all signatures of which share it. With `padding` requests of
    different lengths share a batch.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    method: str = "tensorflow/serving/predict"
    takes_other_shapes: bool = False
    stateful: bool = False
    meaning: ModelMeaning | None = field(default=None, compare=False, repr=False)
    padding: Padding | None = field(default=None, compare=False, repr=False)

    @cached_property
    def input_by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.inputs}

    @cached_property
    def output_by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.outputs}

    @cached_property
    def batched(self) -> bool:
        """Whether rows of several callers may be fused: dimension 0 is open everywhere, and no run leaves a trace."""
        open_rows = bool(self.inputs) and all(spec.is_batched for spec in (*self.inputs, *self.outputs))
        return open_rows and not self.stateful

    @cached_property
    def has_open_sizes(self) -> bool:
        """Whether an input leaves more open than its rows, so that its cost depends on the request."""
        start = int(self.batched)
        return any(spec.shape is None or None in spec.shape[start:] for spec in self.inputs)

    def describe(self) -> str:
        """One line: ``image FP32 [-1,8,8,1] → output_0 FP32 [-1,10]``."""
        sides = (self.inputs, self.outputs)
        return " → ".join(
            ", ".join(f"{s.name} {s.dtype.value} {_bracket(s.wire_shape())}" for s in side) for side in sides
        )


def check_names(signature: Signature, given: Mapping[str, object]) -> None:
    """Raise `InvalidArgument` unless exactly the signature's inputs are given."""
    if given.keys() == signature.input_by_name.keys():
        return
    expected = ", ".join(sorted(signature.input_by_name))
    unknown = sorted(given.keys() - signature.input_by_name.keys())
    if unknown:
        raise InvalidArgument(f"unknown input {unknown[0]!r}: signature {signature.name!r} takes {expected}")
    missing = sorted(signature.input_by_name.keys() - given.keys())
    received = ", ".join(sorted(given)) or "none"
    raise InvalidArgument(
        f"input {missing[0]!r} is missing: signature {signature.name!r} takes {expected}; received {received}"
    )


def check_data_type(spec: TensorSpec, received: str, array: Array) -> None:
    """Raise `InvalidArgument` unless `array` has the type that `spec` asks for.

    `received` is the type's name as the caller's dialect calls it.
    """
    if array.dtype != spec.dtype.numpy:
        raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.dtype.value}, got {received}")


def check_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    """Raise `InvalidArgument`, with the likely fix, unless `shape` fits `spec`.

    Rows are compared where both sides have them: ``[28, 28, 1] expected, got [28, 28]``.
    """
    if spec.admits(shape):
        return
    expected, received = spec.wire_shape(), list(shape)
    if spec.is_batched and shape and not spec.admits((1, *shape)):
        expected, received = expected[1:], received[1:]
    raise InvalidArgument(
        f"input {spec.name!r}: {_bracket(expected)} expected, got {_bracket(received)}" + _likely_fix(spec, shape)
    )


def is_padded(signature: Signature, inputs: Tensors) -> bool:
    """Whether such inputs are padded by length: the signature says so, and declares shapes as theirs are."""
    return signature.padding is not None and all(spec.admits(inputs[spec.name].shape) for spec in signature.inputs)


def count_rows(signature: Signature, inputs: Tensors) -> int:
    """Rows of one request: the size of dimension 0, which all inputs must share.

    A signature that cannot be batched counts as one row. Raises `InvalidArgument` for scalars
    where rows are expected, for an empty batch, and where inputs differ in rows.
    """
    if not signature.batched:
        return 1
    rows = -1
    first = ""
    for name, array in inputs.items():
        if array.ndim == 0:
            raise InvalidArgument(f"input {name!r}: a batch dimension is expected, got a scalar")
        if rows == -1:
            rows, first = array.shape[0], name
        elif array.shape[0] != rows:
            raise InvalidArgument(f"inputs differ in rows: {first!r} has {rows}, {name!r} has {array.shape[0]}")
    if rows == 0:
        raise InvalidArgument(f"input {first!r}: at least one row is expected, got an empty batch")
    return rows


def trailing_shapes(signature: Signature, inputs: Tensors) -> tuple[tuple[int, ...], ...]:
    """What must agree between requests that share a batch: each input's shape without its rows."""
    return tuple(inputs[spec.name].shape[1:] for spec in signature.inputs)


def size_bytes(tensors: Tensors) -> int:
    """Memory held by `tensors`; strings count their bytes."""
    total = 0
    for array in tensors.values():
        total += array.nbytes
        if array.dtype.kind == "O":
            total += sum(len(item) for item in array.flat)
    return total


def concatenate(parts: Sequence[Tensors], pad_to_rows: int = 0) -> Tensors:
    """Fuse requests into one batch, ``(rows, …)`` each, in order.

    Where `pad_to_rows` is more than the rows there are, the batch is filled with copies of its
    first row: a real row is always safe for a model, zeros may not be (the same choice as
    TensorFlow Serving's ``batching_session``). The caller cuts the surplus rows off again.
    """
    first = parts[0]
    rows = sum(len(next(iter(part.values()))) for part in parts)
    surplus = pad_to_rows - rows
    if len(parts) == 1 and surplus <= 0:
        return first
    fused = {}
    for name, array in first.items():
        pieces = [part[name] for part in parts]
        if surplus > 0:
            pieces.append(np.broadcast_to(array[:1], (surplus, *array.shape[1:])))
        fused[name] = np.concatenate(pieces)
    return fused


def split(tensors: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """Cut a batch into consecutive parts of `rows` rows each: the inverse of `concatenate`.

    The parts are views. Rows beyond the sum of `rows` (padding) are dropped.
    """
    if len(rows) == 1 and all(len(array) == rows[0] for array in tensors.values()):
        return [tensors]
    parts = []
    start = 0
    for count in rows:
        stop = start + count
        parts.append({name: array[start:stop] for name, array in tensors.items()})
        start = stop
    return parts


def _bracket(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _likely_fix(spec: TensorSpec, shape: tuple[int, ...]) -> str:
    """A hint where one change would make `shape` fit, else ``""``."""
    first_is_one, last_is_one = shape[:1] == (1,), shape[-1:] == (1,)
    fixes = (
        (spec.is_batched and spec.admits((1, *shape)), "add a batch dimension?"),
        (spec.admits((*shape, 1)), "add a channel axis?"),
        (last_is_one and len(shape) > 1 and spec.admits(shape[:-1]), "drop the last axis?"),
        (first_is_one and len(shape) > 1 and spec.is_batched and spec.admits(shape[1:]), "drop the first axis?"),
        (
            len(shape) == 4 and spec.admits((shape[0], *shape[2:], shape[1])),
            "channels last is expected, transpose?",
        ),
        (_is_flat(spec, shape), "reshape each row?"),
    )
    return next((f": {fix}" for fits, fix in fixes if fits), "")


def _is_flat(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Whether `shape` is rows of the right number of elements, without their inner dimensions."""
    if spec.shape is None or len(spec.shape) < 3 or len(shape) != 2:
        return False
    sizes = [size for size in spec.shape[1:] if size is not None]
    return len(sizes) == len(spec.shape) - 1 and math.prod(sizes) == shape[1]


def unpack_raw(data: bytes | memoryview, dtype: DataType, shape: tuple[int, ...], name: str) -> Array:
    """Raw little-endian bytes as an array of `shape`, without a copy (strings excepted).

    Raises:
        InvalidArgument: the bytes are not exactly what `shape` and `dtype` need.
    """
    count = math.prod(shape)
    if dtype is DataType.BYTES:
        return _unpack_strings(data, count, name).reshape(shape)
    expected = count * dtype.numpy.itemsize
    if len(data) != expected:
        raise InvalidArgument(
            f"input {name!r}: {expected} bytes expected for {dtype.value} {_bracket(shape)}, got {len(data)}"
        )
    if dtype is DataType.BOOL:
        bits: Array = np.frombuffer(data, np.uint8) != 0  # any other bit pattern is undefined in a bool
        return bits.reshape(shape)
    return np.frombuffer(data, dtype.numpy).reshape(shape)


def _unpack_strings(data: bytes | memoryview, count: int, name: str) -> Array:
    """Elements of a 4-byte little-endian length and that many bytes (Open Inference Protocol)."""
    raw = bytes(data)
    if count * 4 > len(raw):
        raise InvalidArgument(f"input {name!r}: {count} strings expected, got {len(raw)} bytes")
    items = np.empty(count, object)
    at = 0
    for index in range(count):
        start = at + 4
        at = start + int.from_bytes(raw[start - 4 : start], "little")
        if start > len(raw) or at > len(raw):
            raise InvalidArgument(f"input {name!r}: string {index} of {count} goes past the end of the data")
        items[index] = raw[start:at]
    if at != len(raw):
        raise InvalidArgument(f"input {name!r}: {len(raw) - at} bytes follow the last of {count} strings")
    return items


def pack_strings(array: Array) -> bytes:
    """The inverse of reading BYTES: each element as its 4-byte length and its bytes."""
    items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.flat]
    return b"".join(part for item in items for part in (len(item).to_bytes(4, "little"), item))


def integers_fit(array: Array, spec: TensorSpec) -> Array:
    """`array` as `spec`'s type; `InvalidArgument` for an integer that the type cannot hold."""
    dtype = spec.dtype.numpy
    if array.dtype == dtype:
        return array
    if dtype.kind in "iu" and array.size:
        limits = np.iinfo(dtype)
        for extreme in (array.min(), array.max()):
            if not limits.min <= int(extreme) <= limits.max:
                raise InvalidArgument(f"input {spec.name!r}: {extreme} does not fit {spec.dtype.value}")
    return array.astype(dtype)
