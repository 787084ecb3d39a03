"""The transport uvicorn: an HTTP server in this event loop, on a socket of our own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from service.rest.http import Asgi


class RestServer:
    """Serves an ASGI application; start it in a running event loop."""

    def __init__(self, app: Asgi, host: str, port: int, *, is_shared: bool = False) -> None:
        """With `is_shared` other processes accept on the same port: see SO_REUSEPORT."""
        self._address = (host, port)
        self._is_shared = is_shared
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="httptools",
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and accept; returns the port. `OSError` if the address cannot be bound."""
        listener = bind(*self._address, is_shared=self._is_shared)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        return int(listener.getsockname()[1])

    def refuse_new(self) -> None:
        """From now on each answer closes its connection, so that clients go elsewhere."""
        self._server.server_state.default_headers.append((b"connection", b"close"))

    async def stop(self) -> None:
        """Take no new connections, and wait a little for those that are in use."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the composition root has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A listening socket; `OSError` with what could not be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=is_shared)
    except OSError as error:
        raise OSError(f"the REST port {host}:{port} cannot be bound: {error.strerror or error}") from error
