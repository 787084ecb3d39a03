"""The few lines of ASGI that the hot paths need: read a body, answer, notice a caller that left."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any

import orjson

from service.batching.queue import Spent
from service.errors import INTERNAL_ERROR, Cancelled, Internal, InvalidArgument, KilnError, Overloaded, TooLarge
from service.rest.codes import HTTP_STATUS
from service.timing import RETURNED, is_returned, server_timing
from service.trace_context import follow

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
TIMEOUT_HEADER = b"kiln-timeout-ms"
KNOWN_ROUTES = 128
"""Paths of which it is remembered what they ask: few, for callers choose how long they are."""
_HEADERS = "kiln.headers"
"""Where a request's scope keeps its headers by name, once one was asked for."""
_RETURNED = [(name, name.encode()) for name in RETURNED]
_RETURNED_KEYS = frozenset(key for _, key in _RETURNED)
_log = logging.getLogger("kiln.rest")
_DEFLATE_APART_BYTES = 128 * 2**10
"""Compressing costs 11 ns a byte: from here on, over 1 ms, in which the loop does something else."""
_WATCH_AFTER_S = 0.05
"""A caller is watched for leaving only once it has waited at least so long: most never do."""


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """The headers by their lower-case names; of several of one name, the first."""
    known: dict[bytes, bytes] | None = scope.get(_HEADERS)
    if known is None:
        known = scope[_HEADERS] = dict(reversed(scope["headers"]))
    return known


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that lower-case name."""
    return headers_of(scope).get(name)


def deadline(scope: Scope, default_s: float) -> float:
    """Absolute deadline on `time.monotonic`, from ``Kiln-Timeout-Ms`` or the default.

    Raises:
        InvalidArgument: the header is not a positive number.
    """
    text = header(scope, TIMEOUT_HEADER)
    timeout_s = default_s
    if text is not None:
        try:
            timeout_s = float(text) / 1e3
        except ValueError:
            timeout_s = math.nan
        if not timeout_s > 0 or math.isinf(timeout_s):
            raise InvalidArgument(f"header Kiln-Timeout-Ms: a positive number expected, got {text.decode('latin-1')!r}")
    return time.monotonic() + timeout_s


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The whole body, inflated if it came as gzip.

    Raises:
        TooLarge: it is over `limit_bytes`, on the wire or inflated.
        InvalidArgument: the encoding is unknown or broken.
        Cancelled: the caller left before it was complete.
    """
    headers = headers_of(scope)
    length = headers.get(b"content-length")
    if length is not None and int(length) > limit_bytes:
        raise TooLarge(f"the body has {int(length)} bytes, over the limit of {limit_bytes}")
    message = await receive()
    body: bytes = message.get("body", b"")
    if len(body) > limit_bytes:
        raise TooLarge(f"the body has over {limit_bytes} bytes, the limit")
    if message.get("more_body"):
        parts = [body]
        size = len(body)
        while message.get("more_body"):
            message = await receive()
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit_bytes:
                raise TooLarge(f"the body has over {limit_bytes} bytes, the limit")
        body = b"".join(parts)
    if message["type"] == "http.disconnect":
        raise Cancelled("the caller left before the body was complete")
    encoding = headers.get(b"content-encoding")
    return body if encoding is None else _inflate(body, encoding, limit_bytes)


def _inflate(body: bytes, encoding: bytes, limit_bytes: int) -> bytes:
    name = encoding.decode("latin-1").strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "x-gzip"):
        raise InvalidArgument(f"header Content-Encoding: gzip or identity expected, got {name!r}")
    inflater = zlib.decompressobj(wbits=31)
    try:
        plain = inflater.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise InvalidArgument(f"the gzip body is broken: {error}") from None
    if len(plain) > limit_bytes:
        raise TooLarge(f"the body inflates to over {limit_bytes} bytes, the limit")
    if not inflater.eof:
        raise InvalidArgument("the gzip body is cut off")
    if inflater.unused_data:
        raise InvalidArgument(f"one gzip member expected as the body, {len(inflater.unused_data)} bytes follow it")
    return plain


async def answer(send: Send, status: int, body: bytes, headers: Headers) -> None:
    """Send a whole response."""
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def returning(scope: Scope, send: Send) -> Send:
    """`send`, with the caller's own trace and request id among the headers of the answer, where it sent any.

    The current task answers that caller from here on.
    """
    if _RETURNED_KEYS.isdisjoint(headers_of(scope)):
        follow(None, None)
        return send
    given = []
    for name, key in _RETURNED:
        value = header(scope, key)
        if value is not None and is_returned(name, value.decode("latin-1")):
            given.append((key, value))
    ids = dict(given)
    follow(ids.get(b"traceparent"), ids.get(b"x-request-id"))

    async def send_with_ids(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *given]
        await send(message)

    return send_with_ids


