"""The planner with plans that are fakes: what is compared, refused and told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.errors import Internal, InvalidArgument, KilnError
from service.runtime import measuring, planner, ranges
from service.runtime.base import PlanUnavailable
from service.runtime.parity import Tolerance
from service.runtime.planner import Budget, Candidate, PlanOptions, Survey, unplanned
from service.runtime.records import SIGNATURE_PLAN, Chosen, Difference, SignatureRecord
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec
from tests.signatures import one
from tests.unit.plan_fakes import BATCHED, OPEN, FakePlan, Machine, changing, failing_after, offer

BUCKETS = (1, 2, 4)
OWN = dict.fromkeys(BUCKETS, SIGNATURE_PLAN)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    for module in (planner, measuring, ranges):
        monkeypatch.setattr(module, "time", machine)
    return machine


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "kiln.planner")
    return caplog


@pytest.fixture
def baseline(machine: Machine) -> FakePlan:
    return FakePlan(machine, "signature")


def survey(
    baseline: FakePlan,
    *candidates: Candidate,
    signature: Signature = BATCHED,
    repeats: bool = True,
    sample: Tensors | None = None,
    **options: Any,
) -> SignatureRecord:
    """What is found out, in `BUCKETS` and within 1000 s where `options` say nothing else."""
    given: dict[str, Any] = {"buckets": BUCKETS, "budget": Budget(1000.0), **options}
    return Survey(signature, baseline, PlanOptions(**given), sample=sample).run(candidates, repeats=repeats)


def test_the_baseline_serves_where_there_is_no_other(baseline: FakePlan) -> None:
    """Without candidates each bucket has the signature's own plan, with its cost."""
    record = survey(baseline)
    assert record.names == OWN
    assert record.chosen[4].seconds == pytest.approx(0.01)
    assert {len(batch["x"]) for batch in baseline.batches} == set(BUCKETS)
    assert not baseline.closed


def test_the_fastest_is_chosen_for_each_bucket(machine: Machine, baseline: FakePlan) -> None:
    """Each bucket takes the plan that is fastest there; all that was measured is kept."""
    small = FakePlan(machine, "small", {1: 0.001, 2: 0.005, 4: 0.02})
    large = FakePlan(machine, "large", {1: 0.02, 2: 0.002, 4: 0.002})
    record = survey(baseline, offer(small), offer(large))
    assert record.names == {1: "small", 2: "large", 4: "large"}
    assert record.chosen[2].seconds == pytest.approx(0.002)
    assert {(m.plan, m.rows) for m in record.measured} == {
        (p, n) for p in ("signature", "small", "large") for n in BUCKETS
    }
    assert record.left_out == {}


def test_every_candidate_is_closed_once(machine: Machine, baseline: FakePlan) -> None:
    """Whether it was chosen, refused or fails: what was built to be measured goes; the baseline stays."""
    good, wrong = FakePlan(machine, "good", 0.001), FakePlan(machine, "wrong")
    wrong.answer = lambda x: x
    survey(baseline, offer(good), offer(wrong))
    assert (good.closed, wrong.closed, baseline.closed) == (1, 1, 0)


def test_a_forced_plan_is_taken_wherever_it_agrees(machine: Machine, baseline: FakePlan) -> None:
    """Forced, a plan is used though it is slower, in all buckets."""
    slow = FakePlan(machine, "slow", 1.0)
    assert survey(baseline, offer(slow), forced=True).names == dict.fromkeys(BUCKETS, "slow")


