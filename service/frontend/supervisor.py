"""The front-end processes: started, started anew when one dies, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from service.errors import KilnError
from service.frontend.channel import Channel
from service.frontend.hub import Hub
from service.frontend.link import Link
from service.frontend.memory import RING_BYTES, Inbox, Outbox, create
from service.settings import Settings

_log = logging.getLogger("kiln.frontend")
_GATHER_EVERY_S = 1.0
"""How much of what a front end has counted is lost if it dies."""
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 5.0
_QUIET_S = 30.0
"""One that dies sooner than that is started anew after a wait, which is doubled each time."""
_START_S = 120.0
_STOP_S = 5.0


class FrontEnds:
    """REST and gRPC in processes of their own; what `Doors` are for one process."""

    def __init__(self, settings: Settings, hub: Hub) -> None:
        self._settings = settings
        self._hub = hub
        self._reserved: list[socket.socket] = []
        self._is_stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> tuple[int, int]:
        """Start them all; returns the ports of REST and gRPC once each accepts.

        Raises:
            OSError: an address cannot be bound, or a front end does not start.
        """
        settings = self._settings
        self._reserved = [_reserve(settings.host, settings.rest_port, "REST")]
        rest_port = int(self._reserved[0].getsockname()[1])
        self._reserved.append(_reserve(settings.host, settings.grpc_port, "gRPC"))
        grpc_port = int(self._reserved[1].getsockname()[1])
        self._settings = settings.model_copy(update={"rest_port": rest_port, "grpc_port": grpc_port})
        processes = [_Process(number + 1, self._settings, self._hub) for number in range(settings.frontends)]
        try:
            await asyncio.gather(*(process.start() for process in processes))
        except (OSError, KilnError) as error:
            await asyncio.gather(*(process.end() for process in processes))
            raise OSError(f"a front end does not start: {error}") from error
        self._tasks = [asyncio.create_task(self._keep(process)) for process in processes]
        self._tasks.append(asyncio.create_task(self._gather()))
        return rest_port, grpc_port

    async def set_serving(self, *, serving: bool) -> None:  # noqa: ARG002 - they are told with all else
        """What callers are told of the server's health."""
        await self._hub.settle()

    def refuse_new(self) -> None:
        """Have clients go elsewhere for their next requests: front ends do so once the engine drains."""
        self._is_stopping = True

    async def stop(self) -> None:
        """Have all of them finish and go, and end those that do not."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in self._reserved:
            each.close()

    async def _keep(self, process: _Process) -> None:
        """Start `process` anew whenever it dies, until cancelled; then stop it."""
        wait_s, loop = _FIRST_WAIT_S, asyncio.get_running_loop()
        try:
            while True:
                started = loop.time()
                why = await process.until_gone()
                wait_s = _FIRST_WAIT_S if loop.time() - started > _QUIET_S else wait_s
                while not process.is_running:
                    if self._is_stopping:
                        return
                    _log.error("front end %d has died (%s); it is started anew", process.number, why)
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * 2, _LONGEST_WAIT_S)
                    self._hub.metrics.frontend_restarted()
                    try:
                        await process.start()
                    except (OSError, KilnError) as error:
                        why = str(error)
        finally:
            await process.end()

    async def _gather(self) -> None:
        while True:
            await asyncio.sleep(_GATHER_EVERY_S)
            await self._hub.gather()


class _Process:
    """One front end: its process and the link with it; the `Owner` of that link."""

    def __init__(self, number: int, settings: Settings, hub: Hub) -> None:
        self.number = number
        self._settings = settings
        self._hub = hub
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._accepting = asyncio.Event()
        self._left = asyncio.Event()
        self._reason = ""

    @property
    def is_running(self) -> bool:
        """Whether it accepts, as far as is known."""
        return self._accepting.is_set() and not self._left.is_set()

    async def start(self) -> None:
        """Until it accepts; `OSError` if it does not come to that."""
        self._accepting, self._left, self._reason = asyncio.Event(), asyncio.Event(), ""
        mine, theirs = socket.socketpair()
        rings = create(RING_BYTES), create(RING_BYTES)
        given = (theirs.fileno(), *rings)
        try:
            channel = Channel(mine, Inbox(rings[0]), Outbox(rings[1]))
            self._link = Link(self.number, channel, self._hub, self)
            self._process = _spawn(self.number, self._settings, given)
        except OSError:
            mine.close()
            raise
        finally:
            theirs.close()
            for descriptor in rings:
                os.close(descriptor)
        channel.open(self._link)
        events = [asyncio.create_task(event.wait()) for event in (self._accepting, self._left)]
        await asyncio.wait(events, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
        for event in events:
            event.cancel()
        if not self._accepting.is_set():
            await self.end()
            why = self._reason or f"it ended with {self._process.returncode}"
            raise OSError(f"front end {self.number} does not accept: {why}")

    def accepts(self) -> None:
        """See `Owner`."""
        self._accepting.set()

    def fails(self, reason: str) -> None:
        """See `Owner`."""
        self._reason = reason

    def ended(self) -> None:
        """See `Owner`."""
        self._left.set()

    async def until_gone(self) -> str:
        """Until it has ended; returns how."""
        assert self._process is not None
        await self._left.wait()
        self._process.kill()  # one that is still there has lost its engine
        code = await asyncio.to_thread(self._process.wait)
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    async def end(self) -> None:
        """Have it finish and go; it is ended if it does not."""
        if self._process is None or self._link is None:
            return
        with contextlib.suppress(KilnError, TimeoutError):
            await asyncio.wait_for(self._link.stop(), _STOP_S)
        try:
            await asyncio.to_thread(self._process.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            _log.warning("front end %d does not stop, it is ended", self.number)
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        self._link.close()


def _spawn(number: int, settings: Settings, descriptors: Sequence[int]) -> subprocess.Popen[bytes]:
    """A front end, which is told its number and descriptors as arguments, and the settings on stdin."""
    package_parent = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    # -P: whatever is called service in the working directory is not ours
    command = [sys.executable, "-P", "-m", "service.frontend", str(number), *map(str, descriptors)]
    environment = os.environ | {"PYTHONPATH": search_path}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=descriptors, env=environment)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(settings.model_dump_json().encode())
    return process


def _reserve(host: str, port: int, side: str) -> socket.socket:
    """A socket that keeps a port for front ends without accepting; `OSError` if another program has it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if port:
            socket.create_server((host, port), family=family).close()  # who shares a port does not see who else has it
        kept = socket.socket(family)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind((host, port))
    except OSError as error:
        raise OSError(f"the {side} port {host}:{port} cannot be bound: {error.strerror or error}") from error
    return kept
