"""What is told of plans: as JSON has it, and as a table for people."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from service.extensions.plans import plans_of, plans_table
from service.runtime.records import Chosen, Difference, Measured, SignatureRecord

INF = float("inf")
RECORD = SignatureRecord(
    chosen={1: Chosen("openvino-1", 1, 0.0005, 0.0005), 8: Chosen("openvino-1", 1, 0.004, 0.004)},
    measured=(
        Measured("signature", 1, 0.001, 0.0011, Difference(), 0.0, 0),
        Measured("openvino-1", 1, 0.0005, 0.0005, Difference(2e-7, INF), 0.25, 3_000_000),
        Measured("signature", 8, 0.006, 0.006, Difference(), 0.0, 0),
        Measured("openvino-1", 8, 0.007, 0.007, Difference(3e-7, 4e-6), 0.5, 4_000_000),
    ),
    left_out={"xla": "refused at 1 rows: output 'y' differs by up to 0.5"},
    best_rows=1,
    streams=2,
    shared="openvino-2x1",
    rows_per_s=4321.0,
    ranges={"ids": (0, 99)},
    invariance=Difference(1e-7, 2e-6),
)


def test_all_of_a_record_is_told_as_json() -> None:
    """Times in µs; a difference that is no number is null, for JSON has none such."""
    told = plans_of({"serving_default": RECORD})["serving_default"]
    assert told["chosen"] == {
        "1": {"plan": "openvino-1", "us": 500.0},
        "8": {"plan": "openvino-1 (8 × 1)", "us": 4000.0},
    }
    assert told["measured"][1] == {
        "plan": "openvino-1",
        "rows": 1,
        "us": 500.0,
        "cpu_us": 500.0,
        "largest_difference": {"absolute": 2e-7, "relative": None},
        "compile_s": 0.25,
        "memory_bytes": 3_000_000,
        "chosen": True,
    }
    assert [m["chosen"] for m in told["measured"]] == [False, True, False, False]
    assert told["left_out"] == RECORD.left_out
    assert (told["best_rows"], told["streams"], told["shared"]) == (1, 2, "openvino-2x1")
    assert told["ranges"] == {"ids": [0, 99]}
    assert told["batch_difference"] == {"absolute": 1e-7, "relative": 2e-6}
    json.dumps(told, allow_nan=False)


def test_what_was_not_measured_is_null() -> None:
    """Before planning, a plan's time may not be known."""
    told = plans_of({"s": SignatureRecord({1: Chosen("signature", 1, INF)}, note="stateful")})["s"]
    assert told["chosen"] == {"1": {"plan": "signature", "us": None}}
    assert (told["measured"], told["note"]) == ([], "stateful")
    json.dumps(told, allow_nan=False)


def test_the_table_has_a_line_for_each_plan_and_bucket() -> None:
    """The fastest first in each bucket, the chosen one marked, also where a bucket is cut into pieces."""
    lines = plans_table(RECORD).splitlines()
    assert lines[0].split("  ")[0] == "plan"
    cells = [line.split() for line in lines[1:5]]
    assert [cell[:4] for cell in cells] == [
        ["openvino-1", "1", "500", "2,000"],
        ["signature", "1", "1,000", "1,000"],
        ["signature", "8", "6,000", "1,333"],
        ["openvino-1", "8", "7,000", "1,143"],
    ]
    assert cells[0][4:] == ["2.0e-07", "0.25", "3", "*"]
    assert cells[1][4:] == ["0.00", "0"]
    assert lines[4].endswith("* in pieces of 1")


def test_the_notes_say_the_rest() -> None:
    """What was left out and why, the best batch, streams, ranges, and how far company changes an answer."""
    assert plans_table(RECORD).splitlines()[5:] == [
        "xla: refused at 1 rows: output 'y' differs by up to 0.5",
        "batches of 1 rows give the most rows/s",
        "2 batches at once, those beside another by openvino-2x1: 4,321 rows/s",
        "ids: integers beyond 0 to 99 are left to the signature plan",
        "rows alone against the same rows in batches: at most 1.0e-07 apart, relative 2.0e-06",
    ]


@pytest.mark.parametrize(("seconds", "us", "rate"), [(0.002, "2,000", "2,000"), (INF, "?", "?")])
def test_a_signature_that_is_not_planned_has_its_own_plan(seconds: float, us: str, rate: str) -> None:
    """With its first estimate, if there is one, and the reason why there is no more."""
    record = SignatureRecord({4: Chosen("signature", 4, seconds)}, note="stateful")
    lines = plans_table(record).splitlines()
    assert lines[1].split() == ["signature", "4", us, rate, "0.00", "0", "*"]
    assert lines[2] == "note: stateful"


def test_a_bucket_that_was_measured_and_not_chosen_has_no_mark() -> None:
    """A record whose buckets are fewer than what was measured is told all the same."""
    lines = plans_table(replace(RECORD, chosen={1: RECORD.chosen[1]})).splitlines()
    assert [line.endswith("*") for line in lines[1:5]] == [True, False, False, False]
