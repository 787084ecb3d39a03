"""What operators ask: the repository extension over REST and gRPC, reloading, labels, and the status of everything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc import StatusCode

from service.registry.config import ModelConfig
from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from tests.fakes import FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import MAX_MESSAGE_BYTES, Kiln, start_kiln
from tests.integration.rpc import MODEL, OIP, PREDICT, Caller, predict_request


@pytest_asyncio.fixture
async def explicit() -> AsyncIterator[Kiln]:
    """A server that loads models by request."""
    kiln = await start_kiln({"double": FakeModel(), "other": FakeModel()}, explicit=True)
    yield kiln
    await kiln.stop(5.0, 0.5)


@pytest_asyncio.fixture
async def labelled() -> AsyncIterator[Kiln]:
    """A server whose version 1 is called ``stable``."""
    kiln = await start_kiln({"double": FakeModel()}, configs={"double": ModelConfig(labels={"stable": 1})})
    yield kiln
    await kiln.stop(5.0, 0.5)


def index(state: str, name: str = "double") -> dict[str, str]:
    return {"name": name, "version": "1", "state": state, "reason": ""}


async def test_models_are_loaded_and_unloaded_over_rest(explicit: Kiln):
    """A model is answered from its load to its unload; the index tells both."""
    client = Client(explicit.app)
    body = {"instances": [[1, 2, 3]]}
    assert (await client.post("/v1/models/double:predict", body)).status == 503
    assert (await client.post("/v2/repository/index", {})).json == []
    loaded = await client.post("/v2/repository/models/double/load", {"parameters": {}})
    assert (loaded.status, loaded.json) == (200, {})
    assert (await client.post("/v1/models/double:predict", body)).json == {"predictions": [[2, 4, 6]]}
    assert (await client.post("/v2/repository/index", b"")).json == [index("READY")]
    assert (await client.post("/v2/repository/index", {"ready": True})).json == [index("READY")]
    assert (await client.post("/v2/repository/models/double/unload", b"")).status == 200
    assert (await client.post("/v1/models/double:predict", body)).status == 503


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/v2/repository/models/nothing/load", {}, 404, "there is no model 'nothing' to load"),
        ("/v2/repository/models/nothing/unload", {}, 404, "there is no model 'nothing' to unload"),
        ("/v2/repository/models/double/load", b"{", 400, "JSON Parse error"),
        ("/v2/repository/models/double/load", b"[]", 400, "a JSON object expected, got []"),
        ("/v2/repository/index", {"ready": "yes"}, 400, "'ready': true or false expected, got \"yes\""),
        (
            "/v2/repository/index",
            b'{"ready": ' + b"[" * 500 + b"]" * 500 + b"}",
            400,
            "'ready': true or false expected, got " + "[" * 60 + "…",
        ),
        (
            "/v2/repository/index",
            b" " * (MAX_MESSAGE_BYTES + 1),
            413,
            f"the body has {MAX_MESSAGE_BYTES + 1} bytes, over the limit of {MAX_MESSAGE_BYTES}",
        ),
    ],
)
async def test_wrong_requests_are_told(explicit: Kiln, path: str, body: object, status: int, text: str):
    """In the error shape of the dialect."""
    answer = await Client(explicit.app).post(path, body)
    assert answer.status == status
    assert text in answer.error


async def test_loading_is_refused_where_the_folder_decides(kiln: Kiln):
    """503, which says what to set."""
    for verb in ("load", "unload"):
        answer = await Client(kiln.app).post(f"/v2/repository/models/double/{verb}", {})
        assert answer.status == 503
        assert "only with --model-control explicit" in answer.error


def _named(request: Any, field: str) -> Any:
    setattr(request, field, "double")
    return request


@pytest.mark.parametrize("field", ["model_name", "repository_name"])
async def test_models_are_loaded_and_unloaded_over_grpc(explicit: Kiln, field: str):
    """The name is in field 2, or, from KServe's own clients, in field 1."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{explicit.grpc_port}") as channel:
        caller = Caller(channel)
        await caller.start(f"{OIP}/RepositoryModelLoad", _named(oip.RepositoryModelLoadRequest(), field))
        answer = await caller.ask(f"{OIP}/RepositoryIndex", oip.RepositoryIndexRequest(), oip.RepositoryIndexResponse)
        assert [(m.name, m.version, m.state, m.reason) for m in answer.models] == [("double", "1", "READY", "")]
        await caller.start(f"{OIP}/RepositoryModelUnload", _named(oip.RepositoryModelUnloadRequest(), field))
        request = oip.RepositoryIndexRequest(ready=True)
        assert not (await caller.ask(f"{OIP}/RepositoryIndex", request, oip.RepositoryIndexResponse)).models
        code, text = await caller.refusal(
            f"{OIP}/RepositoryModelLoad", oip.RepositoryModelLoadRequest(model_name="nothing")
        )
        assert code is StatusCode.NOT_FOUND
        assert "there is no model 'nothing' to load; there are double, other" in text


