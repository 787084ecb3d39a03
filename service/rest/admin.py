"""What operators ask over REST: the repository extension, and the status of everything."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request

from service.errors import InvalidArgument
from service.extensions.repository import check_load, check_unload
from service.predictor import Predictor
from service.registry.lifecycle import INDEX_STATES, State, VersionStatus
from service.rest.http import read_body
from service.rest.json_elements import quote
from service.rest.openapi import ALIVE, INDEX, STATUS, error_responses
from service.rest.openinference import ModelName


def admin_router(predictor: Predictor, max_bytes: int) -> APIRouter:
    """``/v2/repository``, ``/status`` and ``/``; bodies have up to `max_bytes`."""
    router = APIRouter()
    engine = predictor.engine
    repository = "Model repository"

    @router.post(
        "/v2/repository/index",
        tags=[repository],
        summary="All models and versions",
        responses=answers(INDEX, 400),
        openapi_extra=body_of({"ready": True}),
    )
    async def index(request: Request) -> list[dict[str, str]]:
        is_ready_only = _flag(await json_object(request, max_bytes), "ready")
        return [_index(each) for each in engine.all_statuses() if not is_ready_only or each.state is State.READY]

    @router.post(
        "/v2/repository/models/{model}/load",
        tags=[repository],
        summary="Load a model, or what has changed of it",
        responses=answers({}, 400, 404, 501, 503),
        openapi_extra=body_of({"parameters": {}}),
    )
    async def load(request: Request, model: str = ModelName) -> dict[str, Any]:
        check_load(_parameters(await json_object(request, max_bytes)))
        await engine.load(model)
        return {}

    @router.post(
        "/v2/repository/models/{model}/unload",
        tags=[repository],
        summary="Drain a model and let it go",
        responses=answers({}, 400, 404, 503),
        openapi_extra=body_of({"parameters": {"unload_dependents": False}}),
    )
    async def unload(request: Request, model: str = ModelName) -> dict[str, Any]:
        check_unload(_parameters(await json_object(request, max_bytes)))
        await engine.unload(model)
        return {}

    @router.head("/", include_in_schema=False)
    @router.get(
        "/", tags=["Operations"], summary="Whether the server is alive, for KServe's client", responses=answers(ALIVE)
    )
    async def alive() -> dict[str, str]:
        return ALIVE

    @router.get(
        "/status", tags=["Operations"], summary="Every version, with all that is known", responses=answers(STATUS)
    )
    async def status() -> list[dict[str, Any]]:
        return [each.told() for each in engine.all_statuses()]

    return router


async def json_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body as an object; an empty one is ``{}``, whatever its type is said to be."""
    body = await read_body(request.scope, request.receive, max_bytes)
    try:
        value = orjson.loads(body) if body.strip() else {}
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"JSON Parse error: {error}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"a JSON object expected, got {body[:60].decode(errors='replace')}")
    return value


def _parameters(value: dict[str, Any]) -> dict[str, Any]:
    parameters = value.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"'parameters': an object expected, got {orjson.dumps(parameters)[:60].decode()}")
    return parameters


def _flag(value: dict[str, Any], name: str) -> bool:
    flag = value.get(name, False)
    if not isinstance(flag, bool):
        raise InvalidArgument(f"{name!r}: true or false expected, got {quote(flag)}")
    return flag


def body_of(example: Any) -> dict[str, Any]:
    """The OpenAPI of an optional JSON body."""
    return {"requestBody": {"content": {"application/json": {"schema": {"type": "object"}, "example": example}}}}


def answers(example: Any, *errors: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI of a JSON answer, and of each status of an error."""
    return {200: {"content": {"application/json": {"example": example}}}, **error_responses(*errors)}


def _index(status: VersionStatus) -> dict[str, str]:
    return {
        "name": status.model,
        "version": str(status.version),
        "state": INDEX_STATES[status.state],
        "reason": status.reason,
    }
