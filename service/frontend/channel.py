"""One front end's connection with the engine: a socket for frames, shared memory for tensors.

Frames that are sent in one turn of the event loop go out together at its end, and whoever is busy finds
all that has come meanwhile with one look: the busier the two are, the fewer wake-ups a request costs.
That a frame arrives after its block was written needs no lock: the kernel orders them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import pickle
import socket
from collections import deque
from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol

from service.errors import INTERNAL_ERROR, Internal, KilnError, Unavailable
from service.frontend.frames_codec import Block, CorruptFrame, Frame, FrameReader, Kind, frame
from service.frontend.memory import Inbox, Outbox

_log = logging.getLogger("kiln.frontend")
_READ_BYTES = 2**18
_MOST_WAITING_BYTES = 2**26
"""So much unread on its socket, and the other side counts as gone."""
_DESCRIPTORS = 8
_OF_CALLERS = frozenset(map(int, (Kind.REQUEST, Kind.ANSWER, Kind.ERROR, Kind.CANCEL, Kind.RELEASE)))


class Peer(Protocol):
    """What a channel hands on of the other side."""

    def on_frame(self, got: Frame) -> None:
        """A frame about requests."""

    def on_call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Do what is asked, at once; an awaitable for what takes its time. `KilnError`s go to the caller."""

    def on_end(self) -> None:
        """The other side has gone, or what it sends makes no sense; the channel is closed."""


