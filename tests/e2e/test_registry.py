"""Rollouts on a running server: versions come and go, labels move, clients load and reload."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import CLIENTS, Start, run_python
from tests.e2e.process import DIGITS, ROOT, Server, environment, wait_for

_FAST = ("--plan", "signature", "--max-batch-rows", "4", "--poll-s", "0.2")
_ROW = {"instances": [[0.0, 0.0]]}


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SavedModels ``1``, ``2`` and ``3`` that answer with their numbers."""
    folder = tmp_path_factory.mktemp("numbers")
    subprocess.run(
        [sys.executable, "-m", "load_tests.tagged_models", str(folder), "1", "2", "3"],
        cwd=ROOT,
        env=environment({"TF_CPP_MIN_LOG_LEVEL": "3"}),
        stderr=subprocess.DEVNULL,
        check=True,
        timeout=100,
    )
    return folder


@pytest.fixture
def models(tmp_path: Path, numbers: Path) -> Path:
    """A folder of models with version 1 of ``numbers``."""
    folder = tmp_path / "models"
    shutil.copytree(numbers / "1", folder / "numbers" / "1")
    return folder


def answer(server: Server, path: str = "numbers") -> float:
    """The number that the model answers with."""
    status, got = server.predict(_ROW, path)
    assert status == 200, got
    return float(got["predictions"][0][0])


def test_a_version_that_is_still_being_copied_is_waited_for(start: Start, models: Path, numbers: Path):
    """Its files come one after another; it takes over when all are there, and nothing was loaded by halves."""
    server = start(models, *_FAST)
    assert answer(server) == 1.0
    source, target = numbers / "2", models / "numbers" / "2"
    for file in sorted(source.rglob("*"), key=lambda path: path.name != "saved_model.pb"):
        if file.is_file():
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(source))
            assert answer(server) == 1.0
    server.wait(lambda: answer(server) == 2.0, "version 2 takes over")
    assert "numbers v2 failed" not in server.log


def test_a_broken_version_costs_nobody_anything(start: Start, models: Path, numbers: Path):
    """The old one goes on, the reason is shown; once its files are mended it takes over."""
    server = start(models, *_FAST)
    broken = models / "numbers" / "2"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"no graph")

    def failed() -> bool:
        states = {v["version"]: v for v in server.get("/status")[1]}
        return states.get(2, {}).get("state") == "FAILED" and bool(states[2]["reason"])

    server.wait(failed, "version 2 is shown as failed")
    assert answer(server) == 1.0
    shutil.rmtree(broken)
    shutil.copytree(numbers / "2", broken)
    server.wait(lambda: answer(server) == 2.0, "version 2 takes over")


def test_labels_follow_the_config_file(start: Start, models: Path, numbers: Path, tmp_path: Path):
    """The file is read when it changes and on SIGHUP; a wrong one changes nothing."""
    for number in ("2", "3"):
        shutil.copytree(numbers / number, models / "numbers" / number)
    config = tmp_path / "models.yaml"
    config.write_text("models: {numbers: {versions: all, labels: {stable: 1}}}")
    server = start(models, *_FAST, "--models-config", config)
    assert answer(server) == 3.0
    assert answer(server, "numbers/labels/stable") == 1.0
    config.write_text("models: {numbers: {versions: all, labels: {stable: 2}}}")
    server.wait(lambda: answer(server, "numbers/labels/stable") == 2.0, "the label moves")
    config.write_text("models: {numbers: {versions: sideways}}")
    server.signal(signal.SIGHUP)
    server.wait(lambda: "models.numbers.versions" in server.log, "the error is logged")
    assert answer(server, "numbers/labels/stable") == 2.0
    config.write_text("models: {numbers: {versions: [1]}}")
    server.signal(signal.SIGHUP)
    server.wait(lambda: answer(server) == 1.0, "only version 1 is left")
    assert server.predict(_ROW, "numbers/labels/stable")[0] == 400


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclient_loads_and_unloads(start: Start, protocol: str):
    """The repository extension by its own client, over both protocols."""
    server = start(DIGITS, *_FAST, "--model-control", "explicit")
    port = server.rest_port if protocol == "http" else server.grpc_port
    done = run_python(CLIENTS / "triton_repository.py", protocol, f"127.0.0.1:{port}")
    seen = json.loads(done.stdout)
    assert seen["before"] == seen["after"] == []
    assert seen["loaded"] == [["digits", "1", "READY"]]
    assert seen["ready"] is True
    assert "there is no model 'nothing' to load; there are digits" in seen["refused"]


