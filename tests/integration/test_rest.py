"""Every route of the HTTP side, good requests: the real app before a model that doubles its inputs."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from service import __version__
from service.predictor import EXTENSIONS
from service.registry.lifecycle import State
from service.tensors import DataType
from tests.fakes import DOUBLE, FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln, start_kiln
from tests.signatures import many, one, only

OCTETS = "application/octet-stream"
AVAILABLE = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
DOUBLE_METADATA = {
    "name": "double",
    "versions": ["1"],
    "platform": "keras",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
}
MODELS = {
    "double": {"serving_default": DOUBLE, "half": one(DataType.FP16, name="half")},
    "pair": only(many(a=DataType.INT32, b=DataType.BYTES)),
    "half": only(one(DataType.FP16)),
    "scalar": only(one(DataType.FP32, ())),
}


@pytest_asyncio.fixture
async def client() -> AsyncIterator[Client]:
    """A caller of an app that serves `MODELS`."""
    kiln = await start_kiln({name: FakeModel(signatures) for name, signatures in MODELS.items()})
    yield Client(kiln.app)
    await kiln.stop(5.0, 0.0)


def tensor(data: Any, shape: list[int], datatype: str = "FP32", name: str = "x", **keys: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data, **keys}


# TensorFlow Serving


@pytest.mark.parametrize(
    ("model", "body", "expected"),
    [
        ("double", {"instances": [[1, 2, 3]]}, {"predictions": [[2, 4, 6]]}),
        ("double", {"instances": [{"x": [1, 2, 3]}, {"x": [0, 0, 0.5]}]}, {"predictions": [[2, 4, 6], [0, 0, 1]]}),
        ("double", {"inputs": [[1, 2, 3]]}, {"outputs": [[2, 4, 6]]}),
        ("double", {"inputs": {"x": [[1, 2, 3]]}}, {"outputs": [[2, 4, 6]]}),
        ("double", {"signature_name": "half", "instances": [[1, 2, 3]]}, {"predictions": [[2, 4, 6]]}),
        (
            "pair",
            {"instances": [{"a": 1, "b": "p"}, {"a": -2, "b": {"b64": "cQ=="}}]},
            {"predictions": [{"out_a": 2, "out_b": "pp"}, {"out_a": -4, "out_b": "qq"}]},
        ),
        ("pair", {"inputs": {"b": ["é"], "a": [5]}}, {"outputs": {"out_a": [10], "out_b": ["éé"]}}),
        ("half", {"instances": [[0.5, 1, 2]]}, {"predictions": [[1, 2, 4]]}),
        ("scalar", {"inputs": 1.5}, {"outputs": 3.0}),
    ],
)
async def test_predict(client: Client, model: str, body: dict[str, Any], expected: dict[str, Any]):
    """Rows and columns, named and bare, of one input or several."""
    response = await client.post(f"/v1/models/{model}:predict", body)
    assert (response.status, response.json) == (200, expected)
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/v1/models/double/versions/1:predict", "/V1/Models/double/Versions/1:PREDICT"])
async def test_predict_of_a_version(client: Client, path: str):
    """A version may be named; paths match without regard to case, except for the model's name."""
    response = await client.post(path, {"instances": [[1, 2, 3]]})
    assert response.json == {"predictions": [[2, 4, 6]]}


async def test_predict_takes_tokens_and_gzip(client: Client):
    """NaN and the infinities both ways, in a body that came as gzip."""
    body = gzip.compress(b'{"instances": [[NaN, Infinity, -1.5]]}')
    response = await client.post("/v1/models/double:predict", body, content_encoding="gzip")
    assert response.body == b'{"predictions": [[NaN, Infinity, -3.0]]}'


@pytest.mark.parametrize("path", ["/v1/models/double", "/v1/models/double/versions/1", "/V1/MODELS/double"])
async def test_status(client: Client, path: str):
    """In TensorFlow Serving's form; int64 is a string."""
    response = await client.get(path)
    assert (response.status, response.json) == (200, {"model_version_status": [AVAILABLE]})


