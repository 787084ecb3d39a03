"""What the load tests decide: shapes, thresholds, and requests that mean the same in every protocol."""

from __future__ import annotations

import json

import numpy as np
import pytest

from load_tests.payloads import Target, grpc_raw, rest_binary, rest_json, tfserving_grpc, v2_binary, v2_json
from load_tests.shapes import SHAPES, Stage, now_in
from load_tests.thresholds import Thresholds, exceeded
from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2


@pytest.mark.parametrize("name", list(SHAPES))
def test_a_shape_reaches_its_peak_and_ends(name: str):
    """It takes the time given, has users from the start and never more than the peak."""
    stages = SHAPES[name](40, 100.0)
    users = [now_in(stages, second) for second in range(100)]
    counts = [found[0] for found in users if found is not None]
    assert len(counts) == 100
    assert (min(counts) >= 1, max(counts)) == (True, 40)
    assert all(found is not None and found[1] > 0 for found in users)
    assert now_in(stages, 100.0) is None


def test_shapes_differ():
    """Up in steps; up and down; level; up evenly."""
    assert [stage.users for stage in SHAPES["step"](40, 100.0)] == [10, 20, 30, 40]
    assert [stage.users for stage in SHAPES["spike"](40, 100.0)] == [4, 40, 4]
    assert SHAPES["soak"](40, 100.0) == [Stage(100.0, 40, 40)]
    assert len(SHAPES["ramp"](40, 100.0)) == 20
    assert [stage.users for stage in SHAPES["step"](1, 4.0)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("limits", "failures", "problems"),
    [
        (Thresholds(), 0, []),
        (Thresholds(), 1, ["1 of 100 requests failed, at most 0.00% may"]),
        (Thresholds(error_ratio=0.01), 1, []),
        (Thresholds(p95_ms=10, p99_ms=20), 0, []),
        (Thresholds(p95_ms=9), 0, ["p95 is 10.0 ms, at most 9.0 ms expected"]),
        (
            Thresholds(p95_ms=1, p99_ms=2),
            0,
            ["p95 is 10.0 ms, at most 1.0 ms expected", "p99 is 20.0 ms, at most 2.0 ms expected"],
        ),
    ],
)
def test_thresholds(limits: Thresholds, failures: int, problems: list[str]):
    """Each that is exceeded is named with its bound and what was measured."""
    assert exceeded(limits, requests=100, failures=failures, p95_ms=10.0, p99_ms=20.0) == problems


def test_a_run_without_requests_has_failed():
    """Nothing measured is nothing passed."""
    assert exceeded(Thresholds(1.0), requests=0, failures=0, p95_ms=0, p99_ms=0) == ["no request was sent"]


def test_all_protocols_carry_the_same_rows():
    """The rows of a seed are the same, and arrive as they were, to four digits where they are text."""
    target = Target("m", "x", (2, 3))
    row = target.rows(3, 7)[2]
    assert np.array_equal(row, target.rows(3, 7)[2])
    assert not np.array_equal(row, target.rows(3, 8)[2])
    assert row.shape == (1, 2, 3)
    (tensor,) = json.loads(v2_json("x", row))["inputs"]
    assert (tensor["name"], tensor["shape"], tensor["datatype"]) == ("x", [1, 2, 3], "FP32")
    np.testing.assert_allclose(tensor["data"], row.ravel(), atol=1e-4)
    body, header_bytes = v2_binary("x", row)
    assert body[header_bytes:] == row.tobytes()
    assert json.loads(body[:header_bytes])["inputs"][0]["parameters"] == {"binary_data_size": 24}
    assert rest_binary("m", "x", row).endswith(body)
    np.testing.assert_allclose(
        json.loads(rest_json("m", "x", row).partition(b"\r\n\r\n")[2])["instances"], row, atol=1e-4
    )
    predict = serving_pb2.PredictRequest.FromString(tfserving_grpc("m", "x", row))
    assert predict.inputs["x"].tensor_content == row.tobytes()
    assert [dim.size for dim in predict.inputs["x"].tensor_shape.dim] == [1, 2, 3]
    assert oip.ModelInferRequest.FromString(grpc_raw("m", "x", row)).raw_input_contents[0] == row.tobytes()
