"""``kiln bench`` against a running server, as a process: its report, its errors, an interruption."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.process import DIGITS, ROOT, Server, environment

TIMEOUT_S = 200.0


def bench(server: Server, *arguments: str | Path) -> subprocess.Popen[str]:
    """``kiln bench`` of a server on this machine."""
    ports = ("--rest-port", str(server.rest_port), "--grpc-port", str(server.grpc_port))
    return subprocess.Popen(
        [sys.executable, "-m", "service", "bench", *map(str, arguments), *ports],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def assert_sensible(found: dict[str, Any]) -> None:
    """A capacity, with what the server did in its trial."""
    assert (found["error"], found["is_final"]) == (None, True)
    at = found["at_capacity"]
    assert found["capacity_per_s"] == at["rate_per_s"] == found["rows_per_s"] / 2
    assert at["holds"]
    assert 0 < at["p50_ms"] <= at["p90_ms"] <= at["p99_ms"] <= 400
    assert at["ok"] > 0
    assert (at["failed"], at["unanswered"]) == (0, 0)
    server = at["server"]
    assert server["batch_rows"] >= 2
    assert 0 < server["cores"] < 64
    assert all(server[name] > 0 for name in ("cpu_us", "decode_us", "queue_us", "execute_us", "encode_us"))
    assert max(one["rate_per_s"] for one in found["trials"]) >= found["capacity_per_s"]


def test_a_capacity_is_found_for_each_protocol(server: Server, tmp_path: Path):
    """Of a request of two rows; the table and plot go to stdout, one line a trial to stderr."""
    path, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    options = ("--seconds", "0.3", "--rows", "2", "--slo-ms", "400", "--json", path, "--svg", plot)
    process = bench(server, "digits", "--protocols", "rest-v2-binary,grpc-tfs", *options)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    report = json.loads(path.read_text())
    assert (report["model"], report["slo_ms"], report["rows"], report["interrupted"]) == ("digits", 400.0, 2, False)
    assert [found["protocol"] for found in report["protocols"]] == ["rest-v2-binary", "grpc-tfs"]
    for found in report["protocols"]:
        assert_sensible(found)
    assert "rows/batch" in out
    assert "p99 ms, goal 400 ms" in out
    assert len(err.splitlines()) == sum(len(found["trials"]) for found in report["protocols"])
    assert plot.read_text().endswith("</svg>\n")


@pytest.mark.timeout(300)
def test_a_server_is_started_for_it(cache: Path, server: Server):
    """Of a folder of models, by settings from the environment; it is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "bench", "digits", str(DIGITS), "--protocols", "rest-v2", "--seconds", "0.2",
         "--slo-ms", "400", "--json", "-"],
        cwd=ROOT, env=environment({"KILN_CACHE_DIR": str(cache)}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.terminate()
    assert process.returncode == 0, err
    report = json.loads(out)
    assert report["protocols"][0]["capacity_per_s"] > 0
    assert not report["url"].endswith(f":{server.rest_port}")
    port = int(report["url"].rpartition(":")[2])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert err.splitlines()[:2] == ["finding out the plans of digits", f"starting a server of {DIGITS}"]


def test_a_goal_out_of_reach_is_told(server: Server):
    """With the lowest p99 that was seen, as exit code 1; the JSON alone is on stdout."""
    process = bench(server, "digits", "--protocols", "rest-tfs", "--seconds", "0.2", "--slo-ms", "0.001", "--json", "-")
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    (found,) = json.loads(out)["protocols"]
    assert (found["capacity_per_s"], found["at_capacity"]) == (None, None)
    assert "0.001 ms are not kept even at 25.0 requests/s, the lowest tried; " in found["error"]
    assert found["error"] in err


def test_a_model_that_is_not_there_is_told(server: Server):
    """With those that are."""
    process = bench(server, "cat")
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (1, "")
    assert err == f"kiln bench: http://localhost:{server.rest_port} has no model 'cat'; it has digits\n"


def test_a_protocol_that_is_not_answered_is_told(server: Server):
    """That of a port where nobody listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "bench", "digits", "--rest-port", str(server.rest_port), "--grpc-port", "1",
         "--protocols", "grpc-v2"],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "grpc-v2: the first requests were not answered: UNAVAILABLE: " in err
    assert "grpc-v2: the first requests were not answered: UNAVAILABLE: " in out


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN], ids=["in front", "behind"])
def test_an_interruption_ends_at_once_with_what_was_measured(server: Server, inherited: Any):
    """After the first trial of many, long before the next is over; also of a job of a script, which ignores SIGINT."""
    ours = signal.signal(signal.SIGINT, inherited)
    try:
        process = bench(server, "digits", "--protocols", "rest-v2-binary", "--seconds", "3", "--json", "-")
    finally:
        signal.signal(signal.SIGINT, ours)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("rest-v2-binary: ")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    report = json.loads(out)
    assert report["interrupted"] is True
    (found,) = report["protocols"]
    assert (found["is_final"], len(found["trials"])) == (False, 1)
