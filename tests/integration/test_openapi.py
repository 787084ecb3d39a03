"""The OpenAPI document has every path, what it takes, what it answers, and examples of both."""

from __future__ import annotations

import json
from typing import Any

import pytest
import pytest_asyncio

from tests.integration.asgi import Client
from tests.integration.conftest import Kiln

PREDICT, CLASSIFY, REGRESS = (f"/v1/models/{{model}}:{verb}" for verb in ("predict", "classify", "regress"))
INFER = "/v2/models/{model}/infer"
PATHS = {
    "/",
    "/v1/models",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/metrics",
    "/monitoring/prometheus/metrics",
    *(
        f"{model}{version}{verb}"
        for version in ("", "/versions/{version}", "/labels/{label}")
        for model, verbs in {
            "/v1/models/{model}": ("", "/metadata", ":predict", ":classify", ":regress"),
            "/v2/models/{model}": ("", "/ready", "/infer", "/stats", "/config"),
        }.items()
        for verb in verbs
        if model.startswith("/v1") or version != "/labels/{label}"
    ),
    "/predict/{model}",
    "/predict/{model}/versions/{version}",
    "/predict/{model}/labels/{label}",
    "/v2/models",
    "/v2/models/stats",
    "/v2/models/{model}/trace/setting",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/repository/index",
    "/v2/repository/models/{model}/load",
    "/v2/repository/models/{model}/unload",
    "/status",
    *(
        f"/v2/{kind}sharedmemory/{verb}"
        for kind in ("system", "cuda")
        for verb in (
            "status",
            "unregister",
            "region/{region}/status",
            "region/{region}/register",
            "region/{region}/unregister",
        )
    ),
}
"""README's table of dialects."""


@pytest_asyncio.fixture
async def document(kiln: Kiln) -> dict[str, Any]:
    """The document as a client gets it."""
    answer: dict[str, Any] = (await Client(kiln.app).get("/openapi.json")).json
    return answer


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{method} {path}": each for path, methods in document["paths"].items() for method, each in methods.items()}


async def test_every_path_is_there(document: dict[str, Any]):
    """Those of the router, those that go past it, and one for the model that is loaded."""
    assert set(document["paths"]) == PATHS | {"/predict/double"}


async def test_every_operation_has_examples_and_a_group(document: dict[str, Any]):
    """Each JSON answer, each JSON request and each parameter shows one."""
    for name, operation in operations(document).items():
        assert operation["tags"], name
        assert operation["summary"], name
        assert "422" not in operation["responses"], name
        bodies = [operation["requestBody"]] if "requestBody" in operation else []
        assert bool(bodies) == name.startswith("post"), name
        for body in (*operation["responses"].values(), *bodies):
            content = body["content"].get("application/json")
            assert content is None or "example" in content or content.get("examples"), name
        for parameter in operation.get("parameters", []):
            schema = parameter["schema"]
            assert parameter.get("example") or schema.get("examples") or parameter.get("examples"), (name, parameter)
            assert parameter["description"], (name, parameter)


async def test_path_parameters_are_those_of_the_path(document: dict[str, Any]):
    """None is missing, and none is asked for as a query, but for the signature of `/predict`."""
    for name, operation in operations(document).items():
        declared = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"]
        known = ("label", "model", "region", "version")
        assert sorted(declared) == [part for part in known if f"{{{part}}}" in name], name
        queries = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"]
        assert queries == ["signature"] * ("/predict/" in name), name


@pytest.mark.parametrize("path", [PREDICT, CLASSIFY, REGRESS, INFER])
async def test_the_errors_of_a_hot_path_have_the_one_shape(document: dict[str, Any], path: str):
    """Each status that it can answer with, by an example."""
    responses = document["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "413", "429", "503", "504"}
    for status, response in responses.items():
        if status != "200":
            example = response["content"]["application/json"]["examples"]["error"]["value"]
            assert list(example) == ["error"]


async def test_metrics_are_text(document: dict[str, Any]):
    """Not JSON: Prometheus's, or OpenMetrics'."""
    content = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert {*content} == {"text/plain", "application/openmetrics-text"}


async def test_the_document_is_made_once(kiln: Kiln, document: dict[str, Any]):
    """Asked again, it is the same."""
    assert (await Client(kiln.app).get("/openapi.json")).json == json.loads(json.dumps(document))