class Channel:
    """Both processes have one; all of it runs on the event loop's thread."""

    def __init__(self, connection: socket.socket, inbox: Inbox, outbox: Outbox) -> None:
        self.inbox = inbox
        self.outbox = outbox
        self.is_open = False
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader()
        self._descriptors: deque[int] = deque()
        self._frames: list[bytes] = []
        self._waiting: deque[tuple[bytes, int | None]] = deque()
        self._waiting_bytes = 0
        self._is_flush_planned = False
        self._is_blocked = False
        self._told_position = 0
        self._most_untold_bytes = inbox.size_bytes // 4
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Future[Any]] = set()
        self._peer: Peer | None = None

    def open(self, peer: Peer) -> None:
        """From now on hand `peer` what comes."""
        self._peer = peer
        self.is_open = True
        self._socket.setblocking(False)  # noqa: FBT003 - its name is its argument
        self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        """Let the socket go; calls that are under way fail."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._socket)
        if self._is_blocked:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        for descriptor in (*self._descriptors, *(d for _, d in self._waiting if d is not None)):
            os.close(descriptor)
        self._waiting.clear()
        for call in self._calls.values():
            if not call.done():
                call.set_exception(_lost())
                call.exception()  # retrieved: nobody need wait for it
        for task in self._tasks:
            task.cancel()

    # Frames

    def send(self, data: bytes, descriptor: int | None = None) -> None:
        """Send a frame with the others of this turn; `descriptor` goes with it, and is closed then."""
        if not self.is_open:
            if descriptor is not None:
                os.close(descriptor)
            return
        self._frames.append(data)
        self._waiting_bytes += len(data)
        if descriptor is not None:
            last = self._frames.pop()
            self._gather()
            self._waiting.append((last, descriptor))
        if not self._is_flush_planned:
            self._is_flush_planned = True
            self._loop.call_soon(self._flush)

    def take(self, block: Block) -> Any:
        """See `Inbox.take`; the other side is told that the ring is free up to there.

        With the next frames that go there anyway, if the ring has room until then.
        """
        taken = self.inbox.take(block, self._descriptor)
        if self.inbox.position - self._told_position > self._most_untold_bytes and not self._is_flush_planned:
            self._is_flush_planned = True
            self._loop.call_soon(self._flush)
        return taken

    def _descriptor(self) -> int:
        if not self._descriptors:
            raise CorruptFrame("a descriptor expected with the frame, got none")
        return self._descriptors.popleft()

    def _gather(self) -> None:
        if self._frames:
            self._waiting.append((b"".join(self._frames), None))
            self._frames.clear()

    def _flush(self) -> None:
        self._is_flush_planned = False
        if not self.is_open:
            return
        if self.inbox.position != self._told_position:
            self._told_position = self.inbox.position
            self._frames.append(frame(Kind.FREED, self._told_position))
        self._gather()
        if not self._is_blocked:
            self._write()
        elif self._waiting_bytes > _MOST_WAITING_BYTES:
            self._end(f"it leaves {self._waiting_bytes} bytes unread")

    def _write(self) -> None:
        """Send what waits, as far as the socket takes it."""
        try:
            while self._waiting:
                data, descriptor = self._waiting[0]
                sent = self._socket.send(data) if descriptor is None else self._send_with(data, descriptor)
                self._waiting_bytes -= sent
                if sent == len(data):
                    self._waiting.popleft()
                else:
                    self._waiting[0] = (data[sent:], None)
        except BlockingIOError:
            if not self._is_blocked:
                self._is_blocked = True
                self._loop.add_writer(self._socket, self._write)
            return
        except OSError:
            self._end("its socket is closed")
            return
        if self._is_blocked:
            self._is_blocked = False
            self._loop.remove_writer(self._socket)

    def _send_with(self, data: bytes, descriptor: int) -> int:
        sent = socket.send_fds(self._socket, [data], [descriptor])
        os.close(descriptor)
        return sent

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        self._descriptors.extend(descriptors)
        if not data:
            self._end("")
            return
        try:
            for got in self._reader.feed(data):
                self._hand_on(got)
                if not self.is_open:
                    return
        except CorruptFrame as error:
            self._end(str(error))

    def _hand_on(self, got: Frame) -> None:
        assert self._peer is not None
        if got.kind in _OF_CALLERS:
            self._peer.on_frame(got)
        elif got.kind == Kind.FREED:
            try:
                self.outbox.ring.free(got.number)
            except ValueError as error:
                raise CorruptFrame(str(error)) from None
        elif got.kind == Kind.CALL:
            self._answer(got)
        elif got.kind == Kind.RESULT:
            self._settle(got)
        else:
            raise CorruptFrame(f"there are no frames of kind {got.kind}")

    def _end(self, reason: str) -> None:
        assert self._peer is not None
        if reason:
            _log.error("the connection between front end and engine is given up: %s", reason)
        self.close()
        self._peer.on_end()

    # Calls

    def call(self, name: str, *arguments: Any) -> asyncio.Future[Any]:
        """Have the other side do something; the future has its result, or the `KilnError` that it raised."""
        number = next(self._numbers)
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self.is_open:
            future.set_exception(_lost())
            future.exception()  # retrieved: nobody need wait for it
            return future
        self._calls[number] = future
        self.send(frame(Kind.CALL, number, pickle.dumps((name, arguments))))
        return future

    def _settle(self, got: Frame) -> None:
        future = self._calls.pop(got.number, None)
        if future is None or future.done():
            return
        result = pickle.loads(got.body)  # noqa: S301 - from this program's own other process
        if isinstance(result, KilnError):
            future.set_exception(result)
        else:
            future.set_result(result)

    def _answer(self, got: Frame) -> None:
        assert self._peer is not None
        name, arguments = pickle.loads(got.body)  # noqa: S301 - from this program's own other process
        try:
            result = self._peer.on_call(name, arguments)
        except KilnError as error:
            result = error
        if isinstance(result, Awaitable):
            task = asyncio.ensure_future(result)
            self._tasks.add(task)
            task.add_done_callback(partial(self._done, got.number, name))
        else:
            self.send(frame(Kind.RESULT, got.number, pickle.dumps(result)))

    def _done(self, number: int, name: str, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, KilnError):
            _log.error("%s failed", name, exc_info=error)
            error = Internal(INTERNAL_ERROR)
        self.send(frame(Kind.RESULT, number, pickle.dumps(task.result() if error is None else error)))


def _lost() -> Unavailable:
    return Unavailable("the server's processes have lost each other")
