"""A real client passes tensors in shared memory, to a server that takes them and to one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import CLIENTS, Digits, Start, run_python
from tests.e2e.process import DIGITS, Server

_ROWS = 5
PROTOCOLS = pytest.mark.parametrize("protocol", ["http", "grpc"])


@pytest.fixture
def images(digits: Digits, tmp_path: Path) -> Path:
    """The first digits as a file for a client in another process."""
    path = tmp_path / "images.npy"
    np.save(path, digits.images[:_ROWS])
    return path


def ask(server: Server, protocol: str, images: Path) -> Any:
    port = server.rest_port if protocol == "http" else server.grpc_port
    return json.loads(run_python(CLIENTS / "triton_shared_memory.py", protocol, f"127.0.0.1:{port}", images).stdout)


@PROTOCOLS
def test_tritonclient_with_shared_memory(start: Start, digits: Digits, images: Path, protocol: str):
    """Images in and probabilities out through an object of /dev/shm, as Keras gives them; regions come and go."""
    report = ask(start(DIGITS, "--shared-memory"), protocol, images)
    for answer in ("probabilities", "inline"):
        np.testing.assert_allclose(report.pop(answer), digits.probabilities[:_ROWS], rtol=0, atol=1e-4)
    assert report == {"regions": ["digits"], "left": []}


@PROTOCOLS
def test_tritonclient_is_refused_where_it_is_off(server: Server, images: Path, protocol: str):
    """With the setting's name in the client's exception."""
    assert "the setting shared_memory turns it on" in ask(server, protocol, images)["refused"]
