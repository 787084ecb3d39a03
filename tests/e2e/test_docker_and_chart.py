"""The image's recipe, as far as it can be checked without building anything; the chart is in test_chart.py."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.process import ROOT


@pytest.fixture
def stages() -> list[list[str]]:
    """The Dockerfile's instructions, one list a stage, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: list[list[str]] = []
    for line in lines:
        if line.startswith("FROM "):
            found.append([])
        if found:
            found[-1].append(line)
    return found


def test_the_image_has_two_stages(stages: list[list[str]]):
    """What builds is left behind: the second stage copies the result of the first and installs nothing."""
    build, final = stages
    assert build[0].endswith(" AS build")
    assert any(line.startswith("COPY --from=build ") for line in final)
    assert "pip install" in "\n".join(build)
    assert "pip install" not in "\n".join(final)
    assert "--require-hashes" in "\n".join(build)


def test_the_image_runs_as_a_numbered_user(stages: list[list[str]]):
    """The process is not root, by a number that Kubernetes can check."""
    users = [line.split()[1] for line in stages[-1] if line.startswith("USER ")]
    assert users
    assert re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1])


def test_signals_reach_the_process(stages: list[list[str]]):
    """Entry point and command are lists, so that no shell stands between SIGTERM and Kiln."""
    for instruction, expected in (("ENTRYPOINT", ["kiln"]), ("CMD", ["serve"])):
        (line,) = [line for line in stages[-1] if line.startswith(instruction + " ")]
        assert json.loads(line.removeprefix(instruction)) == expected