def reload_request(*models: tfs.ModelConfig) -> tfs.ReloadConfigRequest:
    return tfs.ReloadConfigRequest(
        config=tfs.ModelServerConfig(model_config_list=tfs.ModelConfigList(config=list(models)))
    )


async def test_a_config_is_reloaded_over_grpc(kiln: Kiln):
    """Labels of the new config are addressed at once; what it does not name goes."""
    config = tfs.ModelConfig(name="double", version_labels={"stable": 1})
    config.model_version_policy.specific.versions.append(1)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        caller = Caller(channel)
        answer = await caller.ask(
            f"{MODEL}/HandleReloadConfigRequest", reload_request(config), tfs.ReloadConfigResponse
        )
        assert (answer.status.error_code, answer.status.error_message) == (0, "")
        predicted = await caller.ask(PREDICT, predict_request(version_label="stable"), tfs.PredictResponse)
        assert predicted.model_spec.version.value == 1
        await caller.start(f"{MODEL}/HandleReloadConfigRequest", reload_request())
        code, _ = await caller.refusal(PREDICT, predict_request())
        assert code is StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("models", "code", "text"),
    [
        ([tfs.ModelConfig()], StatusCode.INVALID_ARGUMENT, "config 0: a name of its own expected, got ''"),
        ([tfs.ModelConfig(name="a")] * 2, StatusCode.INVALID_ARGUMENT, "config 1: a name of its own expected"),
        ([tfs.ModelConfig(name="nothing")], StatusCode.NOT_FOUND, "there is no model 'nothing'"),
        (
            [tfs.ModelConfig(name="double", version_labels={"stable": 9})],
            StatusCode.FAILED_PRECONDITION,
            "label 'stable' cannot move to version 9, which is not READY",
        ),
    ],
)
async def test_a_wrong_config_is_told(kiln: Kiln, models: list[tfs.ModelConfig], code: StatusCode, text: str):
    """The entry and what was expected."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        got, message = await Caller(channel).refusal(f"{MODEL}/HandleReloadConfigRequest", reload_request(*models))
    assert got is code
    assert text in message


async def test_labels_are_addressed_over_rest_and_grpc(labelled: Kiln):
    """Predict, status and metadata by label; an unknown one is an error of the request."""
    client = Client(labelled.app)
    answer = await client.post("/v1/models/double/labels/stable:predict", {"instances": [[1, 1, 1]]})
    assert answer.json == {"predictions": [[2, 2, 2]]}
    status = await client.get("/v1/models/double/labels/stable")
    assert [s["version"] for s in status.json["model_version_status"]] == ["1"]
    assert (await client.get("/v1/models/double/labels/stable/metadata")).json["model_spec"]["version"] == "1"
    for path in ("/v1/models/double/labels/canary", "/v1/models/double/labels/canary/metadata"):
        answer = await client.get(path)
        assert answer.status == 400
        assert answer.error == "Unrecognized servable version label: canary; model 'double' has stable"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{labelled.grpc_port}") as channel:
        code, text = await Caller(channel).refusal(PREDICT, predict_request(version_label="canary"))
    assert code is StatusCode.INVALID_ARGUMENT
    assert "Unrecognized servable version label: canary" in text


async def test_the_status_of_everything(kiln: Kiln):
    """State, since when, device, plans, memory and rows served, for each version."""
    client = Client(kiln.app)
    await client.post("/v1/models/double:predict", {"instances": [[1, 1, 1], [2, 2, 2]]})
    (status,) = (await client.get("/status")).json
    since = status.pop("since")
    assert since.endswith("Z")
    assert since[:2] == "20"
    assert status == {
        "model": "double",
        "version": 1,
        "state": "READY",
        "reason": "",
        "device": "CPU:0",
        "plans": "none",
        "memory_bytes": 0,
        "rows": 2,
        "left_out": "",
        "batch_difference": 0.0,
    }


async def test_grpc_tells_the_status_with_the_metadata(kiln: Kiln):
    """The same facts, as properties of the model's metadata."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        request = oip.ModelMetadataRequest(name="double")
        metadata = await Caller(channel).ask(f"{OIP}/ModelMetadata", request, oip.ModelMetadataResponse)
    properties = dict(metadata.properties)
    assert properties.pop("since")[:2] == "20"
    assert properties == {
        "model": "double",
        "version": "1",
        "state": "READY",
        "device": "CPU:0",
        "plans": "none",
        "memory_bytes": "0",
        "rows": "0",
        "batch_difference": "0.0",
    }


async def test_kserves_client_finds_the_server_alive(kiln: Kiln):
    """At the root, in its first protocol's words."""
    answer = await Client(kiln.app).get("/")
    assert (answer.status, answer.json) == (200, {"status": "alive"})
