"""Measure the plans that can run a signature here, check that they agree, choose for each bucket."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.errors import KilnError
from service.runtime.base import Plan, PlanUnavailable, Run
from service.runtime.drawing import Drawer
from service.runtime.measuring import UNKNOWN, Cost, measure, rows_per_s
from service.runtime.memory import resident_bytes
from service.runtime.parity import STRICT, Tolerance, difference, disagreement, same_labels
from service.runtime.ranges import proved_ranges
from service.runtime.records import SIGNATURE_PLAN, Chosen, Difference, Measured, SignatureRecord
from service.tensors import Signature, Tensors

_log = logging.getLogger("kiln.planner")
_SECOND_ROWS = 8
_LEFT_BEHIND = 3.0
"""A plan that is so many times slower than the fastest in the first two buckets is not tried in the others."""
_ALIKE = 0.95
"""Plans within a twentieth count as equally fast: the one that takes less CPU time is chosen."""
_WORTH_A_CHANGE = 0.97
_WORTH_PIECES = 0.95
_PIECE_S = 60e-6
"""What cutting and joining costs a piece."""
_WORTH_FUSING = 0.98
_SHORT_S = 300e-6
_SPINNING = 2.0
"""A short plan whose threads take so many times the CPU time that their work can have been is not chosen."""
_MIN_STREAM_S = 1e-3
_WORTH_STREAMS = 1.1
_WORTH_OWN_CORES = 0.97
"""Streams on cores of their own are taken at the same rate already: what else runs on a core, the server first of
all, holds up one of them, and of a batch on all cores the whole."""
_FOR_STREAMS = 0.1
"""Share of the time for planning that streams have for themselves: where batches are long, plans take all the rest."""
_INVARIANCE_ROWS = 8
REFUSED = "refused"
"""How the reason begins why a plan is left out whose answers were wrong."""


@dataclass(frozen=True)
class Candidate:
    """A plan that may be tried; `tolerance` is what its answers are held to.

    Tried in streams, each batch of one `on_own_cores` keeps to a part of the cores that no other beside it uses.
    """

    name: str
    build: Callable[[], Plan]
    tolerance: Tolerance = STRICT
    on_own_cores: bool = False


class Budget:
    """Time for planning: what the clock says, or what this process got of the CPU where that is less."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._wall, self._cpu = time.monotonic(), time.process_time()

    @property
    def is_spent(self) -> bool:
        return min(time.monotonic() - self._wall, time.process_time() - self._cpu) >= self.seconds


@dataclass(frozen=True)
class PlanOptions:
    """How a signature is planned.

    With `forced` a candidate is taken wherever it agrees, though it be slower. `cores` is how many
    there are; `streams` names the candidates for so many batches at once, and `is_cold` tells which plans need no
    TensorFlow. With `steady` plans whose
    answers depend on a row's place in the batch are refused.
    """

    buckets: tuple[int, ...]
    budget: Budget
    forced: bool = False
    steady: bool = False
    cores: int = 1
    streams: Callable[[int], Sequence[Candidate]] = lambda streams: ()  # noqa: ARG005
    report: Callable[[str, int], None] = lambda plan, rows: None  # noqa: ARG005
    is_cold: Callable[[str], bool] = lambda plan: False  # noqa: ARG005


@dataclass
class _Rival:
    """A plan in the survey: what was prepared of it, by rows."""

    candidate: Candidate
    plan: Plan
    runs: dict[int, Run] = field(default_factory=dict)
    is_behind: bool = False


class _Failed(Exception):
    """A rival failed while it was timed."""

    def __init__(self, rival: _Rival, error: KilnError) -> None:
        super().__init__(str(error))
        self.rival = rival


