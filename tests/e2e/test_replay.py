"""The request log and the log of a real server, and what Locust makes of it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.process import MODELS, ROOT, Server, environment
from tests.e2e.test_start import run_serve

DIGIT = json.loads((MODELS / "digits" / "example.json").read_text())


@pytest.mark.timeout(400)
def test_what_was_asked_is_asked_again(tmp_path: Path):
    """Kept by one server until its end, told of in its log, and answered by the next one without a failure."""
    folder = tmp_path / "kept"
    plain = ("--plan", "signature", "--cache-dir", tmp_path / "cache")
    keep = ("--request-log", folder, "--request-log-share", "1", "--access-log", "--log-format", "json")
    first = Server(MODELS / "digits", *plain, *keep, log=tmp_path / "first.log")
    try:
        first.wait_ready()
        for _ in range(3):
            assert first.predict(DIGIT)[0] == 200
        first.request("POST", "/v1/models/digits:predict", b"{}", {"X-Request-Id": "r-1", "Authorization": "secret"})
        first.signal()
        assert first.exit_code() == 0
    finally:
        first.kill()
    lines = [json.loads(line) for line in first.log.splitlines() if line.startswith('{"time"')]
    access = [line for line in lines if line["logger"] == "kiln.access"]
    assert [line["code"] for line in access] == ["ok", "ok", "ok", "invalid_argument"]
    assert access[-1]["request_id"] == "r-1"
    assert "secret" not in first.log
    (path,) = folder.glob("digits/*/requests-*.tfrecord")
    second = Server(MODELS / "digits", *plain, log=tmp_path / "second.log")
    try:
        second.wait_ready()
        command = [
            sys.executable,
            "-m",
            "locust",
            "--locustfile",
            "load_tests/replay.py",
            "--headless",
            "--users",
            "2",
            "--spawn-rate",
            "2",
        ]
        command += [
            "--host",
            f"http://127.0.0.1:{second.rest_port}",
            "--run-time",
            "10s",
            "--csv",
            str(tmp_path / "report"),
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment({"REPLAY": str(path)}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    finally:
        second.kill()
    with (tmp_path / "report_stats.csv").open() as file:
        total = list(csv.DictReader(file))[-1]
    assert int(total["Request Count"]) > 3
    assert total["Failure Count"] == "0"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--otlp-endpoint", "collector"), "otlp_endpoint: a URL as http://host:4318 expected, got 'collector'"),
        (("--request-log", "/dev/null/x"), "request_log: /dev/null/x cannot be used"),
    ],
)
def test_what_cannot_be_had_is_told_at_the_start(flags: tuple[str, str], text: str):
    """The server does not start without what it was asked for."""
    done = run_serve(MODELS / "digits", "--rest-port", "0", "--grpc-port", "0", *flags)
    assert done.returncode == 1
    assert f"kiln serve: {text}" in done.stderr
    assert "Traceback" not in done.stderr
