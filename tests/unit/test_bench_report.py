"""What ``kiln bench`` tells: trials as figures, the JSON, the table, the plots, the progress."""

from __future__ import annotations

import io
import json
import math
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from service.bench.asked import Counters, ServerShare, parse_counters, parse_goal_ms, share
from service.bench.bench import conclude
from service.bench.clients import Answer
from service.bench.driving import Misses, Record, Trial, arrivals, measure
from service.bench.plot import scale_of, svg, terminal
from service.bench.progress import Progress
from service.bench.report import Capacity, Measured, Report, as_json, limit_of, table, trial_line

OK, REFUSED, FAILED, UNANSWERED = Answer
SERVER = ServerShare(0.5, 400.0, 3.5, 20.0, 300.0, 50.0, 10.0)


def trial(rate: float, p99_ms: float | None = 10.0, **more: Any) -> Trial:
    fields: dict[str, Any] = {
        "offered_per_s": rate, "in_time_per_s": rate, "p50_ms": 5.0, "p90_ms": 8.0, "max_ms": p99_ms,
        "p99_of_answered_ms": 9.0, "ok": 100,
        "refused": 0, "failed": 0, "unanswered": 0, "late_p99_ms": 0.1, "driver_cores": 0.2, "cut_short": False,
        "holds": True,
    } | more  # fmt: skip
    return Trial(rate_per_s=rate, p99_ms=p99_ms, **fields)


def report(*, interrupted: bool = False) -> Report:
    """Two protocols, of which one has an answer."""
    good = Capacity("rest-v2", 200.0, "goal", is_final=True)
    good.trials = [Measured(trial(rate, p99), SERVER) for rate, p99 in ((100.0, 8.0), (200.0, 12.0))]
    good.trials.append(Measured(trial(210.0, 60.0, holds=False, ok=300), SERVER))
    bad = Capacity("grpc-v2", None, "goal", "50 ms are not kept", is_final=True)
    bad.trials = [Measured(trial(4.0, None, holds=False, unanswered=2), None)]
    return Report("digits", "http://h:1", 50.0, 5.0, 2, [good, bad], interrupted)


def record(latencies: list[float], answers: list[Answer] | None = None) -> Record:
    due = [place / 100 for place in range(len(latencies))]
    done = [at + latency for at, latency in zip(due, latencies, strict=True)]
    return Record(due, list(due), done, answers or [OK] * len(latencies))


def test_a_trial_holds_while_99_of_100_are_in_time():
    """p99 counts every request, from when it was due."""
    assert measure(record([0.01] * 199 + [9.0]), 100.0, 0.05, driver_cores=0.1, planned=200).holds
    late = measure(record([0.01] * 190 + [0.07] * 10), 100.0, 0.05, driver_cores=0.1, planned=200)
    assert not late.holds
    assert (late.p50_ms, late.p99_ms, late.ok) == pytest.approx((10.0, 70.0, 200))
    assert late.in_time_per_s == pytest.approx(95.0)


@pytest.mark.parametrize("answer", [REFUSED, FAILED, UNANSWERED])
def test_what_was_not_answered_is_later_than_all(answer: Answer):
    """So that a server does not look better for what it refused; the percentile is then None."""
    found = measure(record([0.01] * 100, [OK] * 95 + [answer] * 5), 100.0, 0.05, driver_cores=0.1, planned=100)
    assert found.p50_ms == pytest.approx(10.0)
    assert (found.p99_ms, found.max_ms, found.holds) == (None, None, False)
    assert found.p99_of_answered_ms == pytest.approx(10.0)
    assert (found.ok, found.refused + found.failed + found.unanswered) == (95, 5)


def test_one_failure_is_one_too_many():
    """A refusal within the hundredth that may be late is none."""
    one = [OK] * 999 + [FAILED]
    assert not measure(record([0.01] * 1000, one), 100.0, 0.05, driver_cores=0.1, planned=1000).holds
    one[-1] = REFUSED
    assert measure(record([0.01] * 1000, one), 100.0, 0.05, driver_cores=0.1, planned=1000).holds


