"""Classify, regress and compressed answers, asked as TensorFlow Serving's and Triton's own clients do."""

from __future__ import annotations

import gzip
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.conftest import CLIENTS, Digits, run_python
from tests.e2e.process import DIGITS, Server
from tests.e2e.test_clients import ask, ask_either, assert_as_keras

CLASSES = [[["a", 11.0], ["b", 12.0], ["c", 13.0]], [["a", 4.5], ["b", 5.5], ["c", 6.5]]]
VALUES = [36.0, 16.5]
EXAMPLES = {"context": {"bias": 10.0}, "examples": [{"x": [1.0, 0.0]}, {"x": [0.0, 1.0], "bias": 0.5}]}


@pytest.fixture(scope="module")
def models(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of ``digits`` and of a model that parses examples, which compresses every answer."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(DIGITS, folder / "models" / "digits" / "1")
    run_python(CLIENTS / "save_examples_model.py", folder / "models" / "parsed" / "1")
    running = Server(folder / "models", "--cache-dir", cache, "--gzip-min-bytes", "1", log=folder / "log")
    try:
        for model in ("digits", "parsed"):
            running.wait(lambda path=f"/v2/models/{model}/ready": running.get(path)[0] == 200, model)  # type: ignore[misc]
        yield running
    finally:
        running.kill()


def test_tensorflow_servings_stubs_with_examples(models: Server, digits: Digits, tmp_path: Path):
    """Signatures made for it parse the examples; an ordinary Keras model gets their features."""
    images = tmp_path / "images.npy"
    np.save(images, digits.images[:5])
    report = ask("tfserving_examples.py", models.grpc_port, images)
    assert_as_keras(report.pop("probabilities"), digits)
    assert report == {
        "classes": CLASSES,
        "values": VALUES,
        "signatures": ["serving_default", "regress"],
        "both": [VALUES, CLASSES],
        "labels": [str(digit) for digit in range(10)],
    }


def test_examples_over_rest(models: Server, digits: Digits):
    """The same over REST, with the answers as gzip for a client that takes it."""

    def ask_rest(path: str, body: object) -> object:
        url = f"http://127.0.0.1:{models.rest_port}/v1/models/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request, timeout=30) as response:
            assert response.headers["Content-Encoding"] == "gzip"
            return json.loads(gzip.decompress(response.read()))["results"]

    assert ask_rest("parsed:classify", EXAMPLES) == CLASSES
    assert ask_rest("parsed:regress", {"signature_name": "regress", **EXAMPLES}) == VALUES
    rows = ask_rest("digits:classify", {"examples": [{"image": row.ravel().tolist()} for row in digits.images[:5]]})
    assert isinstance(rows, list)
    assert_as_keras([[score for _, score in row] for row in rows], digits)


@pytest.mark.parametrize("form", ["json", "binary"])
def test_tritonclient_takes_compressed_answers(models: Server, digits: Digits, tmp_path: Path, form: str):
    """tritonclient.http asks for gzip and finds its outputs, in JSON and in binary."""
    images = tmp_path / "images.npy"
    np.save(images, digits.images[:5])
    report = ask("triton_http.py", models.rest_port, images, form, "gzip")
    assert_as_keras(report["probabilities"], digits)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclient_with_strings(models: Server, protocol: str):
    """Strings of any bytes in, and strings out: in binary, and over HTTP as JSON too."""
    answer = [[["a", "b", "c"]] * 2, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]
    assert ask_either(models, "triton_bytes.py", protocol) == [answer] * (2 if protocol == "http" else 1)
