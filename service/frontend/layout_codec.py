"""How tensors lie in a block of shared memory, pure: one after another, each at a multiple of `ALIGNMENT`.

Layouts are alike from one request to the next, so each is written, and read and checked, once, and is
then known by what made it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from mmap import mmap
from typing import NamedTuple, TypeVar

import numpy as np

from service.errors import InvalidArgument
from service.frontend.frames_codec import CorruptFrame
from service.frontend.ring import aligned
from service.tensors import (
    BY_TENSORFLOW_NUMBER,
    MAX_DIMENSIONS,
    Array,
    DataType,
    Tensors,
    TensorSpec,
    data_type_of,
    pack_strings,
    unpack_raw,
)

K = TypeVar("K")
T = TypeVar("T")
_HEAD = struct.Struct("<HH")  # place of the signature among the version's, number of tensors
_TENSOR = struct.Struct("<HBBxxxxQ")  # place of its specification, type, dimensions, bytes; then the sizes
_MOST_KNOWN = 1024
"""Layouts that are remembered: callers choose the shapes."""
_SMALL_BYTES = 2**16
"""Arrays smaller than this are copied twice in less time than it takes to make a view."""


class Slot(NamedTuple):
    """One tensor in a block: `spec` is its place in the signature's inputs or outputs."""

    spec: int
    dtype: DataType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class Layout(NamedTuple):
    """The tensors of a block, in order; `signature` is a place among the version's, sorted by name."""

    signature: int
    slots: tuple[Slot, ...]
    size_bytes: int


class Written(NamedTuple):
    """Tensors on their way into a block: `parts`, each to be put at its offset."""

    layout: bytes
    parts: Sequence[Array | bytes]
    offsets: Sequence[int]
    size_bytes: int


class LayoutWriter:
    """Writes the layouts of one signature's inputs or outputs, and remembers those that it has written."""

    def __init__(self, signature: int, specs: Sequence[TensorSpec]) -> None:
        """`signature` is its place among the version's, sorted by name."""
        self._signature = signature
        self._places = {spec.name: place for place, spec in enumerate(specs)}
        self._known: dict[tuple[object, ...], tuple[bytes, tuple[int, ...], int]] = {}

    def write(self, tensors: Tensors) -> Written:
        """Lay out `tensors`.

        Raises:
            InvalidArgument: one of them has a name that the signature has not, or a type that cannot be sent.
        """
        parts: list[Array | bytes] = []
        key: list[object] = []
        for name, array in tensors.items():
            part = pack_strings(array) if array.dtype.kind in "OSU" else array
            parts.append(part)
            key += (name, array.shape, len(part) if isinstance(part, bytes) else array.dtype)
        known = self._known.get(at := tuple(key))
        if known is None:
            known = self._lay_out(tensors, parts)
            _remember(self._known, at, known)
        layout, offsets, size_bytes = known
        return Written(layout, parts, offsets, size_bytes)

    def _lay_out(self, tensors: Tensors, parts: Sequence[Array | bytes]) -> tuple[bytes, tuple[int, ...], int]:
        unknown = sorted(tensors.keys() - self._places.keys())
        if unknown:
            raise InvalidArgument(f"tensor {unknown[0]!r}: {', '.join(self._places)} expected")
        layout = [_HEAD.pack(self._signature, len(tensors))]
        offsets, at = [], 0
        for (name, array), part in zip(tensors.items(), parts, strict=True):
            size_bytes = len(part) if isinstance(part, bytes) else part.nbytes
            layout.append(_TENSOR.pack(self._places[name], data_type_of(array).number, array.ndim, size_bytes))
            layout.append(struct.pack(f"<{array.ndim}Q", *array.shape))
            offsets.append(at)
            at += aligned(size_bytes)
        return b"".join(layout), tuple(offsets), at


class LayoutReader:
    """Reads layouts, and remembers those that it has read."""

    def __init__(self) -> None:
        self._known: dict[bytes, Layout] = {}

    def read(self, layout: bytes, size_bytes: int) -> Layout:
        """The layout of a block of `size_bytes`; `CorruptFrame` if it cannot be one."""
        known = self._known.get(layout)
        if known is None:
            known = _read(layout)
            _remember(self._known, layout, known)
        if known.size_bytes != size_bytes:
            raise CorruptFrame(f"a block of {known.size_bytes} bytes expected by its layout, got {size_bytes}")
        return known


def put(buffer: mmap, at: int, written: Written) -> None:
    """Copy tensors into `buffer`, whose place `at` is the start of their block."""
    for part, offset in zip(written.parts, written.offsets, strict=True):
        start = at + offset
        if isinstance(part, bytes):
            buffer[start : start + len(part)] = part
        elif part.nbytes < _SMALL_BYTES:
            buffer[start : start + part.nbytes] = part.tobytes()
        else:
            np.ndarray(part.shape, part.dtype, buffer, start)[...] = part


def get(block: bytes | mmap, layout: Layout, specs: Sequence[TensorSpec]) -> Tensors:
    """The tensors of a block, which is as large as its layout says, under the names of `specs`.

    They are views on it, but for strings.

    Raises:
        CorruptFrame: `layout` has more tensors than there are specifications, or strings are cut short.
    """
    tensors: Tensors = {}
    try:
        for spec, dtype, shape, offset, size_bytes in layout.slots:
            if dtype is DataType.BYTES:
                array = unpack_raw(block[offset : offset + size_bytes], dtype, shape, specs[spec].name)
            else:
                array = np.ndarray(shape, dtype.numpy, block, offset)
            tensors[specs[spec].name] = array
    except (IndexError, InvalidArgument) as error:
        raise CorruptFrame(f"tensors that do not fit their layout: {error}") from None
    return tensors


def _remember(known: dict[K, T], key: K, value: T) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[key] = value


def _read(layout: bytes) -> Layout:
    try:
        signature, count = _HEAD.unpack_from(layout)
        place, offset, slots = _HEAD.size, 0, []
        for _ in range(count):
            spec, number, dimensions, size_bytes = _TENSOR.unpack_from(layout, place)
            shape = struct.unpack_from(f"<{dimensions}Q", layout, place + _TENSOR.size)
            place += _TENSOR.size + 8 * dimensions
            slots.append(_slot(spec, number, shape, offset, size_bytes))
            offset += aligned(size_bytes)
    except struct.error as error:
        raise CorruptFrame(f"a layout that is cut short: {error}") from None
    if place != len(layout):
        raise CorruptFrame(f"{len(layout) - place} bytes follow the layout of {count} tensors")
    return Layout(signature, tuple(slots), offset)


def _slot(spec: int, number: int, shape: tuple[int, ...], offset: int, size_bytes: int) -> Slot:
    dtype = BY_TENSORFLOW_NUMBER.get(number)
    if dtype is None or len(shape) > MAX_DIMENSIONS:
        raise CorruptFrame(f"no tensor has type {number} and {len(shape)} dimensions")
    needed = math.prod(shape) * (4 if dtype is DataType.BYTES else dtype.numpy.itemsize)
    if size_bytes < needed or (size_bytes != needed and dtype is not DataType.BYTES):
        raise CorruptFrame(f"{needed} bytes expected for {dtype.value} {list(shape)}, got {size_bytes}")
    return Slot(spec, dtype, shape, offset, size_bytes)
