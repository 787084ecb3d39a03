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
_RUNS = 5
_SECONDS_PER_CELL = 0.25
WORTH_A_CHANGE = 0.95
WORTH_MORE_THREADS = 0.75
"""A plan on all cores must be this much faster than one on a single core: the front end needs them too."""

Build = Callable[[], Plan]


@dataclass(frozen=True)
class Candidate:
    """A plan that may be tried; it is taken where its time is under `needs_gain` × the best so far."""

    name: str
    build: Build
    needs_gain: float = WORTH_A_CHANGE


@dataclass(frozen=True)
class Choice:
    """The plan for each bucket of rows, and its measured seconds for a batch of that size."""

    plans: dict[int, Plan]
    seconds: dict[int, float]

    @property
    def names(self) -> dict[int, str]:
        return {bucket: plan.name for bucket, plan in self.plans.items()}


def choose(
    signature: Signature,
    baseline: Plan,
    candidates: Sequence[Candidate],
    buckets: Sequence[int],
    budget_s: float,
) -> Choice:
    """Warm the baseline up, and take a candidate wherever it is faster and answers the same.

    A candidate that is absent, fails, or differs from the baseline in any bucket is left out
    with its reason in the log. Once `budget_s` is spent no further candidate is begun.

    Raises:
        KilnError: the baseline itself fails on what its signature declares.
    """
    draw = _Drawer(signature)
    expected, seconds = _warm_up(baseline, draw, buckets)
    plans = dict.fromkeys(buckets, baseline)
    if not expected or not _repeats(baseline, draw.batch(buckets[0]), expected[buckets[0]]):
        return Choice(plans, seconds)
    stop = time.monotonic() + budget_s
    for candidate in candidates:
        if time.monotonic() >= stop:
            _log.info("%s: not measured, the planning budget of %.0f s is spent", candidate.name, budget_s)
            continue
        measured = _try(candidate, draw, expected)
        if measured is None:
            continue
        plan, candidate_seconds = measured
        for bucket in buckets:
            if candidate_seconds[bucket] < candidate.needs_gain * seconds[bucket]:
                plans[bucket], seconds[bucket] = plan, candidate_seconds[bucket]
        if plan not in plans.values():
            plan.close()
    return Choice(plans, seconds)


class _Drawer:
    """Seeded inputs for a signature, the same for the same bucket."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.open_size = _OPEN_SIZES[0]
        self.has_open_sizes = any(
            spec.shape is None or None in spec.shape[int(signature.batched) :] for spec in signature.inputs
        )
        self.zeros = False

    def batch(self, rows: int) -> Tensors:
        """Inputs of `rows` rows (a signature without rows: as declared)."""
        rng = np.random.default_rng(rows)
        return {spec.name: self._array(spec, rows, rng) for spec in self.signature.inputs}

    def attempts(self) -> Iterator[None]:
        """Other ways to draw, where the model refuses the first: sizes, then plain zeros."""
        sizes = _OPEN_SIZES if self.has_open_sizes else _OPEN_SIZES[:1]
        for self.zeros, self.open_size in itertools.product((False, True), sizes):
            yield

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


def _warm_up(plan: Plan, draw: _Drawer, buckets: Sequence[int]) -> tuple[dict[int, Tensors], dict[int, float]]:
    """Run a batch of each bucket; outputs and seconds by bucket.

    Where the signature leaves sizes open, a model may refuse the sizes drawn for them: that is
    no fault, and the version is served without having been warmed up.
    """
    refusal: KilnError | None = None
    for _ in draw.attempts():
        try:
            outputs = {bucket: plan.run(draw.batch(bucket)) for bucket in buckets}
        except KilnError as error:
            refusal = refusal or error
            continue
        seconds = {bucket: _time(plan, draw.batch(bucket)) for bucket in buckets}
        return outputs, seconds
    if refusal is not None and not draw.has_open_sizes:
        raise refusal
    _log.warning("not warmed up: no size drawn for the open dimensions suits the model (%s)", refusal)
    return {}, dict.fromkeys(buckets, 0.0)


def _try(candidate: Candidate, draw: _Drawer, expected: dict[int, Tensors]) -> tuple[Plan, dict[int, float]] | None:
    """The built plan and its seconds by bucket; None if it cannot be used, which is told."""
    try:
        plan = candidate.build()
    except PlanUnavailable as error:
        _log.info("%s: not available: %s", candidate.name, error)
        return None
    seconds = {}
    for bucket, outputs in expected.items():
        inputs = draw.batch(bucket)
        try:
            difference = disagreement(outputs, plan.run(inputs))
        except KilnError as error:
            difference = str(error)
        if difference:
            _log.warning("%s: refused at %d rows: %s", candidate.name, bucket, difference)
            plan.close()
            return None
        seconds[bucket] = _time(plan, inputs)
    return plan, seconds


def disagreement(expected: Tensors, got: Tensors) -> str:
    """Where two plans' outputs differ by more than rtol 1e-4, atol 1e-5; ``""`` if they agree.

    Integers, booleans and strings must be equal.
    """
    for name, want in expected.items():
        have = got.get(name)
        if have is None or have.shape != want.shape or have.dtype != want.dtype:
            return f"output {name!r} is {getattr(have, 'dtype', None)} {getattr(have, 'shape', None)}, " \
                   f"not {want.dtype} {want.shape}"
        if want.dtype.kind in "biuO":
            if not np.array_equal(want, have):
                return f"output {name!r} differs"
        elif not np.allclose(have.astype(np.float64), want.astype(np.float64), _RTOL, _ATOL, equal_nan=True):
            largest = np.nanmax(np.abs(have.astype(np.float64) - want.astype(np.float64)))
            return f"output {name!r} differs by up to {largest:.3g}"
    return ""


def _repeats(plan: Plan, inputs: Tensors, outputs: Tensors) -> bool:
    """Whether the same inputs give the same outputs; random or stateful models do not."""
    try:
        difference = disagreement(outputs, plan.run(inputs))
    except KilnError as error:
        difference = str(error)
    if difference:
        _log.info("served by the signature plan only: its own answers differ between runs (%s)", difference)
    return not difference


def _time(plan: Plan, inputs: Tensors) -> float:
    """Seconds of the fastest of a few runs: noise only ever adds."""
    best = float("inf")
    stop = time.perf_counter() + _SECONDS_PER_CELL
    for _ in range(_RUNS):
        start = time.perf_counter()
        plan.run(inputs)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > stop:
            break
    return best