def test_a_forced_plan_that_differs_is_refused_all_the_same(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """Nothing makes a wrong answer acceptable; record and log have the largest difference."""
    wrong = FakePlan(machine, "wrong")
    wrong.answer = lambda x: x + x + 1
    record = survey(baseline, offer(wrong), forced=True)
    assert record.names == OWN
    told = record.left_out["wrong"]
    assert told == "refused at 1 rows: output 'y' differs by up to 1 (same label in 1 of 1 rows)"
    assert log.messages == [f"serving_default: wrong: {told}"]


def test_a_plan_that_differs_in_one_bucket_is_used_in_none(machine: Machine, baseline: FakePlan) -> None:
    """What it did in the others does not count any more."""
    wrong = FakePlan(machine, "wrong", 0.001)
    wrong.answer = lambda x: x + x + (np.float32(0.25) if len(x) == 4 else 0)
    record = survey(baseline, offer(wrong))
    assert record.names == OWN
    assert record.left_out["wrong"].startswith("refused at 4 rows: output 'y' differs by up to 0.25")
    assert {m.plan for m in record.measured} == {"signature"}
    assert wrong.closed


def wrong_where(condition: Callable[[Array], Any]) -> Callable[[Array], Array]:
    return lambda x: np.where(condition(x), x, x + x).astype(x.dtype)


@pytest.mark.parametrize(
    ("kind", "condition"),
    [
        ("large", lambda x: np.abs(x) > 100),
        ("negative", lambda x: (x < 0).all()),
        ("zero", lambda x: (x == 0).all()),
    ],
)
def test_a_plan_that_is_wrong_for_unusual_numbers_only(
    machine: Machine, baseline: FakePlan, kind: str, condition: Callable[[Array], Any]
) -> None:
    """Zeros, large and negative numbers are compared too, and the refusal says which it was."""
    wrong = FakePlan(machine, "wrong", 0.001)
    wrong.answer = wrong_where(condition) if kind != "zero" else lambda x: x + x + (0 if x.any() else 1)
    record = survey(baseline, offer(wrong))
    assert record.names == OWN
    assert f"with {kind} inputs" in record.left_out["wrong"]


def test_a_plan_that_is_wrong_for_empty_strings_only(machine: Machine, baseline: FakePlan) -> None:
    """Strings of no length are compared too."""

    def lengths(empty: int) -> Callable[[Array], Array]:
        return lambda x: np.array([[len(s) or empty for s in row] for row in x], np.int32)

    signature = Signature(
        "s", (TensorSpec("x", DataType.BYTES, (None, 1)),), (TensorSpec("y", DataType.INT32, (None, 1)),)
    )
    baseline.answer = lengths(0)
    wrong = FakePlan(machine, "wrong", 0.001)
    wrong.answer = lengths(-1)
    record = survey(baseline, offer(wrong), signature=signature)
    assert record.names == OWN
    assert record.left_out["wrong"].startswith("refused at 1 rows: output 'y' differs with empty inputs")


IDS = Signature("ids", (TensorSpec("x", DataType.INT32, (None, 2)),), (TensorSpec("y", DataType.INT32, (None, 2)),))


def embedding(x: Array) -> Array:
    """What refuses an index that it does not have."""
    if x.min() < 0 or x.max() > 99:
        raise InvalidArgument("indices[0,0] is not in [0, 100)")
    return x + x


def test_a_plan_that_is_wrong_for_the_highest_integer_only(machine: Machine, baseline: FakePlan) -> None:
    """Of the integers that a model takes the last one is compared."""
    baseline.answer = embedding
    wrong = FakePlan(machine, "wrong", 0.001)
    wrong.answer = wrong_where(lambda x: x == 99)
    record = survey(baseline, offer(wrong), signature=IDS)
    assert record.names == OWN
    assert record.ranges == {"x": (0, 99)}
    assert "with highest inputs" in record.left_out["wrong"]


def test_integers_on_which_plans_agree_are_recorded(machine: Machine, baseline: FakePlan) -> None:
    """Inputs are drawn from what the model takes, and beyond that nothing is asked of a candidate."""
    baseline.answer = embedding
    quick = FakePlan(machine, "quick", 0.001)
    record = survey(baseline, offer(quick), signature=IDS)
    assert record.names == dict.fromkeys(BUCKETS, "quick")
    assert record.ranges == {"x": (0, 99)}
    seen = np.concatenate([batch["x"].ravel() for batch in quick.batches])
    assert (seen.min(), seen.max()) == (0, 99)
    assert len(np.unique(seen)) > 5


def test_a_plan_that_is_wrong_at_its_second_run_only(machine: Machine, baseline: FakePlan) -> None:
    """Each batch is run several times."""
    wrong = FakePlan(machine, "wrong", 0.001)
    runs = iter(range(10_000))
    wrong.answer = lambda x: x + x if next(runs) != 1 else x
    record = survey(baseline, offer(wrong))
    assert record.names == OWN
    assert "refused at 1 rows" in record.left_out["wrong"]


def test_numbers_that_overflow_are_not_asked_of_a_plan(machine: Machine, baseline: FakePlan) -> None:
    """Where the baseline itself answers with infinity or fails, plans need not agree."""

    def baselines(x: Array) -> Array:
        if (x < 0).all():
            raise InvalidArgument("not negative")
        return np.where(np.abs(x) > 100, np.float32(np.inf), x + x)

    baseline.answer = baselines
    quick = FakePlan(machine, "quick", 0.001)
    assert survey(baseline, offer(quick)).names == dict.fromkeys(BUCKETS, "quick")


def test_a_tolerance_is_the_candidates_own(machine: Machine, baseline: FakePlan) -> None:
    """A plan of less precision is held to what the config allows it."""
    rough = FakePlan(machine, "rough", 0.001)
    rough.answer = lambda x: (x + x) * np.float32(1.001)
    record = survey(baseline, offer(rough, Tolerance(1e-2, 1e-2)))
    assert record.names == dict.fromkeys(BUCKETS, "rough")
    assert all(0 < m.difference.relative < 1e-2 for m in record.measured if m.plan == "rough")
    assert survey(baseline, offer(rough)).names == OWN


@pytest.mark.parametrize("runs", [0, 1, 2, 12])
def test_a_plan_that_fails_is_refused(machine: Machine, baseline: FakePlan, runs: int) -> None:
    """A candidate that raises, at once or while it is timed, does no harm to the others."""
    broken, quick = FakePlan(machine, "broken", 0.001), FakePlan(machine, "quick", 0.002)
    broken.answer = failing_after(runs)
    record = survey(baseline, offer(broken), offer(quick))
    assert record.names == dict.fromkeys(BUCKETS, "quick")
    assert record.left_out == {"broken": "refused at 1 rows: out of memory"}
    assert broken.closed


def test_a_plan_that_is_not_available_is_told(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """Why a plan cannot be built, or not for so many rows, is in record and log, and the next one is tried."""

    def build() -> FakePlan:
        raise PlanUnavailable("openvino is not installed")

    part, quick = FakePlan(machine, "part", 0.0001), FakePlan(machine, "quick", 0.001)
    part.unavailable_from = 4
    record = survey(baseline, Candidate("openvino", build), offer(part), offer(quick))
    assert record.names == dict.fromkeys(BUCKETS, "quick")
    assert record.left_out == {
        "openvino": "not available: openvino is not installed",
        "part": "not available: not for 4 rows",
    }
    assert log.messages == [f"serving_default: {name}: {reason}" for name, reason in record.left_out.items()]


def test_nothing_is_begun_once_the_budget_is_spent(machine: Machine, baseline: FakePlan) -> None:
    """A plan that was not measured is left out from that bucket on, which is told."""
    first, second = FakePlan(machine, "first", 0.009), FakePlan(machine, "second", 0.001)
    record = survey(baseline, offer(first), offer(second), budget=Budget(0.0))
    assert record.names == OWN
    told = "not measured from 1 rows on: the time for planning is spent"
    assert record.left_out == {"first": told, "second": told}
    assert second.batches == []
    late = survey(baseline, offer(first), offer(second), budget=Budget(0.2))
    assert late.names == {1: "second", 2: "second (2 × 1)", 4: "second (4 × 1)"}
    assert late.left_out["second"] == "not measured from 4 rows on: the time for planning is spent"
    assert {m.rows for m in late.measured if m.plan == "second"} == {1}


@pytest.mark.parametrize(("clock", "processor", "spent"), [(5.0, 5.0, True), (50.0, 1.0, False), (5.0, 20.0, True)])
def test_a_budget_counts_what_the_process_got(machine: Machine, clock: float, processor: float, spent: bool) -> None:
    """Planning yields to traffic: while it waits for the processor its time does not run out."""
    budget = Budget(5.0)
    machine.now += clock
    machine.cpu += processor
    assert budget.is_spent is spent


def test_a_plan_far_behind_is_not_tried_in_all_buckets(machine: Machine, baseline: FakePlan) -> None:
    """Three times slower in two buckets is enough to know; forced, it is tried everywhere."""
    slow = FakePlan(machine, "slow", 0.05)
    record = survey(baseline, offer(slow), buckets=(1, 2, 4, 8, 16))
    assert sorted(slow.prepared) == [1, 8]
    assert record.left_out == {"slow": "not measured in all buckets: over 3 × slower"}
    assert {m.rows for m in record.measured if m.plan == "slow"} == {1, 8}


def test_a_model_that_does_not_repeat_itself_has_no_other_plan(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture
) -> None:
    """Where the baseline's own answers differ between runs nothing can be compared with it."""
    baseline.answer = changing()
    quick = FakePlan(machine, "quick", 0.0001)
    record = survey(baseline, offer(quick))
    assert record.names == OWN
    assert record.chosen[1].seconds == pytest.approx(0.01)
    assert quick.batches == []
    assert record.note.startswith("its own answers differ between runs (output 'y'")
    assert log.messages == [f"served by the signature plan only: {record.note}"]


def test_a_model_known_to_be_random_is_only_measured(machine: Machine, baseline: FakePlan) -> None:
    """With random operations in the graph no other plan is built, however alike two answers look."""
    quick = FakePlan(machine, "quick", 0.0001)
    record = survey(baseline, offer(quick), repeats=False)
    assert (record.names, record.note) == (OWN, "random or stateful operations")
    assert (quick.batches, quick.prepared) == ([], [])


def test_a_baseline_that_stops_answering_has_no_other_plan(machine: Machine, log: pytest.LogCaptureFixture) -> None:
    """A fault in the repeated run is told like a difference."""
    baseline = FakePlan(machine, "signature", 1.0)
    runs = iter(range(10_000))

    def answer(x: Array) -> Array:
        if next(runs) == 2:
            raise Internal("out of memory")
        return x

    baseline.answer = answer
    survey(baseline, buckets=(1,))
    assert "differ between runs (out of memory)" in log.text


def test_a_baseline_that_fails_on_what_it_declares_raises(baseline: FakePlan) -> None:
    """The first error is raised, after other inputs have been tried in vain."""
    errors: Iterator[KilnError] = iter([InvalidArgument("first"), InvalidArgument("second")])

    def answer(x: Array) -> Array:
        raise next(errors)

    baseline.answer = answer
    with pytest.raises(InvalidArgument, match="first"):
        survey(baseline)
    assert [bool(batch["x"].any()) for batch in baseline.batches] == [True, False]


def test_zeros_are_tried_where_random_inputs_are_refused(machine: Machine, baseline: FakePlan) -> None:
    """A model that takes few numbers only may take zeros; its plans are then compared on those."""

    def answer(x: Array) -> Array:
        if x.any():
            raise InvalidArgument("only zeros")
        return x

    baseline.answer = answer
    quick = FakePlan(machine, "quick", 0.001)
    assert survey(baseline, offer(quick)).names == dict.fromkeys(BUCKETS, "quick")
    assert not any(batch["x"].any() for batch in quick.batches)


@pytest.mark.parametrize("fits", [32, 1, 224])
def test_sizes_are_tried_for_open_dimensions(baseline: FakePlan, fits: int) -> None:
    """Where the signature leaves a size open, several are tried until the model takes one."""

    def answer(x: Array) -> Array:
        if x.shape[1] != fits:
            raise InvalidArgument(f"not {x.shape}")
        return x

    baseline.answer = answer
    record = survey(baseline, signature=OPEN)
    assert record.chosen[4].seconds == pytest.approx(0.01)
    assert baseline.batches[-1]["x"].shape[1] == fits


@pytest.mark.parametrize(("signature", "text"), [(OPEN, "a multiple of 7"), (one(DataType.BYTES, (None,)), "no JPEG")])
def test_what_no_one_can_draw_is_served_unmeasured(
    machine: Machine, baseline: FakePlan, log: pytest.LogCaptureFixture, signature: Signature, text: str
) -> None:
    """A model that refuses every size and text that was tried is served all the same, at unknown cost."""

    def answer(x: Array) -> Array:
        raise InvalidArgument(text)

    baseline.answer = answer
    record = survey(baseline, offer(FakePlan(machine, "quick")), signature=signature)
    assert record == unplanned(BUCKETS, "nothing drawn for its inputs suits the model")
    assert record.chosen[2] == Chosen("signature", 2, float("inf"))
    assert log.messages[0].startswith("not warmed up: ")
    assert f"({text})" in log.messages[0]


def test_samples_are_what_plans_are_compared_on(machine: Machine, baseline: FakePlan) -> None:
    """Rows that were seen are cut or repeated to each bucket."""
    quick = FakePlan(machine, "quick", 0.001)
    sample = {"x": np.array([[1, 2, 3], [4, 5, 6]], np.float32)}
    survey(baseline, offer(quick), sample=sample)
    usual = [batch["x"].tolist() for batch in quick.batches]
    assert [[1, 2, 3]] in usual
    assert [[1, 2, 3], [4, 5, 6], [1, 2, 3], [4, 5, 6]] in usual


def test_a_signature_without_rows_has_one_cell(machine: Machine, baseline: FakePlan) -> None:
    """It is measured as declared, once, and never run in several streams."""
    signature = one(DataType.FP32, (3,))
    quick = FakePlan(machine, "quick", 0.002)
    record = survey(baseline, offer(quick), signature=signature)
    assert record.names == {1: "quick"}
    assert (record.best_rows, record.streams, record.invariance) == (1, 1, Difference())


def test_a_steady_plan_answers_alike_in_any_place(machine: Machine, baseline: FakePlan) -> None:
    """Where answers must not depend on company, one that differs in its last bit by place is refused."""
    wrong = FakePlan(machine, "wrong", 0.001)

    def by_place(x: Array) -> Array:
        answer = x + x
        answer[-1] = np.nextafter(answer[-1], np.float32(np.inf))
        return answer

    wrong.answer = by_place
    steady = survey(baseline, offer(wrong), buckets=(4,), steady=True)
    assert steady.names == {4: "signature"}
    assert steady.left_out == {"wrong": "refused at 4 rows: its answers depend on a row's place in the batch"}
    loose = survey(baseline, offer(wrong), buckets=(4,))
    assert loose.names == {4: "wrong"}
    assert 0 < loose.invariance.absolute < 1e-6


def test_how_much_company_changes_an_answer_is_measured(machine: Machine, baseline: FakePlan) -> None:
    """The same rows alone and in each bucket, by the plans that were chosen."""
    quick = FakePlan(machine, "quick", 0.001)
    quick.answer = lambda x: x + x + (np.float32(2e-6) if len(x) == 4 else np.float32(0))
    record = survey(baseline, offer(quick))
    assert record.names[4] == "quick"
    assert record.invariance.absolute == pytest.approx(2e-6, rel=0.2)
    assert record.invariance.relative > 0


def streams_of(*plans: FakePlan) -> Callable[[int], Sequence[Candidate]]:
    return lambda streams: [offer(plan) for plan in plans] if streams == 2 else []


def test_streams_are_used_where_they_give_more_rows(machine: Machine, baseline: FakePlan) -> None:
    """Two batches at once by a plan of its own, if that answers a tenth more rows a second; it is compared as well."""
    whole, split = FakePlan(machine, "whole", 0.004), FakePlan(machine, "split-2x1", 0.002)
    record = survey(baseline, offer(whole), cores=2, streams=streams_of(split))
    assert record.names == dict.fromkeys(BUCKETS, "whole")
    assert (record.streams, record.shared) == (2, "split-2x1")
    assert record.rows_per_s == pytest.approx(4 / 0.002, rel=0.1)
    assert split.closed == 1
    known = survey(baseline, offer(whole), cores=2, streams=streams_of(whole))
    assert (known.streams, known.shared) == (1, "")


def test_streams_on_cores_of_their_own_are_taken_at_the_same_rate(machine: Machine, baseline: FakePlan) -> None:
    """What holds up one core there holds up one batch; the fastest of them is taken, and a slower one is not."""
    whole = FakePlan(machine, "whole", 0.004)
    seconds = {"level": 0.00405, "quicker": 0.004, "late": 0.0045}
    plans = [FakePlan(machine, name, each) for name, each in seconds.items()]

    def streams(count: int) -> list[Candidate]:
        return [replace(offer(plan), on_own_cores=True) for plan in plans]

    record = survey(baseline, offer(whole), cores=2, streams=streams)
    assert (record.streams, record.shared) == (2, "quicker")
    del plans[:2]
    assert survey(baseline, offer(whole), cores=2, streams=streams).streams == 1


def test_streams_have_time_of_their_own(machine: Machine, baseline: FakePlan) -> None:
    """However long the plans alone take, a tenth of the time is left for them; then nothing more is begun."""
    whole, split, never = (FakePlan(machine, name, 0.002) for name in ("whole", "split", "never"))
    whole.seconds = 0.004
    record = survey(baseline, offer(whole), cores=2, streams=streams_of(split), budget=Budget(0.5))
    assert "the time for planning is spent" in record.left_out["whole"]
    assert (record.streams, record.shared) == (2, "split")
    again = survey(baseline, offer(whole), cores=2, streams=streams_of(split, never), budget=Budget(0.5))
    assert (again.shared, never.prepared) == ("split", [])


@pytest.mark.parametrize("fault", ["wrong", "unavailable", "slow", "failing build"])
def test_streams_by_a_plan_that_will_not_do_are_not_used(machine: Machine, baseline: FakePlan, fault: str) -> None:
    """What is wrong, absent or no faster in streams leaves the batches one at a time."""
    whole, split = FakePlan(machine, "whole", 0.004), FakePlan(machine, "split", 0.001)
    candidate = offer(split)
    if fault == "wrong":
        split.answer = lambda x: x
    elif fault == "unavailable":
        split.unavailable_from = 1
    elif fault == "slow":
        split.seconds = 0.0039
    else:

        def build() -> FakePlan:
            raise PlanUnavailable("no")

        candidate = Candidate("split", build)
    record = survey(baseline, offer(whole), cores=2, streams=lambda streams: [candidate])
    assert (record.streams, record.shared) == (1, "")
    assert ("split" in record.left_out) is (fault != "slow")


def test_the_signature_plan_may_run_in_streams(machine: Machine, baseline: FakePlan) -> None:
    """It needs no second build, and is measured like the others."""
    own = Candidate(SIGNATURE_PLAN, lambda: pytest.fail("it is there already"))
    record = survey(baseline, cores=2, streams=lambda streams: [own])
    assert (record.streams, record.shared) == (1, "")
    assert record.rows_per_s > 0


def test_a_plan_that_was_refused_is_not_tried_in_streams(machine: Machine, baseline: FakePlan) -> None:
    """Nor is anything tried in streams once the time is spent, or for batches that take no time."""
    wrong = FakePlan(machine, "wrong", 0.001)
    wrong.answer = lambda x: x
    record = survey(baseline, offer(wrong), cores=2, streams=streams_of(wrong))
    assert (record.streams, wrong.closed) == (1, 1)
    asked: list[int] = []

    def streams(count: int) -> list[Candidate]:
        asked.append(count)
        return []

    survey(baseline, cores=2, streams=streams, budget=Budget(0.0))
    survey(FakePlan(machine, "signature", 1e-4), cores=2, streams=streams)
    survey(baseline, cores=1, streams=streams)
    assert asked == []
    survey(baseline, cores=4, streams=streams)
    assert asked == [2, 4]


def test_what_is_tried_is_reported(machine: Machine, baseline: FakePlan) -> None:
    """Before a plan is built and before each bucket, so that whoever ends here is known."""
    told: list[tuple[str, int]] = []
    quick = FakePlan(machine, "quick", 0.001)
    survey(baseline, offer(quick), buckets=(1, 4), report=lambda plan, rows: told.append((plan, rows)))
    assert told == [("quick", 0), ("quick", 1), ("", 1), ("quick", 4), ("", 4)]


def test_plans_that_need_no_tensorflow_are_kept_apart(machine: Machine, baseline: FakePlan) -> None:
    """For a start without it the record has the fastest of those in every bucket."""
    own, other = FakePlan(machine, "xla", 0.001), FakePlan(machine, "openvino", 0.002)
    record = survey(baseline, offer(own), offer(other), is_cold=lambda plan: plan == "openvino")
    assert record.names == dict.fromkeys(BUCKETS, "xla")
    assert {rows: cell.plan for rows, cell in record.cold.items()} == dict.fromkeys(BUCKETS, "openvino")


def test_the_real_clock_measures() -> None:
    """Without a fake clock a cost is positive time."""
    start = time.perf_counter()
    record = survey(FakePlan(Machine(), "signature"), buckets=(1,))
    assert 0 < record.chosen[1].seconds < time.perf_counter() - start


def test_a_record_tells_what_its_plans_are_prepared_for() -> None:
    """Plan and rows of each cell, and of the plan for batches beside others up to the best bucket."""
    record = SignatureRecord({1: Chosen("a", 1, 1.0), 8: Chosen("a", 1, 8.0), 16: Chosen("b", 16, 9.0)})
    assert record.names == {1: "a", 8: "a (8 × 1)", 16: "b"}
    assert record.needed == {("a", 1), ("b", 16)}
    shared = replace(record, streams=2, shared="c", best_rows=8)
    assert shared.needed == {("a", 1), ("b", 16), ("c", 1), ("c", 8)}
