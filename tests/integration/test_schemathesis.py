"""Requests made up from our own OpenAPI document, valid and not: each answer is one that the document has."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks

from service.rest.app import KilnApp
from tests.fakes import FakeModel
from tests.integration.asgi import Client, Response
from tests.integration.conftest import start_kiln
from tests.integration.test_openapi import PATHS

T = TypeVar("T")
VERBS = (":predict", ":classify", ":regress")
POSTED = (*VERBS, "/infer", "/load", "/unload", "/index", "/register", "/unregister")
DOORS = sorted(path for path in PATHS if path.startswith("/predict/"))
METHODS = [(path, "post" if path.endswith(POSTED) else "get") for path in sorted(PATHS - {*DOORS})]
METHODS += [(path, "post") for path in sorted(PATHS) if path.endswith(("/logging", "/trace/setting"))]
METHODS += [(path, "post") for path in (*DOORS, "/predict/double")]
OPERATIONS = [
    (path, method, mode)
    for path, method in METHODS
    for mode in schemathesis.GenerationMode
    if mode is schemathesis.GenerationMode.POSITIVE or method == "post"  # any text is right in a path
]
EXAMPLES = 25
_MODEL = "double"
_CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]


class Server:
    """A server of the model ``double`` in an event loop of its own, asked from this thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._kiln = self._run(start_kiln({_MODEL: FakeModel()}))
        self._client = Client(self._kiln.app)

    @property
    def app(self) -> KilnApp:
        assert isinstance(self._kiln.app, KilnApp)
        return self._kiln.app

    def ask(self, request: requests.PreparedRequest) -> Response:
        body = request.body or b""
        headers = {name.lower().replace("-", "_"): str(value) for name, value in request.headers.items()}
        path, question, query = request.path_url.partition("?")
        return self._run(
            self._client.ask(
                request.method or "",
                unquote(path).replace("?", "%3F") + question + query,
                body.encode() if isinstance(body, str) else body,
                **headers,
            )
        )

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30.0)

    def stop(self) -> None:
        self._run(self._kiln.stop(5.0, 0.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all operations; they may change the log's level."""
    level = logging.getLogger("kiln").level
    server = Server()
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(logging.getLogger("kiln").setLevel, level)
        stack.callback(server.stop)
        yield server


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    """The document as schemathesis reads it."""
    load_all_checks()
    return schemathesis.openapi.from_dict(server.app.openapi())


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_answers_are_those_of_the_document(
    server: Server, schema: Any, path: str, method: str, mode: schemathesis.GenerationMode
):
    """Status, content type, form and headers; an error has the one shape, and none is 500."""
    operation = schema[path][method]

    @given(case=operation.as_strategy(mode), is_known=st.booleans())
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def ask(case: schemathesis.Case, is_known: bool) -> None:
        if is_known and "model" in (case.path_parameters or {}):
            case.path_parameters["model"] = _MODEL
        request = requests.Request(**case.as_transport_kwargs("http://kiln")).prepare()
        response = server.ask(request)
        assert response.status != 500
        if response.status >= 400:
            assert response.error
        case.validate_response(_as_schemathesis(response, request), checks=_CHECKS)

    ask()


def _as_schemathesis(response: Response, request: requests.PreparedRequest) -> schemathesis.Response:
    headers = {name: [value] for name, value in response.headers.items()}
    return schemathesis.Response(response.status, headers, response.body, request, 0.0, verify=False)
