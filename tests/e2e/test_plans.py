"""Plans as those see them who run Kiln: found ahead of time, inspected, used at the next start, served over REST."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import Digits, Start
from tests.e2e.process import DIGITS, ROOT, Server, environment

SETTINGS = ("--plan", "openvino", "--buckets", "1,8", "--max-batch-rows", "8")


def kiln(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """``kiln COMMAND`` run to its end."""
    line = [sys.executable, "-m", "service", command, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that ``kiln plan`` has filled."""
    cache = tmp_path_factory.mktemp("planned")
    done = kiln("plan", DIGITS, *SETTINGS, "--cache-dir", cache)
    assert done.returncode == 0, done.stderr
    assert "digits v1: looking for its fastest plans" in done.stdout
    assert done.stdout.count("digits v1 on CPU:0") == 1
    return cache


def test_plans_are_found_once(planned: Path) -> None:
    """The second time ``kiln plan`` has nothing to do, and says so."""
    done = kiln("plan", DIGITS, *SETTINGS, "--cache-dir", planned)
    assert (done.returncode, "planned before" in done.stdout) == (0, True), done.stderr
    assert "looking for" not in done.stdout


def test_inspect_prints_the_table(planned: Path) -> None:
    """A line for each plan and bucket, with its cost and difference, and a mark at those in use."""
    done = kiln("inspect", DIGITS, *SETTINGS, "--cache-dir", planned)
    assert (done.returncode, done.stderr) == (0, "")
    table = done.stdout[: done.stdout.index("rows alone")]
    lines = [line.split() for line in table.splitlines() if line.startswith(("openvino", "signature"))]
    assert {(line[0].split("-")[0], line[1]) for line in lines} == {
        (plan, rows) for plan in ("openvino", "signature") for rows in ("1", "8")
    }
    chosen = [line for line in lines if "*" in line]
    assert {line[1] for line in chosen} == {"1", "8"}
    assert all(line[0].startswith("openvino") for line in chosen)
    assert all(float(line[2].replace(",", "")) > 0 for line in lines)


def test_a_planned_model_is_served_without_tensorflow(start: Start, planned: Path, digits: Digits) -> None:
    """The first correct answer comes from a process that has not loaded it, nor ever does."""
    server = start(DIGITS, *SETTINGS, cache=planned)
    status, answer = server.predict({"instances": digits.images[:8].tolist()})
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], digits.probabilities[:8], 1e-4, 1e-5)
    maps = server.mapped()
    assert "openvino" in maps
    assert "libtensorflow" not in maps
    assert "_pywrap_tensorflow" not in maps


def test_plans_are_told_over_rest(start: Start, planned: Path) -> None:
    """What is chosen, measured and left out; in short in the metrics and the status."""
    server = start(DIGITS, *SETTINGS, cache=planned)
    status, config = server.get("/v2/models/digits/config")
    assert status == 200
    plans: dict[str, Any] = config["plans"]["serving_default"]
    assert set(plans["chosen"]) == {"1", "8"}
    assert all(cell["plan"].startswith("openvino") and cell["us"] > 0 for cell in plans["chosen"].values())
    assert {m["rows"] for m in plans["measured"] if m["plan"] == "signature"} == {1, 8}
    assert plans["batch_difference"]["absolute"] < 1e-5
    assert server.metric("kiln_plan_info") >= 2
    labels = 'kind="absolute",model="digits",signature="serving_default",version="1"'
    assert server.metric(f"kiln_plan_batch_difference{{{labels}}}") == plans["batch_difference"]["absolute"]
    assert "openvino" in server.request("GET", "/status")[1].decode()


def test_a_version_is_planned_while_it_serves(start: Start, planned: Path, digits: Digits) -> None:
    """Ready by the signature plan, it answers meanwhile, and has other plans after."""
    server: Server = start(DIGITS, "--plan", "frozen", "--buckets", "1,8", "--max-batch-rows", "8", cache=planned)
    expected = digits.probabilities[:2]

    def is_planned() -> bool:
        status, answer = server.predict({"instances": digits.images[:2].tolist()})
        assert status == 200
        np.testing.assert_allclose(answer["predictions"], expected, 1e-4, 1e-5)
        config = server.get("/v2/models/digits/config")[1]
        return {c["plan"].split("-")[0] for c in config["plans"]["serving_default"]["chosen"].values()} == {"frozen"}

    server.wait(is_planned, "planned")
    assert "digits v1: planned in " in server.log


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_what_fails_is_told_with_its_exit_code(command: str, tmp_path: Path) -> None:
    """1 where a model cannot be loaded, with the reason; 2 where a setting is wrong."""
    (tmp_path / "bad" / "1").mkdir(parents=True)
    (tmp_path / "bad" / "1" / "model.keras").write_bytes(b"no model")
    done = kiln(command, tmp_path, "--cache-dir", tmp_path / "cache")
    assert done.returncode == 1
    assert f"kiln {command}: bad" in done.stderr
    assert "Traceback" not in done.stderr
    wrong = kiln(command, tmp_path, "--plan", "fastest")
    assert (wrong.returncode, "plan: input should be" in wrong.stderr) == (2, True)
