"""Open Inference Protocol v2 over REST: ``infer`` as a plain ASGI callable, the rest as FastAPI routes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from fastapi import APIRouter, Path, Response

from service import __version__
from service.errors import InvalidArgument, NotFound
from service.predictor import EXTENSIONS, SERVER_NAME, Decoded, Engine, ModelRef, Predictor
from service.registry.lifecycle import State
from service.rest.http import (
    JSON,
    KNOWN_ROUTES,
    Asgi,
    Headers,
    Receive,
    Scope,
    Send,
    answer_content,
    answer_not_post,
    deadline,
    guarded,
    header,
    read_body,
    timing_header,
)
from service.rest.known_headers import KnownHeaders
from service.rest.openapi import HEALTH, MODEL, MODEL_READY, MODELS, SERVER, error_responses
from service.rest.openinference_codec import Wanted, encode_infer, model_metadata
from service.rest.options import RestOptions
from service.shared_memory import SharedMemory
from service.tensors import Signature

INFER_ROUTE = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
_LENGTH_HEADER = b"inference-header-content-length"
_BINARY = (b"content-type", b"application/octet-stream")

ModelName = Path(description="name of the model", examples=["digits"])
Version = Path(description="version of the model", examples=["1"])


def infer_app(predictor: Predictor, options: RestOptions) -> Asgi:
    """The ASGI callable for ``POST /v2/models/{m}[/versions/{v}]/infer``."""
    known_headers = KnownHeaders(options.max_json_depth, options.memory, options.bounds)

    async def infer(scope: Scope, receive: Receive, send: Send) -> None:
        name, version = _named(scope["path"])
        if scope["method"] != "POST":
            await answer_not_post(scope, send)
            return
        try:
            ref = model_ref(name, version)
        except NotFound as error:
            predictor.refused("rest-v2", error)
            raise
        with predictor.request(ref, "rest-v2") as request:
            due = deadline(scope, options.request_timeout_s)
            length = _header_length(scope)
            body = await read_body(scope, receive, options.max_message_bytes)
            wanted = Wanted()

            def decode(signatures: Mapping[str, Signature]) -> Decoded:
                nonlocal wanted
                decoded, wanted = known_headers.decode(body, length, signatures)
                return decoded

            prediction = await request.predict(due, decode)
            content, json_bytes = encode_infer(prediction, wanted)
        headers: Headers = [JSON, timing_header(prediction.spent)]
        if json_bytes is not None:
            headers[0] = _BINARY
            headers.append((_LENGTH_HEADER, b"%d" % json_bytes))
        await answer_content(scope, send, content, headers, options.gzip_min_bytes)

    return guarded(infer)


@lru_cache(maxsize=KNOWN_ROUTES)
def _named(path: str) -> tuple[str, str | None]:
    """The names of the model and of the version in a path; `NotFound` if it is no such path."""
    match = INFER_ROUTE.fullmatch(path)
    if match is None:
        raise NotFound(f"there is no {path}")
    return match[1], match[2]


def model_ref(name: str, version: str | None) -> ModelRef:
    """A reference from a path; versions are text in this protocol.

    Raises:
        NotFound: the version is no integer, so no model can have it.
    """
    if not version:
        return ModelRef(name)
    if not (version.isascii() and version.isdigit() and len(version) < 20):
        raise NotFound(f"model {name!r} has no version {version!r}: versions are integers")
    return ModelRef(name, int(version))


def _header_length(scope: Scope) -> int | None:
    text = header(scope, _LENGTH_HEADER)
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise InvalidArgument(
            f"header Inference-Header-Content-Length: a size in bytes expected, got {text.decode('latin-1')!r}"
        )
    return int(text)


def _example(value: dict[str, Any], *errors: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI of a route's answers."""
    return {200: {"content": {"application/json": {"example": value}}}, **error_responses(*errors)}


def metadata_router(predictor: Predictor, is_ready: Callable[[], bool], memory: SharedMemory) -> APIRouter:
    """Server and model metadata, liveness and readiness."""
    router = APIRouter(tags=["Open Inference Protocol v2"])
    engine = predictor.engine

    @router.head("/v2", include_in_schema=False)
    @router.head("/v2/", include_in_schema=False)
    @router.get("/v2/", include_in_schema=False)
    @router.get("/v2", summary="Server metadata", responses=_example(SERVER))
    async def server_metadata() -> dict[str, Any]:
        return {"name": SERVER_NAME, "version": __version__, "extensions": [*EXTENSIONS, *memory.extensions]}

    @router.get("/v2/models", summary="Names of all models", responses=_example(MODELS))
    async def models() -> dict[str, list[str]]:
        return {"models": engine.model_names()}

    @router.head("/v2/health/live", include_in_schema=False)
    @router.get("/v2/health/live", summary="Whether the server is alive", responses=_example(HEALTH))
    async def live() -> dict[str, bool]:
        return {"live": True, "ready": is_ready()}

    @router.head("/v2/health/ready", include_in_schema=False)
    @router.get("/v2/health/ready", summary="Whether the server takes requests; 503 if not", responses=_example(HEALTH))
    async def ready(response: Response) -> dict[str, bool]:
        if not is_ready():
            response.status_code = 503
        return {"live": True, "ready": is_ready()}

    @router.get("/v2/models/{model}", summary="Model metadata", responses=_example(MODEL, 404, 503))
    async def metadata(model: str = ModelName) -> dict[str, Any]:
        return model_metadata(engine.describe(model_ref(model, None)))

    @router.get(
        "/v2/models/{model}/versions/{version}",
        summary="Metadata of one version",
        responses=_example(MODEL, 404, 503),
    )
    async def version_metadata(model: str = ModelName, version: str = Version) -> dict[str, Any]:
        return model_metadata(engine.describe(model_ref(model, version)))

    @router.head("/v2/models/{model}/ready", include_in_schema=False)
    @router.get(
        "/v2/models/{model}/ready",
        summary="Whether the model can be asked; 503 if not",
        responses=_example(MODEL_READY, 404),
    )
    async def model_ready(response: Response, model: str = ModelName) -> dict[str, Any]:
        return _readiness(response, engine, model_ref(model, None))

    @router.head("/v2/models/{model}/versions/{version}/ready", include_in_schema=False)
    @router.get(
        "/v2/models/{model}/versions/{version}/ready",
        summary="Whether one version can be asked",
        responses=_example(MODEL_READY, 404),
    )
    async def version_ready(response: Response, model: str = ModelName, version: str = Version) -> dict[str, Any]:
        return _readiness(response, engine, model_ref(model, version))

    return router


def _readiness(response: Response, engine: Engine, ref: ModelRef) -> dict[str, Any]:
    is_model_ready = State.READY in [status.state for status in engine.statuses(ref)]
    if not is_model_ready:
        response.status_code = 503
    return {"name": ref.name, "ready": is_model_ready}
