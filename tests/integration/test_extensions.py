"""Triton's extensions of the Open Inference Protocol, over REST and gRPC alike."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToDict
from grpc import StatusCode

from service.rpc._generated.inference import open_inference_pb2 as oip
from service.tensors import DataType, unpack_raw
from tests.fakes import DOUBLE, FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln, start_kiln
from tests.integration.load import busy
from tests.integration.rpc import INFER, OIP, Caller, infer_request


@pytest_asyncio.fixture
async def caller(kiln: Kiln) -> AsyncIterator[Caller]:
    """A gRPC client of the running server."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        yield Caller(channel)


@pytest.fixture
def client(kiln: Kiln) -> Client:
    """A REST client of the same."""
    return Client(kiln.app)


def body(*rows: float, **keys: Any) -> dict[str, Any]:
    data = [value for row in rows for value in (row, row + 1, row + 2)]
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [len(rows), 3], "data": data}], **keys}


async def infer(client: Client, *rows: float, **keys: Any) -> Any:
    response = await client.post("/v2/models/double/infer", body(*rows, **keys))
    assert response.status == 200, response.body
    return response.json


async def test_the_extensions_are_those_that_are_answered(client: Client):
    """By Triton's names."""
    assert (await client.get("/v2")).json["extensions"] == [
        "classification",
        "model_repository",
        "schedule_policy",
        "model_configuration",
        "binary_tensor_data",
        "parameters",
        "statistics",
        "trace",
        "logging",
    ]


# Statistics


