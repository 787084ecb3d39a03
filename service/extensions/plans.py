"""What is known of a version's execution plans, as JSON has it and as a table for people, pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from service.runtime.records import SIGNATURE_PLAN, Difference, Measured, SignatureRecord

_HEADS = ("plan", "rows", "µs", "rows/s", "largest difference", "compile s", "memory MB", "chosen")


def plans_of(plans: Mapping[str, SignatureRecord]) -> dict[str, Any]:
    """Of each signature: what was chosen for each bucket, what was measured, what was left out and why.

    Times are in µs; those that are not known are null.
    """
    return {name: _signature(record) for name, record in plans.items()}


def plans_table(record: SignatureRecord) -> str:
    """Lines for a terminal: one for each plan and bucket, the chosen ones marked, and what else is to be said."""
    measured = record.measured or tuple(_unmeasured(record))
    rows = [_HEADS, *(_line(m, record) for m in sorted(measured, key=lambda m: (m.rows, m.seconds)))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    lines = ["  ".join(_cell(i, row[i], widths[i]) for i in range(len(row))).rstrip() for row in rows]
    return "\n".join([*lines, *_notes(record)])


def _signature(record: SignatureRecord) -> dict[str, Any]:
    return {
        "chosen": {
            str(rows): {"plan": record.names[rows], "us": _us(cell.seconds)} for rows, cell in record.chosen.items()
        },
        "measured": [
            {
                "plan": m.plan,
                "rows": m.rows,
                "us": _us(m.seconds),
                "cpu_us": _us(m.cpu_s),
                "largest_difference": {"absolute": m.difference.absolute, "relative": _number(m.difference.relative)},
                "compile_s": round(m.compile_s, 3),
                "memory_bytes": m.memory_bytes,
                "chosen": _is_chosen(m, record),
            }
            for m in record.measured
        ],
        "left_out": record.left_out,
        "same_labels": record.same_labels,
        "best_rows": record.best_rows,
        "streams": record.streams,
        "shared": record.shared,
        "ranges": {name: list(ends) for name, ends in record.ranges.items()},
        "batch_difference": {"absolute": record.invariance.absolute, "relative": _number(record.invariance.relative)},
        "note": record.note,
    }


def _unmeasured(record: SignatureRecord) -> Iterable[Measured]:
    for rows, cell in record.chosen.items():
        yield Measured(cell.plan, rows, cell.seconds, math.nan, Difference(), 0.0, 0)


def _line(m: Measured, record: SignatureRecord) -> tuple[str, ...]:
    known = math.isfinite(m.seconds)
    return (
        m.plan,
        str(m.rows),
        f"{m.seconds * 1e6:,.0f}" if known else "?",
        f"{m.rows / m.seconds:,.0f}" if known else "?",
        f"{m.difference.absolute:.1e}" if m.plan != SIGNATURE_PLAN else "",
        f"{m.compile_s:.2f}",
        f"{m.memory_bytes / 1e6:.0f}",
        _mark(m, record),
    )


def _mark(m: Measured, record: SignatureRecord) -> str:
    cell = record.chosen.get(m.rows)
    if cell is None:
        return ""
    if cell.plan == m.plan:
        return "*" if cell.piece_rows == m.rows else f"* in pieces of {cell.piece_rows}"
    return ""


def _is_chosen(m: Measured, record: SignatureRecord) -> bool:
    cell = record.chosen.get(m.rows)
    return cell is not None and (cell.plan, cell.piece_rows) == (m.plan, m.rows)


def _notes(record: SignatureRecord) -> list[str]:
    lines = [f"{plan}: {reason}" for plan, reason in record.left_out.items()]
    if record.note:
        lines.append(f"note: {record.note}")
    lines += [
        f"{plan}: the same label in {share:.1%} of rows" for plan, share in record.same_labels.items() if share < 1
    ]
    if record.best_rows:
        lines.append(f"batches of {record.best_rows} rows give the most rows/s")
    if record.streams > 1:
        rate = f"{record.rows_per_s:,.0f} rows/s"
        lines.append(f"{record.streams} batches at once, those beside another by {record.shared}: {rate}")
    for name, (lowest, highest) in record.ranges.items():
        lines.append(f"{name}: integers beyond {lowest} to {highest} are left to the signature plan")
    lines.append(
        f"rows alone against the same rows in batches: at most {record.invariance.absolute:.1e} apart, "
        f"relative {record.invariance.relative:.1e}"
    )
    return lines


def _cell(index: int, text: str, width: int) -> str:
    return text.ljust(width) if index in (0, len(_HEADS) - 1) else text.rjust(width)


def _us(seconds: float) -> float | None:
    return round(seconds * 1e6, 1) if math.isfinite(seconds) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
