"""Questions about models go past no engine in another process: it is asked how things are before they are answered.

Predict calls are not held up by it. What a client has changed in one front end is changed in all of
them before it is told so.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, Protocol

from service.rest.door import DOOR
from service.rest.http import Asgi, Receive, Scope, Send
from service.rpc.handlers import Handler, Timed

_PREDICT_PATHS = ("/infer", ":predict", ":classify", ":regress")
_METHODS = frozenset(("ModelInfer", "Predict", "Classify", "Regress", "MultiInference", "ServerLive", "ServerReady"))
_PATHS = ("/v2/health/", "/metrics", "/monitoring/")
"""What is answered at once: predict calls, whether the server is alive, and metrics, for which the engine is asked."""


class Mirror(Protocol):
    """How the engine is seen from here; see `service.frontend.remote.RemoteEngine`."""

    async def refresh(self) -> None: ...
    async def settle(self) -> None: ...


class FreshApp:
    """An ASGI application before which a `Mirror` is refreshed."""

    def __init__(self, app: Asgi, mirror: Mirror) -> None:
        self._app = app
        self._mirror = mirror

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_hot(scope["method"], scope["path"]):
            await self._app(scope, receive, send)
            return
        await self._mirror.refresh()

        async def settled(message: MutableMapping[str, Any]) -> None:
            await self._mirror.settle()
            await send(message)

        await self._app(scope, receive, settled)


def _is_hot(method: str, path: str) -> bool:
    if method != "POST":
        return path.startswith(_PATHS) or path == "/"
    return path.endswith(_PREDICT_PATHS) or path.startswith(DOOR)


def around(mirror: Mirror) -> Callable[[str, Handler], Handler]:
    """The same for gRPC: what becomes of a handler, by the path of its method."""

    def wrap(path: str, handler: Handler) -> Handler:
        if path.rpartition("/")[2] in _METHODS:
            return handler

        async def fresh(data: bytes, deadline: float) -> bytes | Timed:
            await mirror.refresh()
            answer = await handler(data, deadline)
            await mirror.settle()
            return answer

        return fresh

    return wrap
