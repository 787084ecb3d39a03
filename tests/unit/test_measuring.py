"""How long batches take, on a clock that the jobs move."""

from __future__ import annotations

import math

import pytest

from service.runtime import measuring
from service.runtime.measuring import UNKNOWN, measure, rows_per_s
from tests.unit.plan_fakes import Machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(measuring, "time", machine)
    return machine


class Job:
    """A batch that takes `seconds`, and more in the runs of `disturbed`."""

    def __init__(self, machine: Machine, seconds: float, threads: float = 1.0) -> None:
        self.machine, self.seconds, self.threads = machine, seconds, threads
        self.disturbed: dict[int, float] = {}
        self.runs = 0

    def __call__(self) -> None:
        self.machine.work(self.seconds + self.disturbed.get(self.runs, 0.0), self.threads)
        self.runs += 1


def test_a_cost_is_wall_and_processor_time(machine: Machine) -> None:
    """A batch on two threads takes twice its time of the processors."""
    cost = measure({"a": Job(machine, 0.01, threads=2.0)})["a"]
    assert [cost.seconds, cost.cpu_s] == pytest.approx([0.01, 0.02])
    assert math.isinf(UNKNOWN.seconds)


def test_plans_are_timed_in_turn(machine: Machine) -> None:
    """What disturbs one run of each disturbs none of the costs, and the ratio least."""
    a, b = Job(machine, 0.001), Job(machine, 0.002)
    a.disturbed = b.disturbed = {0: 0.25, 4: 0.1}
    costs = measure({"a": a, "b": b})
    assert costs["a"].seconds == pytest.approx(0.001)
    assert costs["b"].seconds == pytest.approx(0.002)


def test_slow_plans_are_timed_few_times(machine: Machine) -> None:
    """A third of a second for each plan, or one run; quick plans are timed 15 times, after a run that is not."""
    slow, quick = Job(machine, 1.0), Job(machine, 0.001)
    measure({"slow": slow})
    measure({"quick": quick})
    assert (slow.runs, quick.runs) == (1, 15 + 14)


def test_a_hopeless_plan_is_timed_three_times(machine: Machine) -> None:
    """Four times slower than the fastest is known from three runs, which leaves the time to the others."""
    slow, quick = Job(machine, 0.05), Job(machine, 0.001)
    costs = measure({"quick": quick, "slow": slow})
    assert (slow.runs, quick.runs) == (3, 15 + 14)
    assert costs["slow"].seconds == pytest.approx(0.05)


def test_slow_plans_that_are_close_are_timed_three_times(machine: Machine) -> None:
    """One disturbed run must not decide between them; a plan that cannot win is not run for that."""
    first, second, behind = Job(machine, 1.0), Job(machine, 1.1), Job(machine, 1.5)
    first.disturbed = {0: 0.3}
    costs = measure({"first": first, "second": second, "behind": behind})
    assert (first.runs, second.runs, behind.runs) == (3, 3, 1)
    assert costs["first"].seconds < costs["second"].seconds


def test_a_plan_is_not_charged_for_the_threads_of_another(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that spin after their own run have come to rest before the next plan's."""
    spins = 0.0

    def sleep(seconds: float) -> None:
        nonlocal spins
        machine.work(seconds, 1.0 if spins > 0 else 0.0)
        spins -= seconds

    def spinning() -> None:
        nonlocal spins
        machine.work(0.001, 2.0)
        spins = 0.002

    monkeypatch.setattr(machine, "sleep", sleep)
    quiet = Job(machine, 0.001)
    costs = measure({"spinning": spinning, "quiet": quiet})
    assert costs["quiet"].cpu_s == pytest.approx(0.001)
    assert costs["spinning"].cpu_s == pytest.approx(0.0022)


def test_a_disturbed_machine_is_given_more_rounds(machine: Machine) -> None:
    """Where the fastest plan's runs are far apart three times as many are made."""
    job = Job(machine, 0.001)
    job.disturbed = dict.fromkeys(range(0, 60, 4), 0.001) | {2: 0.001, 6: 0.001}
    assert measure({"a": job}, seconds_per_plan=10.0)["a"].seconds == pytest.approx(0.001)
    assert 15 + 14 < job.runs <= 45 + 44


def test_what_a_job_raises_is_raised(machine: Machine) -> None:
    """Whoever measures decides what a failure means."""

    def job() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        measure({"a": job})


@pytest.mark.parametrize("streams", [1, 2])
def test_rows_a_second_are_counted_over_all_streams(machine: Machine, streams: int) -> None:
    """Every thread's runs count; the fake machine has one processor, so that two are no faster."""
    assert rows_per_s(Job(machine, 0.01), 4, streams) == pytest.approx(400, rel=0.1)
