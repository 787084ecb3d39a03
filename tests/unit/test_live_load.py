"""What the load tests of the real server make of their records: goodput, memory, recovery, the best point of a grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from load_tests.fleet import markdown, put_between, spread
from load_tests.live import best_of_ways, points
from load_tests.live import table as live_table
from load_tests.overload import judge, table
from service.bench.clients import Answer
from service.bench.driving import Record, Trial, measure

OK, REFUSED, FAILED, UNANSWERED = Answer
MEMORY = [(float(place), 100.0 + place // 8) for place in range(10)]


def record() -> Record:
    """Ten seconds of overload at 10 a second, half of it refused, then ten seconds at 1, of which two are late."""
    due = [place / 10 for place in range(100)] + [10.0 + place for place in range(10)]
    answers = [OK, REFUSED] * 50 + [OK] * 10
    done = [at + 0.05 for at in due]
    done[0] += 1.0  # accepted, but late
    done[100] += 1.0
    done[101] += 1.0
    return Record(due, list(due), done, answers)


def test_an_overload_is_judged_by_what_came_in_time():
    """During it by goodput and p99 of what was accepted, after it by the last request that missed the goal."""
    found = judge(record(), peak_per_s=5.0, end_s=10.0, slo_s=0.1, memory=MEMORY)
    assert (found.offered_per_s, found.goodput_per_s, found.goodput_share) == pytest.approx((10.0, 4.9, 0.98))
    assert found.refused_share == pytest.approx(0.5)
    assert 50 < found.accepted_p99_ms < 1050
    assert (found.failed, found.recovery_s) == (0, 1.0)
    assert found.memory_growth == pytest.approx(1.01)
    text = table([found, replace(found, peak_per_s=7.0)], "five_ms", 100.0)
    assert text.splitlines()[2].startswith(
        "| five_ms | 1 | 100 | 5 / 7 / 7 | 10 / 10 / 10 | 5 / 5 / 5 | 0.70 / 0.98 / 0.98 |"
    )


def test_an_overload_that_leaves_nothing_behind_took_no_time():
    """And failures are counted, whenever they were."""
    calm = record()
    calm.done = [at + 0.05 for at in calm.due]
    calm.answers[3] = FAILED
    calm.answers[5] = UNANSWERED
    found = judge(calm, peak_per_s=5.0, end_s=10.0, slo_s=0.1, memory=[(0.0, 10.0)])
    assert (found.recovery_s, found.failed, found.memory_growth) == (0.0, 2, 1.0)


def trial(in_time: int) -> Trial:
    due = [place / 10 for place in range(10)]
    done = [at + (0.01 if place < in_time else 5.0) for place, at in enumerate(due)]
    return measure(Record(due, list(due), done, [OK] * 10), 10.0, 0.1, driver_cores=0.0, planned=10)


def test_the_grids_best_point_is_that_of_each_trace():
    """By the median of its goodput; the other ways have one point."""
    tried = points(100.0, 32)
    assert [point.way for point in tried] == ["none", *["fixed, best of grid"] * 4, "Kiln, slo_ms"]
    grid = [point.name for point in tried if point.way == "fixed, best of grid"]
    assert grid[0] == "fixed, best of grid --max-batch-rows 8 --batch-wait-ms 0"
    scores = {point.name: [trial(3)] * 3 for point in tried}
    scores[grid[1]] = [trial(4), trial(9), trial(9)]
    scores[grid[2]] = [trial(5), trial(5), trial(10)]
    best = best_of_ways({"poisson": scores}, tried)
    assert best["poisson"]["fixed, best of grid"] == scores[grid[1]]
    assert list(best["poisson"]) == ["none", "fixed, best of grid", "Kiln, slo_ms"]
    lines = live_table(best).splitlines()
    assert lines[3].startswith("| poisson | fixed, best of grid | 10 | 4 / 9 / 9 | 10.0 / 10.0 / 5,000.0 | ")
    assert len(lines) == 5


def test_a_table_is_put_between_its_marks(tmp_path: Path):
    """What else the file has stays; a file without the marks is told."""
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- live -->\nold\n<!-- /live -->\nafter\n")
    put_between(path, "live", markdown(("a", "b", "c"), [("1", "2", "3")]))
    assert path.read_text() == (
        "before\n<!-- live -->\n| a | b | c |\n| --- | --- | --: |\n| 1 | 2 | 3 |\n<!-- /live -->\nafter\n"
    )
    with pytest.raises(SystemExit, match="<!-- overload -->"):
        put_between(path, "overload", "text")


def test_a_spread_is_least_median_most():
    """In whatever order they came."""
    assert spread([3.0, 1.0, 2000.0], 1) == "1.0 / 3.0 / 2,000.0"
