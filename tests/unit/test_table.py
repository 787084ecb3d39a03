"""The cells of a table of plans: what is run where a batch is not of the size that a plan takes."""

from __future__ import annotations

import numpy as np
import pytest

from service.runtime.table import Cell
from service.tensors import Tensors


def cell(piece_rows: int, *, pads: bool) -> tuple[Cell, list[int]]:
    """A cell whose plan doubles, and refuses other sizes if it pads; and the rows of each run."""
    seen: list[int] = []

    def run(inputs: Tensors) -> Tensors:
        rows = len(inputs["x"])
        assert not pads or rows == piece_rows
        seen.append(rows)
        return {"y": 2 * inputs["x"]}

    return Cell(run, piece_rows, pads), seen


@pytest.mark.parametrize(
    ("rows", "pads", "runs"),
    [
        (8, True, [8]),
        (5, True, [8]),
        (16, True, [8, 8]),
        (19, True, [8, 8, 8]),
        (5, False, [5]),
        (19, False, [8, 8, 3]),
    ],
)
def test_a_batch_of_any_size_is_answered(rows: int, pads: bool, runs: list[int]) -> None:
    """New plans may be put in use between a batch's padding and its run: it is padded anew, and cut again."""
    made, seen = cell(8, pads=pads)
    x = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    np.testing.assert_array_equal(made.run({"x": x}, rows)["y"], 2 * x)
    assert seen == runs