@pytest.mark.parametrize("path", ["/v2/models/stats", "/v2/models/double/stats", "/v2/models/double/versions/1/stats"])
async def test_statistics_tell_what_was_run(client: Client, path: str):
    """Requests, rows and batches, of every loaded version that is asked for."""
    await infer(client, 1)
    await infer(client, 1, 2)
    (told,) = (await client.get(path)).json["model_stats"]
    assert (told["name"], told["version"], told["inference_count"], told["execution_count"]) == ("double", "1", 3, 2)
    assert told["last_inference"] > 1.6e12
    assert {name: each["count"] for name, each in told["inference_stats"].items()} == {
        "success": 2,
        "fail": 0,
        "queue": 2,
        "compute_input": 2,
        "compute_infer": 2,
        "compute_output": 2,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert [(size["batch_size"], size["compute_infer"]["count"]) for size in told["batch_stats"]] == [(1, 1), (2, 1)]


@pytest.mark.parametrize(("name", "version"), [("", ""), ("double", ""), ("double", "1")])
async def test_statistics_over_grpc_are_the_same(client: Client, caller: Caller, name: str, version: str):
    """Number for number."""
    await infer(client, 1, 2, 3)
    request = oip.ModelStatisticsRequest(name=name, version=version)
    answer = await caller.ask(f"{OIP}/ModelStatistics", request, oip.ModelStatisticsResponse)
    told = (await client.get("/v2/models/stats")).json
    plain = MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    assert _numbers(plain) == told


def _numbers(value: Any) -> Any:
    """Protobuf's JSON writes 64 bits as text."""
    if isinstance(value, dict):
        return {key: each if key == "version" else _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return int(value) if isinstance(value, str) and value.isdigit() else value


async def test_statistics_of_what_is_not_there(kiln: Kiln, client: Client, caller: Caller):
    """404 for what does not exist; nothing of what is not loaded."""
    for path in ("no", "double/versions/9", "double/versions/x"):
        assert (await client.get(f"/v2/models/{path}/stats")).status == 404
    request = oip.ModelStatisticsRequest(name="no")
    assert (await caller.refusal(f"{OIP}/ModelStatistics", request))[0] is StatusCode.NOT_FOUND
    await kiln.registry.stop(1.0)
    assert (await client.get("/v2/models/double/stats")).json == {"model_stats": []}


# Configuration


@pytest.mark.parametrize("version", ["", "1"])
async def test_configuration_in_both_protocols(client: Client, caller: Caller, version: str):
    """What batches there are, and the shapes without their rows."""
    path = f"/v2/models/double/versions/{version}/config" if version else "/v2/models/double/config"
    told = (await client.get(path)).json
    assert (told["name"], told["platform"], told["max_batch_size"]) == ("double", "keras", 8)
    assert (told["input"][0]["data_type"], told["input"][0]["dims"]) == ("TYPE_FP32", [3])
    assert told["dynamic_batching"]["preferred_batch_size"] == [1, 2, 4, 8]
    request = oip.ModelConfigRequest(name="double", version=version)
    config = (await caller.ask(f"{OIP}/ModelConfig", request, oip.ModelConfigResponse)).config
    assert (config.name, config.platform, config.backend, config.max_batch_size) == (
        "double",
        "keras",
        "tensorflow",
        8,
    )
    assert config.input[0].data_type == oip.DataType.TYPE_FP32
    assert list(config.output[0].dims) == [3]
    assert config.version_policy.latest.num_versions == 1
    assert config.instance_group[0].kind == oip.ModelInstanceGroup.KIND_CPU
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 2, 4, 8]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert not config.model_transaction_policy.decoupled


async def test_configuration_of_what_is_not_there(client: Client, caller: Caller):
    """404."""
    assert (await client.get("/v2/models/no/config")).status == 404
    assert (await client.get("/v2/models/double/versions/2/config")).status == 404
    assert (await caller.refusal(f"{OIP}/ModelConfig", oip.ModelConfigRequest(name="no")))[0] is StatusCode.NOT_FOUND


# Log and trace


@pytest.fixture
def _level() -> Iterator[None]:
    logger = logging.getLogger("kiln")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


@pytest.mark.usefixtures("_level")
async def test_the_log_is_switched_in_both_protocols(client: Client, caller: Caller):
    """What one sets the other tells, and the logger obeys."""
    changed = await client.post("/v2/logging", {"log_verbose_level": 1})
    assert changed.status == 200
    assert changed.json == (await client.get("/v2/logging")).json
    assert logging.getLogger("kiln").isEnabledFor(logging.DEBUG)
    request = oip.LogSettingsRequest()
    request.settings["log_verbose_level"].uint32_param = 0
    request.settings["log_info"].bool_param = False
    request.settings["log_error"].SetInParent()
    told = await caller.ask(f"{OIP}/LogSettings", request, oip.LogSettingsResponse)
    assert {name: getattr(each, each.WhichOneof("parameter_choice")) for name, each in told.settings.items()} == {
        "log_file": "",
        "log_info": False,
        "log_warning": True,
        "log_error": True,
        "log_verbose_level": 0,
        "log_format": "console",
    }
    assert (await client.get("/v2/logging")).json["log_info"] is False
    assert not logging.getLogger("kiln").isEnabledFor(logging.INFO)


@pytest.mark.usefixtures("_level")
async def test_a_log_setting_that_is_wrong(client: Client, caller: Caller):
    """Refused by name."""
    refused = await client.post("/v2/logging", {"log_level": "debug"})
    assert (refused.status, refused.error.split(":")[0]) == (400, "unknown log setting 'log_level'")
    request = oip.LogSettingsRequest()
    request.settings["log_info"].string_param = "yes"
    code, text = await caller.refusal(f"{OIP}/LogSettings", request)
    assert (code, text) == (
        StatusCode.INVALID_ARGUMENT,
        "log setting log_info: true or false expected, got 'yes'",
    )


@pytest.mark.parametrize("model", ["", "double"])
async def test_tracing_is_off_and_stays_so(client: Client, caller: Caller, model: str):
    """Turning it on is not implemented, and says so."""
    path = f"/v2/models/{model}/trace/setting" if model else "/v2/trace/setting"
    off = {"trace_level": ["OFF"]}
    assert (await client.get(path)).json == off
    assert (await client.post(path, {"trace_level": "OFF"})).json == off
    refused = await client.post(path, {"trace_level": ["TIMESTAMPS"]})
    assert (refused.status, "requests are not traced" in refused.error) == (501, True)
    request = oip.TraceSettingRequest(model_name=model)
    request.settings["trace_level"].value.append("OFF")
    request.settings["trace_rate"].SetInParent()
    told = await caller.ask(f"{OIP}/TraceSetting", request, oip.TraceSettingResponse)
    assert {name: list(each.value) for name, each in told.settings.items()} == off
    request.settings["trace_level"].value.append("TENSORS")
    assert (await caller.refusal(f"{OIP}/TraceSetting", request))[0] is StatusCode.UNIMPLEMENTED


async def test_trace_settings_of_an_unknown_model(client: Client, caller: Caller):
    """404, to ask and to set."""
    assert (await client.get("/v2/models/no/trace/setting")).status == 404
    assert (await client.post("/v2/models/no/trace/setting", {})).status == 404
    request = oip.TraceSettingRequest(model_name="no")
    assert (await caller.refusal(f"{OIP}/TraceSetting", request))[0] is StatusCode.NOT_FOUND


# Classification


async def test_classes_as_json(client: Client):
    """The best of each row; the type is BYTES."""
    outputs = [{"name": "y", "parameters": {"classification": 2}}]
    (output,) = (await infer(client, 1, 5, outputs=outputs))["outputs"]
    assert output == {
        "name": "y",
        "datatype": "BYTES",
        "shape": [2, 2],
        "data": ["6.000000:2", "4.000000:1", "14.000000:2", "12.000000:1"],
    }


async def test_classes_as_binary(client: Client):
    """Each with its length before it."""
    outputs = [{"name": "y", "parameters": {"classification": 9, "binary_data": True}}]
    response = await client.post("/v2/models/double/infer", body(1, outputs=outputs))
    length = int(response.headers["inference-header-content-length"])
    (output,) = json.loads(response.body[:length])["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 3])
    texts = unpack_raw(response.body[length:], DataType.BYTES, (1, 3), "y")
    assert texts.tolist() == [[b"6.000000:2", b"4.000000:1", b"2.000000:0"]]


@pytest.mark.parametrize("raw", [True, False])
async def test_classes_over_grpc(caller: Caller, raw: bool):
    """Raw where the request was, else typed."""
    request = infer_request()
    request.outputs.add(name="y").parameters["classification"].int64_param = 2
    if not raw:
        del request.raw_input_contents[:]
        request.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    answer = await caller.ask(INFER, request, oip.ModelInferResponse)
    (output,) = answer.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [1, 2])
    if raw:
        texts = unpack_raw(answer.raw_output_contents[0], DataType.BYTES, (1, 2), "y").tolist()
    else:
        texts = [list(output.contents.bytes_contents)]
    assert texts == [[b"6.000000:2", b"4.000000:1"]]


async def test_a_count_that_is_none_reaches_no_batch(kiln: Kiln, client: Client, caller: Caller):
    """400, with the output's name."""
    text = "output 'y': parameter classification: a whole number of at least 1 expected, got 0"
    outputs = [{"name": "y", "parameters": {"classification": 0}}]
    refused = await client.post("/v2/models/double/infer", body(1, outputs=outputs))
    assert (refused.status, refused.error) == (400, text)
    request = infer_request()
    request.outputs.add(name="y").parameters["classification"].int64_param = 0
    assert await caller.refusal(INFER, request) == (StatusCode.INVALID_ARGUMENT, text)
    assert kiln.model.batches == []


async def test_classes_have_the_names_of_the_model():
    """Carried by the signature's output."""
    named = replace(DOUBLE, outputs=(replace(DOUBLE.outputs[0], labels=("a", "b", "c")),))
    kiln = await start_kiln({"double": FakeModel({"serving_default": named})})
    try:
        client = Client(kiln.app)
        (output,) = (await infer(client, 1, outputs=[{"name": "y", "parameters": {"classification": 1}}]))["outputs"]
        assert output["data"] == ["6.000000:2:c"]
        assert (await client.get("/v2/models/double/config")).json["output"][0]["label_filename"] == "labels.txt"
    finally:
        await kiln.stop(1.0, 0.0)


# Schedule hints


async def test_a_timeout_of_the_request_ends_its_wait(kiln: Kiln, client: Client, caller: Caller):
    """In µs, where it is earlier than the deadline of the call; the request is not run."""
    request = infer_request()
    request.parameters["timeout"].uint64_param = 1000
    async with busy(kiln):
        refused = await client.post("/v2/models/double/infer", body(2, parameters={"timeout": 1000}))
        assert (refused.status, "the deadline passed" in refused.error) == (504, True)
        assert (await caller.refusal(INFER, request))[0] is StatusCode.DEADLINE_EXCEEDED
    assert len(kiln.model.batches) == 1


async def test_the_deadline_of_the_call_holds_all_the_same(kiln: Kiln, client: Client):
    """A longer timeout does not put it off."""
    async with busy(kiln):
        parameters = {"timeout": 60_000_000}
        refused = await client.post("/v2/models/double/infer", body(2, parameters=parameters), kiln_timeout_ms="5")
        assert refused.status == 504


async def test_hints_are_taken(client: Client, caller: Caller):
    """With a priority, and with parameters that nobody knows."""
    answer = await infer(client, 1, parameters={"timeout": 30_000_000, "priority": 1, "colour": "red"})
    assert answer["outputs"][0]["data"] == [2, 4, 6]
    request = infer_request()
    request.parameters["timeout"].int64_param = 30_000_000
    request.parameters["priority"].uint64_param = 1
    request.parameters["colour"].string_param = "red"
    raw = (await caller.ask(INFER, request, oip.ModelInferResponse)).raw_output_contents[0]
    assert np.frombuffer(raw, np.float32).tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("timeout", "int64_param", -1),
        ("timeout", "string_param", "5"),
        ("priority", "double_param", 1.0),
        ("signature_name", "int64_param", 1),
        ("binary_data_output", "string_param", "yes"),
    ],
)
async def test_a_known_parameter_of_the_wrong_type(
    kiln: Kiln, client: Client, caller: Caller, name: str, kind: str, value: Any
):
    """400 in both protocols, before any batch."""
    refused = await client.post("/v2/models/double/infer", body(1, parameters={name: value}))
    assert refused.status == 400
    assert refused.error.startswith(f"parameter {name}")
    request = infer_request()
    setattr(request.parameters[name], kind, value)
    code, text = await caller.refusal(INFER, request)
    assert code is StatusCode.INVALID_ARGUMENT
    assert text.startswith(f"parameter {name}")
    assert kiln.model.batches == []


