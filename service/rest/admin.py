"""What operators ask over REST: the repository extension, and the status of everything."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Body, Path

from service.predictor import Predictor
from service.registry.lifecycle import INDEX_STATES, State, VersionStatus
from service.rest.openapi import INDEX, STATUS, error_responses

_READY_ONLY = Body(default=False, embed=True, description="only what is READY")
_PARAMETERS = Body(default={}, embed=True, description="taken as the protocol has it; none is needed")


def admin_router(predictor: Predictor) -> APIRouter:
    """``/v2/repository`` and ``/status``."""
    router = APIRouter()
    engine = predictor.engine
    repository = "Model repository"

    @router.post("/v2/repository/index", tags=[repository], summary="All models and versions", responses=_ok(INDEX))
    async def index(*, ready: bool = _READY_ONLY) -> list[dict[str, str]]:
        return [_index(status) for status in engine.all_statuses() if not ready or status.state is State.READY]

    @router.post(
        "/v2/repository/models/{model}/load",
        tags=[repository],
        summary="Load a model, or what has changed of it",
        responses=error_responses(400, 404, 503),
    )
    async def load(model: str = Path(), parameters: dict[str, Any] = _PARAMETERS) -> dict[str, Any]:  # noqa: ARG001
        await engine.load(model)
        return {}

    @router.post(
        "/v2/repository/models/{model}/unload",
        tags=[repository],
        summary="Drain a model and let it go",
        responses=error_responses(404, 503),
    )
    async def unload(model: str = Path(), parameters: dict[str, Any] = _PARAMETERS) -> dict[str, Any]:  # noqa: ARG001
        await engine.unload(model)
        return {}

    @router.get("/status", tags=["Operations"], summary="Every version, with all that is known", responses=_ok(STATUS))
    async def status() -> list[dict[str, Any]]:
        return [_status(each) for each in engine.all_statuses()]

    return router


def _ok(example: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {"application/json": {"example": example}}}}


def _index(status: VersionStatus) -> dict[str, str]:
    return {
        "name": status.model,
        "version": str(status.version),
        "state": INDEX_STATES[status.state],
        "reason": status.reason,
    }


def _status(status: VersionStatus) -> dict[str, Any]:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.since)) if status.since else ""
    return {
        "model": status.model,
        "version": status.version,
        "state": status.state.value,
        "reason": status.reason,
        "since": since,
        "device": status.device,
        "plans": status.plans,
        "memory_bytes": status.memory_bytes,
        "rows": status.rows,
    }
