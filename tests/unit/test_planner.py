"""The planner with plans that are fakes: what is chosen for each bucket, what is refused and told."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from service.errors import Internal, InvalidArgument, KilnError
from service.runtime import planner
from service.runtime.base import PlanUnavailable
from service.runtime.planner import Candidate, Choice, Cost, choose
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec
from tests.signatures import one

X, Y = TensorSpec("x", DataType.FP32, (None, 3)), TensorSpec("y", DataType.FP32, (None, 3))
BATCHED = Signature("serving_default", (X,), (Y,))
BUCKETS = (1, 2, 4)


class Machine:
    """Where fake plans run: a clock that moves as they say, in place of the module's `time`."""

    def __init__(self) -> None:
        self.now = 50.0
        self.cpu = 0.0

    monotonic = perf_counter = lambda self: self.now

    def process_time(self) -> float:
        return self.cpu

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float, threads: float) -> None:
        self.now += seconds
        self.cpu += seconds * threads


class FakePlan:
    """Doubles ``x``; `seconds` per batch are given by its rows, on `threads` threads."""

    def __init__(
        self, machine: Machine, name: str, seconds: float | dict[int, float] = 0.01, threads: float = 1.0
    ) -> None:
        self.name = name
        self.machine, self.seconds, self.threads = machine, seconds, threads
        self.answer: Callable[[Array], Array] = lambda x: x + x
        self.batches: list[Tensors] = []
        self.closed = False

    def bucket_rows(self, rows: int) -> int:
        return rows

    def run(self, inputs: Tensors) -> Tensors:
        self.batches.append(inputs)
        rows = len(inputs["x"]) if inputs["x"].ndim else 1
        self.machine.work(self.seconds[rows] if isinstance(self.seconds, dict) else self.seconds, self.threads)
        return {"y": self.answer(inputs["x"])}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(planner, "time", machine)
    return machine


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "kiln.planner")
    return caplog


@pytest.fixture
def baseline(machine: Machine) -> FakePlan:
    return FakePlan(machine, "signature")


def offer(plan: FakePlan, *, forced: bool = False) -> Candidate:
    return Candidate(plan.name, lambda: plan, forced)


def chosen(baseline: FakePlan, *candidates: Candidate, budget_s: float = 100.0) -> Choice:
    return choose(BATCHED, baseline, candidates, BUCKETS, budget_s)


def test_the_baseline_serves_where_there_is_no_other(baseline: FakePlan) -> None:
    """Without candidates each bucket has the signature's own plan, with its cost."""
    choice = chosen(baseline)
    assert choice.names == dict.fromkeys(BUCKETS, "signature")
    assert choice.costs[4] == Cost(pytest.approx(0.01), pytest.approx(0.01))  # type: ignore[arg-type]
    assert {len(batch["x"]) for batch in baseline.batches} == set(BUCKETS)


def test_the_fastest_is_chosen_for_each_bucket(machine: Machine, baseline: FakePlan) -> None:
    """Each bucket takes the plan that is fastest there."""
    small = FakePlan(machine, "small", {1: 0.001, 2: 0.005, 4: 0.5})
    large = FakePlan(machine, "large", {1: 0.5, 2: 0.002, 4: 0.002})
    choice = chosen(baseline, offer(small), offer(large))
    assert choice.names == {1: "small", 2: "large", 4: "large"}
    assert choice.costs[2].seconds == pytest.approx(0.002)
    assert not small.closed
    assert not large.closed


def test_a_plan_that_is_nowhere_faster_is_closed(machine: Machine, baseline: FakePlan) -> None:
    """What is not used does not keep memory; a gain under a twentieth is not worth a change."""
    slow = FakePlan(machine, "slow", 0.0097)
    assert chosen(baseline, offer(slow)).names == dict.fromkeys(BUCKETS, "signature")
    assert slow.closed


def test_processor_time_counts(machine: Machine, baseline: FakePlan) -> None:
    """A plan that is a little faster and burns all cores takes from everything else, and loses."""
    greedy = FakePlan(machine, "greedy", 0.008, threads=4.0)
    assert chosen(baseline, offer(greedy)).names == dict.fromkeys(BUCKETS, "signature")


