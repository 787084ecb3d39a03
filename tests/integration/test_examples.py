"""Classify, regress and multi-inference through the real front ends, over REST and over gRPC alike."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc import StatusCode

from service.batching.queue import Lane, Limits
from service.rpc._generated.kiln.tensorflow.example_pb2 import Example
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.tensors import DataType, Signature, Tensors, TensorSpec
from tests.fakes import FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import GZIP_MIN_BYTES, Kiln, start_kiln
from tests.integration.rpc import PREDICTION, Caller
from tests.signatures import one

CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"
_MESSAGES = (TensorSpec("inputs", DataType.BYTES, (None,)),)
SIGNATURES = {
    signature.name: signature
    for signature in (
        one(DataType.FP32, (None, 2)),
        one(DataType.FP32, (None,), "value"),
        Signature(
            "classes",
            _MESSAGES,
            (TensorSpec("classes", DataType.BYTES, (None, 2)), TensorSpec("scores", DataType.FP32, (None, 2))),
            CLASSIFY,
        ),
        Signature("values", _MESSAGES, (TensorSpec("outputs", DataType.FP32, (None, 1)),), REGRESS),
    )
}


class ExampleModel(FakeModel):
    """Doubles features, and in signatures made for it parses messages: `x` by `y`, and their sum."""

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        if "inputs" not in inputs:
            return super().run(lane, inputs)
        self.batches.append(inputs)
        features = [Example.FromString(data).features.feature for data in inputs["inputs"]]
        numbers = np.array([[f["x"].float_list.value[0], f["y"].int64_list.value[0]] for f in features], np.float32)
        if lane.signature.name == "values":
            return {"outputs": numbers.sum(axis=1, keepdims=True)}
        labels = np.array([[f["label"].bytes_list.value[0], b"other"] for f in features], object)
        return {"classes": labels, "scores": numbers}


@dataclass
class Server:
    """A server of one such model, ``m``, and callers of both its sides."""

    kiln: Kiln
    rest: Client
    rpc: Caller

    async def json(self, verb: str, body: Any, **headers: str) -> Any:
        response = await self.rest.post(f"/v1/models/m:{verb}", body, **headers)
        assert response.status == 200, response.body
        assert list(response.json) == ["results"]
        return response.json["results"]

    async def classify(self, request: pb.ClassificationRequest) -> list[list[tuple[str, float]]]:
        response = await self.rpc.ask(f"{PREDICTION}/Classify", request, pb.ClassificationResponse)
        assert (response.model_spec.name, response.model_spec.version.value) == ("m", 1)
        return _classes(response.result)

    async def regress(self, request: pb.RegressionRequest) -> list[float]:
        response = await self.rpc.ask(f"{PREDICTION}/Regress", request, pb.RegressionResponse)
        assert (response.model_spec.name, response.model_spec.version.value) == ("m", 1)
        return [each.value for each in response.result.regressions]

    def counted(self, protocol: str, code: str = "ok") -> float:
        labels = {"model": "m", "version": "1", "protocol": protocol, "code": code}
        return self.kiln.metrics.registry.get_sample_value("kiln_requests_total", labels) or 0


def _classes(result: Any) -> list[list[tuple[str, float]]]:
    return [[(each.label, each.score) for each in row.classes] for row in result.classifications]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Server]:
    """See `Server`."""
    kiln = await start_kiln({"m": ExampleModel(SIGNATURES)}, Limits(64, 4096, 1 << 20))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        yield Server(kiln, Client(kiln.app), Caller(channel))
    await kiln.stop(5.0, 0.0)


ROWS = [{"x": [1.0, 2.5]}, {"x": [3.0, 4.0]}]
NAMED = {"context": {"y": 2, "label": "first"}, "examples": [{"x": 1.0}, {"x": 3.0, "y": 4, "label": {"b64": "w6k="}}]}
ONE_BY_ONE = [{"x": 1.0}, {"x": 3.0}]


def fill(source: Any, rows: list[dict[str, Any]], context: dict[str, Any] | None = None) -> None:
    """`rows` of JSON as messages of an ``Input``."""
    target = source.example_list
    if context is not None:
        target = source.example_list_with_context
        _fill_example(target.context, context)
    for row in rows:
        _fill_example(target.examples.add(), row)


def _fill_example(example: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        feature = example.features.feature[name]
        values = value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, float):
                feature.float_list.value.append(item)
            elif isinstance(item, int):
                feature.int64_list.value.append(item)
            else:
                feature.bytes_list.value.append("é".encode() if isinstance(item, dict) else item.encode())


def request_of(kind: Any, signature: str, rows: list[dict[str, Any]], context: dict[str, Any] | None = None) -> Any:
    request = kind(model_spec={"name": "m", "signature_name": signature})
    fill(request.input, rows, context)
    return request


async def test_classify_by_features(server: Server):
    """An ordinary signature's output has the scores, and the classes are called by their index."""
    expected = [[("0", 2.0), ("1", 5.0)], [("0", 6.0), ("1", 8.0)]]
    assert await server.json("classify", {"examples": ROWS}) == [[list(c) for c in row] for row in expected]
    assert await server.classify(request_of(pb.ClassificationRequest, "", ROWS)) == expected
    assert (server.counted("rest-tfs"), server.counted("grpc-tfs")) == (1, 1)


async def test_classify_by_messages(server: Server):
    """A signature made for it parses the examples, which have the context in them."""
    expected = [[("first", 1.0), ("other", 2.0)], [("é", 3.0), ("other", 4.0)]]
    body = {"signature_name": "classes", **NAMED}
    assert await server.json("CLASSIFY", body) == [[list(c) for c in row] for row in expected]
    request = request_of(pb.ClassificationRequest, "classes", NAMED["examples"], NAMED["context"])  # type: ignore[arg-type]
    assert await server.classify(request) == expected


