"""Buckets of batch sizes, and the line about signatures in the log."""

from __future__ import annotations

import pytest

from service.runtime.base import bucket_for, buckets_up_to, signatures_line
from service.tensors import DataType, Signature, TensorSpec


@pytest.mark.parametrize(
    ("max_rows", "buckets"),
    [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (9, (1, 2, 4, 8, 9)), (100, (1, 2, 4, 8, 16, 32, 64, 100))],
)
def test_buckets_are_powers_of_two_and_the_largest_batch(max_rows: int, buckets: tuple[int, ...]) -> None:
    """Every batch size up to the limit has a bucket at most twice as large."""
    assert buckets_up_to(max_rows) == buckets


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6), (7, 7), (100, 100)])
def test_rows_go_to_the_smallest_bucket_that_holds_them(rows: int, bucket: int) -> None:
    """More rows than the largest bucket are left as they are."""
    assert bucket_for((1, 2, 4, 6), rows) == bucket


def test_signatures_are_told_once() -> None:
    """Names of signatures that look the same share one text."""
    x, y = TensorSpec("x", DataType.FP32, (None, 3)), TensorSpec("y", DataType.INT64, ())
    signatures = {name: Signature(name, (x,), (y,)) for name in ("serve", "a")} | {
        "other": Signature("other", (y,), (y,))
    }
    assert signatures_line(signatures) == "a/serve: x FP32 [-1, 3] → y INT64 []; other: y INT64 [] → y INT64 []"
    assert signatures_line({}) == ""