@pytest.mark.parametrize("path", ["/v1/models/double/metadata", "/v1/models/double/versions/1/metadata"])
async def test_metadata(client: Client, path: str):
    """All signatures, as proto3 JSON of a SignatureDefMap."""
    answer = (await client.get(path)).json
    assert answer["model_spec"] == {"name": "double", "signature_name": "", "version": "1"}
    packed = answer["metadata"]["signature_def"]
    assert list(packed) == ["signature_def"]  # no "@type": the original prints the map, not the Any around it
    assert set(packed["signature_def"]) == {"serving_default", "half"}
    assert packed["signature_def"]["serving_default"]["inputs"]["x"] == {
        "dtype": "DT_FLOAT",
        "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "3", "name": ""}], "unknown_rank": False},
        "name": "x:0",
    }


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/V1/Models"])
async def test_list_of_models(client: Client, path: str):
    """Names, sorted."""
    assert (await client.get(path)).json == {"models": sorted(MODELS)}


# Open Inference Protocol


async def test_server_metadata(client: Client):
    """Who answers, and what of the extensions."""
    response = await client.get("/v2")
    assert response.json == {
        "name": "kiln",
        "version": __version__,
        "extensions": list(EXTENSIONS),
    }


@pytest.mark.parametrize("path", ["/v2/models/double", "/v2/models/double/versions/1"])
async def test_model_metadata(client: Client, path: str):
    """Of the default signature."""
    response = await client.get(path)
    assert (response.status, response.json) == (200, DOUBLE_METADATA)


async def test_a_model_may_be_called_infer():
    """Its metadata is not taken for the inference of a model without a name."""
    kiln = await start_kiln({"infer": FakeModel()})
    client = Client(kiln.app)
    assert (await client.get("/v2/models/infer")).json["name"] == "infer"
    assert (await client.post("/v2/models/infer/infer", {"inputs": [tensor([1, 2, 3], [1, 3])]})).status == 200
    await kiln.stop(5.0, 0.0)


@pytest.mark.parametrize("path", ["/v2/models/double/infer", "/v2/models/double/versions/1/infer"])
@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
async def test_infer_with_json(client: Client, path: str, data: list[Any]):
    """Flat or nested in, flat out; the id is echoed."""
    response = await client.post(path, {"id": "42", "inputs": [tensor(data, [2, 3])]})
    assert response.headers["content-type"] == "application/json"
    assert response.json == {
        "model_name": "double",
        "model_version": "1",
        "id": "42",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 3], "data": [2, 4, 6, 8, 10, 12]}],
    }


async def test_infer_without_an_id(client: Client):
    """None is made up."""
    response = await client.post("/v2/models/double/infer", {"inputs": [tensor([1, 2, 3], [1, 3])]})
    assert "id" not in response.json


@pytest.mark.parametrize(
    "keys",
    [
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]},
    ],
)
async def test_infer_with_binary_both_ways(client: Client, keys: dict[str, Any]):
    """Tensors follow the JSON, whose length is in the header; asked for by the request or by the output."""
    sent = np.array([[1, 2, 3]], np.float32)
    input_ = {"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
    text = json.dumps({"inputs": [input_], **keys}).encode()
    response = await client.post(
        "/v2/models/double/infer", text + sent.tobytes(), inference_header_content_length=str(len(text))
    )
    assert response.status == 200
    assert response.headers["content-type"] == OCTETS
    length = int(response.headers["inference-header-content-length"])
    (output,) = json.loads(response.body[:length])["outputs"]
    assert output == {"name": "y", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}
    assert np.frombuffer(response.body[length:], np.float32).tolist() == [2, 4, 6]


async def test_infer_with_each_output_as_asked(client: Client):
    """One as JSON, one as binary, in the order asked for."""
    body = {
        "inputs": [tensor([5], [1], "INT32", "a"), tensor(["p"], [1], "BYTES", "b")],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "out_b"}, {"name": "out_a", "parameters": {"binary_data": False}}],
    }
    response = await client.post("/v2/models/pair/infer", body)
    length = int(response.headers["inference-header-content-length"])
    out_b, out_a = json.loads(response.body[:length])["outputs"]
    assert (out_b["name"], out_b["parameters"]) == ("out_b", {"binary_data_size": 6})
    assert (out_a["name"], out_a["data"]) == ("out_a", [10])
    assert response.body[length:] == b"\x02\0\0\0pp"


