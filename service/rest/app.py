"""The FastAPI app: routes, OpenAPI, metrics; the hot paths go past its router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from service import __version__
from service.errors import INTERNAL_ERROR, KilnError
from service.predictor import Engine, Predictor
from service.rest.admin import admin_router
from service.rest.codes import HTTP_STATUS
from service.rest.door import DOOR, door_app
from service.rest.door_openapi import door_paths
from service.rest.http import Asgi, Receive, Scope, Send, returning
from service.rest.openapi import HOT_PATHS
from service.rest.openinference import infer_app, metadata_router
from service.rest.openinference_admin import extensions_router
from service.rest.options import RestOptions
from service.rest.shared_memory import shared_memory_router
from service.rest.tfserving import tfserving_app


class Pages(Protocol):
    """Who has the page of metrics; see `Metrics`."""

    async def whole_page(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, for an ``Accept`` header."""


class KilnApp(FastAPI):
    """FastAPI with predict calls handed to plain ASGI callables, before any middleware or routing.

    Its own way to a plain callable costs as much CPU again as uvicorn does for a request.
    """

    infer: Asgi
    tfserving: Asgi
    door: Asgi

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            send = returning(scope, send)
            path: str = scope["path"]
            if path.startswith("/v2/models/") and path.endswith("/infer") and path != "/v2/models/infer":
                await self.infer(scope, receive, send)
                return
            if path[:4].lower() in ("/v1/", "/v1"):
                await self.tfserving(scope, receive, send)
                return
            if path.startswith(DOOR):
                await self.door(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def rest_app(predictor: Predictor, pages: Pages, is_ready: Callable[[], bool], options: RestOptions) -> KilnApp:
    """The whole HTTP side as one ASGI app."""
    app = KilnApp(
        title="Kiln",
        version=__version__,
        description="Serves trained Keras models: TensorFlow Serving's REST API and the Open Inference Protocol v2.",
        redoc_url=None,
    )
    app.infer = infer_app(predictor, options)
    app.tfserving = tfserving_app(predictor, options)
    app.door = door_app(predictor, options)
    app.include_router(shared_memory_router(options))
    app.include_router(extensions_router(predictor, options.max_message_bytes))
    app.include_router(metadata_router(predictor, is_ready, options.memory))
    app.include_router(admin_router(predictor, options.max_message_bytes))
    _add_metrics(app, pages)
    app.add_exception_handler(KilnError, _kiln_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.openapi = lambda: _openapi(app, FastAPI.openapi, predictor.engine)  # type: ignore[method-assign]
    return app


def _add_metrics(app: FastAPI, pages: Pages) -> None:
    forms: dict[int | str, dict[str, Any]] = {200: {"content": {"application/openmetrics-text": {}}}}

    @app.get(
        "/metrics",
        tags=["Operations"],
        summary="Metrics in Prometheus's text format, or OpenMetrics' with exemplars",
        response_class=PlainTextResponse,
        responses=forms,
    )
    @app.get(
        "/monitoring/prometheus/metrics",
        tags=["Operations"],
        summary="The same, where TensorFlow Serving has it",
        response_class=PlainTextResponse,
        responses=forms,
    )
    async def page(request: Request) -> Response:
        content, content_type = await pages.whole_page(request.headers.get("accept", ""))
        return Response(content, media_type=content_type, headers={"vary": "accept"})


async def _kiln_error(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
    assert isinstance(error, KilnError)
    return JSONResponse({"error": str(error)}, HTTP_STATUS[error.code])


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse({"error": text}, error.status_code, headers=error.headers)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:  # noqa: ARG001
    return JSONResponse({"error": INTERNAL_ERROR}, 500)  # logged by the middleware that calls this


def _openapi(app: FastAPI, generate: Callable[[FastAPI], dict[str, Any]], engine: Engine) -> dict[str, Any]:
    """FastAPI's document, with the paths that its router does not see; those of `engine`'s models are as of now."""
    if app.openapi_schema is None:
        paths = generate(app)["paths"]
        for operation in (operation for path in paths.values() for operation in path.values()):
            operation["responses"].pop("422", None)  # FastAPI's own refusal; nothing here can cause it
        paths.update(HOT_PATHS)
    document = app.openapi_schema or {}
    return {**document, "paths": {**document.get("paths", {}), **door_paths(engine)}}
