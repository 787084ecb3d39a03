"""When two plans' outputs agree, and by how much they differ."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from service.runtime.parity import Tolerance, difference, disagreement, same_labels
from service.runtime.records import Difference
from service.tensors import Tensors

NAN, INF = float("nan"), float("inf")


def floats(*values: float, dtype: Any = np.float32) -> Tensors:
    return {"y": np.array(values, dtype)}


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (floats(1.0, -2.0), floats(1.00009, -2.0)),
        (floats(0.0), floats(9e-6)),
        (floats(NAN, INF, -INF), floats(NAN, INF, -INF)),
        (floats(1.0, dtype=np.float16), floats(1.0, dtype=np.float16)),
        (floats(1.0, dtype=ml_dtypes.bfloat16), floats(1.0, dtype=ml_dtypes.bfloat16)),
        (floats(1.0, dtype=np.float64), floats(1.0 + 9e-5, dtype=np.float64)),
        ({"y": np.array([1, 2])}, {"y": np.array([1, 2])}),
        ({"y": np.array([b"a"], object)}, {"y": np.array([b"a"], object)}),
        ({"y": np.array([True])}, {"y": np.array([True])}),
        ({}, {}),
        ({"y": np.array([1])}, {"y": np.array([1]), "more": np.array([2])}),
        (floats(), floats()),
    ],
)
def test_outputs_agree_within_the_tolerance(expected: Tensors, got: Tensors) -> None:
    """Floats may differ by 1e-4 of their size and 1e-5; NaN equals NaN; all else must be the same."""
    assert disagreement(expected, got) == ""


@pytest.mark.parametrize(
    ("expected", "got", "text"),
    [
        (floats(1.0, 2.0), floats(1.0, 2.5), "output 'y' differs by up to 0.5"),
        (floats(0.0, 1.0), floats(2e-5, 1.0), "output 'y' differs by up to 2e-05"),
        (floats(1.0, dtype=np.float64), floats(1.001, dtype=np.float64), "output 'y' differs by up to 0.001"),
        (floats(1.0, dtype=np.float16), floats(1.5, dtype=np.float16), "output 'y' differs by up to 0.5"),
        (
            floats(1.0, dtype=ml_dtypes.bfloat16),
            floats(2.0, dtype=ml_dtypes.bfloat16),
            "output 'y' differs by up to 1",
        ),
        (floats(NAN, 1.0), floats(0.0, 1.0), "output 'y' differs by up to inf"),
        (floats(NAN, 1.0), floats(NAN, 2.0), "output 'y' differs by up to 1"),
        (floats(INF, INF), floats(INF, -INF), "output 'y' differs by up to inf"),
        (floats(INF, 1.0), floats(INF, 3.0), "output 'y' differs by up to 2"),
        ({"y": np.array([1, 2])}, {"y": np.array([1, 3])}, "output 'y' differs"),
        ({"y": np.array([1], np.uint8)}, {"y": np.array([2], np.uint8)}, "output 'y' differs"),
        ({"y": np.array([True])}, {"y": np.array([False])}, "output 'y' differs"),
        ({"y": np.array([b"a"], object)}, {"y": np.array([b"b"], object)}, "output 'y' differs"),
        (floats(1.0), {"z": np.array([1.0])}, "output 'y' is None None, not float32 (1,)"),
        (floats(1.0), floats(1.0, 1.0), "output 'y' is float32 (2,), not float32 (1,)"),
        (floats(1.0), floats(1.0, dtype=np.float64), "output 'y' is float64 (1,), not float32 (1,)"),
    ],
)
def test_a_disagreement_is_told(expected: Tensors, got: Tensors, text: str) -> None:
    """The first output that differs is named, with the largest difference where that is a number."""
    assert disagreement(expected, got) == text


def test_a_tolerance_is_relative_and_absolute() -> None:
    """What a config allows is allowed, to the edge."""
    loose = Tolerance(0.5, 0.0)
    assert disagreement(floats(2.0), floats(3.0), loose) == ""
    assert disagreement(floats(2.0), floats(3.1), loose) == "output 'y' differs by up to 1.1"
    assert disagreement(floats(0.0), floats(0.5), Tolerance(0.0, 0.5)) == ""


def test_the_largest_difference_is_over_all_outputs() -> None:
    """Absolute and relative may come from different elements; integers and strings do not count."""
    want = {
        "a": np.array([100.0, 1.0], np.float32),
        "b": np.array([[2.0]]),
        "n": np.array([1]),
        "s": np.array([b""], object),
    }
    have = {
        "a": np.array([101.0, 1.5], np.float32),
        "b": np.array([[2.0]]),
        "n": np.array([9]),
        "s": np.array([b"x"], object),
    }
    assert difference(want, have) == Difference(1.0, 0.5)
    assert difference(floats(0.0), floats(1.0)) == Difference(1.0, INF)
    assert difference(floats(NAN, INF), floats(NAN, INF)) == Difference()
    assert Difference(1.0, 2.0) | Difference(0.5, 3.0) == Difference(1.0, 3.0)


def test_labels_agree_where_the_largest_value_is_at_the_same_place() -> None:
    """Rows of classes are counted; what has no classes is not."""
    want, have = np.array([[0.1, 0.9], [0.6, 0.4], [0.2, 0.8]]), np.array([[0.2, 0.8], [0.4, 0.6], [0.1, 0.9]])
    assert same_labels({"y": want}, {"y": have}) == (2, 3)
    others: Tensors = {"scalar": np.array([[1.0]]), "flat": np.array([1.0, 2.0]), "ids": np.array([[1, 2]])}
    assert same_labels(others, others) == (0, 0)
