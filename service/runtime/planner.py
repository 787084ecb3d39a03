"""Measure the plans that can run a signature here, check that they agree, choose for each bucket."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from service.errors import KilnError
from service.runtime.base import Plan, PlanUnavailable
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec

_log = logging.getLogger("kiln.planner")
_RTOL = 1e-4
_ATOL = 1e-5
_OPEN_SIZES = (32, 1, 224)
"""Sizes tried, in order, for a dimension that the signature leaves open."""
_RUNS = 15
_SECONDS_PER_CELL = 0.3
_PAUSE_S = 200e-6
"""Between timed runs, as between batches of a server: threads that spin through it show as CPU time."""
_WORTH_A_CHANGE = 0.95

Build = Callable[[], Plan]


@dataclass(frozen=True)
class Candidate:
    """A plan that may be tried; one that is `forced` is taken wherever it agrees."""

    name: str
    build: Build
    forced: bool = False


@dataclass(frozen=True)
class Cost:
    """What one batch takes: seconds until it is done, and CPU seconds of all threads."""

    seconds: float
    cpu_s: float

    @property
    def score(self) -> float:
        """Less is better: the wait of this batch, and what is taken from everything else.

        By time alone a plan on all cores wins whose idle threads spin: 50 µs and 400 µs of CPU for
        64 rows of a dense model, where one thread takes 76 and 78.
        """
        return self.seconds + self.cpu_s


_UNKNOWN = Cost(float("inf"), float("inf"))


@dataclass(frozen=True)
class Choice:
    """The plan for each bucket of rows, and what a batch of that size was measured to cost."""

    plans: dict[int, Plan]
    costs: dict[int, Cost]

    @property
    def names(self) -> dict[int, str]:
        return {bucket: plan.name for bucket, plan in self.plans.items()}


def choose(
    signature: Signature,
    baseline: Plan,
    candidates: Sequence[Candidate],
    buckets: Sequence[int],
    budget_s: float,
    *,
    sample: Tensors | None = None,
) -> Choice:
    """Warm the baseline up, and take a candidate wherever it is faster and answers the same.

    Inputs are the rows of `sample`, ``(rows, …)``, as often as it takes, or where there is none random.

    A candidate that is absent, fails, or differs from the baseline in any bucket is left out
    with its reason in the log. Once `budget_s` is spent no further candidate is begun.

    Raises:
        KilnError: the baseline itself fails on what its signature declares.
    """
    draw = _Drawer(signature, sample)
    expected, costs = _warm_up(baseline, draw, buckets)
    plans = dict.fromkeys(buckets, baseline)
    if not expected or not _repeats(baseline, draw.batch(buckets[0]), expected[buckets[0]]):
        return Choice(plans, costs)
    stop = time.monotonic() + budget_s
    for candidate in candidates:
        if time.monotonic() >= stop:
            _log.info("%s: not measured, the planning budget of %.0f s is spent", candidate.name, budget_s)
            continue
        measured = _try(candidate, draw, expected)
        if measured is None:
            continue
        plan, candidate_costs = measured
        for bucket, cost in candidate_costs.items():
            if candidate.forced or cost.score < _WORTH_A_CHANGE * costs[bucket].score:
                plans[bucket], costs[bucket] = plan, cost
        if plan not in plans.values():
            plan.close()
    return Choice(plans, costs)


class _Drawer:
    """Inputs for a signature, the same for the same bucket: those of a sample, else seeded ones."""

    def __init__(self, signature: Signature, sample: Tensors | None) -> None:
        self.signature = signature
        self.sample = sample
        self.open_size = _OPEN_SIZES[0]
        self.zeros = False

    def batch(self, rows: int) -> Tensors:
        """Inputs of `rows` rows (a signature without rows: as declared)."""
        if self.sample is not None:
            return {name: self._repeat(array, rows) for name, array in self.sample.items()}
        rng = np.random.default_rng(rows)
        return {spec.name: self._array(spec, rows, rng) for spec in self.signature.inputs}

    def attempts(self) -> Iterator[None]:
        """Other ways to draw, where the model refuses the first: the sample, random sizes, then plain zeros."""
        if self.sample is not None:
            yield
            self.sample = None
        sizes = _OPEN_SIZES if self.signature.has_open_sizes else _OPEN_SIZES[:1]
        for self.zeros, self.open_size in itertools.product((False, True), sizes):
            yield

    def _repeat(self, array: Array, rows: int) -> Array:
        if not self.signature.batched:
            return array
        repeated: Array = array[np.arange(rows) % len(array)]
        return repeated

    def _array(self, spec: TensorSpec, rows: int, rng: np.random.Generator) -> Array:
        sizes = [self.open_size if size is None else size for size in spec.shape or ()]
        if self.signature.batched:
            sizes[0] = rows
        if spec.dtype is DataType.BYTES:
            return np.full(sizes, b"" if self.zeros else b"a few words", dtype=object)
        if self.zeros:
            return np.zeros(sizes, spec.dtype.numpy)
        if spec.dtype.is_float:
            return rng.standard_normal(sizes, dtype=np.float32).astype(spec.dtype.numpy)
        return rng.integers(0, 2, sizes).astype(spec.dtype.numpy)


def _warm_up(plan: Plan, draw: _Drawer, buckets: Sequence[int]) -> tuple[dict[int, Tensors], dict[int, Cost]]:
    """Run a batch of each bucket; outputs and cost by bucket.

    Where the signature leaves sizes open, a model may refuse the sizes drawn for them, and where it
    takes strings, those that are no JPEG or ``tf.Example``: that is no fault, and the version is
    served without having been warmed up.
    """
    refusal: KilnError | None = None
    for _ in draw.attempts():
        try:
            outputs = {bucket: plan.run(draw.batch(bucket)) for bucket in buckets}
        except KilnError as error:
            refusal = refusal or error
            continue
        return outputs, {bucket: _measure(plan, draw.batch(bucket)) for bucket in buckets}
    takes_strings = any(spec.dtype is DataType.BYTES for spec in draw.signature.inputs)
    if refusal is not None and not draw.signature.has_open_sizes and not takes_strings:
        raise refusal
    _log.warning("not warmed up: nothing drawn for open dimensions or strings suits the model (%s)", refusal)
    return {}, dict.fromkeys(buckets, _UNKNOWN)


def _try(candidate: Candidate, draw: _Drawer, expected: dict[int, Tensors]) -> tuple[Plan, dict[int, Cost]] | None:
    """The built plan and its cost by bucket; None if it cannot be used, which is told."""
    try:
        plan = candidate.build()
    except PlanUnavailable as error:
        _log.info("%s: not available: %s", candidate.name, error)
        return None
    costs = {}
    for bucket, outputs in expected.items():
        inputs = draw.batch(bucket)
        try:
            difference = disagreement(outputs, plan.run(inputs))
            if not difference:
                costs[bucket] = _measure(plan, inputs)
        except KilnError as error:
            difference = str(error)
        if difference:
            _log.warning("%s: refused at %d rows: %s", candidate.name, bucket, difference)
            plan.close()
            return None
    return plan, costs


def disagreement(expected: Tensors, got: Tensors) -> str:
    """Where two plans' outputs differ by more than rtol 1e-4, atol 1e-5; ``""`` if they agree.

    Integers, booleans and strings must be equal.
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
        elif not np.allclose(have.astype(np.float64), want.astype(np.float64), _RTOL, _ATOL, equal_nan=True):
            return f"output {name!r} differs by up to {_largest_difference(want, have):.3g}"
    return ""


