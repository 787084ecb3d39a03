"""How `kiln serve` starts: what it serves, what it reports, and with which exit code it gives up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2

from tests.e2e.conftest import Digits, Start
from tests.e2e.process import DIGITS, ROOT, START_S, Server, command, environment, wait_for

MODEL_FILE = DIGITS / "model.keras"
_HEAVY = ("tensorflow", "keras", "openvino", "grpc", "fastapi", "uvicorn", "numpy", "pydantic")
"""What ``kiln --help`` has no use for."""


def run_serve(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`kiln serve` that is expected to give up by itself."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder without models."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("door", ["rest", "grpc"])
def test_a_port_in_use(door: str, empty: Path):
    """Where a port is taken the server says which one and exits with 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"rest": "0", "grpc": "0", door: str(port)}
        done = run_serve(empty, "--host", "127.0.0.1", "--rest-port", ports["rest"], "--grpc-port", ports["grpc"])
    assert done.returncode == 1
    name = {"rest": "REST", "grpc": "gRPC"}[door]
    assert f"kiln serve: the {name} port 127.0.0.1:{port} cannot be bound" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_that_does_not_exist(tmp_path: Path):
    """Where there are no models at all the server says so and exits with 1."""
    done = run_serve(tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"kiln serve: there is no file or folder {str(tmp_path / 'nowhere')!r}"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "models: must be given"),
        (("models", "--rest-port", "65536"), "rest_port: input should be less than or equal to 65535, got '65536'"),
        (("models", "--config", "nowhere.yaml"), "--config: no file 'nowhere.yaml'"),
    ],
)
def test_a_wrong_call(arguments: tuple[str, ...], text: str):
    """A setting that is missing or wrong is named, with exit code 2."""
    done = run_serve(*arguments)
    assert (done.returncode, done.stderr) == (2, f"kiln serve: {text}\n")


def test_one_model_under_a_name(start: Start, digits: Digits):
    """``kiln serve path/to/model.keras --name cat`` serves it as cat, without converting it again."""
    server = start(MODEL_FILE, "--name", "cat")
    status, answer = server.predict({"instances": digits.images[:3].tolist()}, "cat")
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], digits.probabilities[:3], rtol=0, atol=1e-4)
    assert server.predict({"instances": digits.images[:3].tolist()})[0] == 404
    assert "cat v1 was imported before" in server.log
    assert "importing" not in server.log


def test_ready_means_all_that_was_copied_just_before(start: Start, tmp_path: Path):
    """Files that are new at the start are waited for, not left to the next look."""
    models = tmp_path / "models"
    for name in ("one", "other"):
        shutil.copytree(DIGITS, models / name / "1")
    server = start(models)
    for name in ("one", "other"):
        (shown,) = server.get(f"/v1/models/{name}")[1]["model_version_status"]
        assert shown["state"] == "AVAILABLE"
    assert "still changing" not in server.log