def test_a_trial_that_was_cut_short_does_not_hold():
    """Whatever the latencies of what was sent; nothing sent is nothing held."""
    found = measure(record([0.01] * 10), 100.0, 0.05, driver_cores=0.1, planned=500)
    assert (found.cut_short, found.holds) == (True, False)
    none = measure(Record(), 100.0, 0.05, driver_cores=0.1, planned=1)
    assert (none.p99_ms, none.late_p99_ms, none.holds) == (None, 0.0, False)


def test_misses_are_counted_once():
    """More than so many, of which each is late or no success."""
    misses = Misses(0.05, 2.0)
    grown = record([0.01, 0.06, 0.06])
    assert not misses(grown)
    assert not misses(grown)
    for values, value in ((grown.due, 0.0), (grown.sent, 0.0), (grown.done, 0.0)):
        values.append(value)
    grown.answers.append(REFUSED)
    assert misses(grown)


def test_arrivals_are_those_of_their_seed():
    """In order, as many as the rate says, at least one."""
    times = arrivals(100.0, 5.0, 3)
    assert len(times) == 500
    assert (times[1:] >= times[:-1]).all()
    assert 0 <= times[0] <= times[-1] < 5
    assert (times == arrivals(100.0, 5.0, 3)).all()
    assert not (times == arrivals(100.0, 5.0, 4)).all()
    assert len(arrivals(0.01, 1.0)) == 1


def test_the_json_has_all_figures():
    """By fixed names, with null for what there is not."""
    told = json.loads(json.dumps(as_json(report()), allow_nan=False))
    good, bad = told.pop("protocols")
    assert told == {
        "model": "digits", "url": "http://h:1", "slo_ms": 50.0, "seconds": 5.0, "rows": 2, "interrupted": False
    }  # fmt: skip
    keys = {"protocol", "capacity_per_s", "rows_per_s", "limit", "error", "is_final", "at_capacity", "trials"}
    assert set(good) == set(bad) == keys
    assert (good["capacity_per_s"], good["rows_per_s"], good["limit"], good["error"]) == (200.0, 400.0, "goal", None)
    assert (bad["capacity_per_s"], bad["rows_per_s"], bad["at_capacity"], bad["error"]) == (
        None, None, None, "50 ms are not kept",
    )  # fmt: skip
    assert good["at_capacity"] == good["trials"][1]
    assert set(good["trials"][0]) == {
        "rate_per_s", "offered_per_s", "in_time_per_s", "p50_ms", "p90_ms", "p99_ms", "max_ms", "p99_of_answered_ms",
        "ok", "refused",
        "failed", "unanswered", "late_p99_ms", "driver_cores", "cut_short", "holds", "server",
    }  # fmt: skip
    assert good["trials"][0]["server"] == {
        "cores": 0.5, "cpu_us": 400.0, "batch_rows": 3.5, "decode_us": 20.0, "queue_us": 300.0, "execute_us": 50.0,
        "encode_us": 10.0,
    }  # fmt: skip
    assert (bad["trials"][0]["p99_ms"], bad["trials"][0]["server"]) == (None, None)


def test_the_table_tells_of_each_protocol_and_what_went_wrong():
    """The highest rate that held, rows per batch and the CPU on both sides."""
    lines = table(report(interrupted=True)).splitlines()
    assert lines[1].split() == "rest-v2 200 5.00 12.00 3.5 0.50 0.20 400 20 300 50 10 goal".split()
    assert lines[2].split() == ["grpc-v2", *["–"] * 11, "goal"]
    assert lines[3:] == ["grpc-v2: 50 ms are not kept", "interrupted: this is what was measured until then"]
    unfinished = report()
    unfinished.protocols[0].is_final = False
    unfinished.protocols[0].trials = [Measured(trial(100.0), None)]
    assert table(unfinished).splitlines()[1].startswith("rest-v2 (so far)         100")
    assert not unfinished.is_complete


