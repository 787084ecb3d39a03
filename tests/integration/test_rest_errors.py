"""Every way an HTTP request can go wrong: one shape of error, with the field, what was expected and what came."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from service.errors import INTERNAL_ERROR, ModelLoadError
from tests.fakes import DOUBLE, FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import MAX_MESSAGE_BYTES, Kiln, start_kiln
from tests.integration.load import batcher_of, busy, full, queued
from tests.signatures import only

PREDICT, INFER = "/v1/models/double:predict", "/v2/models/double/infer"
ROWS = {"instances": [[1, 2, 3]]}
TENSOR = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
TENSORS = {"inputs": [TENSOR]}
BOTH = pytest.mark.parametrize(("path", "body"), [(PREDICT, ROWS), (INFER, TENSORS)], ids=["tfs", "v2"])


@pytest_asyncio.fixture
async def client(kiln: Kiln) -> AsyncIterator[Client]:
    """A caller of the app."""
    yield Client(kiln.app)


def value(kiln: Kiln, name: str, **labels: str) -> float:
    return kiln.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v1/models/no", 404, "Could not find any versions of model no; loaded are double"),
        ("GET", "/v1/models/double/versions/9", 404, "Could not find version 9 of model double"),
        ("GET", "/v1/models/double/labels/best", 400, "Unrecognized servable version label: best"),
        ("GET", "/v1/models/no/metadata", 404, "Servable not found for request: Latest(no); loaded are double"),
        ("POST", "/v1/models/no:predict", 404, "Servable not found for request: Latest(no); loaded are double"),
        (
            "POST",
            "/v1/models/double/versions/9:predict",
            404,
            "Servable not found for request: Specific(double, 9); model 'double' has version 1",
        ),
        ("POST", "/v1/models/double/labels/best:predict", 400, "Unrecognized servable version label: best"),
        (
            "POST",
            f"/v1/models/double/versions/{2**63}:predict",
            404,
            f"version {2**63} is over the largest there can be, {2**63 - 1}",
        ),
        ("POST", "/v1/models/no:classify", 404, "Servable not found for request: Latest(no); loaded are double"),
        ("POST", "/v1/models/double/labels/best:Regress", 400, "Unrecognized servable version label: best"),
        ("GET", "/v2/models/no", 404, "Servable not found for request: Latest(no); loaded are double"),
        ("GET", "/v2/models/double/versions/v1", 404, "model 'double' has no version 'v1': versions are integers"),
        ("GET", "/v2/models/no/ready", 404, "Could not find any versions of model no; loaded are double"),
        ("GET", "/v2/models/double/versions/9/ready", 404, "Could not find version 9 of model double"),
        ("POST", "/v2/models/no/infer", 404, "Servable not found for request: Latest(no); loaded are double"),
        ("POST", "/v2/models/double/versions/x/infer", 404, "model 'double' has no version 'x': versions are integers"),
        ("POST", f"/v2/models/double/versions/{10**20}/infer", 404, f"model 'double' has no version '{10**20}'"),
        ("POST", "/v2/models/a/b/infer", 404, "there is no /v2/models/a/b/infer"),
        ("GET", "/nothing", 404, "Not Found: GET /nothing"),
        ("GET", "/v1beta", 404, "Not Found: GET /v1beta"),
    ],
)
async def test_what_is_not_there(client: Client, method: str, path: str, status: int, text: str):
    """Models, versions, labels, verbs and paths; the text says what there is."""
    response = await client.ask(method, path)
    assert response.status == status
    assert response.error.startswith(text)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/models/double"),
        ("GET", "/v1/models/double:predict"),
        ("GET", "/v1/models/double:classify"),
        ("POST", "/v1/models/double/metadata"),
        ("POST", "/v1/models"),
        ("GET", "/v1"),
        ("GET", "/V1/else"),
        ("POST", "/v1/models/double:explode"),
        ("POST", "/v1/models/double/versions/x:predict"),
        ("DELETE", "/v1/models/double"),
    ],
)
async def test_what_is_no_route_of_tensorflow_serving(client: Client, method: str, path: str):
    """400, as TensorFlow Serving has it, with the method and the path."""
    response = await client.ask(method, path)
    assert response.status == 400
    assert response.error == f"Malformed request: {method} {path}"


@pytest.mark.parametrize(
    ("method", "path", "allow", "text"),
    [
        ("GET", INFER, "POST", f"{INFER} is asked with POST, not GET"),
        ("POST", "/v2", "GET", "Method Not Allowed: POST /v2"),
        ("PUT", "/v2/models/double", "GET", "Method Not Allowed: PUT /v2/models/double"),
        ("POST", "/metrics", "GET", "Method Not Allowed: POST /metrics"),
    ],
)
async def test_a_wrong_method(client: Client, method: str, path: str, allow: str, text: str):
    """405, and which method there is."""
    response = await client.ask(method, path)
    assert (response.status, response.headers["allow"]) == (405, allow)
    assert response.error == text


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        (PREDICT, b"", "JSON Parse error: The document is empty"),
        (PREDICT, b"[]", "JSON Value: [] Is not object"),
        (PREDICT, {"rows": []}, "Missing 'inputs' or 'instances' key"),
        (PREDICT, {"instances": [{"z": 1}]}, "element 0 of 'instances': unknown input 'z'"),
        (PREDICT, {"instances": [["a", 2, 3]]}, "input 'x': FP32 expected at [0][0], got \"a\""),
        (PREDICT, {"instances": [[1, 2]]}, "input 'x': [3] expected, got [2]"),
        (PREDICT, ROWS | {"signature_name": "no"}, 'Serving signature name: "no" not found in signature def'),
        (INFER, b"{", "JSON Parse error: Expecting property name"),
        (INFER, {"inputs": []}, "input 'x' is missing: signature 'serving_default' takes x; received none"),
        (INFER, {"inputs": [TENSOR | {"datatype": "INT8"}]}, "input 'x': expected datatype FP32, got \"INT8\""),
        (INFER, {"inputs": [TENSOR | {"shape": [3]}]}, "input 'x': [-1, 3] expected, got [3]: add a batch dimension?"),
        (INFER, TENSORS | {"outputs": [{"name": "z"}]}, "unknown output 'z': signature 'serving_default' gives y"),
    ],
)
async def test_a_wrong_body(client: Client, kiln: Kiln, path: str, body: Any, text: str):
    """Refused before it reaches a batch."""
    response = await client.post(path, body)
    assert response.status == 400
    assert response.error.startswith(text)
    assert kiln.model.batches == []


@pytest.mark.parametrize(
    ("path", "headers", "text"),
    [
        (PREDICT, {"kiln_timeout_ms": "soon"}, "header Kiln-Timeout-Ms: a positive number expected, got 'soon'"),
        (INFER, {"kiln_timeout_ms": "-1"}, "header Kiln-Timeout-Ms: a positive number expected, got '-1'"),
        (PREDICT, {"content_encoding": "br"}, "header Content-Encoding: gzip or identity expected, got 'br'"),
        (INFER, {"content_encoding": "gzip"}, "the gzip body is broken"),
        (INFER, {"inference_header_content_length": "x"}, "header Inference-Header-Content-Length: a size in bytes"),
        (INFER, {"inference_header_content_length": "-1"}, "header Inference-Header-Content-Length: a size in bytes"),
        (INFER, {"inference_header_content_length": "9" * 19}, "header Inference-Header-Content-Length: a size in"),
        (INFER, {"inference_header_content_length": "9999"}, "header Inference-Header-Content-Length: 9999 is not"),
    ],
)
async def test_a_wrong_header(client: Client, path: str, headers: dict[str, str], text: str):
    """The text names the header."""
    response = await client.post(path, TENSORS, **headers)
    assert response.status == 400
    assert response.error.startswith(text)


@BOTH
@pytest.mark.parametrize("stated", [True, False])
async def test_a_body_over_the_limit(client: Client, path: str, body: Any, stated: bool):
    """413 with the limit, whether the length was stated or not; the connection is closed, for the rest is not read."""
    length = MAX_MESSAGE_BYTES + 1
    response = await client.post(path, bytes(length), content_length=str(length if stated else 0))
    assert (response.status, response.headers["connection"]) == (413, "close")
    assert str(MAX_MESSAGE_BYTES) in response.error


@BOTH
async def test_a_full_queue(client: Client, kiln: Kiln, path: str, body: Any):
    """429 at once, in TensorFlow Serving's words, with when to come back; the next one is answered again."""
    async with full(kiln):
        response = await client.post(path, body)
        assert (response.status, response.headers["retry-after"]) == (429, "1")
        assert response.error.startswith("The batch scheduling queue to which this task was submitted is full: ")
    assert (await client.post(path, body)).status == 200


