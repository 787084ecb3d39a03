"""Calls under way over ASGI: who is still there, what comes in, and how they are ended.

A call is never cancelled while it waits for the HTTP server: the server resolves that by itself
once the caller has left, and a future that it can no longer resolve makes it log an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from service.errors import KilnError
from service.rpc.framing import Deframer

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_LOOK_S = 0.05
"""How often one looks whether callers have left: most calls are over before that."""
_LAST_WORDS_S = 0.5
"""How long calls that are stopped may take to tell their callers."""
_MOST_WAITING = 4
"""Messages of a stream that are received ahead of its handler."""


class Left(Exception):
    """The caller is not there any more: nothing can be sent, nobody wants it."""


class Call:
    """One call, run by the current task; `left` and `is_stopped` say who cancelled it."""

    __slots__ = ("_can_cancel", "_receive", "_send", "_task", "has_started", "is_read", "is_stopped", "left")

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._task = asyncio.current_task()
        self._can_cancel = True
        self.has_started = False
        self.is_read = False
        self.is_stopped = False
        self.left = False

    async def receive(self) -> Event:
        """The next part of the body; `Left` if there is nobody to send it."""
        self._can_cancel = False
        event = await self._receive()
        self._can_cancel = True
        if event["type"] == "http.disconnect":
            self.left = True
            raise Left
        return event

    async def send(self, event: Event) -> None:
        """`Left` if there is nobody to receive it."""
        self._can_cancel = False
        try:
            await self._send(event)
        except Exception as error:  # each server has an exception of its own for it
            raise Left from error
        if self.left:
            raise Left
        self._can_cancel = self.has_started = True

    async def look(self) -> bool:
        """Receive beside the call's task; whether the caller is still there, else the call is given up.

        Once the body is read ASGI has this wait until the caller leaves; Envoy answers at once.
        """
        return self.notice(await self._receive())

    def notice(self, event: Event) -> bool:
        """Whether `event` leaves the caller there, else the call is given up."""
        if event["type"] == "http.disconnect":
            self.left = True
            self._cancel()
        return not self.left

    def stop(self) -> None:
        """End it, though its caller is there."""
        self.is_stopped = True
        self._cancel()

    def _cancel(self) -> None:
        if self._can_cancel and self._task is not None:
            self._task.cancel()


class Calls:
    """All calls that are being handled; one timer looks after those whose body is read."""

    def __init__(self) -> None:
        self.stopping = False
        self._young: set[Call] = set()
        self._old: set[Call] = set()
        self._looks: dict[Call, asyncio.Task[bool]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._none_left = asyncio.Event()

    def add(self, call: Call) -> None:
        self._young.add(call)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def discard(self, call: Call) -> None:
        self._young.discard(call)
        self._old.discard(call)
        if self.stopping and not (self._young or self._old):
            self._none_left.set()

    async def stop(self, grace_s: float) -> None:
        """Wait until all are done; after `grace_s` stop those that are not, and let them tell their callers."""
        self.stopping = True
        for last_s in (grace_s, _LAST_WORDS_S):
            if not (self._young or self._old):
                return
            try:
                async with asyncio.timeout(last_s):
                    await self._none_left.wait()
            except TimeoutError:
                for call in (*self._young, *self._old):
                    call.stop()

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        for call in self._old:
            if call.is_read and call not in self._looks:
                self._looks[call] = look = loop.create_task(call.look())
                look.add_done_callback(partial(self._looked, call))
        self._old |= self._young
        self._young.clear()
        self._timer = loop.call_later(_LOOK_S, self._look) if self._old else None

    def _looked(self, call: Call, look: asyncio.Task[bool]) -> None:
        del self._looks[call]
        if not look.cancelled():
            look.exception()  # the server ends: there is nobody to tell


class Incoming:
    """The messages of a stream, received by a task of its own: it notices at any time that the caller leaves."""

    def __init__(self, call: Call, receive: Receive, deframer: Deframer) -> None:
        self._call = call
        self._receive = receive
        self._deframer = deframer
        self._is_receiving = False
        self._is_over = False
        self._waiting: asyncio.Queue[bytes | KilnError | None] = asyncio.Queue(_MOST_WAITING)
        self._task = asyncio.create_task(self._pump())

    def __aiter__(self) -> Incoming:
        return self

    async def __anext__(self) -> bytes:
        """The next one, until the caller has sent its last; the `KilnError` where one is wrong."""
        item = None if self._is_over else await self._waiting.get()
        if isinstance(item, bytes):
            return item
        self._is_over = True
        if item is None:
            raise StopAsyncIteration
        raise item

    def close(self) -> None:
        """Receive no more; what is being received is waited for, see above."""
        if not self._is_receiving:
            self._task.cancel()

    async def _pump(self) -> None:
        try:
            while not self._call.is_read:
                self._is_receiving = True
                event = await self._receive()
                self._is_receiving = False
                if not self._call.notice(event):
                    return
                self._deframer.feed(event.get("body", b""))
                for message in self._deframer.messages():
                    await self._waiting.put(message)
                self._call.is_read = not event.get("more_body")
            self._deframer.finish()
            await self._waiting.put(None)
        except KilnError as error:
            await self._waiting.put(error)
