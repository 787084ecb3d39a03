"""Whether two plans answer the same, and by how much they differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.runtime.records import Difference
from service.tensors import Array, Tensors


@dataclass(frozen=True)
class Tolerance:
    """How far floating outputs may differ: ``|have - want| ≤ absolute + relative × |want|``."""

    relative: float = 1e-4
    absolute: float = 1e-5


STRICT = Tolerance()


def disagreement(expected: Tensors, got: Tensors, tolerance: Tolerance = STRICT) -> str:
    """Where two plans' outputs differ by more than `tolerance`; ``""`` if they agree.

    Integers, booleans and strings must be equal; NaN equals NaN.
    """
    for name, want in expected.items():
        have = got.get(name)
        if have is None or have.shape != want.shape or have.dtype != want.dtype:
            return (
                f"output {name!r} is {getattr(have, 'dtype', None)} {getattr(have, 'shape', None)}, "
                f"not {want.dtype} {want.shape}"
            )
        if want.dtype.kind in "biuO":
            if not np.array_equal(want, have):
                return f"output {name!r} differs"
        elif not np.allclose(_wide(have), _wide(want), tolerance.relative, tolerance.absolute, equal_nan=True):
            return f"output {name!r} differs by up to {_difference(want, have).absolute:.3g}"
    return ""


def difference(expected: Tensors, got: Tensors) -> Difference:
    """The largest differences of floating outputs of the same shapes; others do not count."""
    largest = Difference()
    for name, want in expected.items():
        if want.dtype.kind not in "biuO":
            largest |= _difference(want, got[name])
    return largest


def same_labels(expected: Tensors, got: Tensors) -> tuple[int, int]:
    """Rows whose largest value is at the same place, of all rows: of floating outputs ``(rows, classes)``."""
    same = total = 0
    for name, want in expected.items():
        if want.dtype.kind not in "biuO" and want.ndim == 2 and want.shape[1] > 1:
            same += int((_wide(want).argmax(1) == _wide(got[name]).argmax(1)).sum())
            total += len(want)
    return same, total


def _difference(want: Array, have: Array) -> Difference:
    """Infinite where only one of the two is NaN or infinite."""
    want, have = _wide(want), _wide(have)
    if not want.size:
        return Difference()
    same = (want == have) | (np.isnan(want) & np.isnan(have))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        absolute = np.where(same, 0.0, np.abs(have - want))
        relative = np.where(same, 0.0, absolute / np.abs(want))
    return Difference(_largest(absolute), _largest(relative))


def _largest(values: Array) -> float:
    return float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max())


def _wide(array: Array) -> Array:
    return array.astype(np.float64)
