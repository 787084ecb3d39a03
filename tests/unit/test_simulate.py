"""The simulator and its parts, on small cases whose outcome can be told beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from load_tests import simulate as simulation
from load_tests.contenders import Aimd, Contender, Fixed, Line
from load_tests.simulate import Curve, contenders, read_curve, simulate
from load_tests.traces import TRACES, from_file

FLAT = Curve({1: 0.01, 8: 0.01})
STEEP = Curve({1: 0.01, 8: 0.04})


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take exactly what the curve says."""
    monkeypatch.setattr(simulation, "_SPREAD", 0.0)
    monkeypatch.setattr(simulation, "_STALL", 1.0)


def run(contender: Contender, arrivals: list[float], curve: Curve = FLAT, slo_s: float = 0.1) -> simulation.Outcome:
    return simulate(np.array(arrivals), contender, curve, slo_s=slo_s, seconds=1.0, seed=0)


@pytest.mark.parametrize("name", list(TRACES))
def test_traces_are_in_order_of_their_rate_and_the_same_for_a_seed(name: str):
    """Within the length, about as many as the rate says, other ones for another seed but where they are constant."""
    trace = TRACES[name]
    times = trace(200.0, 100.0, 3)
    assert np.all(np.diff(times) >= 0)
    assert 0 <= times[0] < times[-1] <= 100
    assert 10_000 < len(times) < 40_000
    assert np.array_equal(times, trace(200.0, 100.0, 3))
    assert np.array_equal(times, trace(200.0, 100.0, 4)) == (name == "constant")


def test_a_trace_comes_from_a_file(tmp_path: Path):
    """One time a line, empty lines left out, counted from the first."""
    file = tmp_path / "trace.txt"
    file.write_text("5\n5.5\n\n7\n")
    assert from_file(file).tolist() == [0.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\nx\n", r":2: seconds expected, got 'x'"),
        ("2\n1\n", r":2: no earlier time than the one before expected, got '1'"),
        ("inf\n", r":1: no earlier time .* got 'inf'"),
        ("\n", "no arrivals"),
    ],
)
def test_a_broken_trace_is_refused(tmp_path: Path, text: str, message: str):
    """With the line and what came."""
    file = tmp_path / "trace.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        from_file(file)


def test_without_batching_each_waits_for_all_before_it():
    """Three at once take one, two and three runs."""
    found = run(Fixed(1), [0.0, 0.0, 0.0])
    assert (found.answered, found.refused, found.batch_rows) == (3, 0, 1.0)
    assert found.p50_ms == pytest.approx(20)


def test_a_fixed_batch_waits_until_it_is_full_or_its_time_is_over():
    """The fourth fills the batch at once; a fifth waits alone for the time."""
    found = run(Fixed(4, wait_s=0.02), [0.0, 0.001, 0.002, 0.003, 0.05])
    assert found.batch_rows == 2.5
    assert found.p99_ms == pytest.approx(30, abs=1)


def test_a_full_queue_refuses():
    """What finds no room counts as refused, and is no latency."""
    found = run(Fixed(1, queue_rows=2), [0.0] * 5)
    assert (found.answered, found.refused) == (3, 2)


def test_goodput_counts_what_is_in_time():
    """Of ten one after another six are answered within 60 ms."""
    assert run(Fixed(1), [0.0] * 10, slo_s=0.0605).goodput_per_s == 6


def test_aimd_grows_while_the_goal_is_kept_and_shrinks_when_it_is_not():
    """Two rows more after each batch in time; a tenth less after each that was not, but one row at least."""
    contender = Aimd(8, 0.03, "serving_default")
    run(contender, [0.0] * 40, slo_s=0.03)
    assert contender._rows == 8
    slow = Aimd(8, 0.001, "serving_default")
    run(slow, [0.0] * 5, slo_s=0.001)
    assert slow._rows == 1


def test_the_line_is_learned():
    """From runs of different sizes a and b are what the curve was made of."""
    contender = Line(8, 1.0)
    run(contender, np.cumsum(np.random.default_rng(1).exponential(0.01, 300)).tolist(), STEEP, slo_s=1.0)
    assert contender._a == pytest.approx(0.03 / 7, rel=0.01)
    assert contender._b == pytest.approx(0.01 - 0.03 / 7, rel=0.02)


def test_the_line_drops_what_would_be_late():
    """Behind a long queue it answers some in time rather than all too late."""
    found = run(Line(2, 0.1), [0.0] * 200)
    assert found.refused > 100
    assert found.answered + found.refused == 200


def test_with_a_goal_all_that_is_let_in_is_in_time():
    """At twenty times of what can be run, with exact run times."""
    arrivals = TRACES["poisson"](20 * STEEP.best_rows_per_s, 3.0, 1)
    (goal,) = contenders(STEEP, 0.15)["Kiln, slo_ms"]()
    found = simulate(arrivals, goal, STEEP, slo_s=0.15, seconds=3.0, seed=1)
    assert found.p99_ms is not None
    assert found.p99_ms <= 150
    assert found.goodput_per_s >= 0.95 * STEEP.best_rows_per_s


def test_with_a_goal_nothing_is_slower_at_low_load():
    """A request that finds the runner free takes as long as alone."""
    (goal,) = contenders(STEEP, 0.15)["Kiln, slo_ms"]()
    found = run(goal, [0.0, 0.1, 0.2, 0.3], STEEP, slo_s=0.15)
    assert found.p99_ms == pytest.approx(10)


def test_the_deferred_one_waits_for_the_last_moment():
    """Its requests are in time, but late."""
    (deferred,) = contenders(STEEP, 0.15)["Kiln, deferred"]()
    found = run(deferred, [0.0, 0.01], STEEP, slo_s=0.15)
    assert found.batch_rows == 2
    assert found.p99_ms is not None
    assert 90 < found.p99_ms <= 150


def test_curves_are_read_from_plans_too(tmp_path: Path):
    """A record of the plan cache is taken as it is."""
    record = {"plans": {"serving_default": {"chosen": {"1": {"seconds": 0.5}, "4": {"seconds": 1.0}}}}}
    (tmp_path / "record.json").write_text(json.dumps(record))
    curve = read_curve(tmp_path / "record.json")
    assert (curve.most_rows, curve.best_rows_per_s) == (4, 4.0)
    assert curve.true_s(2) == pytest.approx(2 / 3)
    assert curve.bucket_s(simulation._LANE, 2) == 1.0
    assert curve.bucket_s(simulation._LANE, 5) == float("inf")


def test_the_command_writes_the_same_for_the_same_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A table, its figures as JSON and a plot; a Kiln behind the best of the grid is told of by name and exit code."""
    monkeypatch.setattr(simulation, "_MOST_ARRIVALS", 60)
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        code = simulation.main(["--seconds", "1", "--out", str(out), "--seed", "5"])
        told = capsys.readouterr().out
        assert "| poisson 2 | Kiln, slo_ms |" in told
        assert code == ("behind the best point of the grid" in told)
    for name in ("simulation.json", "simulation.svg"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
