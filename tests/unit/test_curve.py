"""What batches take: measured, learned, guessed."""

from __future__ import annotations

import math

import pytest

from service.batching.curve import Curve


def _unknown(rows: int) -> float:
    return math.inf


def _measured(rows: int) -> float:
    return 0.004 + 0.001 * rows if rows <= 8 else math.inf


def test_before_any_run_the_plans_measurement_holds():
    """Mean as measured, and a tenth of it as spread."""
    curve = Curve(_measured)
    assert curve.expected_s(4) == pytest.approx(0.008)
    assert curve.late_s(4) == pytest.approx(0.008 * 1.3)


def test_runs_correct_their_bucket_and_the_others_in_proportion():
    """What always takes twice as long as measured is expected to, in buckets that never ran as well."""
    curve = Curve(_measured)
    for _ in range(60):
        curve.learn(8, 0.024)
    assert curve.expected_s(8) == pytest.approx(0.024, rel=0.01)
    assert curve.expected_s(2) == pytest.approx(0.012, rel=0.01)


def test_the_spread_is_that_of_the_runs():
    """Steady runs leave little of it, runs that vary more, but not without bound."""
    steady, varied = Curve(_measured), Curve(_measured)
    for number in range(100):
        steady.learn(4, 0.008)
        varied.learn(4, 0.004 if number % 2 else 0.012)
    assert steady.late_s(4) == pytest.approx(0.008, rel=0.01)
    assert varied.late_s(4) == pytest.approx(varied.expected_s(4) * 1.75)


def test_a_stall_is_no_new_curve_but_a_slower_machine_is():
    """One run of a second moves the estimate by less than a third; many do move it."""
    curve = Curve(_measured)
    curve.learn(4, 1.0)
    assert 0.008 < curve.expected_s(4) < 0.011
    for _ in range(100):
        curve.learn(4, 1.0)
    assert curve.expected_s(4) == pytest.approx(1.0, rel=0.01)


def test_a_size_that_had_a_stall_is_not_shunned_for_good():
    """While only other sizes run, its estimate follows theirs."""
    curve = Curve(_measured)
    for _ in range(20):
        curve.learn(8, 1.0)
    assert curve.expected_s(8) > 0.05
    for _ in range(300):
        curve.learn(4, 0.008)
    assert curve.expected_s(8) == pytest.approx(0.012, rel=0.02)
    assert curve.late_s(8) == pytest.approx(0.012, rel=0.02)


def test_what_was_never_measured_is_learned():
    """Nothing is expected of the unknown; after a run other sizes are guessed from it, the smaller not as less."""
    curve = Curve(_unknown)
    assert (curve.expected_s(16), curve.late_s(16)) == (0.0, 0.0)
    curve.learn(16, 0.01)
    assert curve.expected_s(16) == 0.01
    assert curve.late_s(16) == pytest.approx(0.013)
    assert curve.expected_s(64) == pytest.approx(0.04)
    assert curve.expected_s(1) == 0.01
    curve.learn(16, 0.01)
    assert curve.expected_s(16) == pytest.approx(0.01)
