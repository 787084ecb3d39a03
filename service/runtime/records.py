"""What planning found out about a model's plans."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.tensors import Signature

SIGNATURE_PLAN = "signature"


@dataclass(frozen=True)
class Difference:
    """The largest differences seen: absolute, and relative to the wanted value."""

    absolute: float = 0.0
    relative: float = 0.0

    def __or__(self, other: Difference) -> Difference:
        return Difference(max(self.absolute, other.absolute), max(self.relative, other.relative))


@dataclass(frozen=True)
class Measured:
    """One plan at one number of rows; `compile_s` and `memory_bytes` are what preparing it took."""

    plan: str
    rows: int
    seconds: float
    cpu_s: float
    difference: Difference
    compile_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Chosen:
    """How batches of a bucket are run: by `plan`, `piece_rows` at a time; `seconds` is what that takes."""

    plan: str
    piece_rows: int
    seconds: float
    cpu_s: float = 0.0


@dataclass(frozen=True)
class SignatureRecord:
    """All that is known about one signature's plans.

    `chosen` is by bucket. `best_rows` is the bucket with the most rows a second; with `streams` over 1 so many
    batches run at once, by the plan `shared` where others run already, which gives `rows_per_s`. `ranges` are the
    integers ``[lowest, highest]`` of an input on which all plans were seen to agree; others are left to the
    signature plan. `left_out` has a reason for each plan that is not used at all or from some bucket on.
    `invariance` is the largest difference between rows alone and the same rows in any bucket. A signature that is the
    same function as another runs by the plans of that, its `twin`. `cold` is, by bucket, the fastest way that needs no
    TensorFlow, with which a process can start while that is still being imported; empty if there is none. `same_labels`
    is, by plan, the share of rows whose largest output stands at the same place, where outputs are rows of classes.
    """

    chosen: dict[int, Chosen]
    measured: tuple[Measured, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    best_rows: int = 0
    streams: int = 1
    shared: str = ""
    rows_per_s: float = 0.0
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    invariance: Difference = field(default_factory=Difference)
    note: str = ""
    twin: str = ""
    same_labels: dict[str, float] = field(default_factory=dict)
    cold: dict[int, Chosen] = field(default_factory=dict)

    @property
    def names(self) -> dict[int, str]:
        """The plan of each bucket, ``openvino-1`` or, in pieces, ``openvino-1 (8 × 1)``."""
        return {rows: _name(rows, cell) for rows, cell in self.chosen.items()}

    @property
    def needed(self) -> set[tuple[str, int]]:
        """Plans and the numbers of rows that they are prepared for."""
        cells = {(cell.plan, cell.piece_rows) for cell in self.chosen.values()}
        return cells | {(self.shared, rows) for rows in self.shared_pieces.values()}

    @property
    def shared_pieces(self) -> dict[int, int]:
        """By bucket, how many rows of a batch are run at once beside another: `best_rows`, where it has more."""
        return {rows: min(rows, self.best_rows) for rows in self.chosen} if self.streams > 1 else {}


@dataclass(frozen=True)
class ModelRecord:
    """What is known about a version: where it ran, its signatures, and the plans of each."""

    device: str
    signatures: dict[str, Signature]
    left_out: dict[str, str]
    plans: dict[str, SignatureRecord]


def _name(rows: int, cell: Chosen) -> str:
    return cell.plan if cell.piece_rows == rows else f"{cell.plan} ({-(-rows // cell.piece_rows)} × {cell.piece_rows})"