def test_a_broken_model_beside_a_good_one(start: Start, digits: Digits, tmp_path: Path):
    """What does not load is reported in log, status and metric, and does not keep digits from being served."""
    models = tmp_path / "models"
    shutil.copytree(DIGITS, models / "digits" / "1")
    (models / "broken" / "1").mkdir(parents=True)
    (models / "broken" / "1" / "model.keras").write_bytes(b"no zip archive")
    (models / "hollow" / "7").mkdir(parents=True)
    server = start(models)

    status, answer = server.predict({"instances": digits.images[:3].tolist()})
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], digits.probabilities[:3], rtol=0, atol=1e-4)
    wait_for(lambda: server.metric("kiln_model_failed") == 2, "both have failed", START_S)
    for name, version, reason in (
        ("broken", "1", "the .keras file is damaged: File is not a zip file"),
        (
            "hollow",
            "7",
            "model.keras, model.h5 or a SavedModel (saved_model.pb and variables/) expected, found nothing",
        ),
    ):
        (shown,) = server.get(f"/v1/models/{name}")[1]["model_version_status"]
        assert (shown["version"], shown["state"]) == (version, "END")
        assert shown["status"]["error_code"] == "FAILED_PRECONDITION"
        assert reason in shown["status"]["error_message"]
        assert server.metric("kiln_model_failed") == 2
        metrics = server.request("GET", "/metrics")[1].decode()
        series = [line for line in metrics.splitlines() if line.startswith(f'kiln_model_failed{{model="{name}"')]
        assert len(series) == 1
        assert reason in series[0]
        assert any("ERROR" in line and name in line and reason in line for line in server.log.splitlines())
        status, answer = server.predict({"instances": [0]}, name)
        assert status == 503
        assert reason in answer["error"]


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A cache with nothing in it yet."""
    folder = tmp_path / "fresh"
    folder.mkdir()
    return folder


@pytest.fixture
def loading(start: Start, fresh: Path) -> Server:
    """A server that converts digits: the child process for it has begun."""
    server = start(DIGITS, wait=False, cache=fresh)
    server.wait(lambda: "importing digits" in server.log and bool(server.children()), "importing")
    return server


def test_while_models_load(loading: Server):
    """Until the models are loaded the server is alive but not ready, over REST and gRPC, and says what it does."""
    assert loading.get("/v2/health/live") == (200, {"live": True, "ready": False})
    assert loading.get("/v2/health/ready") == (503, {"live": True, "ready": False})
    assert loading.get("/v2/models/digits/ready") == (503, {"name": "digits", "ready": False})
    assert loading.get("/v1/models/digits")[1]["model_version_status"][0]["state"] == "LOADING"
    status, answer = loading.predict({"instances": [0]})
    assert (status, answer) == (503, {"error": "model 'digits' version 1 is LOADING, not READY"})
    with grpc.insecure_channel(f"127.0.0.1:{loading.grpc_port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        health = health_pb2.HealthCheckResponse.FromString(check(b"", timeout=30))
    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert loading.metric("kiln_ready") == 0
    assert loading.children(), "it was still loading when all of this was asked"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_stopped_while_models_load(loading: Server, fresh: Path, number: signal.Signals):
    """A signal while a model is converted ends server and child soon, with exit code 0, and leaves nothing behind."""
    children = loading.children()
    loading.signal(number)
    assert loading.exit_code(5.0) == 0, loading.log
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert list(fresh.iterdir()) == []


def test_settings_from_flag_environment_and_file(start: Start, digits: Digits, tmp_path: Path):
    """A flag goes before the environment, the environment before the YAML file, and all three take effect."""
    config = tmp_path / "kiln.yaml"
    config.write_text("oversize: refuse\nmax_batch_rows: 16\nrest_port: 1\n")
    env = {"KILN_MAX_BATCH_ROWS": "4", "KILN_LOG_FORMAT": "json", "KILN_GRPC_PORT": "1"}
    server = start(DIGITS, "--config", config, env=env)
    status, answer = server.predict({"instances": digits.images[:5].tolist()})
    assert (status, answer) == (400, {"error": "at most 4 rows per request are taken, got 5"})
    assert server.predict({"instances": digits.images[:4].tolist()})[0] == 200
    events: list[Any] = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    assert "ready" in [event["message"] for event in events]


def test_help_is_quick_and_loads_nothing():
    """``kiln --help`` takes at most half a second (the best of three) and loads none of the heavy packages."""
    kiln = Path(sys.executable).with_name("kiln")
    env = {name: value for name, value in environment().items() if not name.startswith("COVERAGE")}
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([kiln, "--help"], env=env, capture_output=True, text=True, timeout=30, check=True)
        seconds.append(time.perf_counter() - begin)
    assert "serve a folder of models, or one model" in done.stdout
    assert min(seconds) <= 0.5
    trace = [sys.executable, "-X", "importtime", "-m", "service", "--help"]
    loaded = subprocess.run(trace, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30, check=True).stderr
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in loaded.splitlines()}
    assert "service" in modules
    assert modules.isdisjoint(_HEAVY)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")  # noqa: PTH110
def test_tensorflow_is_loaded_only_where_a_model_needs_it(server: Server, start: Start, empty: Path):
    """The front ends run without TensorFlow and OpenVINO: a server without models maps neither."""
    bare = start(empty, wait=False)
    bare.wait(lambda: "not ready: none of 0 models could be loaded" in bare.log, "settled")
    assert bare.get("/v2/health/live")[0] == 200
    assert bare.get("/v2/health/ready")[0] == 503
    assert bare.get("/v1/models") == (200, {"models": []})
    libraries = ("libtensorflow", "libopenvino", "ai_edge_litert")
    assert [name for name in libraries if name in bare.mapped()] == []
    assert [name for name in libraries if name in server.mapped()] != []