def test_a_forced_plan_is_taken_wherever_it_agrees(machine: Machine, baseline: FakePlan) -> None:
    """Forced, a plan is used though it is slower."""
    slow = FakePlan(machine, "slow", 1.0)
    assert chosen(baseline, offer(slow, forced=True)).names == dict.fromkeys(BUCKETS, "slow")


def test_a_forced_plan_that_differs_is_refused_all_the_same(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """Nothing makes a wrong answer acceptable."""
    wrong = FakePlan(machine, "wrong")
    wrong.answer = lambda x: x + x + 1
    assert chosen(baseline, offer(wrong, forced=True)).names == dict.fromkeys(BUCKETS, "signature")
    assert log.messages == ["wrong: refused at 1 rows: output 'y' differs by up to 1"]


def test_a_plan_that_differs_in_one_bucket_is_used_in_none(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """The log has the largest difference and the bucket where it was seen."""
    wrong = FakePlan(machine, "wrong", 0.001)
    wrong.answer = lambda x: x + x + (np.float32(0.25) if len(x) == 4 else 0)
    assert chosen(baseline, offer(wrong)).names == dict.fromkeys(BUCKETS, "signature")
    assert log.messages == ["wrong: refused at 4 rows: output 'y' differs by up to 0.25"]
    assert wrong.closed


def failing_after(runs: int) -> Callable[[Array], Array]:
    """An answer that fails once it has been given `runs` times."""
    left = iter(range(runs))

    def answer(x: Array) -> Array:
        if next(left, None) is None:
            raise Internal("out of memory")
        return x + x

    return answer


@pytest.mark.parametrize("runs", [0, 1, 5])
def test_a_plan_that_fails_is_refused(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture, runs: int
) -> None:
    """A candidate that raises, at once or while it is timed, does no harm to the version."""
    broken = FakePlan(machine, "broken", 0.001)
    broken.answer = failing_after(runs)
    assert chosen(baseline, offer(broken)).names == dict.fromkeys(BUCKETS, "signature")
    assert log.messages == ["broken: refused at 1 rows: out of memory"]
    assert broken.closed


def test_a_plan_that_is_not_available_is_told(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """Why a plan cannot be built is in the log, and the next candidate is tried."""

    def build() -> FakePlan:
        raise PlanUnavailable("openvino is not installed")

    quick = FakePlan(machine, "quick", 0.001)
    choice = chosen(baseline, Candidate("openvino", build), offer(quick))
    assert choice.names == dict.fromkeys(BUCKETS, "quick")
    assert log.messages == ["openvino: not available: openvino is not installed"]


def test_nothing_is_begun_once_the_budget_is_spent(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """A candidate is measured to its end; those after it are left out, which is told."""
    first, second = FakePlan(machine, "first", 0.009), FakePlan(machine, "second", 0.001)
    choice = chosen(baseline, offer(first), offer(second), budget_s=0.1)
    assert choice.names == dict.fromkeys(BUCKETS, "first")
    assert log.messages == ["second: not measured, the planning budget of 0 s is spent"]
    assert second.batches == []


def test_a_slow_plan_is_timed_few_times(machine: Machine) -> None:
    """Measuring one bucket takes a third of a second at most, or one run; quick plans run 15 times."""
    slow, quick = FakePlan(machine, "slow", 1.0), FakePlan(machine, "quick", 0.001)
    choose(BATCHED, slow, [], (1,), 1.0)
    choose(BATCHED, quick, [], (1,), 1.0)
    assert len(slow.batches) == 1 + 1 + 1  # to see whether it runs, to time it, to see whether it repeats
    assert len(quick.batches) == 1 + 15 + 1


def test_a_cost_is_a_median(machine: Machine) -> None:
    """One slow run, as when a kernel is built, does not count."""
    plan = FakePlan(machine, "signature", 0.001)
    times = iter([0.0, 0.25])

    def answer(x: Array) -> Array:
        machine.work(next(times, 0.0), 1.0)
        return x

    plan.answer = answer
    assert choose(BATCHED, plan, [], (1,), 1.0).costs[1].seconds == pytest.approx(0.001)


def changing(first: float = 0.0) -> Callable[[Array], Array]:
    """An answer that is another one each time."""
    runs = iter(np.arange(first, 1e6, dtype=np.float32))
    return lambda x: x + next(runs)


def test_a_model_that_does_not_repeat_itself_has_no_other_plan(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """Where the baseline's own answers differ between runs nothing can be compared with it."""
    baseline.answer = changing()
    quick = FakePlan(machine, "quick", 0.0001)
    choice = chosen(baseline, offer(quick))
    assert choice.names == dict.fromkeys(BUCKETS, "signature")
    assert choice.costs[1].seconds == pytest.approx(0.01)
    assert quick.batches == []
    (message,) = log.messages
    assert message.startswith("served by the signature plan only: its own answers differ between runs (output 'y'")


def test_a_baseline_that_stops_answering_has_no_other_plan(machine: Machine, log: pytest.LogCaptureFixture) -> None:
    """A fault in the repeated run is told like a difference."""
    baseline = FakePlan(machine, "signature", 1.0)
    baseline.answer = failing_after(2)
    choose(BATCHED, baseline, [], (1,), 1.0)
    assert "differ between runs (out of memory)" in log.text


def test_a_baseline_that_fails_on_what_it_declares_raises(baseline: FakePlan) -> None:
    """The first error is raised, after other inputs have been tried in vain."""
    errors: Iterator[KilnError] = iter([InvalidArgument("first"), InvalidArgument("second")])

    def answer(x: Array) -> Array:
        raise next(errors)

    baseline.answer = answer
    with pytest.raises(InvalidArgument, match="first"):
        chosen(baseline)
    assert [bool(batch["x"].any()) for batch in baseline.batches] == [True, False]


def test_zeros_are_tried_where_random_inputs_are_refused(machine: Machine, baseline: FakePlan) -> None:
    """A model that takes few numbers only may take zeros; its plans are then compared on those."""

    def answer(x: Array) -> Array:
        if x.any():
            raise InvalidArgument("only zeros")
        return x

    baseline.answer = answer
    quick = FakePlan(machine, "quick", 0.001)
    assert chosen(baseline, offer(quick)).names == dict.fromkeys(BUCKETS, "quick")
    assert not any(batch["x"].any() for batch in quick.batches)


OPEN = Signature(
    "open", (TensorSpec("x", DataType.FP32, (None, None)),), (TensorSpec("y", DataType.FP32, (None, None)),)
)


@pytest.mark.parametrize("fits", [32, 1, 224])
def test_sizes_are_tried_for_open_dimensions(baseline: FakePlan, fits: int) -> None:
    """Where the signature leaves a size open, several are tried until the model takes one."""

    def answer(x: Array) -> Array:
        if x.shape[1] != fits:
            raise InvalidArgument(f"not {x.shape}")
        return x

    baseline.answer = answer
    choice = choose(OPEN, baseline, [], BUCKETS, 1.0)
    assert choice.costs[4].seconds == pytest.approx(0.01)
    assert baseline.batches[-1]["x"].shape == (1, fits)


def test_open_sizes_that_none_fits_are_served_unmeasured(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """A model that takes no size that was tried is served all the same, at unknown cost."""

    def answer(x: Array) -> Array:
        raise InvalidArgument("a multiple of 7, please")

    baseline.answer = answer
    choice = choose(OPEN, baseline, [offer(FakePlan(machine, "quick"))], BUCKETS, 1.0)
    assert choice.names == dict.fromkeys(BUCKETS, "signature")
    assert choice.costs == dict.fromkeys(BUCKETS, Cost(float("inf"), float("inf")))
    assert re.fullmatch(r"not warmed up: .* \(a multiple of 7, please\)", log.messages[0])
    assert len(baseline.batches) == 2 * 3


def test_strings_that_no_one_can_draw_are_served_unmeasured(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """A model that takes JPEGs or ``tf.Example`` messages refuses any text, and is served all the same."""

    def answer(x: Array) -> Array:
        raise InvalidArgument("no JPEG")

    baseline.answer = answer
    choice = choose(one(DataType.BYTES, (None,)), baseline, [], BUCKETS, 1.0)
    assert choice.costs == dict.fromkeys(BUCKETS, Cost(float("inf"), float("inf")))
    assert re.fullmatch(r"not warmed up: .* strings .* \(no JPEG\)", log.messages[0])


def test_the_real_clock_measures() -> None:
    """Without a fake clock a cost is positive time."""
    plan = FakePlan(Machine(), "signature")
    start = time.perf_counter()
    choice = choose(BATCHED, plan, [], (1,), 1.0)
    assert 0 < choice.costs[1].seconds < time.perf_counter() - start