# Repository and health


@pytest.mark.parametrize(
    ("verb", "parameters", "status", "text"),
    [
        ("load", {"config": "{}"}, 501, "parameter 'config': models are loaded as they lie"),
        ("load", {"file:1/model.keras": ""}, 501, "parameter 'file:1/model.keras'"),
        ("load", [], 400, "'parameters': an object expected, got []"),
        ("unload", {"unload_dependents": 1}, 400, "parameter unload_dependents: true or false expected"),
    ],
)
async def test_parameters_of_the_repository(client: Client, verb: str, parameters: Any, status: int, text: str):
    """What cannot be done is refused, not ignored."""
    refused = await client.post(f"/v2/repository/models/double/{verb}", {"parameters": parameters})
    assert refused.status == status
    assert refused.error.startswith(text)


async def test_parameters_of_the_repository_over_grpc(caller: Caller):
    """Likewise."""
    request = oip.RepositoryModelLoadRequest(model_name="double")
    request.parameters["config"].string_param = "{}"
    assert (await caller.refusal(f"{OIP}/RepositoryModelLoad", request))[0] is StatusCode.UNIMPLEMENTED
    unload = oip.RepositoryModelUnloadRequest(model_name="double")
    unload.parameters["unload_dependents"].int64_param = 1
    assert (await caller.refusal(f"{OIP}/RepositoryModelUnload", unload))[0] is StatusCode.INVALID_ARGUMENT


async def test_the_names_of_all_models(client: Client):
    """As KServe lists them."""
    assert (await client.get("/v2/models")).json == {"models": ["double"]}


@pytest.mark.parametrize("path", ["/", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models/double/ready"])
async def test_head_is_answered_as_get(kiln: Kiln, client: Client, path: str):
    """With the same status and type, ready or not."""
    for is_loaded in (True, False):
        kiln.health.loaded = is_loaded
        head, get = await client.ask("HEAD", path), await client.get(path)
        assert (head.status, head.headers) == (get.status, get.headers)
        assert head.status == (200 if is_loaded or path != "/v2/health/ready" else 503)
    assert (await client.get("/v2/")).json == (await client.get("/v2")).json