def _largest_difference(want: Array, have: Array) -> float:
    """Infinite where only one of the two is NaN or infinite."""
    want, have = want.astype(np.float64), have.astype(np.float64)
    same = (want == have) | (np.isnan(want) & np.isnan(have))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(have - want))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max())


def _repeats(plan: Plan, inputs: Tensors, outputs: Tensors) -> bool:
    """Whether the same inputs give the same outputs; random or stateful models do not."""
    try:
        difference = disagreement(outputs, plan.run(inputs))
    except KilnError as error:
        difference = str(error)
    if difference:
        _log.info("served by the signature plan only: its own answers differ between runs (%s)", difference)
    return not difference


def _measure(plan: Plan, inputs: Tensors) -> Cost:
    """Medians over a few runs with a pause before each."""
    seconds: list[float] = []
    cpu_s: list[float] = []
    stop = time.perf_counter() + _SECONDS_PER_CELL
    while len(seconds) < _RUNS and (not seconds or time.perf_counter() < stop):
        cpu_start = time.process_time()
        time.sleep(_PAUSE_S)
        start = time.perf_counter()
        plan.run(inputs)
        seconds.append(time.perf_counter() - start)
        cpu_s.append(time.process_time() - cpu_start)
    return Cost(float(np.median(seconds)), float(np.median(cpu_s)))
