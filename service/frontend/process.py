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
from service.following.record_folder import Part
from service.frontend.channel import Channel
from service.frontend.doors import Behind, Doors, shared_memory
from service.frontend.loop import loop_factory, spare_garbage_collector
from service.frontend.memory import Inbox, Outbox
from service.frontend.remote import RemoteEngine
from service.metrics import Metrics
from service.observers import Observers, observers
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
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # they go to the whole group; the engine says what is to be done
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    logs.configure(settings.log_level, settings.log_format, f"frontend-{number}", access=settings.access_log)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            runner.run(_serve(settings, Part(number, settings.frontends), descriptors))
        except (KilnError, OSError) as error:
            _log.error("%s", error)
            return 1
    return 0


async def _serve(settings: Settings, part: Part, descriptors: Sequence[int]) -> None:
    """Serve; a `KilnError` or `OSError` that keeps it from starting is told to the engine, and raised."""
    connection, to_engine, from_engine = descriptors
    channel = Channel(socket.socket(fileno=connection), Inbox(from_engine), Outbox(to_engine))
    for each in (to_engine, from_engine):
        os.close(each)
    metrics, memory = Metrics(), shared_memory(settings)
    engine = RemoteEngine(channel, metrics, memory, _end)
    channel.open(engine)
    try:
        observing = observers(settings, metrics, part)
        await channel.call("joined")
        predictor = Predictor(engine, metrics, observing.following)
        doors = Doors(settings, Behind(predictor, engine, lambda: engine.is_ready, memory, engine), RpcServer)
        front_end = FrontEnd(engine, doors, observing)
        await front_end.start()
    except (KilnError, OSError) as error:
        await channel.call("fails", str(error))
        raise
    await channel.call("accepts")
    await front_end.until_over()


def _end() -> NoReturn:
    _log.error("the engine is gone, and so is this front end")
    logging.shutdown()
    os._exit(1)


class FrontEnd:
    """Doors that follow what the engine says."""

    def __init__(self, engine: RemoteEngine, doors: Doors, observing: Observers) -> None:
        self._engine = engine
        self._doors = doors
        self._observing = observing
        self._is_draining = False
        self._is_over = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Accept; `OSError` if an address cannot be bound."""
        await self._doors.start()
        spare_garbage_collector()
        self._engine.on_stop = self._stop
        self._engine.on_change = self._follow
        self._follow()

    async def until_over(self) -> None:
        """Until the engine has had this stop."""
        await self._is_over.wait()

    def _follow(self) -> None:
        """Tell callers what a snapshot has told."""
        self._telling = asyncio.ensure_future(self._doors.set_serving(serving=self._engine.is_ready))
        if self._engine.draining and not self._is_draining:
            self._is_draining = True
            self._doors.refuse_new()

    async def _stop(self) -> None:
        await self._doors.stop()
        await asyncio.to_thread(self._observing.close)
        self._engine.on_end = self._is_over.set
        asyncio.get_running_loop().call_later(_LAST_WORD_S, self._is_over.set)


_LAST_WORD_S = 0.1
"""For the engine to be told that this front end has stopped."""
