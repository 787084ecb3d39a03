"""Triton's extensions of the Open Inference Protocol over REST: statistics, configuration, log and trace."""

from __future__ import annotations

from enum import Enum
from typing import Any

from fastapi import APIRouter, Request

from service.extensions.model_configuration import model_configuration
from service.extensions.settings import change_log_settings, change_trace_settings, log_settings, trace_settings
from service.extensions.statistics import statistics_of
from service.predictor import Engine, ModelRef, Predictor
from service.rest.admin import answers, body_of, json_object
from service.rest.openapi_extensions import CONFIGURATION, LOGGING, STATISTICS, TRACE
from service.rest.openinference import ModelName, Version, model_ref

_PROTOCOL: list[str | Enum] = ["Open Inference Protocol v2"]
_STATISTICS: list[str | Enum] = ["Statistics"]
_LOG_AND_TRACE: list[str | Enum] = ["Log and trace"]


def extensions_router(predictor: Predictor, max_bytes: int) -> APIRouter:
    """``…/stats``, ``…/config``, ``…/trace/setting`` and ``/v2/logging``.

    It comes before the router that has ``/v2/models/{model}``, of which ``/v2/models/stats`` is none.
    """
    router = APIRouter()
    _add_statistics(router, predictor.engine)
    _add_configuration(router, predictor.engine)
    _add_trace(router, predictor, max_bytes)
    _add_logging(router, max_bytes)
    return router


def _add_statistics(router: APIRouter, engine: Engine) -> None:
    tags, responses = _STATISTICS, answers(STATISTICS, 404)

    @router.get("/v2/models/stats", tags=tags, summary="Of all loaded versions", responses=answers(STATISTICS))
    async def all_statistics() -> dict[str, Any]:
        return statistics_of(engine.statistics(None))

    @router.get("/v2/models/{model}/stats", tags=tags, summary="Of a model's loaded versions", responses=responses)
    async def statistics(model: str = ModelName) -> dict[str, Any]:
        return statistics_of(engine.statistics(ModelRef(model)))

    @router.get("/v2/models/{model}/versions/{version}/stats", tags=tags, summary="Of one version", responses=responses)
    async def version_statistics(model: str = ModelName, version: str = Version) -> dict[str, Any]:
        return statistics_of(engine.statistics(model_ref(model, version)))


def _add_configuration(router: APIRouter, engine: Engine) -> None:
    tags, responses = _PROTOCOL, answers(CONFIGURATION, 404, 503)

    @router.get("/v2/models/{model}/config", tags=tags, summary="How the model is served", responses=responses)
    async def configuration(model: str = ModelName) -> dict[str, Any]:
        return model_configuration(engine.describe(ModelRef(model)))

    @router.get(
        "/v2/models/{model}/versions/{version}/config",
        tags=tags,
        summary="How one version is served",
        responses=responses,
    )
    async def version_configuration(model: str = ModelName, version: str = Version) -> dict[str, Any]:
        return model_configuration(engine.describe(model_ref(model, version)))


def _add_trace(router: APIRouter, predictor: Predictor, max_bytes: int) -> None:
    engine, share = predictor.engine, predictor.trace_share
    tags, body = _LOG_AND_TRACE, body_of({"trace_level": ["OFF"]})

    @router.get("/v2/trace/setting", tags=tags, summary="Trace settings", responses=answers(TRACE))
    async def trace() -> dict[str, Any]:
        return trace_settings(share)

    @router.post(
        "/v2/trace/setting",
        tags=tags,
        summary="Change trace settings; only what they are can be set",
        responses=answers(TRACE, 400, 501),
        openapi_extra=body,
    )
    async def change_trace(request: Request) -> dict[str, Any]:
        return change_trace_settings(await json_object(request, max_bytes), share)

    @router.get(
        "/v2/models/{model}/trace/setting", tags=tags, summary="A model's trace settings", responses=answers(TRACE, 404)
    )
    async def model_trace(model: str = ModelName) -> dict[str, Any]:
        engine.statuses(ModelRef(model))
        return trace_settings(share)

    @router.post(
        "/v2/models/{model}/trace/setting",
        tags=tags,
        summary="Change a model's trace settings; only what they are can be set",
        responses=answers(TRACE, 400, 404, 501),
        openapi_extra=body,
    )
    async def change_model_trace(request: Request, model: str = ModelName) -> dict[str, Any]:
        engine.statuses(ModelRef(model))
        return change_trace_settings(await json_object(request, max_bytes), share)


def _add_logging(router: APIRouter, max_bytes: int) -> None:
    tags = _LOG_AND_TRACE

    @router.get("/v2/logging", tags=tags, summary="Log settings", responses=answers(LOGGING))
    async def logging() -> dict[str, Any]:
        return log_settings()

    @router.post(
        "/v2/logging",
        tags=tags,
        summary="Show more or less in the log",
        responses=answers(LOGGING, 400),
        openapi_extra=body_of({"log_verbose_level": 1}),
    )
    async def change_logging(request: Request) -> dict[str, Any]:
        return change_log_settings(await json_object(request, max_bytes))