async def test_infer_with_a_raw_request(client: Client):
    """A JSON part of length 0: the body is the tensor, and so is the answer's tail."""
    response = await client.post(
        "/v2/models/half/infer", np.ones(6, np.float16).tobytes(), inference_header_content_length="0"
    )
    length = int(response.headers["inference-header-content-length"])
    assert json.loads(response.body[:length])["outputs"][0]["shape"] == [2, 3]
    assert np.frombuffer(response.body[length:], np.float16).tolist() == [2] * 6


async def test_infer_of_another_signature(client: Client):
    """Named by a parameter."""
    body = {"inputs": [tensor([1, 2, 3], [1, 3], "FP16")], "parameters": {"signature_name": "half"}}
    response = await client.post(
        "/v2/models/double/infer", body | {"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    )
    assert response.status == 200
    assert np.frombuffer(response.body[-6:], np.float16).tolist() == [2, 4, 6]


@pytest.mark.parametrize("path", ["/v2/models/double/ready", "/v2/models/double/versions/1/ready"])
async def test_a_model_is_ready(client: Client, path: str):
    """200 and true."""
    response = await client.get(path)
    assert (response.status, response.json) == (200, {"name": "double", "ready": True})


# Health


@pytest.mark.parametrize(("phase", "ready"), [("ready", True), ("loading", False), ("draining", False)])
async def test_health_follows_the_server(kiln: Kiln, phase: str, ready: bool):
    """Alive throughout; ready only when loaded and not stopping. Both keys come in both answers."""
    kiln.health.loaded = phase != "loading"
    kiln.health.draining = phase == "draining"
    client = Client(kiln.app)
    body = {"live": True, "ready": ready}
    live, is_ready = await client.get("/v2/health/live"), await client.get("/v2/health/ready")
    assert (live.status, live.json) == (200, body)
    assert (is_ready.status, is_ready.json) == (200 if ready else 503, body)


async def test_a_model_that_was_unloaded_is_not_ready(kiln: Kiln):
    """503 and false, and END in TensorFlow Serving's words."""
    await kiln.registry.stop(1.0)
    client = Client(kiln.app)
    response = await client.get("/v2/models/double/ready")
    assert (response.status, response.json) == (503, {"name": "double", "ready": False})
    (status,) = (await client.get("/v1/models/double")).json["model_version_status"]
    assert status["state"] == "END"


async def test_a_model_that_failed_tells_why(kiln: Kiln):
    """END with the reason and an error code."""
    kiln.registry._models["double"].versions[0].lifecycle.advance(State.FAILED, "no memory")
    (status,) = (await Client(kiln.app).get("/v1/models/double")).json["model_version_status"]
    assert status == {
        "version": "1",
        "state": "END",
        "status": {"error_code": "FAILED_PRECONDITION", "error_message": "no memory"},
    }


# Operations


@pytest.mark.parametrize("path", ["/metrics", "/monitoring/prometheus/metrics"])
async def test_metrics_count_both_dialects(client: Client, path: str):
    """In Prometheus's text format, at both places."""
    await client.post("/v1/models/double:predict", {"instances": [[1, 2, 3]]})
    await client.post("/v2/models/double/infer", {"inputs": []})
    response = await client.get(path)
    assert response.headers["content-type"].startswith("text/plain; version=")
    counts = [line for line in response.body.decode().splitlines() if line.startswith("kiln_requests_total{")]
    assert sorted(counts) == [
        'kiln_requests_total{code="invalid_argument",model="double",protocol="rest-v2",version="1"} 1.0',
        'kiln_requests_total{code="ok",model="double",protocol="rest-tfs",version="1"} 1.0',
    ]


async def test_docs_are_served(client: Client):
    """A page on which the examples can be tried."""
    response = await client.get("/docs")
    assert response.status == 200
    assert b"/openapi.json" in response.body


async def test_what_is_no_request_goes_to_the_framework(kiln: Kiln):
    """A server that asks for the app's lifespan gets it."""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive() -> dict[str, str]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await kiln.app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