@BOTH
async def test_a_deadline_that_passes(client: Client, kiln: Kiln, path: str, body: Any):
    """504, whether it had passed before the queue or passes in it; the model never sees the request."""
    async with busy(kiln):
        response = await client.post(path, body, kiln_timeout_ms="0.0001")
        assert response.status == 504
        assert response.error == "the deadline passed before the request was queued"
        response = await client.post(path, body, kiln_timeout_ms="30")
        assert response.status == 504
        assert response.error.startswith("the deadline passed after ")
    assert len(kiln.model.batches) == 1


@BOTH
async def test_a_server_that_stops(client: Client, kiln: Kiln, path: str, body: Any):
    """503, even where the body is over the limit: it is refused unread."""
    await kiln.registry.stop(1.0)
    for sent in (body, bytes(MAX_MESSAGE_BYTES + 1)):
        response = await client.post(path, sent)
        assert response.status == 503
        assert response.error == "the server is stopping and takes no new requests"
    assert (await client.get("/v2/models/double")).status == 503
    assert (await client.get("/v1/models/double/metadata")).status == 503


@BOTH
async def test_a_model_that_fails(client: Client, kiln: Kiln, path: str, body: Any):
    """500 with what the model said."""
    kiln.model.poison = 2.0
    response = await client.post(path, body)
    assert response.status == 500
    assert response.error == "the model failed: ValueError: poisoned"


