"""Models saved in every way that TensorFlow and Keras have: served by one process, and imported, as they answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import CLIENTS, run_python
from tests.e2e.process import Server

FORMS = (
    *("saved-sequential", "saved-functional", "saved-subclassed", "saved-module", "export-sequential"),
    *("export-subclassed", "keras-functional", "keras-augmented", "h5-sequential", "keras2-slots", "keras2-saved"),
)
IMPORTED = {"saved-subclassed": "1", "keras-functional": "1/model.keras"}
"""What goes through the command too: one of each kind."""
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, a version of each, and what they answered when they were saved."""
    folder = tmp_path_factory.mktemp("forms")
    run_python(CLIENTS / "save_forms.py", folder)
    return folder


@pytest.fixture(scope="module")
def answers(saved: Path) -> dict[str, Any]:
    with np.load(saved / "answers.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def server(saved: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """All of them, some a second time through ``kiln import``."""
    for name, path in IMPORTED.items():
        done = run_python(
            *("-m", "service", "import", saved / name / path, "--models", saved, "--name", f"imported-{name}"),
            *("--cache-dir", cache),
        )
        assert f"imported-{name} version 1: " in done.stdout
    running = Server(saved, "--cache-dir", cache, log=tmp_path_factory.mktemp("log") / "log")
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


def test_the_forms_are_all_there_are(answers: dict[str, Any]):
    """What the script saves is what is asked below."""
    assert {*FORMS, "x"} == set(answers)


@pytest.mark.parametrize("name", [*FORMS, *(f"imported-{name}" for name in IMPORTED)])
def test_it_answers_as_it_did(server: Server, answers: dict[str, Any], name: str):
    """Sequential, Functional and subclassed models, a module, optimizer state: the answer is that of the model."""
    status, answer = server.predict({"instances": answers["x"].tolist()}, name)
    assert status == 200, answer
    np.testing.assert_allclose(answer["predictions"], answers[name.removeprefix("imported-")], 1e-4, 1e-5)
