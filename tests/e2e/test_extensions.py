"""Triton's extensions as tritonclient uses them, against a server with a real model and names of its classes."""

from __future__ import annotations

import http.client
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import CLIENTS, Digits, Start, run_python
from tests.e2e.process import DIGITS

_ROWS = 5
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def seen(start: Start, digits: Digits, tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """What the client reports over a protocol."""
    models = tmp_path / "models"
    shutil.copytree(DIGITS, models / "digits" / "1")
    (models / "digits" / "labels.txt").write_text("\n".join(_NAMES) + "\n")
    server = start(models)
    np.save(tmp_path / "images.npy", digits.images[:_ROWS])
    port = server.rest_port if request.param == "http" else server.grpc_port
    client = CLIENTS / "triton_extensions.py"
    return json.loads(run_python(client, request.param, f"127.0.0.1:{port}", tmp_path / "images.npy").stdout)


@pytest.mark.parametrize("seen", ["http", "grpc"], indirect=True)
def test_what_tritonclient_sees(seen: Any, digits: Digits):
    """Classes with names, hints, statistics, configuration, log and trace settings; a stream over gRPC."""
    expected = digits.probabilities[:_ROWS]
    for row, texts in zip(expected, seen["classes"], strict=True):
        parts = [text.split(":") for text in texts]
        assert [int(index) for _, index, _ in parts] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([float(score) for score, _, _ in parts], np.sort(row)[::-1][:3], atol=1e-4)
        assert [name for _, _, name in parts] == [_NAMES[int(index)] for _, index, _ in parts]
    assert "parameter timeout (µs): a whole number of at least 0 expected, got -1" in seen["refused"]
    assert "the deadline passed" in seen["late"]

    statistics = seen["statistics"]
    assert (statistics["name"], statistics["version"], seen["all statistics"]) == ("digits", "1", 1)
    assert (int(statistics["inference_count"]), int(statistics["execution_count"])) == (_ROWS, 1)
    assert int(statistics["inference_stats"]["success"]["count"]) == 1
    assert int(statistics["inference_stats"]["compute_infer"]["ns"]) > 0
    assert [int(size["batch_size"]) for size in statistics["batch_stats"]] == [_ROWS]
    assert int(statistics["memory_usage"][0]["byte_size"]) > 0

    config = seen["config"]
    assert (config["name"], config["max_batch_size"]) == ("digits", 64)
    assert [int(size) for size in config["input"][0]["dims"]] == [8, 8, 1]
    assert (config["output"][0]["data_type"], config["output"][0]["label_filename"]) == ("TYPE_FP32", "labels.txt")

    assert [_verbosity(seen[name]) for name in ("log", "log after")] == [1, 0]
    assert "log_file" in seen["log refused"]
    assert _levels(seen["trace"]) == _levels(seen["model trace"]) == ["OFF"]
    assert "requests are not traced" in seen["trace refused"]


def _verbosity(settings: Any) -> int:
    """From either protocol's form."""
    value = settings.get("settings", settings)["log_verbose_level"]
    return int(value["uint32_param"] if isinstance(value, dict) else value)


def _levels(settings: Any) -> list[str]:
    value = settings.get("settings", settings)["trace_level"]
    return list(value["value"] if isinstance(value, dict) else value)


@pytest.mark.parametrize("seen", ["grpc"], indirect=True)
def test_a_stream_of_tritonclient(seen: Any, digits: Digits):
    """Answers in the order of the requests, an error in its place, the final mark where it was asked for."""
    classes = digits.probabilities[:_ROWS].argmax(axis=1).tolist()
    wrong = seen["stream"].pop(1)
    assert "Servable not found for request: Latest(nothing)" in wrong
    assert seen["stream"] == [[str(number), classes[number], number == 2] for number in (0, 2, 3, 4)]


def test_head_has_no_body(server: Any):
    """A probe that sends HEAD gets the status alone, and its connection goes on."""
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=30)
    for path in ("/v2/health/ready", "/v2/health/live", "/v2/"):
        connection.request("HEAD", path)
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
    connection.close()
