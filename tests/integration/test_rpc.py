"""The real gRPC server on a free port, asked with raw bytes: methods, statuses, health and reflection."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from service import __version__
from service.errors import INTERNAL_ERROR
from service.predictor import EXTENSIONS
from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from service.rpc.asgi import GrpcApp
from service.rpc.options import RpcOptions
from service.rpc.server import RpcServer
from tests.integration.conftest import MAX_MESSAGE_BYTES, Kiln
from tests.integration.load import busy, full, queued
from tests.integration.rpc import INFER, MODEL, OIP, PREDICT, PREDICTION, Caller, infer_request, predict_request

BOTH = pytest.mark.parametrize(
    ("method", "request_"), [(INFER, infer_request()), (PREDICT, predict_request())], ids=["v2", "tfs"]
)


# Open Inference Protocol


async def test_liveness_and_server_metadata(caller: Caller):
    """Who answers, and what of the extensions."""
    assert (await caller.ask(f"{OIP}/ServerLive", b"", oip.ServerLiveResponse)).live
    metadata = await caller.ask(f"{OIP}/ServerMetadata", b"", oip.ServerMetadataResponse)
    assert (metadata.name, metadata.version) == ("kiln", __version__)
    assert tuple(metadata.extensions) == EXTENSIONS


@pytest.mark.parametrize(("phase", "ready"), [("ready", True), ("loading", False), ("draining", False)])
async def test_readiness_follows_the_server(kiln: Kiln, caller: Caller, phase: str, ready: bool):
    """Ready only when loaded and not stopping."""
    kiln.health.loaded = phase != "loading"
    kiln.health.draining = phase == "draining"
    assert (await caller.ask(f"{OIP}/ServerReady", b"", oip.ServerReadyResponse)).ready is ready


@pytest.mark.parametrize("version", ["", "1"])
async def test_a_model_is_ready_until_it_is_unloaded(kiln: Kiln, caller: Caller, version: str):
    """Without a version too."""
    request = oip.ModelReadyRequest(name="double", version=version)
    assert (await caller.ask(f"{OIP}/ModelReady", request, oip.ModelReadyResponse)).ready
    await kiln.registry.stop(1.0)
    assert not (await caller.ask(f"{OIP}/ModelReady", request, oip.ModelReadyResponse)).ready


@pytest.mark.parametrize("version", ["", "1"])
async def test_model_metadata(caller: Caller, version: str):
    """Of the default signature; versions are text."""
    request = oip.ModelMetadataRequest(name="double", version=version)
    metadata = await caller.ask(f"{OIP}/ModelMetadata", request, oip.ModelMetadataResponse)
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("double", ["1"], "keras")
    assert [(x.name, x.datatype, list(x.shape)) for x in metadata.inputs] == [("x", "FP32", [-1, 3])]
    assert [(y.name, y.datatype, list(y.shape)) for y in metadata.outputs] == [("y", "FP32", [-1, 3])]


@pytest.mark.parametrize("version", ["", "1"])
async def test_infer(caller: Caller, version: str):
    """Raw for raw, typed for typed, with the id."""
    answer = await caller.ask(INFER, infer_request(version=version, id="42"), oip.ModelInferResponse)
    assert (answer.model_name, answer.model_version, answer.id) == ("double", "1", "42")
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [2, 4, 6]
    request = infer_request()
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    answer = await caller.ask(INFER, request, oip.ModelInferResponse)
    assert list(answer.outputs[0].contents.fp32_contents) == [2, 4, 6]
    assert not answer.raw_output_contents


# TensorFlow Serving


@pytest.mark.parametrize("spec", [{}, {"version": {"value": 1}}, {"signature_name": "serving_default"}])
async def test_predict(caller: Caller, spec: dict[str, Any]):
    """The outputs, and who made them."""
    answer = await caller.ask(PREDICT, predict_request(**spec), tfs.PredictResponse)
    made_by = answer.model_spec
    assert (made_by.name, made_by.version.value, made_by.signature_name) == ("double", 1, "serving_default")
    y = answer.outputs["y"]
    assert [dim.size for dim in y.tensor_shape.dim] == [1, 3]
    assert np.frombuffer(y.tensor_content, np.float32).tolist() == [2, 4, 6]


async def test_signatures(caller: Caller):
    """As a SignatureDefMap in an Any of its public name."""
    request = tfs.GetModelMetadataRequest(model_spec={"name": "double"}, metadata_field=["signature_def"])
    answer = await caller.ask(f"{PREDICTION}/GetModelMetadata", request, tfs.GetModelMetadataResponse)
    packed = answer.metadata["signature_def"]
    assert packed.type_url == "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    signature = tfs.SignatureDefMap.FromString(packed.value).signature_def["serving_default"]
    assert signature.inputs["x"].name == "x:0"


async def test_model_status(caller: Caller):
    """Each version's state."""
    request = tfs.GetModelStatusRequest(model_spec={"name": "double"})
    answer = await caller.ask(f"{MODEL}/GetModelStatus", request, tfs.GetModelStatusResponse)
    (status,) = answer.model_version_status
    assert (status.version, status.state, status.status.error_code) == (1, tfs.ModelVersionStatus.AVAILABLE, 0)