def timing_header(spent: Spent) -> tuple[bytes, bytes]:
    """The header that tells where a request's time went."""
    return (b"server-timing", server_timing(spent).encode())


async def answer_content(scope: Scope, send: Send, body: bytes, headers: Headers, gzip_min_bytes: int) -> None:
    """Send what was asked for: as gzip, if it has `gzip_min_bytes` (0: never) and the caller takes that."""
    if 0 < gzip_min_bytes <= len(body):
        headers.append((b"vary", b"accept-encoding"))
        if takes_gzip(header(scope, b"accept-encoding")):
            headers.append((b"content-encoding", b"gzip"))
            if len(body) < _DEFLATE_APART_BYTES:
                body = zlib.compress(body, 1, 31)
            else:
                body = await asyncio.to_thread(zlib.compress, body, 1, 31)
    await answer(send, 200, body, headers)


@lru_cache(maxsize=64)
def takes_gzip(accept_encoding: bytes | None) -> bool:
    """Whether an ``Accept-Encoding`` header names gzip, or ``*``, with a weight that is not 0."""
    weights = {}
    for part in (accept_encoding or b"").decode("latin-1").lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        weights[name] = not any(re.fullmatch(r"q\s*=\s*0(\.0*)?", parameter) for parameter in parameters)
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", False)))


async def answer_json(send: Send, status: int, value: object) -> None:
    """Send `value` as JSON."""
    await answer(send, status, orjson.dumps(value), [JSON])


async def answer_not_post(scope: Scope, send: Send) -> None:
    """The answer 405, for a path that is asked with POST only."""
    text = f"{scope['path']} is asked with POST, not {scope['method']}"
    await answer(send, 405, orjson.dumps({"error": text}), [JSON, (b"allow", b"POST")])


async def answer_error(send: Send, error: KilnError) -> None:
    """The error shape of both REST dialects: ``{"error": "…"}``."""
    headers = [JSON]
    if isinstance(error, Overloaded):
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
    if isinstance(error, TooLarge):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    text = str(error).encode(errors="replace").decode()  # a caller's text may have lone surrogates
    await answer(send, HTTP_STATUS[error.code], orjson.dumps({"error": text}), headers)


def guarded(handle: Asgi) -> Asgi:
    """`handle`, with what it raises answered in the error shape, and given up if the caller leaves."""
    watches = _Watches()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        watch = _Watch(receive, watches)
        try:
            await handle(scope, watch.receive, send)
        except KilnError as error:
            if not isinstance(error, Cancelled):
                await answer_error(send, error)
        except asyncio.CancelledError:
            if not watch.left:
                raise
        except Exception:  # noqa: BLE001 - whatever it is, it must not cost the connection
            _log.exception("%s %s failed", scope["method"], scope["path"])
            await answer_error(send, Internal(INTERNAL_ERROR))
        finally:
            watch.stop()

    return guard


class _Watches:
    """The requests whose body has been read, looked at together: a timer for each would cost 8 µs.

    A request that is still there after one to two times `_WATCH_AFTER_S` is watched from then on.
    """

    def __init__(self) -> None:
        self._young: set[_Watch] = set()
        self._old: set[_Watch] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, watch: _Watch) -> None:
        self._young.add(watch)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._look)

    def discard(self, watch: _Watch) -> None:
        self._young.discard(watch)
        self._old.discard(watch)

    def _look(self) -> None:
        for watch in self._old:
            watch.begin()
        self._old, self._young = self._young, set()
        is_needed = bool(self._old)
        self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._look) if is_needed else None


class _Watch:
    """Cancels the current task once its caller has disconnected.

    Begins some time after the last of the body was read through `receive`: before that the messages
    are the body's reader's, after it there is none but the disconnect.
    """

    __slots__ = ("_receive", "_task", "_watcher", "_watches", "left")

    def __init__(self, receive: Receive, watches: _Watches) -> None:
        self.left = False
        self._receive = receive
        self._watches = watches
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None

    async def receive(self) -> MutableMapping[str, Any]:
        """The next message for the reader of the body."""
        message = await self._receive()
        if not message.get("more_body"):
            self._watches.add(self)
        return message

    def begin(self) -> None:
        """Wait for the disconnect."""
        self._watcher = asyncio.get_running_loop().create_task(self._wait())

    def stop(self) -> None:
        self._watches.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()

    async def _wait(self) -> None:
        message = await self._receive()
        if message["type"] == "http.disconnect" and self._task is not None:
            self.left = True
            self._task.cancel()
