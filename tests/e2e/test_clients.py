"""The clients that people use get the answers that Keras gives."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.conftest import CLIENTS, Digits, Start, run_python
from tests.e2e.process import DIGITS, Server

_ROWS = 5


@pytest.fixture
def images(digits: Digits, tmp_path: Path) -> Path:
    """The first digits as a file for a client in another process."""
    path = tmp_path / "images.npy"
    np.save(path, digits.images[:_ROWS])
    return path


def assert_as_keras(probabilities: Any, digits: Digits) -> None:
    """The first rows' classes are Keras's, and the probabilities are within 1e-4."""
    expected = digits.probabilities[:_ROWS]
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(probabilities, axis=1), expected.argmax(axis=1))


def ask(client: str, port: int, *arguments: str | Path) -> Any:
    """What the program `client` reports of the server at `port`."""
    return json.loads(run_python(CLIENTS / client, f"127.0.0.1:{port}", *arguments).stdout)


def ask_either(server: Server, client: str, protocol: str, *arguments: str | Path) -> Any:
    """The same of a client that speaks both protocols, http and grpc."""
    port = server.rest_port if protocol == "http" else server.grpc_port
    return json.loads(run_python(CLIENTS / client, protocol, f"127.0.0.1:{port}", *arguments).stdout)


def binary_tensor(digits: Digits) -> tuple[bytes, int]:
    """A binary infer request that wants a binary answer, and the size of its JSON."""
    tensor = digits.images[:_ROWS].tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "image",
                    "shape": [_ROWS, 8, 8, 1],
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": len(tensor)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    return head + tensor, len(head)


def binary_answer(body: bytes, json_bytes: int) -> Any:
    """The single FP32 output of a binary answer."""
    (output,) = json.loads(body[:json_bytes])["outputs"]
    assert output["parameters"]["binary_data_size"] == len(body) - json_bytes
    return np.frombuffer(body[json_bytes:], np.float32).reshape(output["shape"])


@pytest.mark.parametrize("form", ["json", "binary"])
def test_tritonclient_over_http(server: Server, digits: Digits, images: Path, form: str):
    """tritonclient.http gets Keras's answer, its request's id, metadata and readiness, in JSON and in binary."""
    report = ask("triton_http.py", server.rest_port, images, form)
    assert_as_keras(report.pop("probabilities"), digits)
    assert report == {"live": True, "ready": True, "id": "seven", "inputs": ["image"], "versions": ["1"]}


def test_tritonclient_over_grpc(server: Server, digits: Digits, images: Path):
    """tritonclient.grpc gets Keras's answer, its request's id, metadata and readiness."""
    report = ask("triton_grpc.py", server.grpc_port, images)
    assert_as_keras(report.pop("probabilities"), digits)
    assert report == {"live": True, "ready": True, "id": "seven", "inputs": ["image"], "versions": ["1"]}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclients_coroutines(start: Start, digits: Digits, images: Path, protocol: str):
    """A model is loaded, asked at the same time in each form (over gRPC on a stream too), and unloaded."""
    server = start(DIGITS, "--model-control", "explicit")
    report = ask_either(server, "triton_aio.py", protocol, images)
    for probabilities in report.pop("answers"):
        assert_as_keras(probabilities, digits)
    assert "model 'digits' is not loaded" in report.pop("refused")
    assert report == {
        "live": True,
        "ready": True,
        "model ready": True,
        "loaded": [["digits", "1", "READY"]],
        "inputs": ["image"],
        "max_batch_size": 64,
        "requests": 2 * _ROWS,
        "left": [],
    }


def test_tensorflow_servings_stubs(server: Server, digits: Digits, images: Path):
    """TensorFlow Serving's own client gets Keras's answer, the signature and the version's state."""
    report = ask("tfserving_grpc.py", server.grpc_port, images)
    assert_as_keras(report.pop("probabilities"), digits)
    assert report == {"states": {"1": "AVAILABLE"}, "inputs": ["image"], "versions": ["1"]}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_openvino_model_servers_client(server: Server, digits: Digits, images: Path, protocol: str):
    """It gets Keras's answers with version 0, which it sends for none, and its own kinds of errors."""
    report = ask_either(server, "ovms.py", protocol, images)
    assert_as_keras(report.pop("probabilities"), digits)
    assert_as_keras(report.pop("version 1"), digits)
    kinds, texts = zip(*report.pop("refused"), strict=True)
    assert kinds == ("ModelNotFoundError", "ModelNotFoundError", "InvalidInputError")
    for text, expected in zip(texts, ("Latest(nothing)", "Specific(digits, 7)", "[-1, 8, 8, 1] expected"), strict=True):
        assert expected in text
    assert report == {"states": {"1": "AVAILABLE"}, "inputs": ["image"]}


def test_tensorflow_servings_rest(server: Server, digits: Digits):
    """TensorFlow Serving's REST predict answers as Keras does, and its status says AVAILABLE."""
    status, answer = server.predict({"instances": digits.images[:_ROWS].tolist()})
    assert status == 200
    assert_as_keras(answer["predictions"], digits)
    (version,) = server.get("/v1/models/digits")[1]["model_version_status"]
    assert (version["version"], version["state"]) == ("1", "AVAILABLE")


def test_a_binary_tensor_with_urllib(server: Server, digits: Digits):
    """A binary tensor posted with urllib is answered with a binary tensor as Keras gives it."""
    body, json_bytes = binary_tensor(digits)
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.rest_port}/v2/models/digits/infer",
        body,
        {"Inference-Header-Content-Length": str(json_bytes)},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = binary_answer(response.read(), int(response.headers["Inference-Header-Content-Length"]))
    assert_as_keras(answer, digits)


def test_a_binary_tensor_with_curl(server: Server, digits: Digits, tmp_path: Path):
    """``curl --data-binary`` with a JSON head and a tensor after it is answered in the same form."""
    body, json_bytes = binary_tensor(digits)
    (tmp_path / "request").write_bytes(body)
    subprocess.run(
        [
            *("curl", "-sS", "--fail", "--dump-header", tmp_path / "head", "--output", tmp_path / "answer"),
            *("-H", f"Inference-Header-Content-Length: {json_bytes}", "-H", "Content-Type: application/octet-stream"),
            *("--data-binary", f"@{tmp_path / 'request'}"),
            f"http://127.0.0.1:{server.rest_port}/v2/models/digits/infer",
        ],
        check=True,
        timeout=60,
    )
    lines = (tmp_path / "head").read_text().lower().splitlines()
    head = dict(line.split(": ", 1) for line in lines if ": " in line)
    answer = binary_answer((tmp_path / "answer").read_bytes(), int(head["inference-header-content-length"]))
    assert_as_keras(answer, digits)
