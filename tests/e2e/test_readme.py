"""The commands of README.md do what it says, and the example model reads digits as well as its README says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Digits
from tests.e2e.process import MODELS, ROOT, Server, environment


@pytest.fixture(scope="module")
def server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Digits as ``make serve`` serves it: its newest version."""
    running = Server(MODELS / "digits", "--cache-dir", cache, log=tmp_path_factory.mktemp("newest") / "log")
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


def blocks(path: Path, heading: str) -> list[str]:
    """The shell blocks under ``## heading``."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    assert section, f"{path.name} has no heading {heading!r}"
    return re.findall(r"^```sh\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)


def run(script: str, server: Server) -> str:
    """What `script` prints: as it stands, but with this server's ports and this interpreter."""
    script = script.replace("localhost:8501", f"localhost:{server.rest_port}")
    script = script.replace("localhost:8500", f"localhost:{server.grpc_port}")
    script = re.sub(r"(?:\.venv/bin/python|python3)\b", shlex.quote(sys.executable), script)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("protocol", ["REST", "gRPC"])
def test_ask_it(server: Server, protocol: str):
    """Both blocks under "Ask it" print the class that README.md promises."""
    scripts = blocks(ROOT / "README.md", "Ask it")
    assert len(scripts) == 2
    (script,) = [each for each in scripts if ("8500" if protocol == "gRPC" else "8501") in each]
    assert run(script, server) == "class 4\n"


def test_ask_it_in_your_own_terms(server: Server):
    """An image, raw and in a form: the answer is in words, or the word alone."""
    (script,) = blocks(ROOT / "README.md", "Ask it in your own terms")
    answer, _, word = run(script, server).partition("}]}")
    best = json.loads(answer + "}]}")["output_0"][0]
    assert (best["label"], best["id"], word) == ("4", 4, "4\n")
    assert best["probability"] > 0.99


def test_the_example_models_curl(server: Server):
    """The command of the example model's README gives its class the probability that it names."""
    readme = MODELS / "digits" / "README.md"
    promised = re.search(
        r"\*\*a (\d)\*\*, which the model recognises with a probability of (\d\.\d+)", readme.read_text()
    )
    assert promised
    (script,) = blocks(readme, "Try it")
    (row,) = json.loads(run(script, server))["predictions"]
    assert row.index(max(row)) == int(promised[1])
    assert max(row) == pytest.approx(float(promised[2]), abs=1e-4)


def test_the_example_models_accuracy(digits: Digits):
    """The committed version 1 reads at least 97 % of the held-out digits."""
    assert len(digits.labels) == 360
    assert digits.accuracy >= 0.97
