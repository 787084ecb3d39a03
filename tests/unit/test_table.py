"""The plans in use for a signature: which cell runs a batch, in which pieces, and what is checked before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.errors import InvalidArgument
from service.runtime.base import PlanUnavailable, Run
from service.runtime.drawing import Drawer
from service.runtime.parity import STRICT
from service.runtime.records import Chosen, SignatureRecord
from service.runtime.table import Cell, Table, build_table, check_table, own_table, quick_record
from service.tensors import Array, DataType, Tensors
from tests.signatures import one
from tests.unit.plan_fakes import BATCHED, OPEN, FakePlan, Machine


class Fixed(FakePlan):
    """A plan that takes exactly the rows that it was prepared for."""

    pads = True

    def prepare(self, rows: int) -> Run:
        prepared = super().prepare(rows)

        def run(inputs: Tensors) -> Tensors:
            assert len(inputs["x"]) == rows, f"compiled for {rows} rows, got {len(inputs['x'])}"
            return prepared(inputs)

        return run


def record(cells: dict[int, tuple[str, int]], **more: Any) -> SignatureRecord:
    return SignatureRecord({rows: Chosen(plan, piece, 0.01) for rows, (plan, piece) in cells.items()}, **more)


def x(rows: int) -> Tensors:
    return {"x": np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)}


@pytest.fixture
def own() -> FakePlan:
    return FakePlan(Machine(), "signature")


@pytest.fixture
def fixed() -> Fixed:
    return Fixed(Machine(), "fixed")


@pytest.mark.parametrize(
    ("piece_rows", "pads", "rows", "given"),
    [(4, True, 3, 4), (4, True, 4, 4), (4, True, 5, 8), (1, True, 7, 7), (4, False, 3, 3), (4, False, 9, 9)],
)
def test_only_plans_with_fixed_sizes_are_padded(
    own: FakePlan, piece_rows: int, pads: bool, rows: int, given: int
) -> None:
    """To whole pieces, as few as it takes."""
    assert Cell(own.run, piece_rows, pads).given_rows(rows) == given


@pytest.mark.parametrize(
    ("piece_rows", "rows", "pieces"), [(1, 3, [1, 1, 1]), (2, 5, [2, 2, 1]), (4, 4, [4]), (4, 2, [2])]
)
def test_a_batch_is_run_in_pieces_and_joined(own: FakePlan, piece_rows: int, rows: int, pieces: list[int]) -> None:
    """Rows stay in order; the last piece has what is left."""
    outputs = Cell(own.run, piece_rows, pads=False).run(x(rows), rows)
    np.testing.assert_array_equal(outputs["y"], 2 * x(rows)["x"])
    assert [len(batch["x"]) for batch in own.batches] == pieces


@pytest.mark.parametrize(("piece_rows", "rows", "pieces"), [(4, 3, 1), (2, 5, 3), (2, 4, 2), (1, 1, 1)])
def test_a_batch_that_was_assembled_for_other_plans_is_padded(
    fixed: Fixed, piece_rows: int, rows: int, pieces: int
) -> None:
    """Plans may come into use between assembling a batch and running it: it is answered all the same, with its rows."""
    outputs = Cell(fixed.prepare(piece_rows), piece_rows, pads=True).run(x(rows), rows)
    np.testing.assert_array_equal(outputs["y"], 2 * x(rows)["x"])
    assert len(fixed.batches) == pieces


def test_the_smallest_bucket_that_holds_the_rows_is_run(own: FakePlan) -> None:
    """More rows than any bucket has go to the largest one, in pieces."""
    cells = {rows: Cell(own.run, rows, pads=False) for rows in (1, 4, 8)}
    table = Table(record({}), cells)
    assert [table.cell(rows, beside_others=False).piece_rows for rows in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, 8]


def test_batches_beside_others_have_cells_of_their_own(own: FakePlan, fixed: Fixed) -> None:
    """If there are such; the first batch has the machine's whole plan."""
    alone, shared = Cell(own.run, 4, pads=False), Cell(fixed.prepare(4), 4, pads=True)
    table = Table(record({}), {4: alone}, {4: shared})
    assert table.cell(4, beside_others=False) is alone
    assert table.cell(4, beside_others=True) is shared
    assert Table(record({}), {4: alone}).cell(4, beside_others=True) is alone


def test_a_table_is_built_of_what_was_chosen(own: FakePlan, fixed: Fixed) -> None:
    """Each plan is built once and prepared for its rows; the signature plan is there already, and not closed."""
    built: list[str] = []

    def build(name: str) -> FakePlan:
        built.append(name)
        return fixed

    chosen = record({1: ("fixed", 1), 4: ("fixed", 1), 8: ("fixed", 8), 16: ("signature", 16)})
    table = build_table(chosen, own.run, build, "signature")
    assert (built, fixed.prepared) == (["fixed"], [1, 8])
    assert {rows: (cell.piece_rows, cell.pads) for rows, cell in table.cells.items()} == {
        1: (1, True), 4: (1, True), 8: (8, True), 16: (16, False),
    }  # fmt: skip
    assert (table.record, table.shared) == (chosen, {})
    table.close()
    assert (fixed.closed, own.closed) == (1, 0)