class Survey:
    """One signature's plans, tried one bucket after another."""

    def __init__(
        self, signature: Signature, baseline: Plan, options: PlanOptions, *, sample: Tensors | None = None
    ) -> None:
        """`baseline` is the signature's own plan; `sample` has inputs that were seen, ``(rows, …)``."""
        self.signature = signature
        self.options = options
        self._baseline = baseline.prepare(1)
        self._drawer = Drawer(signature, sample)
        self._budget = options.budget
        self._rivals: list[_Rival] = []
        self._ranges: dict[str, tuple[int, int]] = {}
        self._expected: dict[int, Tensors] = {}
        self._measured: list[Measured] = []
        self._left_out: dict[str, str] = {}
        self._agreed: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        """By plan, of each run compared: rows with the same label, and rows."""

    def run(self, candidates: Sequence[Candidate], *, repeats: bool = True) -> SignatureRecord:
        """Try them all; every plan that was built is closed at the end.

        Without `repeats` the model is known to answer differently each time, and only measured.

        Raises:
            KilnError: the baseline fails on what its signature declares.
        """
        if not self._draw():
            return unplanned(self._buckets, "nothing drawn for its inputs suits the model")
        note = "" if repeats else "random or stateful operations"
        if not note and (changed := self._changes()):
            note = f"its own answers differ between runs ({changed})"
        if note:
            _log.info("served by the signature plan only: %s", note)
            candidates = ()
        try:
            if candidates:
                self._ranges = proved_ranges(self.signature, self._baseline, self._drawer.batch(1))
            self._drawer.ranges = self._ranges
            self._expected.clear()
            self._build(candidates)
            for number, rows in enumerate(_order(self._buckets)):
                self._try(rows, edges=number < 2)
                if number == 1:
                    self._leave_behind()
            return self._record(note)
        finally:
            for rival in self._rivals:
                rival.plan.close()

    @property
    def _buckets(self) -> tuple[int, ...]:
        return self.options.buckets if self.signature.batched else (1,)

    def _draw(self) -> bool:
        """Find inputs that the baseline takes; False where a model is allowed to refuse all of them."""
        return first_inputs(self._drawer, self._baseline, self._buckets[:1])

    def _changes(self) -> str:
        inputs = self._drawer.batch(self._buckets[0])
        try:
            return disagreement(self._baseline(inputs), self._baseline(inputs))
        except KilnError as error:
            return str(error)

    def _build(self, candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            self.options.report(candidate.name, 0)
            try:
                self._rivals.append(_Rival(candidate, candidate.build()))
            except PlanUnavailable as error:
                self._leave_out(candidate.name, f"not available: {error}")

    def _leave_out(self, name: str, reason: str) -> None:
        _log.info("%s: %s: %s", self.signature.name, name, reason)
        self._left_out[name] = reason

    def _try(self, rows: int, *, edges: bool) -> None:
        """Prepare, compare and time every plan at `rows` rows."""
        inputs = self._drawer.batch(rows)
        expected = self._expected[rows] = self._baseline(inputs)
        seen: dict[str, tuple[Difference, float, int]] = {SIGNATURE_PLAN: (Difference(), 0.0, 0)}
        for rival in list(self._rivals):
            if rival.is_behind:
                continue
            name = rival.candidate.name
            if self._budget.is_spent:
                self._left_out.setdefault(name, f"not measured from {rows} rows on: the time for planning is spent")
                rival.is_behind = True
                continue
            found = self._prepare(rival, rows, inputs, expected, edges=edges)
            if found is not None:
                seen[name] = found
        self.options.report("", rows)
        for name, cost in self._time(rows, inputs, seen).items():
            self._measured.append(Measured(name, rows, cost.seconds, cost.cpu_s, *seen[name]))

    def _time(self, rows: int, inputs: Tensors, names: Container[str]) -> dict[str, Cost]:
        """The cost of the signature plan and of every rival in `names`; one that fails meanwhile is out."""
        while True:
            rivals = [rival for rival in self._rivals if rival.candidate.name in names]
            jobs = {SIGNATURE_PLAN: _bound(self._baseline, inputs)}
            jobs |= {rival.candidate.name: _timed(rival, rows, inputs) for rival in rivals}
            try:
                return measure(jobs)
            except _Failed as failure:
                self._dismiss(failure.rival, f"{REFUSED} at {rows} rows: {failure}")

    def _prepare(
        self, rival: _Rival, rows: int, inputs: Tensors, expected: Tensors, *, edges: bool
    ) -> tuple[Difference, float, int] | None:
        """The largest difference, seconds and bytes that it took; None if the plan is out."""
        self.options.report(rival.candidate.name, rows)
        start, resident = time.perf_counter(), resident_bytes()[0]
        try:
            run = rival.runs[rows] = rival.plan.prepare(rows)
            run(inputs)
            took = time.perf_counter() - start, max(resident_bytes()[0] - resident, 0)
            largest = self._compare(rival.candidate, run, inputs, expected)
            for kind, edge in self._edges(rows) if edges else ():
                largest |= self._compare(rival.candidate, run, edge, self._baseline(edge), f" with {kind} inputs")
        except PlanUnavailable as error:
            self._dismiss(rival, f"not available: {error}")
        except (KilnError, _Refused) as error:
            self._dismiss(rival, f"{REFUSED} at {rows} rows: {error}")
        else:
            return largest, *took
        return None

    def _compare(
        self, candidate: Candidate, run: Run, inputs: Tensors, expected: Tensors, where: str = ""
    ) -> Difference:
        largest = Difference()
        for _ in range(2):
            got = run(inputs)
            if problem := disagreement(expected, got, candidate.tolerance):
                raise _Refused(_with_labels(problem, expected, got) + where)
            largest |= difference(expected, got)
            self._agreed[candidate.name].append(same_labels(expected, got))
        if self.options.steady and not _is_steady(run, inputs, got):
            raise _Refused("its answers depend on a row's place in the batch")
        return largest

    def _edges(self, rows: int) -> Iterator[tuple[str, Tensors]]:
        """Unusual inputs that the baseline answers with numbers."""
        for kind, inputs in self._drawer.edges(rows):
            try:
                outputs = self._baseline(inputs)
            except KilnError:
                continue
            if all(o.dtype.kind in "biuO" or np.isfinite(o.astype(np.float32)).all() for o in outputs.values()):
                yield kind, inputs

    def _dismiss(self, rival: _Rival, reason: str) -> None:
        self._rivals.remove(rival)
        rival.plan.close()
        self._leave_out(rival.candidate.name, reason)
        self._measured = [m for m in self._measured if m.plan != rival.candidate.name]

    def _leave_behind(self) -> None:
        """Plans that are far behind in all buckets so far are not tried in the others."""
        fastest = {rows: min(m.seconds for m in self._measured if m.rows == rows) for rows in self._expected}
        for rival in self._rivals:
            name = rival.candidate.name
            own = [m for m in self._measured if m.plan == name]
            if own and not self.options.forced and all(m.seconds > _LEFT_BEHIND * fastest[m.rows] for m in own):
                rival.is_behind = True
                self._left_out.setdefault(name, f"not measured in all buckets: over {_LEFT_BEHIND:.0f} × slower")

    def _record(self, note: str) -> SignatureRecord:
        chosen = choose(self._measured, forced=self.options.forced, cores=self.options.cores)
        runs = {(r.candidate.name, rows): run for r in self._rivals for rows, run in r.runs.items()}
        runs |= {(SIGNATURE_PLAN, rows): self._baseline for rows in self._buckets}
        streams, shared, rate = self._streams(chosen, runs)
        return SignatureRecord(
            chosen,
            tuple(self._measured),
            self._left_out,
            best_rows(chosen),
            streams,
            shared,
            rate,
            self._ranges,
            self._invariance(chosen, runs),
            note,
            same_labels={name: share for name, seen in self._agreed.items() if (share := _share(seen)) is not None},
            cold=choose_cold(self._measured, self._buckets, self.options.is_cold),
        )

    def _streams(self, chosen: Mapping[int, Chosen], runs: Mapping[tuple[str, int], Run]) -> tuple[int, str, float]:
        """How many batches are best run at once, by which plan, and the rows/s of that."""
        rows = best_rows(chosen)
        cell = chosen[rows]
        if not self.signature.batched or cell.seconds < _MIN_STREAM_S or not self._budget.seconds:
            return 1, "", rows / cell.seconds
        inputs = self._drawer.batch(rows)
        piece = self._drawer.batch(cell.piece_rows)
        alone = rows_per_s(_bound(runs[cell.plan, cell.piece_rows], piece), cell.piece_rows, 1)
        best, budget = (1, "", alone), Budget(_FOR_STREAMS * self._budget.seconds)
        for streams in _stream_counts(self.options.cores):
            for candidate in self.options.streams(streams):
                run = None if budget.is_spent else self._prepared(candidate, rows, inputs, runs)
                if run is None:
                    continue
                found = rows_per_s(_bound(run, inputs), rows, streams)
                worth = _WORTH_OWN_CORES if candidate.on_own_cores else _WORTH_STREAMS
                if found > max(worth * alone, best[2] if best[1] else 0.0):
                    best = streams, candidate.name, found
        return best

    def _prepared(
        self, candidate: Candidate, rows: int, inputs: Tensors, runs: Mapping[tuple[str, int], Run]
    ) -> Run | None:
        """What runs `rows` rows by `candidate`, which is built for this where it was not tried before."""
        known = next((r for r in self._rivals if r.candidate.name == candidate.name), None)
        if known is not None or candidate.name in self._left_out:
            return runs.get((candidate.name, rows))
        if candidate.name == SIGNATURE_PLAN:
            return self._baseline
        self._build([candidate])
        rival = self._rivals[-1] if self._rivals else None
        if rival is None or rival.candidate is not candidate:
            return None
        found = self._prepare(rival, rows, inputs, self._expected[rows], edges=False)
        return None if found is None else rival.runs[rows]

    def _invariance(self, chosen: Mapping[int, Chosen], runs: Mapping[tuple[str, int], Run]) -> Difference:
        """How much rows alone differ from the same rows in each bucket, by the plans that were chosen."""
        if not self.signature.batched:
            return Difference()
        largest = Difference()
        smallest = min(chosen)
        alone = runs[chosen[smallest].plan, chosen[smallest].piece_rows]
        for cell in chosen.values():
            inputs = self._drawer.batch(cell.piece_rows)
            fused = runs[cell.plan, cell.piece_rows](inputs)
            for row in range(min(cell.piece_rows, _INVARIANCE_ROWS)):
                single = {name: np.repeat(array[row : row + 1], smallest, 0) for name, array in inputs.items()}
                part = {name: np.repeat(array[row : row + 1], smallest, 0) for name, array in fused.items()}
                largest |= difference(alone(single), part)
        return largest


def unplanned(buckets: Sequence[int], note: str) -> SignatureRecord:
    """That the signature plan runs all `buckets`, at unknown cost, and why."""
    return SignatureRecord({rows: Chosen(SIGNATURE_PLAN, rows, UNKNOWN.seconds) for rows in buckets}, note=note)


class _Refused(Exception):
    """A candidate's answers are not those of the baseline."""


def choose(measured: Sequence[Measured], *, forced: bool = False, cores: int = 1) -> dict[int, Chosen]:
    """The plan for each bucket that was measured, and where smaller pieces are faster, for those.

    The fastest one, or of those within a twentieth the one that takes the least CPU time; the
    signature plan unless another is faster by 3 %. A short plan whose idle threads spin is not
    taken: a dense model on all cores answers 64 rows in 50 µs and burns 400 µs of CPU.
    """
    chosen: dict[int, Chosen] = {}
    for rows in sorted({m.rows for m in measured}):
        cells = [m for m in measured if m.rows == rows]
        own = next(m for m in cells if m.plan == SIGNATURE_PLAN)
        others = [m for m in cells if m.plan != SIGNATURE_PLAN]
        if not forced:
            others = [m for m in others if m.seconds < _WORTH_A_CHANGE * own.seconds and not _spins(m, cores)]
        best = _best(others) if others else own
        chosen[rows] = Chosen(best.plan, rows, best.seconds, best.cpu_s)
    for rows in list(chosen):
        for piece_rows, piece in chosen.items():
            count = -(-rows // piece_rows)
            seconds = count * (piece.seconds + _PIECE_S)
            if piece_rows < rows and piece.piece_rows == piece_rows and seconds < _WORTH_PIECES * chosen[rows].seconds:
                chosen[rows] = Chosen(piece.plan, piece_rows, seconds, count * piece.cpu_s)
    return chosen


def choose_cold(
    measured: Sequence[Measured], buckets: Sequence[int], is_cold: Callable[[str], bool]
) -> dict[int, Chosen]:
    """For each bucket the fastest plan that `is_cold`, or the largest measured piece of one; ``{}`` if none is."""
    cells: dict[int, Chosen] = {}
    for m in measured:
        if is_cold(m.plan) and (m.rows not in cells or m.seconds < cells[m.rows].seconds):
            cells[m.rows] = Chosen(m.plan, m.rows, m.seconds, m.cpu_s)
    if not cells or min(cells) != min(buckets):
        return {}
    chosen = {}
    for rows in sorted(buckets):
        piece_rows = max(known for known in cells if known <= rows)
        count, piece = -(-rows // piece_rows), cells[piece_rows]
        chosen[rows] = Chosen(piece.plan, piece_rows, count * piece.seconds, count * piece.cpu_s)
    return chosen


def best_rows(chosen: Mapping[int, Chosen]) -> int:
    """The bucket with the most rows a second; of those within 2 % the smallest."""
    rates = {rows: rows / cell.seconds for rows, cell in chosen.items()}
    return min(rows for rows, rate in rates.items() if rate >= _WORTH_FUSING * max(rates.values()))


def first_inputs(drawer: Drawer, run: Run, buckets: Sequence[int]) -> bool:
    """Set `drawer` to inputs that `run` takes in all `buckets`; False where there are none and need not be.

    Where the signature leaves sizes open, a model may refuse the sizes drawn for them, and where it
    takes strings, those that are no JPEG or ``tf.Example``: that is no fault, and the version is
    served without having been warmed up.

    Raises:
        KilnError: it refuses what its signature declares.
    """
    refusal: KilnError | None = None
    for _ in drawer.attempts():
        try:
            for rows in buckets:
                run(drawer.batch(rows))
        except KilnError as error:
            refusal = refusal or error
            continue
        return True
    takes_strings = any(array.dtype.kind == "O" for array in drawer.batch(1).values())
    if refusal is not None and not drawer.signature.has_open_sizes and not takes_strings:
        raise refusal
    _log.warning("not warmed up: nothing drawn for open dimensions or strings suits the model (%s)", refusal)
    return False


def _best(cells: Sequence[Measured]) -> Measured:
    fastest = min(m.seconds for m in cells)
    return min((m for m in cells if m.seconds * _ALIKE <= fastest), key=lambda m: m.cpu_s)


def _spins(cell: Measured, cores: int) -> bool:
    return cell.seconds < _SHORT_S and cell.cpu_s > _SPINNING * cell.seconds * min(cores, 2)


def _order(buckets: Sequence[int]) -> list[int]:
    """The smallest first, then one of about eight rows, then the others."""
    second = min(buckets, key=lambda rows: abs(rows - _SECOND_ROWS))
    return list(dict.fromkeys((buckets[0], second, *buckets)))


def _stream_counts(cores: int) -> list[int]:
    return sorted({2, cores} if cores > 1 else set())


def _bound(run: Run, inputs: Tensors) -> Callable[[], object]:
    return lambda: run(inputs)


def _timed(rival: _Rival, rows: int, inputs: Tensors) -> Callable[[], object]:
    """A run of `rival` that raises `_Failed`."""
    run = rival.runs[rows]

    def job() -> object:
        try:
            return run(inputs)
        except KilnError as error:
            raise _Failed(rival, error) from error

    return job


def _is_steady(run: Run, inputs: Tensors, outputs: Tensors) -> bool:
    """Whether the same rows in another order give the very same answers."""
    turned = run({name: np.roll(array, 1, 0) for name, array in inputs.items()})
    return all(np.array_equal(np.roll(array, 1, 0), turned[name]) for name, array in outputs.items())


def _share(seen: Sequence[tuple[int, int]]) -> float | None:
    total = sum(rows for _, rows in seen)
    return sum(same for same, _ in seen) / total if total else None


def _with_labels(problem: str, expected: Tensors, got: Tensors) -> str:
    """What differs, and of how many rows the label is the same all the same."""
    if any(name not in got or got[name].shape != want.shape for name, want in expected.items()):
        return problem
    same, total = same_labels(expected, got)
    return f"{problem} (same label in {same} of {total} rows)" if total else problem
