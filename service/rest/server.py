"""The transport uvicorn: an HTTP server in this event loop, on a socket of our own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.rest.http import Asgi

_TICK_S = 1.0


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
            http=partial(_Protocol, self._connected),  # type: ignore[arg-type]  # what makes one will do
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
        self._server.config.encoded_headers.append((b"connection", b"close"))
        self._server.date_answers()

    async def stop(self) -> None:
        """Take no new connections, and wait a little for those that are in use."""
        self._server.should_exit = True
        self._server.wake()
        if self._task is not None:
            await self._task

    def _connected(self) -> None:
        if len(self._server.server_state.connections) == 1:  # it was at rest
            self._server.date_answers()
            self._server.wake()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, for the composition root has its own, and at rest while nobody is connected.

    Its own loop wakes ten times a second, which is most of what an idle server does.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look at once whether to stop, and when the date is to be told anew."""
        self._woken.set()

    def date_answers(self) -> None:
        """Let answers have the date, and the headers of the configuration, as they are now."""
        date = formatdate(time.time(), usegmt=True).encode()
        self.server_state.default_headers = [(b"date", date), *self.config.encoded_headers]

    async def main_loop(self) -> None:
        """Keep the date of answers to the second until `should_exit`."""
        while not self.should_exit:
            self.date_answers()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S if self.server_state.connections else None):
                    await self._woken.wait()
            self._woken.clear()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(HttpToolsProtocol):
    """One connection; `connected` is told of it."""

    def __init__(self, connected: Callable[[], None], **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._connected = connected

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connected()


def bind(host: str, port: int, *, is_shared: bool = False) -> socket.socket:
    """A listening socket; `OSError` with what could not be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=is_shared)
    except OSError as error:
        raise OSError(f"the REST port {host}:{port} cannot be bound: {error.strerror or error}") from error