def test_streams_have_their_plan_in_every_bucket(own: FakePlan, fixed: Fixed) -> None:
    """What runs beside others is prepared for those up to the best one; larger batches are cut."""
    cells = {rows: ("signature", rows) for rows in (1, 4, 8, 16)}
    table = build_table(record(cells, streams=2, shared="fixed", best_rows=4), own.run, lambda name: fixed, "signature")
    assert {rows: cell.piece_rows for rows, cell in table.shared.items()} == {1: 1, 4: 4, 8: 4, 16: 4}
    assert fixed.prepared == [1, 4]


def test_a_plan_that_cannot_be_had_any_more_closes_the_others(own: FakePlan, fixed: Fixed) -> None:
    """Nothing is left of a table that cannot be built."""

    def build(name: str) -> FakePlan:
        if name == "gone":
            raise PlanUnavailable("no")
        return fixed

    with pytest.raises(PlanUnavailable):
        build_table(record({1: ("fixed", 1), 2: ("gone", 2)}), own.run, build, "signature")
    assert fixed.closed == 1
    fixed.unavailable_from = 2
    with pytest.raises(PlanUnavailable):
        build_table(record({1: ("fixed", 1), 2: ("fixed", 2)}), own.run, build, "signature")
    assert fixed.closed == 2


@pytest.mark.parametrize("pads", [False, True])
def test_before_planning_the_signature_plan_runs_all(own: FakePlan, pads: bool) -> None:
    """With one bucket, where answers must not depend on company, batches are padded to it."""
    table = own_table(quick_record(BATCHED, {8: 0.1}, "signature"), own.run, pads=pads)
    assert table.cell(3, beside_others=False).given_rows(3) == (8 if pads else 3)
    table.close()
    assert not own.closed


def test_a_first_estimate_bounds_no_batch() -> None:
    """Until more is known the largest bucket is best; a signature without rows has one row."""
    quick = quick_record(BATCHED, {1: 0.1, 8: 0.2}, "signature")
    assert (quick.names, quick.best_rows) == ({1: "signature", 8: "signature"}, 8)
    assert quick_record(one(DataType.FP32, (2,)), {1: 0.1}, "signature").best_rows == 1


def checked(table: Table, own: Run | None, signature: Any = BATCHED) -> str:
    return check_table(table, Drawer(signature), STRICT, own)


def test_every_cell_is_compared_before_it_is_used(own: FakePlan, fixed: Fixed) -> None:
    """With the signature plan, where that is there; a cell that differs now is told, with its bucket."""
    table = build_table(record({1: ("fixed", 1), 4: ("fixed", 4)}), own.run, lambda name: fixed, "signature")
    assert checked(table, own.run) == ""
    assert [len(batch["x"]) for batch in fixed.batches] == [1, 4]
    fixed.answer = lambda x: x + x + (len(x) == 4)
    assert checked(table, own.run) == "at 4 rows: output 'y' differs by up to 1"
    assert checked(table, None) == ""


def test_cells_for_streams_are_compared_too(own: FakePlan, fixed: Fixed) -> None:
    """They run only when it is busy, which is no time to find out."""
    chosen = record({1: ("signature", 1)}, streams=2, shared="fixed", best_rows=1)
    table = build_table(chosen, own.run, lambda name: fixed, "signature")
    fixed.answer = lambda x: x
    assert checked(table, own.run).startswith("at 1 rows: output 'y' differs by up to ")


def test_a_cell_that_fails_is_told(own: FakePlan, fixed: Fixed) -> None:
    """What is refused or raised is the reason not to use the table."""

    def refuse(x: Array) -> Array:
        raise InvalidArgument("not today")

    fixed.answer = refuse
    table = build_table(record({1: ("fixed", 1)}), own.run, lambda name: fixed, "signature")
    assert checked(table, own.run) == "not today"
    assert checked(table, None) == "not today"


def test_a_model_that_nothing_suits_is_not_compared(own: FakePlan) -> None:
    """It was planned without comparison, too."""

    def refuse(x: Array) -> Array:
        raise InvalidArgument("a multiple of 7, please")

    own.answer = refuse
    assert checked(own_table(record({1: ("signature", 1)}), own.run, pads=False), own.run, OPEN) == ""


def test_integers_are_drawn_from_the_ranges_of_the_record(own: FakePlan) -> None:
    """Plans are not asked what only the signature plan may answer."""
    ids = one(DataType.INT32, (None, 3))
    table = own_table(record({4: ("signature", 4)}, ranges={"x": (0, 500)}), own.run, pads=False)
    assert checked(table, own.run, ids) == ""
    assert 1 < own.batches[-1]["x"].max() <= 500
