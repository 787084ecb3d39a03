"""The plans in use for one signature on one device: what runs a batch of so many rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from service.errors import KilnError
from service.runtime.base import Plan, PlanUnavailable, Run
from service.runtime.drawing import Drawer
from service.runtime.parity import Tolerance, disagreement
from service.runtime.planner import first_inputs
from service.runtime.records import Chosen, SignatureRecord
from service.tensors import Signature, Tensors, concatenate, split

_LONG_S = 0.05


@dataclass(frozen=True)
class Cell:
    """What runs the batches of a bucket, `piece_rows` at a time; with `pads` each piece has to be whole."""

    run_piece: Run
    piece_rows: int
    pads: bool

    def given_rows(self, rows: int) -> int:
        """Rows to hand over for `rows` rows; the surplus is padding."""
        return -(-rows // self.piece_rows) * self.piece_rows if self.pads else rows

    def run(self, inputs: Tensors, rows: int) -> Tensors:
        """Outputs ``(rows, …)`` of `rows` rows, padding included.

        A batch that was assembled for other plans, just before these came into use, is padded here.
        """
        given = self.given_rows(rows)
        if given != rows:
            return split(self.run(concatenate([inputs], given), given), [rows])[0]
        if rows <= self.piece_rows:
            return self.run_piece(inputs)
        full, rest = divmod(rows, self.piece_rows)
        pieces = split(inputs, [self.piece_rows] * full + [rest] * bool(rest))
        return concatenate([self.run_piece(piece) for piece in pieces])


@dataclass
class Table:
    """Cells by bucket; `shared` has those for batches that run beside others."""

    record: SignatureRecord
    cells: dict[int, Cell]
    shared: dict[int, Cell] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)

    def cell(self, rows: int, *, beside_others: bool) -> Cell:
        """The cell for `rows` rows; the largest one's pieces where no bucket holds them."""
        cells = self.shared if beside_others and self.shared else self.cells
        for bucket, cell in cells.items():
            if bucket >= rows:
                return cell
        return cell

    def close(self) -> None:
        """Close the plans; the signature's own is none of these."""
        for plan in self.plans:
            plan.close()


def own_table(record: SignatureRecord, run: Run, *, pads: bool) -> Table:
    """The table before anything is planned: all by the signature plan."""
    return Table(record, {rows: Cell(run, rows, pads) for rows in sorted(record.chosen)})


def build_table(
    record: SignatureRecord, own: Run, build: Callable[[str], Plan], own_name: str, *, pads: bool = False
) -> Table:
    """Prepare what `record` chose; `own` runs the signature plan, called `own_name`, and `build` makes the others.

    Raises:
        PlanUnavailable: one of them cannot be had any more.
    """
    plans: dict[str, Plan] = {}
    runs: dict[tuple[str, int], Run] = {}

    def cell(name: str, rows: int) -> Cell:
        if name == own_name:
            return Cell(own, rows, pads)
        if name not in plans:
            plans[name] = build(name)
        if (name, rows) not in runs:
            runs[name, rows] = plans[name].prepare(rows)
        return Cell(runs[name, rows], rows, pads or plans[name].pads)

    try:
        cells = {rows: cell(chosen.plan, chosen.piece_rows) for rows, chosen in sorted(record.chosen.items())}
        shared = {rows: cell(record.shared, piece_rows) for rows, piece_rows in sorted(record.shared_pieces.items())}
    except PlanUnavailable:
        for plan in plans.values():
            plan.close()
        raise
    return Table(record, cells, shared, list(plans.values()))


def check_table(table: Table, drawer: Drawer, tolerance: Tolerance, own: Run | None) -> str:
    """Run every cell once, and compare it with `own` where that is given; what is wrong, or ``""``.

    Of the long ones only the first: requests are being answered beside this.
    """
    first = next(iter(table.cells.values()))
    drawer.ranges = table.record.ranges
    try:
        if not first_inputs(drawer, own or first.run_piece, (first.piece_rows,)):
            return ""
        for cells in (table.cells, table.shared):
            for rows, cell in cells.items():
                if rows > next(iter(cells)) and table.record.chosen[rows].seconds > _LONG_S:
                    continue
                inputs = drawer.batch(cell.piece_rows)
                outputs = cell.run_piece(inputs)
                problem = disagreement(own(inputs), outputs, tolerance) if own is not None else ""
                if problem:
                    return f"at {rows} rows: {problem}"
    except KilnError as error:
        return str(error)
    return ""


def quick_record(signature: Signature, seconds: Mapping[int, float], plan: str) -> SignatureRecord:
    """A record for a signature that has not been planned: `seconds` by bucket, as far as they are known."""
    chosen = {rows: Chosen(plan, rows, taken) for rows, taken in seconds.items()}
    return SignatureRecord(chosen, best_rows=max(chosen) if signature.batched else 1)
