"""TensorFlow Serving's REST API: everything under ``/v1``, as one plain ASGI callable.

Paths match without regard to case, and whatever is not a route is 400 ``Malformed request: …``,
both as TensorFlow Serving has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache, partial

from service.errors import Code, InvalidArgument, NotFound
from service.examples import Method, classes_of, decode_examples, values_of
from service.predictor import Decoded, ModelRef, Predictor
from service.registry.lifecycle import State, VersionStatus
from service.rest.examples_codec import decode_examples_body, encode_classes, encode_values
from service.rest.http import (
    JSON,
    KNOWN_ROUTES,
    Asgi,
    Receive,
    Scope,
    Send,
    answer_content,
    answer_json,
    deadline,
    guarded,
    read_body,
    timing_header,
)
from service.rest.options import RestOptions
from service.rest.tfserving_codec import decode_predict, encode_predict, signature_def
from service.tensors import Signature

_ROUTE = re.compile(
    r"(?i)/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?(?::(classify|regress|predict)|(/metadata))?"
)
_STATES = {
    State.NEW: "START",
    State.LOADING: "LOADING",
    State.WARMING: "LOADING",
    State.READY: "AVAILABLE",
    State.DRAINING: "UNLOADING",
    State.UNLOADED: "END",
    State.FAILED: "END",
}
_LARGEST_VERSION = 2**63 - 1


def tfserving_app(predictor: Predictor, options: RestOptions) -> Asgi:
    """The ASGI callable for every path under ``/v1``."""

    async def predict(scope: Scope, receive: Receive, send: Send, ref: ModelRef) -> None:
        with predictor.request(ref, "rest-tfs") as request:
            due = deadline(scope, options.request_timeout_s)
            body = await read_body(scope, receive, options.max_message_bytes)
            form = ""

            def decode(signatures: Mapping[str, Signature]) -> Decoded:
                nonlocal form
                decoded, form = decode_predict(body, signatures, options.max_json_depth, options.bounds)
                return decoded

            prediction = await request.predict(due, decode)
            content = encode_predict(prediction, form)
        headers = [JSON, timing_header(prediction.spent)]
        await answer_content(scope, send, content, headers, options.gzip_min_bytes)

    async def infer(scope: Scope, receive: Receive, send: Send, ref: ModelRef, method: Method) -> None:
        with predictor.request(ref, "rest-tfs") as request:
            due = deadline(scope, options.request_timeout_s)
            body = await read_body(scope, receive, options.max_message_bytes)
            examples, name = decode_examples_body(body, options.max_json_depth, options.bounds)
            decode = partial(decode_examples, method, examples, name=name, bounds=options.bounds)
            prediction = await request.predict(due, decode)
            if method is Method.CLASSIFY:
                content = encode_classes(classes_of(prediction, len(examples)))
            else:
                content = encode_values(values_of(prediction, len(examples)))
        headers = [JSON, timing_header(prediction.spent)]
        await answer_content(scope, send, content, headers, options.gzip_min_bytes)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if method == "GET" and path.lower().rstrip("/") == "/v1/models":
            await answer_json(send, 200, {"models": predictor.engine.model_names()})
            return
        ref, asked = _asked(predictor, method, path)
        if asked == "predict":
            await predict(scope, receive, send, ref)
        elif asked == "metadata":
            await answer_json(send, 200, _metadata(predictor, ref))
        elif asked == "status":
            await answer_json(send, 200, _status(predictor, ref))
        else:
            await infer(scope, receive, send, ref, Method[asked.upper()])

    return guarded(app)


def _asked(predictor: Predictor, method: str, path: str) -> tuple[ModelRef, str]:
    """As `_parse`; what asks a model for a version that there cannot be is counted."""
    try:
        return _parse(method, path)
    except NotFound as error:
        if method == "POST":
            predictor.refused("rest-tfs", error)
        raise


@lru_cache(maxsize=KNOWN_ROUTES)
def _parse(method: str, path: str) -> tuple[ModelRef, str]:
    """The model that a route means, and what is asked of it: a verb, ``metadata`` or ``status``."""
    match = _ROUTE.fullmatch(path)
    if match is None or method != ("POST" if match[4] else "GET"):
        raise InvalidArgument(f"Malformed request: {method} {path}")
    asked = match[4] or ("metadata" if match[5] else "status")
    return ModelRef(match[1], _version(match[2]), match[3]), asked.lower()


def _version(text: str | None) -> int | None:
    if text is None:
        return None
    version = int(text[:20])
    if version > _LARGEST_VERSION:
        raise NotFound(f"version {text[:20]} is over the largest there can be, {_LARGEST_VERSION}")
    return version


def _metadata(predictor: Predictor, ref: ModelRef) -> dict[str, object]:
    info = predictor.engine.describe(ref)
    definitions = {name: signature_def(signature) for name, signature in info.signatures.items()}
    return {
        "model_spec": {"name": info.name, "signature_name": "", "version": str(info.version)},
        "metadata": {"signature_def": {"signature_def": definitions}},
    }


def _status(predictor: Predictor, ref: ModelRef) -> dict[str, object]:
    return {"model_version_status": [_version_status(s) for s in predictor.engine.statuses(ref)]}


def _version_status(status: VersionStatus) -> dict[str, object]:
    failed = status.state is State.FAILED
    return {
        "version": str(status.version),
        "state": _STATES[status.state],
        "status": {
            "error_code": Code.FAILED_PRECONDITION.name if failed else "OK",
            "error_message": status.reason,
        },
    }