async def test_a_shape_that_only_the_graph_can_tell():
    """Another shape is tried where the graph can be let try; if it refuses, the text is Kiln's own."""
    model = FakeModel(only(replace(DOUBLE, takes_other_shapes=True)))
    kiln = await start_kiln({"double": model})
    client = Client(kiln.app)
    assert (await client.post(PREDICT, {"instances": [1.0, 2.0, 5.0]})).json == {"predictions": [2, 4, 10]}
    model.poison = 5.0
    response = await client.post(PREDICT, {"instances": [1.0, 2.0, 5.0]})
    assert (response.status, response.error) == (400, "input 'x': [-1, 3] expected, got [3]: add a batch dimension?")
    await kiln.stop(5.0, 0.0)


@BOTH
async def test_a_caller_who_leaves(client: Client, kiln: Kiln, path: str, body: Any):
    """The request leaves the queue unrun, is counted as cancelled, and nothing is answered."""
    async with busy(kiln), client.leaving(path, body) as left:
        await queued(kiln, 1)
        left.set()
    assert (await client.post(path, body)).status == 200
    assert [batch["x"].shape[0] for batch in kiln.model.batches] == [1, 1]
    protocol = "rest-tfs" if path == PREDICT else "rest-v2"
    labels = {"model": "double", "version": "1", "protocol": protocol}
    assert value(kiln, "kiln_requests_total", code="cancelled", **labels) == 1
    assert value(kiln, "kiln_dropped_requests_total", model="double", version="1", reason="cancelled") == 1
    assert batcher_of(kiln).queue.rows == 0


@pytest.mark.parametrize("path", ["/v2/models/double", "/v1/models/double/metadata", INFER])
async def test_a_fault_of_kiln(
    client: Client, kiln: Kiln, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """500 that shows nothing of the fault, in routes and hot paths alike."""

    def explode(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(kiln.registry, "describe", explode)
    monkeypatch.setattr(kiln.registry, "check", explode)
    response = await client.ask("POST" if path == INFER else "GET", path)
    assert response.status == 500
    assert response.error == INTERNAL_ERROR


async def test_a_model_that_could_not_be_loaded(client: Client, kiln: Kiln, monkeypatch: pytest.MonkeyPatch):
    """What a route raises is answered by its code."""

    def refuse(*_: object) -> None:
        raise ModelLoadError("no such layer")

    monkeypatch.setattr(kiln.registry, "describe", refuse)
    response = await client.get("/v2/models/double")
    assert (response.status, response.error) == (400, "no such layer")
