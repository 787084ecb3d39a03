"""A caller of an ASGI app: what an HTTP client would be, without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]


@dataclass(frozen=True)
class Response:
    """What came back; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The text of an error, which is all that its body has."""
        assert self.headers["content-type"] == "application/json"
        body = self.json
        assert list(body) == ["error"], body
        assert isinstance(body["error"], str)
        return str(body["error"])


class Client:
    """Asks `app` as uvicorn would, and stays until the answer has come."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def get(self, path: str, **headers: str) -> Response:
        return await self.ask("GET", path, **headers)

    async def post(self, path: str, body: Any, **headers: str) -> Response:
        """`body` as bytes, or anything else as JSON."""
        return await self.ask("POST", path, body, **headers)

    async def ask(self, method: str, path: str, body: Any = b"", **headers: str) -> Response:
        """`headers` by their names with underscores."""
        with _Exchange(method, path, body, headers) as exchange:
            try:
                await self._app(exchange.scope, exchange.receive, exchange.send)
            except Exception:
                if not exchange.sent:  # after an answer, uvicorn only logs it
                    raise
            return exchange.response

    @contextlib.asynccontextmanager
    async def leaving(self, path: str, body: Any) -> AsyncIterator[asyncio.Event]:
        """Post `body`; the caller leaves once the event is set, and no answer may come then."""
        with _Exchange("POST", path, body, {}) as exchange:
            call = asyncio.ensure_future(self._app(exchange.scope, exchange.receive, exchange.send))
            yield exchange.left
            await call
            assert exchange.sent == []


class _Exchange:
    def __init__(self, method: str, path: str, body: Any, headers: dict[str, str]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        path, _, query = path.partition("?")
        lines = {"host": "kiln", "content-length": str(len(data))} | headers
        self.scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in lines.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.left = asyncio.Event()
        self.sent: list[Message] = []
        self._messages = [{"type": "http.request", "body": data, "more_body": False}]

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.left.set()

    async def receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def response(self) -> Response:
        start, *parts = self.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        body = b"".join(part.get("body", b"") for part in parts)
        assert int(headers["content-length"]) == len(body)
        return Response(start["status"], headers, body)