# What goes wrong


@pytest.mark.parametrize(
    ("method", "request_", "code", "text"),
    [
        (INFER, infer_request("no"), StatusCode.NOT_FOUND, "Servable not found for request: Latest(no)"),
        (
            INFER,
            infer_request(version="9"),
            StatusCode.NOT_FOUND,
            "Servable not found for request: Specific(double, 9)",
        ),
        (INFER, infer_request(version="v1"), StatusCode.NOT_FOUND, "model 'double' has no version 'v1': versions are"),
        (INFER, infer_request(version="9" * 20), StatusCode.NOT_FOUND, "model 'double' has no version '999999999999"),
        (PREDICT, predict_request(name="no"), StatusCode.NOT_FOUND, "Servable not found for request: Latest(no)"),
        (PREDICT, predict_request(version={"value": 9}), StatusCode.NOT_FOUND, "Servable not found for request: Spec"),
        (PREDICT, predict_request(version_label="best"), StatusCode.INVALID_ARGUMENT, "Unrecognized servable version"),
        (PREDICT, predict_request(signature_name="no"), StatusCode.FAILED_PRECONDITION, 'Serving signature name: "no'),
        (
            PREDICT,
            tfs.PredictRequest(model_spec={"name": "double"}),
            StatusCode.INVALID_ARGUMENT,
            "input 'x' is missing",
        ),
        (f"{OIP}/ModelReady", oip.ModelReadyRequest(name="no"), StatusCode.NOT_FOUND, "Could not find any versions of"),
        (f"{OIP}/ModelMetadata", oip.ModelMetadataRequest(name="no"), StatusCode.NOT_FOUND, "Servable not found for"),
        (
            f"{MODEL}/GetModelStatus",
            tfs.GetModelStatusRequest(model_spec={"name": "no"}),
            StatusCode.NOT_FOUND,
            "Could not find any versions of model no",
        ),
        (
            f"{PREDICTION}/GetModelMetadata",
            tfs.GetModelMetadataRequest(model_spec={"name": "double"}),
            StatusCode.INVALID_ARGUMENT,
            "metadata_field: 'signature_def' expected, got none",
        ),
        (
            f"{PREDICTION}/Classify",
            tfs.ClassificationRequest(model_spec={"name": "no"}),
            StatusCode.NOT_FOUND,
            "Servable not found for request: Latest(no)",
        ),
        (f"{PREDICTION}/Regress", b"\xff", StatusCode.INVALID_ARGUMENT, "the request cannot be parsed as"),
        (f"{PREDICTION}/MultiInference", b"", StatusCode.INVALID_ARGUMENT, "tasks: at least one expected, got none"),
        (f"{MODEL}/HandleReloadConfigRequest", b"", StatusCode.INVALID_ARGUMENT, "config: a model_config_list"),
        (f"{OIP}/Nothing", b"", StatusCode.UNIMPLEMENTED, "Method not found"),
    ],
)
async def test_statuses(caller: Caller, method: str, request_: Any, code: StatusCode, text: str):
    """Each with its text."""
    got, details = await caller.refusal(method, request_)
    assert (got, details[: len(text)]) == (code, text)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (INFER, "inference.ModelInferRequest"),
        (f"{OIP}/ModelReady", "inference.ModelReadyRequest"),
        (f"{OIP}/ModelMetadata", "inference.ModelMetadataRequest"),
        (PREDICT, "tensorflow.serving.PredictRequest"),
        (f"{PREDICTION}/GetModelMetadata", "tensorflow.serving.GetModelMetadataRequest"),
        (f"{MODEL}/GetModelStatus", "tensorflow.serving.GetModelStatusRequest"),
    ],
)
async def test_garbage(caller: Caller, method: str, name: str):
    """Bytes that are no message are told by the message's public name."""
    expected = (StatusCode.INVALID_ARGUMENT, f"the request cannot be parsed as {name}")
    assert await caller.refusal(method, b"\xff\xff\xff") == expected


@pytest.mark.parametrize("method", [INFER, PREDICT, f"{OIP}/ServerLive"])
async def test_a_message_over_the_limit(caller: Caller, method: str):
    """The text has its size and the limit, as over REST."""
    size = MAX_MESSAGE_BYTES + 1
    text = f"the message has {size} bytes, over the limit of {MAX_MESSAGE_BYTES}"
    assert await caller.refusal(method, bytes(size)) == (StatusCode.INVALID_ARGUMENT, text)


