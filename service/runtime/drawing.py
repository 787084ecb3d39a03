"""Inputs for a signature that nobody has asked yet: those of a sample, else seeded ones by type."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from service.runtime.ranges import Ranges
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec

_OPEN_SIZES = (32, 1, 224)
"""Sizes tried, in order, for a dimension that the signature leaves open."""
_LARGE = 255.0
"""Beyond what is usual by as much as pixels are that nobody scaled."""
_WORDS = (b"a few words", b"", b"caf\xc3\xa9 and more", b"0", b"another line of text, longer than the others")
_LARGEST_DRAWN = 1000
EDGES = ("zero", "large", "negative", "empty", "lowest", "highest")
"""Kinds of inputs, beside the ordinary ones, on which plans have to agree."""


class Drawer:
    """Draws batches, the same for the same number of rows."""

    def __init__(self, signature: Signature, sample: Tensors | None = None) -> None:
        """`sample` has rows ``(rows, …)`` that were seen; they are repeated as often as it takes."""
        self.signature = signature
        self.sample = sample
        self.open_size = _OPEN_SIZES[0]
        self.zeros = False
        self.images = False
        """Strings are PNG files."""
        self.ranges: Ranges = {}
        """Integers that the model takes; of an input that has none here, all of its type."""

    def batch(self, rows: int) -> Tensors:
        """Inputs of `rows` rows (a signature without rows: as declared)."""
        if self.sample is not None:
            return {name: self._repeat(array, rows) for name, array in self.sample.items()}
        rng = np.random.default_rng(rows)
        return {spec.name: self._array(spec, rows, rng) for spec in self.signature.inputs}

    def attempts(self) -> Iterator[None]:
        """Other ways to draw, where the model refuses the first: the sample, random sizes, images, then plain zeros."""
        if self.sample is not None:
            yield
            self.sample = None
        sizes = _OPEN_SIZES if self.signature.has_open_sizes else _OPEN_SIZES[:1]
        has_strings = any(spec.dtype is DataType.BYTES for spec in self.signature.inputs)
        for self.images in (False, True) if has_strings else (False,):
            for self.zeros, self.open_size in itertools.product((False, True), sizes):
                yield

    def edges(self, rows: int) -> Iterator[tuple[str, Tensors]]:
        """Batches of one of `EDGES` each, shaped as `batch` is; those that would repeat one are left out."""
        usual = self.batch(rows)
        for kind in EDGES:
            edge = {
                spec.name: _edge(kind, spec.dtype, usual[spec.name], self.ranges.get(spec.name))
                for spec in self.signature.inputs
            }
            if any(edge[name] is not array for name, array in usual.items()):
                yield kind, edge

    def _repeat(self, array: Array, rows: int) -> Array:
        if not self.signature.batched:
            return array
        repeated: Array = array[np.arange(rows) % len(array)]
        return repeated

    def _array(self, spec: TensorSpec, rows: int, rng: np.random.Generator) -> Array:
        sizes = [self.open_size if size is None else size for size in spec.shape or ()]
        if self.signature.batched:
            sizes[0] = rows
        if spec.dtype is DataType.BYTES:
            return _strings(sizes, (b"",) if self.zeros and not self.images else _images() if self.images else _WORDS)
        if self.zeros:
            return np.zeros(sizes, spec.dtype.numpy)
        if spec.dtype.is_float:
            return rng.standard_normal(sizes, dtype=np.float32).astype(spec.dtype.numpy)
        lowest, highest = self.ranges.get(spec.name, (0, 1))
        return rng.integers(max(lowest, 0), min(highest, _LARGEST_DRAWN) + 1, sizes).astype(spec.dtype.numpy)


def _strings(sizes: list[int], words: Sequence[bytes]) -> Array:
    array = np.empty(math.prod(sizes), object)
    array[:] = list(itertools.islice(itertools.cycle(words), array.size))
    return array.reshape(sizes)


@cache
def _images() -> tuple[bytes, ...]:
    """PNG files of random pixels, in colour and of different sizes."""
    from PIL import Image

    files = []
    for size in (32, 48):
        pixels = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return tuple(files)


def _edge(kind: str, dtype: DataType, usual: Array, ends: tuple[int, int] | None) -> Array:
    """`usual` itself where `kind` says nothing about its type."""
    if dtype is DataType.BYTES:
        return np.full(usual.shape, b"", object) if kind == "empty" else usual
    if kind == "zero":
        return np.zeros_like(usual)
    if ends is not None and kind in ("lowest", "highest"):
        return np.full_like(usual, ends[kind == "highest"])
    if dtype.is_float and kind == "large":
        return (usual.astype(np.float32) * _LARGE).astype(usual.dtype)
    if dtype.is_float and kind == "negative":
        return (-np.abs(usual.astype(np.float32))).astype(usual.dtype)
    return usual