@pytest.mark.parametrize(
    ("failed", "limit"),
    [
        (trial(300.0, 80.0, holds=False), "goal"),
        (trial(300.0, None, holds=False, refused=50), "refusals"),
        (trial(300.0, None, holds=False, failed=1), "failures"),
        (trial(300.0, 80.0, holds=False, late_p99_ms=13.0), "driver"),
        (trial(300.0, 80.0, holds=False, driver_cores=0.95), "driver"),
    ],
)
def test_why_the_next_rate_did_not_hold(failed: Trial, limit: str):
    """The driver is suspected first: its own lateness is measured."""
    assert limit_of(failed, 50.0) == limit
    capacity = Capacity("rest-v2", 200.0, trials=[Measured(trial(200.0), None), Measured(failed, None)])
    conclude(capacity, 50.0)
    assert (capacity.limit, capacity.error) == (limit, "")
    text = table(Report("m", "u", 50.0, 1.0, 1, [capacity]))
    assert ("the driver is the limit, not the server: at 300 requests/s it sent" in text) == (limit == "driver")


def test_a_goal_out_of_reach_is_told_with_what_was_seen():
    """The lowest rate, the lowest p99, failures, and whether the driver was late."""
    capacity = Capacity("rest-v2")
    capacity.trials = [Measured(trial(16.0, 9.0, holds=False), None), Measured(trial(4.0, 7.5, holds=False), None)]
    conclude(capacity, 5.0)
    assert (
        capacity.error == "5 ms are not kept even at 4.0 requests/s, the lowest tried; the lowest p99 seen is 7.50 ms"
    )
    worse = Capacity("rest-v2")
    worse.trials = [Measured(trial(4.0, None, holds=False, failed=3, late_p99_ms=4.0), None)]
    conclude(worse, 5.0)
    assert worse.error == (
        "5 ms are not kept even at 4.0 requests/s, the lowest tried; requests were refused or not answered; "
        "up to 3 requests of a trial failed; the driver itself was late by up to 4.00 ms (p99)"
    )


def test_a_trial_in_a_few_words():
    """With what was not answered, by kind."""
    assert trial_line("rest-v2", Measured(trial(1000.0), None)) == "rest-v2: 1,000/s holds: p99 10.00 ms"
    bad = trial(4.0, None, holds=False, refused=1, failed=2, unanswered=3)
    assert trial_line("grpc-v2", Measured(bad, None)) == (
        "grpc-v2: 4/s does not hold: p99 without answer, 1 refused, 2 failed, 3 unanswered"
    )


def test_the_plot_on_a_terminal():
    """A mark for each trial at its place, the goal as a dashed line, a key."""
    told = report()
    lines = terminal(told, columns=40, lines=12).splitlines()
    assert lines[0] == "p99 ms, goal 50 ms (- -)"
    grid = [line[10:] for line in lines[1:13]]
    assert sum(line.count("o") for line in grid) == 3
    places = {line.index("o"): row for row, line in enumerate(grid) if "o" in line}
    assert [places[column] for column in sorted(places)] == sorted(places.values(), reverse=True)
    dashed = next(row for row, line in enumerate(grid) if line.startswith("- - -"))
    assert places[max(places)] <= dashed < places[min(places)]
    assert lines[1 + dashed].startswith("      50 |")
    assert lines[-1].split() == ["o", "rest-v2", "x", "grpc-v2"]
    assert "100" in lines[-2]
    told.protocols = told.protocols[1:]
    assert not terminal(told)