@pytest.mark.parametrize("letter", ["x", "é", "\n", "𝄞"])
async def test_a_long_text_is_cut_before_it_costs_the_status(caller: Caller, letter: str):
    """A status of over 16 KB would reach the client as RESOURCE_EXHAUSTED, which means a full queue."""
    code, text = await caller.refusal(INFER, infer_request(letter * 20_000))
    assert code is StatusCode.NOT_FOUND
    assert text.endswith(letter + "…")


@BOTH
async def test_a_full_queue(kiln: Kiln, caller: Caller, method: str, request_: Any):
    """RESOURCE_EXHAUSTED at once, in TensorFlow Serving's words; when to come back is in the trailing metadata."""
    async with full(kiln):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await caller.start(method, request_)
    assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED
    assert str(refused.value.details()).startswith(
        "The batch scheduling queue to which this task was submitted is full"
    )
    assert ("retry-after", "1") in list(refused.value.trailing_metadata())


@BOTH
async def test_a_deadline_of_the_caller(kiln: Kiln, caller: Caller, method: str, request_: Any):
    """The model never sees a request whose deadline passes in the queue."""
    async with busy(kiln):
        code, _ = await caller.refusal(method, request_, timeout_s=0.05)
        assert code is StatusCode.DEADLINE_EXCEEDED
    await caller.start(method, request_)
    assert [len(batch["x"]) for batch in kiln.model.batches] == [1, 1]


@BOTH
async def test_a_deadline_of_the_server(kiln: Kiln, transport: str, method: str, request_: Any):
    """A caller who states none is told when the server's own has passed."""
    options = RpcOptions("127.0.0.1:0", MAX_MESSAGE_BYTES, 0.03)
    server = RpcServer(kiln.predictor, kiln.health.is_ready, options)
    hasty = replace(kiln, rpc=server, grpc_app=GrpcApp(server.services, options), grpc_port=await server.start())
    async with hasty.channel(transport) as channel, busy(kiln):
        code, text = await Caller(channel).refusal(method, request_)
    await server.stop(0.0)
    assert code is StatusCode.DEADLINE_EXCEEDED
    assert text.startswith("the deadline passed after ")


@BOTH
async def test_a_caller_who_cancels(kiln: Kiln, caller: Caller, method: str, request_: Any):
    """The request leaves the queue unrun and is counted as cancelled."""
    labels = {"model": "double", "version": "1", "protocol": "grpc-v2" if method == INFER else "grpc-tfs"}
    labels["code"] = "cancelled"
    counted = partial(kiln.metrics.registry.get_sample_value, "kiln_requests_total", labels)
    async with busy(kiln):
        call = caller.start(method, request_)
        await queued(kiln, 1)
        call.cancel()
        async with asyncio.timeout(30.0):
            while not counted():
                await asyncio.sleep(0)
    await caller.start(method, request_)
    assert [len(batch["x"]) for batch in kiln.model.batches] == [1, 1]


@BOTH
async def test_a_server_that_stops(kiln: Kiln, caller: Caller, method: str, request_: Any):
    """UNAVAILABLE, which clients retry elsewhere."""
    await kiln.registry.stop(1.0)
    expected = (StatusCode.UNAVAILABLE, "the server is stopping and takes no new requests")
    assert await caller.refusal(method, request_) == expected


@BOTH
async def test_a_model_that_fails(kiln: Kiln, caller: Caller, method: str, request_: Any):
    """INTERNAL, with what the model said."""
    kiln.model.poison = 2.0
    expected = (StatusCode.INTERNAL, "the model failed: ValueError: poisoned")
    assert await caller.refusal(method, request_) == expected


async def test_a_fault_of_kiln(
    kiln: Kiln, caller: Caller, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """INTERNAL that shows nothing of the fault; the log does."""

    def explode(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(kiln.registry, "check", explode)
    assert await caller.refusal(INFER, infer_request()) == (StatusCode.INTERNAL, INTERNAL_ERROR)
    assert f"/{INFER} failed" in caplog.text
    assert "secret" in caplog.text


async def test_a_port_that_is_taken(kiln: Kiln):
    """An OSError with the address; a server that never started can be stopped."""
    server = RpcServer(
        kiln.predictor, kiln.health.is_ready, RpcOptions(f"127.0.0.1:{kiln.grpc_port}", MAX_MESSAGE_BYTES, 30.0)
    )
    await server.stop(0.0)
    with pytest.raises(OSError, match=f"the gRPC port 127.0.0.1:{kiln.grpc_port} cannot be bound"):
        await server.start()
