"""Made-up requests for a signature: seeded, of any batch size, and as JSON that can be pasted."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.tensors import DEFAULT_SIGNATURE, Array, DataType, Signature, Tensors, TensorSpec

BATCH_ROWS = (1, 3, 8)
"""Batch sizes that a model is tried with."""
_OPEN_SIZES = (8, 32, 128, 256)
"""What an open dimension is tried with: networks that halve images many times refuse small ones."""
_WHOLE = (1000, 100, 10, 2)
"""Bounds of whole numbers, which may be indices into a table of any length."""
_DIGITS = 4
"""Decimals of the numbers in an example."""


@dataclass(frozen=True)
class Draw:
    """One way to make inputs up: whole numbers are below `below`, floats are whole too where `whole`."""

    open_size: int = _OPEN_SIZES[0]
    below: int = _WHOLE[0]
    whole: bool = False
    pictures: bool = False

    def batch(self, signature: Signature, rows: int) -> Tensors:
        """Inputs ``(rows, …)``, the same for the same `rows`; as declared where the signature has no rows."""
        rng = np.random.default_rng(rows)
        return {spec.name: self._array(spec, rows if signature.batched else None, rng) for spec in signature.inputs}

    def _array(self, spec: TensorSpec, rows: int | None, rng: np.random.Generator) -> Array:
        sizes = [self.open_size if size is None else size for size in spec.shape or ()]
        if rows is not None:
            sizes[0] = rows
        if spec.dtype is DataType.BYTES:
            items = [_picture(rng) if self.pictures else _words(rng) for _ in range(math.prod(sizes))]
            array = np.empty(len(items), object)
            array[:] = items
            return array.reshape(sizes)
        if spec.dtype.is_float and not self.whole:
            return np.asarray(rng.standard_normal(sizes, dtype=np.float32)).round(_DIGITS).astype(spec.dtype.numpy)
        most = 2 if spec.dtype is DataType.BOOL else min(self.below, 128)  # what every integer type holds
        if spec.dtype.numpy.itemsize > 1:
            most = self.below
        return np.asarray(rng.integers(0, most, sizes)).astype(spec.dtype.numpy)


def draws(signature: Signature) -> Iterator[Draw]:
    """Ways to make inputs up, the likeliest first; a model may refuse some of them."""
    types = {spec.dtype for spec in signature.inputs}
    floats = any(each.is_float for each in types)
    numbers = floats or any(each.is_integer for each in types)
    yield from itertools.starmap(
        lambda size, whole, below, pictures: Draw(size, below, whole, pictures),
        itertools.product(
            _OPEN_SIZES if signature.has_open_sizes else _OPEN_SIZES[:1],
            (False, True) if floats else (False,),
            _WHOLE if numbers else _WHOLE[:1],
            (False, True) if DataType.BYTES in types else (False,),
        ),
    )


def _words(rng: np.random.Generator) -> bytes:
    return b" ".join(rng.choice([b"a", b"good", b"day", b"for", b"one", b"more", b"test"], 4).tolist())


def _picture(rng: np.random.Generator) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def predict_body(signature: Signature, inputs: Tensors) -> str:
    """TensorFlow Serving's JSON for `inputs`: by rows where there are rows, else by columns."""
    columns = {name: _plain(array) for name, array in inputs.items()}
    body: dict[str, Any] = {} if signature.name == DEFAULT_SIGNATURE else {"signature_name": signature.name}
    if not signature.batched:
        body["inputs"] = next(iter(columns.values())) if len(columns) == 1 else columns
    elif len(columns) == 1:
        body["instances"] = next(iter(columns.values()))
    else:
        body["instances"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return json.dumps(body)


def _plain(array: Array) -> Any:
    if array.dtype.kind == "O":
        texts = np.empty(array.size, object)
        texts[:] = [_text(item) for item in array.flat]
        return texts.reshape(array.shape).tolist()
    if array.dtype.kind in "biu":
        return array.tolist()
    rounded = np.empty(array.size, object)
    rounded[:] = [round(float(item), _DIGITS) for item in array.flat]
    return rounded.reshape(array.shape).tolist()


def _text(item: bytes) -> Any:
    return item.decode() if item.isascii() else {"b64": base64.b64encode(item).decode()}


def largest_difference(wanted: Tensors, given: Tensors) -> float:
    """Of all elements; infinite where names, shapes, strings, or which numbers are finite differ."""
    if wanted.keys() != given.keys():
        return math.inf
    return max((_difference(wanted[name], given[name]) for name in wanted), default=0.0)


def is_close(wanted: Tensors, given: Tensors, *, rtol: float, atol: float) -> bool:
    """Whether each element of `given` is within ``atol + rtol × |wanted|``, and strings are equal."""
    return wanted.keys() == given.keys() and all(
        wanted[name].shape == given[name].shape and _is_close(wanted[name], given[name], rtol, atol) for name in wanted
    )


def _is_close(wanted: Array, given: Array, rtol: float, atol: float) -> bool:
    if wanted.dtype.kind == "O" or given.dtype.kind == "O":
        return bool(np.array_equal(wanted, given))
    return np.allclose(given.astype(np.float64), wanted.astype(np.float64), rtol, atol, equal_nan=True)


def _difference(wanted: Array, given: Array) -> float:
    if wanted.shape != given.shape:
        return math.inf
    if wanted.dtype.kind == "O" or given.dtype.kind == "O":
        return 0.0 if np.array_equal(wanted, given) else math.inf
    want, have = wanted.astype(np.float64), given.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((want == have) | (np.isnan(want) & np.isnan(have)), 0.0, np.abs(want - have))
    return float(np.nan_to_num(apart, nan=math.inf).max(initial=0.0))


def write_batches(path: Path, batches: Sequence[Tensors]) -> None:
    """Keep `batches` in a file that is read without running anything: an archive of plain arrays."""
    arrays: dict[str, Array] = {}
    index = [[[name, _pack(array, arrays)] for name, array in batch.items()] for batch in batches]
    arrays["index"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    np.savez(path, allow_pickle=False, **arrays)


def _pack(array: Array, arrays: dict[str, Array]) -> str:
    """Add `array` to `arrays`; its key, with ``s`` in front for strings."""
    key = str(len(arrays))
    if array.dtype.kind == "O":
        items = [item if isinstance(item, bytes) else str(item).encode() for item in array.flat]
        arrays[f"s{key}"] = np.frombuffer(b"".join(items), np.uint8)
        arrays[f"l{key}"] = np.array([len(item) for item in items], np.int64).reshape(array.shape)
        return f"s{key}"
    arrays[f"n{key}"] = array if array.dtype.kind in "biuf" else array.astype(np.float32)
    return f"n{key}"


def read_batches(path: Path) -> list[Tensors]:
    """What `write_batches` wrote; bfloat16 comes back as float32."""
    with np.load(path, allow_pickle=False) as file:
        index = json.loads(file["index"].tobytes())
        return [{name: _unpack(key, file) for name, key in batch} for batch in index]


def _unpack(key: str, file: Any) -> Array:
    array: Array = file[key]
    if key.startswith("n"):
        return array
    text, lengths = array.tobytes(), file[f"l{key[1:]}"]
    ends = np.cumsum(lengths.reshape(-1)).tolist()
    items = np.empty(lengths.size, object)
    items[:] = [text[start:end] for start, end in zip([0, *ends][:-1], ends, strict=True)]
    return items.reshape(lengths.shape)