def test_tensorflow_servings_stubs_reload_the_config(start: Start, models: Path, numbers: Path):
    """Versions and labels of the new config are there when the call returns; a path outside is refused."""
    shutil.copytree(numbers / "2", models / "numbers" / "2")
    server = start(models, *_FAST)
    done = run_python(CLIENTS / "tfserving_reload.py", f"127.0.0.1:{server.grpc_port}", models / "numbers")
    seen = json.loads(done.stdout)
    assert (seen["reloaded"], seen["available"], seen["stable"]) == (0, [1, 2], [1])
    assert seen["refused"][0] == "INVALID_ARGUMENT"
    assert "a base_path below" in seen["refused"][1]
    assert answer(server, "numbers/labels/stable") == 1.0


def test_the_status_command_prints_a_table(start: Start, models: Path):
    """A head and one line per version; without a server it says so and exits with 1."""
    server = start(models, *_FAST)
    answer(server)
    command = [sys.executable, "-m", "service", "status", "--url", f"http://127.0.0.1:{server.rest_port}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    head, line = done.stdout.splitlines()
    assert head.split()[:5] == ["model", "version", "state", "since", "device"]
    assert line.split()[:3] == ["numbers", "1", "READY"]
    assert "CPU:0" in line
    done = subprocess.run(
        [*command[:-1], "http://127.0.0.1:1"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "does not answer" in done.stderr


def test_swaps_under_locusts_load_lose_nothing():
    """A few versions, a moving label and eight callers without pause: no request fails."""
    done = subprocess.run(
        [sys.executable, "-m", "load_tests.swap", "--swaps", "3"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 3 |" in done.stdout


def test_an_empty_folder_is_followed(start: Start, tmp_path: Path, numbers: Path):
    """A server without a model is alive but not ready; it becomes ready with its first model."""
    models = tmp_path / "later"
    models.mkdir()
    server = start(models, *_FAST, wait=False)
    server.wait(lambda: "not ready" in server.log, "no model is there")
    assert server.get("/v2/health/live")[0] == 200
    assert server.get("/v2/health/ready")[0] == 503
    shutil.copytree(numbers / "1", models / "numbers" / "1")
    server.wait_ready()
    assert answer(server) == 1.0
    shutil.rmtree(models / "numbers")
    wait_for(lambda: server.get("/v2/health/ready")[0] == 503, "the model is gone")


def test_shares_and_shadows(start: Start, models: Path, numbers: Path, tmp_path: Path):
    """Both versions of a split answer, and the one on trial is compared and never seen."""
    for number in ("2", "3"):
        shutil.copytree(numbers / number, models / "numbers" / number)
    config = tmp_path / "models.yaml"
    config.write_text("models: {numbers: {versions: all, split: {1: 1, 2: 1}, shadow: {to: 3}}}")
    server = start(models, *_FAST, "--models-config", config)
    assert {answer(server) for _ in range(40)} == {1.0, 2.0}
    differing = 'kiln_shadow_requests_total{model="numbers",outcome="differ",version="3"}'
    server.wait(lambda: differing in server.request("GET", "/metrics")[1].decode(), "the trial is counted")
    assert server.metric("kiln_shadow_requests_total") == 40


def test_a_model_on_demand_and_one_that_does_not_fit(start: Start, models: Path, numbers: Path, tmp_path: Path):
    """The first request loads the one and waits for it; the other is refused with the numbers."""
    config = tmp_path / "models.yaml"
    config.write_text("models: {numbers: {on_demand: true}}")
    server = start(models, *_FAST, "--models-config", config)
    (status,) = server.get("/status")[1]
    assert (status["state"], status["reason"]) == ("UNLOADED", "it is loaded at its next request")
    assert answer(server) == 1.0
    (status,) = server.get("/status")[1]
    assert status["state"] == "READY"
    small = start(models, *_FAST, "--memory-budget-bytes", "1000", wait=False)
    small.wait(lambda: small.get("/status")[1][0]["state"] == "FAILED", "it does not fit")
    (status,) = small.get("/status")[1]
    assert "of CPU memory, but 1000 bytes of the budget of 1000 bytes are free" in status["reason"]