def test_the_plot_as_svg():
    """A document with a point for each trial that has a p99, and names that are escaped."""
    told = report()
    told.model = "a<b"
    root = ET.fromstring(svg(told))
    name = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{name}circle")
    assert len(circles) == 3
    xs, ys = ([float(circle.attrib[key]) for circle in circles] for key in ("cx", "cy"))
    assert xs == sorted(xs)
    assert ys == sorted(ys, reverse=True)
    assert all(64 <= x <= 490 for x in xs)
    texts = [element.text for element in root.iter(f"{name}text")]
    assert {"goal 50 ms", "rest-v2", "grpc-v2", "requests/s to a<b"} <= set(texts)


def test_a_scale_holds_its_values():
    """With a tick at least, even for one value or none; what lies beyond an end lies at the end."""
    for values in ([3.0], [], [1.0, 1000.0], [0.0, 2.0]):
        scale = scale_of(values)
        assert all(0 < scale.share(value) < 1 for value in values if value > 0)
        assert list(scale.ticks())
    assert (scale.share(0.0), scale.share(math.inf)) == (0.0, 1.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_alone():
    """It is written over, and lines stay above it."""
    stream = Terminal()
    progress = Progress(stream)
    progress.bar(0.5, "half")
    progress.tell("a line")
    progress.bar(2.0, "all")
    progress.end()
    bar = "[############............]  50% half"
    assert stream.getvalue().startswith(f"{bar}\r{' ' * len(bar)}\ra line\n[{'#' * 24}] 100% all\r")
    plain = io.StringIO()
    progress = Progress(plain)
    progress.bar(0.5, "half")
    progress.tell("a line")
    progress.end()
    assert plain.getvalue() == "a line\n"


PAGE = """\
# TYPE kiln_ready gauge
kiln_ready 1
# TYPE process_cpu_seconds counter
process_cpu_seconds_total 12.5
# TYPE kiln_batch_rows histogram
kiln_batch_rows_bucket{model="a",version="1",le="+Inf"} 4
kiln_batch_rows_sum{model="a",version="1"} 10
kiln_batch_rows_count{model="a",version="1"} 4
kiln_batch_rows_sum{model="a",version="2"} 6
kiln_batch_rows_count{model="a",version="2"} 4
kiln_batch_rows_sum{model="b",version="1"} 99
# TYPE kiln_encode_seconds summary
kiln_encode_seconds_sum{model="a",version="1",protocol="rest-v2"} 0.5
kiln_encode_seconds_count{model="a",version="1",protocol="rest-v2"} 20
kiln_encode_seconds_count{model="a",version="1",protocol="grpc-v2"} 7
# TYPE kiln_slo_seconds gauge
kiln_slo_seconds{model="a"} 0.025
"""


def test_counters_are_those_of_a_model_and_a_protocol():
    """Over all its versions; the CPU time is the process's."""
    found = parse_counters(PAGE, "a", "rest-v2")
    assert found == Counters(12.5, 8.0, 16.0, 0.0, 0.0, 0.0, 0.5, 20.0)
    assert parse_counters("", "a", "rest-v2") is None
    assert parse_counters("process_cpu_seconds_total 3\n", "a", "rest-v2") is None
    assert (parse_goal_ms(PAGE, "a"), parse_goal_ms(PAGE, "b")) == (25.0, None)


def test_a_share_is_the_difference_of_two_counts():
    """By request and by batch, and nothing where there were none."""
    before = Counters(1.0, 10, 20, 0.1, 0.2, 0.3, 0.4, 100)
    after = Counters(3.0, 20, 60, 0.2, 0.4, 0.31, 0.42, 200)
    found = share(before, after, 4.0)
    assert (found.cores, found.cpu_us, found.batch_rows) == pytest.approx((0.5, 20_000, 4.0))
    assert (found.queue_us, found.execute_us, found.decode_us, found.encode_us) == pytest.approx((1000, 2000, 100, 200))
    assert share(before, before, 4.0) == ServerShare(0.0, None, None, None, None, None, None)