@pytest.mark.parametrize(
    ("signature", "body", "expected"),
    [("value", {"examples": ONE_BY_ONE}, [2.0, 6.0]), ("values", NAMED, [3.0, 7.0])],
)
async def test_regress(server: Server, signature: str, body: Any, expected: list[float]):
    """By features, and by messages."""
    assert await server.json("regress", {"signature_name": signature, **body}) == expected
    request = request_of(pb.RegressionRequest, signature, body["examples"], body.get("context"))
    assert await server.regress(request) == expected


async def test_multi_inference(server: Server):
    """Several signatures on the same examples: one request, answered in the order of its tasks."""
    request = pb.MultiInferenceRequest()
    request.tasks.add(model_spec={"name": "m", "signature_name": "values"}, method_name=REGRESS)
    request.tasks.add(model_spec={"name": "m", "signature_name": "classes"}, method_name=CLASSIFY)
    fill(request.input, NAMED["examples"], NAMED["context"])  # type: ignore[arg-type]
    response = await server.rpc.ask(f"{PREDICTION}/MultiInference", request, pb.MultiInferenceResponse)
    first, second = response.results
    assert [each.value for each in first.regression_result.regressions] == [3, 7]
    assert _classes(second.classification_result)[1] == [("é", 3.0), ("other", 4.0)]
    assert [result.model_spec.signature_name for result in response.results] == ["values", "classes"]
    assert server.counted("grpc-tfs") == 1
    call = server.rpc.start(f"{PREDICTION}/MultiInference", request)
    await call
    assert dict(await call.trailing_metadata())["server-timing"].endswith("rows;desc=2")


@pytest.mark.parametrize(
    ("signature", "rows", "text"),
    [
        ("none", ROWS, 'Serving signature name: "none" not found in signature def'),
        ("values", ROWS, f"signature 'values': method {CLASSIFY} expected, got {REGRESS}"),
        ("value", ONE_BY_ONE, "output 'y': shape [rows, classes] expected, got [-1]"),
        ("", [{"x": [1.0]}], "feature 'x': 2 values expected for a row of shape [2], got 1"),
        ("", [{"x": ["a", "b"]}], "feature 'x' of example 0: integers or floats expected for FP32, got strings"),
        ("", [], ""),
    ],
)
async def test_a_wrong_request_reaches_no_batch(server: Server, signature: str, rows: Any, text: str):
    """400 and INVALID_ARGUMENT with one text, and counted."""
    response = await server.rest.post("/v1/models/m:classify", {"signature_name": signature, "examples": rows})
    assert response.status == 400
    request = request_of(pb.ClassificationRequest, signature, rows)
    code, details = await server.rpc.refusal(f"{PREDICTION}/Classify", request)
    assert code == StatusCode.INVALID_ARGUMENT
    assert response.error[: len(text)] == details[: len(text)] == text
    assert server.kiln.model.batches == []
    assert server.counted("grpc-tfs", "invalid_argument") == 1


async def test_callers_share_a_batch_with_predict(server: Server):
    """Features are inputs like any others: the same lane takes them."""
    await server.json("classify", {"examples": ROWS})
    response = await server.rest.post("/v1/models/m:predict", {"instances": [[1, 2.5], [3, 4]]})
    assert response.json == {"predictions": [[2, 5], [6, 8]]}
    first, second = server.kiln.model.batches
    np.testing.assert_array_equal(first["x"], second["x"])


@pytest.mark.parametrize("path", ["/v1/models/m:predict", "/v1/models/m:classify", "/v2/models/m/infer"])
async def test_large_answers_come_as_gzip_where_they_are_taken(server: Server, path: str):
    """In both REST dialects; the caller who takes none gets the same bytes."""
    rows = [[index / 7, index] for index in range(GZIP_MIN_BYTES // 8)]
    flat = [value for row in rows for value in row]
    bodies: dict[str, Any] = {
        "predict": {"instances": rows},
        "classify": {"examples": [{"x": [a, float(b)]} for a, b in rows]},
        "infer": {"inputs": [{"name": "x", "shape": [len(rows), 2], "datatype": "FP32", "data": flat}]},
    }
    body = bodies[path.replace(":", "/").rpartition("/")[2]]
    bare = await server.rest.post(path, body)
    packed = await server.rest.post(path, body, accept_encoding="gzip, deflate")
    assert (bare.status, packed.status) == (200, 200)
    assert len(packed.body) < len(bare.body)
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in bare.headers
    assert gzip.decompress(packed.body) == bare.body


async def test_a_binary_answer_as_gzip_tells_the_size_of_its_json(server: Server):
    """Of the JSON before it was compressed, as Triton has it."""
    x = np.arange(GZIP_MIN_BYTES, dtype=np.float32).reshape(-1, 2)
    head = {
        "inputs": [{"name": "x", "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    response = await server.rest.post(
        "/v2/models/m/infer",
        text + x.tobytes(),
        inference_header_content_length=str(len(text)),
        accept_encoding="gzip",
    )
    body = gzip.decompress(response.body)
    json_bytes = int(response.headers["inference-header-content-length"])
    assert json.loads(body[:json_bytes])["outputs"][0]["parameters"]["binary_data_size"] == x.nbytes
    np.testing.assert_array_equal(np.frombuffer(body[json_bytes:], np.float32).reshape(x.shape), 2 * x)
