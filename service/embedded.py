"""Kiln within Envoy: where `service.rpc.envoy` has the process go on, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from service import logs
from service.errors import KilnError
from service.predictor import Predictor
from service.rpc.calls import Receive, Scope, Send
from service.rpc.envoy import SIGNALS, EnvoyServer, embedding
from service.rpc.options import RpcOptions
from service.server import serve
from service.settings import Settings

_log = logging.getLogger("kiln.server")


class Embedded:
    """The server, from Envoy's start of the application to the end of the process."""

    _asgi_single_callable = True
    """asgiref's mark for an application of ASGI 3 that is no coroutine function itself."""

    def __init__(self) -> None:
        here = embedding()
        self._settings = Settings.model_validate_json(here.settings)
        self._address = here.address, here.port
        self._server: EnvoyServer | None = None
        self._built = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        logs.configure(self._settings.log_level, self._settings.log_format, access=self._settings.access_log)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and self._server is not None:
            return self._server.app(scope, receive, send)
        return self._live(receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: Envoy opens its port when told that the start is complete."""
        await receive()
        self._task = asyncio.create_task(self._run())
        await self._built.wait()
        assert self._server is not None
        await self._server.may_accept.wait()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _run(self) -> None:
        """Serve, then end the process as ``kiln serve`` does, before Envoy would take Python down."""
        code = 0
        try:
            await serve(self._settings, self._front_end, _Signals().add)
        except (KilnError, OSError) as error:
            print(f"kiln serve: {error}", file=sys.stderr)
            code = 1
        except BaseException:  # noqa: BLE001 - the end of the process
            _log.exception("the server failed")
            code = 1
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _front_end(self, predictor: Predictor, is_ready: Callable[[], bool], options: RpcOptions) -> EnvoyServer:
        self._server = EnvoyServer(predictor, is_ready, options, self._address)
        self._built.set()
        return self._server


class _Signals:
    """`loop.add_signal_handler` for a loop that is not in the main thread: a thread waits for signals."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._handlers: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        threading.Thread(target=self._wait, name="kiln-signals", daemon=True).start()

    def add(self, number: int, handler: Callable[..., Any], *arguments: Any) -> None:
        self._handlers[number] = handler, arguments

    def _wait(self) -> None:
        while True:
            number = signal.sigwait(SIGNALS)
            handler, arguments = self._handlers.get(number, (os._exit, (128 + number,)))
            self._loop.call_soon_threadsafe(handler, *arguments)


app = Embedded()
