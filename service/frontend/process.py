"""One front end in a process of its own: REST and gRPC before an engine at the other end of a channel."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from service import logs
from service.errors import KilnError
from service.frontend.channel import Channel
from service.frontend.doors import Behind, Doors, shared_memory
from service.frontend.loop import loop_factory, spare_garbage_collector
from service.frontend.memory import Inbox, Outbox
from service.frontend.remote import RemoteEngine
from service.metrics import Metrics
from service.predictor import Predictor
from service.rpc.server import RpcServer
from service.settings import Settings

_log = logging.getLogger("kiln.frontend")


def main(arguments: Sequence[str]) -> int:
    """Serve until the engine says that it is enough, or is gone; returns the exit code.

    `arguments` are its number, and the descriptors of its socket and of the rings to and from the engine;
    the settings come as JSON on stdin.
    """
    number, *descriptors = map(int, arguments)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)  # they go to the whole group; the engine says when it is time
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    logs.configure(settings.log_level, settings.log_format, f"frontend-{number}")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            runner.run(_serve(settings, descriptors))
        except (KilnError, OSError) as error:
            _log.error("%s", error)
            return 1
    return 0


async def _serve(settings: Settings, descriptors: Sequence[int]) -> None:
    connection, to_engine, from_engine = descriptors
    channel = Channel(socket.socket(fileno=connection), Inbox(from_engine), Outbox(to_engine))
    for each in (to_engine, from_engine):
        os.close(each)
    metrics, memory = Metrics(), shared_memory(settings)
    engine = RemoteEngine(channel, metrics, memory, _end)
    channel.open(engine)
    await channel.call("joined")
    behind = Behind(Predictor(engine, metrics), engine, lambda: engine.is_ready, memory, engine)
    await FrontEnd(engine, Doors(settings, behind, RpcServer)).serve(channel)


def _end() -> NoReturn:
    _log.error("the engine is gone, and so is this front end")
    logging.shutdown()
    os._exit(1)


class FrontEnd:
    """Doors that follow what the engine says."""

    def __init__(self, engine: RemoteEngine, doors: Doors) -> None:
        self._engine = engine
        self._doors = doors
        self._is_draining = False
        self._is_over = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    async def serve(self, channel: Channel) -> None:
        """Accept, and tell the engine so; until it has this stop."""
        await self._doors.start()
        spare_garbage_collector()
        self._engine.on_stop = self._stop
        self._engine.on_change = self._follow
        self._follow()
        await channel.call("accepts")
        await self._is_over.wait()

    def _follow(self) -> None:
        """Tell callers what a snapshot has told."""
        self._telling = asyncio.ensure_future(self._doors.set_serving(serving=self._engine.is_ready))
        if self._engine.draining and not self._is_draining:
            self._is_draining = True
            self._doors.refuse_new()

    async def _stop(self) -> None:
        await self._doors.stop()
        self._engine.on_end = self._is_over.set
        asyncio.get_running_loop().call_later(_LAST_WORD_S, self._is_over.set)


_LAST_WORD_S = 0.1
"""For the engine to be told that this front end has stopped."""
