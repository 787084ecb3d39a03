"""The byte-level handlers as an ASGI application: gRPC for any HTTP/2 server that can send trailers.

Source: ``PROTOCOL-HTTP2.md`` of the gRPC project, and ASGI's extension ``http.response.trailers``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from service.errors import InvalidArgument, KilnError, Unavailable
from service.rpc.calls import Call, Calls, Incoming, Left, Receive, Scope, Send
from service.rpc.framing import ENCODINGS, PREFIX_BYTES, Deframer, escape, frame, timeout_s
from service.rpc.handlers import (
    Handler,
    StreamHandler,
    Timed,
    ids_of,
    status_of,
    stream_limits,
    timing_trailer,
    too_large,
    unforeseen,
)
from service.rpc.options import RpcOptions
from service.rpc.services import Services
from service.timing import RETURNED
from service.trace_context import follow

_MOST_OVER_LIMIT_BYTES = 64 * 2**20
"""A message of a stream this much over the limit is still received: its handler refuses it, and goes on."""
_CONTENT = (b"content-type", b"application/grpc")
_START: dict[str, Any] = {"type": "http.response.start", "status": 200, "headers": [_CONTENT], "trailers": True}
_DONE: dict[str, Any] = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}
_OK = [_CONTENT, (b"grpc-status", b"0")]
_STOPPING = "the server is stopping and takes no new requests"
_NO_METHOD = [_CONTENT, (b"grpc-status", b"12"), (b"grpc-message", b"Method not found!")]
_Headers = Mapping[bytes, bytes]


class GrpcApp:
    """Unary and streaming calls by method path; `stop` ends those that are under way."""

    def __init__(self, services: Services, options: RpcOptions) -> None:
        self._handlers = services.handlers
        self._streams = services.streams
        self._refused = services.refused
        self._request_timeout_s = options.request_timeout_s
        self._max_message_bytes = options.max_message_bytes
        self._calls = Calls()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every failure of it is answered too."""
        headers: _Headers = dict(scope["headers"])
        refusal = _not_grpc(scope, headers)
        if refusal is not None:
            await _answer_plainly(send, *refusal)
            return
        path: str = scope["path"]
        call = Call(receive, send)
        follow(headers.get(b"traceparent"), headers.get(b"x-request-id"))
        handler, stream = self._handlers.get(path), self._streams.get(path)
        with contextlib.suppress(Left):
            if handler is not None:
                await self._unary(path, handler, headers, call)
            elif stream is not None:
                await self._stream(path, stream, headers, call, receive)
            else:
                await _fail(call, _NO_METHOD)

    async def stop(self, grace_s: float) -> None:
        """Answer new calls UNAVAILABLE, and also those that are not done within `grace_s`."""
        await self._calls.stop(grace_s)

    async def _unary(self, path: str, handler: Handler, headers: _Headers, call: Call) -> None:
        try:
            remaining_s = timeout_s(headers.get(b"grpc-timeout"))
            deadline = time.monotonic() + (self._request_timeout_s if remaining_s is None else remaining_s)
            data = await self._read(headers, call)
            call.is_read = True
            self._begin(call)
            answer = await handler(data, deadline)
        except BaseException as error:  # noqa: BLE001 - it is told, or raised again
            if isinstance(error, KilnError):
                self._refused(path, error)
            failure = _failure(path, call, error)
        else:
            self._calls.discard(call)
            await _answer(call, answer, headers)
            return
        self._calls.discard(call)
        await _fail(call, [*_error_headers(failure), *_ids_of(headers)])

    def _begin(self, call: Call) -> None:
        if self._calls.stopping:
            raise Unavailable(_STOPPING)
        self._calls.add(call)

    async def _read(self, headers: _Headers, call: Call) -> bytes:
        """The one message of a unary call."""
        message = await call.receive()
        body: bytes = message.get("body", b"")
        encoding = headers.get(b"grpc-encoding")
        size = len(body) - PREFIX_BYTES
        if size >= 0 and not body[0] and int.from_bytes(body[1:PREFIX_BYTES], "big") == size and encoding is None:
            if size > self._max_message_bytes:
                raise too_large(size, self._max_message_bytes)
            return body[PREFIX_BYTES:]
        deframer = Deframer(encoding, self._max_message_bytes)
        while True:
            deframer.feed(body)
            for data in deframer.messages():
                return data
            if not message.get("more_body"):
                deframer.finish()
                raise InvalidArgument("one message expected, got none")
            message = await call.receive()
            body = message.get("body", b"")

    async def _stream(self, path: str, handler: StreamHandler, headers: _Headers, call: Call, receive: Receive) -> None:
        failure: KilnError | None = None
        incoming: Incoming | None = None
        try:
            limits = stream_limits(
                timeout_s(headers.get(b"grpc-timeout")),
                request_timeout_s=self._request_timeout_s,
                max_message_bytes=self._max_message_bytes,
            )
            deframer = Deframer(headers.get(b"grpc-encoding"), self._max_message_bytes + _MOST_OVER_LIMIT_BYTES)
            self._begin(call)
            incoming = Incoming(call, receive, deframer)
            async with contextlib.aclosing(handler(incoming, limits)) as answers:
                await _send_all(call, answers)
        except BaseException as error:  # noqa: BLE001 - it is told, or raised again
            failure = _failure(path, call, error)
        finally:
            self._calls.discard(call)
            if incoming is not None:
                incoming.close()
        await _fail(call, [*(_OK if failure is None else _error_headers(failure)), *_ids_of(headers)])


async def _answer(call: Call, answer: bytes | Timed, headers: _Headers) -> None:
    """The one answer of a unary call, and its end."""
    trailers = _ids_of(headers)
    if isinstance(answer, Timed):
        name, value = timing_trailer(answer.spent)
        trailers.append((name.encode(), value.encode()))
        answer = answer.data
    await call.send(_START)
    await call.send({"type": "http.response.body", "body": frame(answer)})
    await call.send({**_DONE, "headers": [*_DONE["headers"], *trailers]} if trailers else _DONE)


def _ids_of(headers: _Headers) -> list[tuple[bytes, bytes]]:
    """What a caller gets back of its headers."""
    given = ((name, headers.get(name.encode())) for name in RETURNED)
    ids = ids_of((name, value.decode("latin-1")) for name, value in given if value is not None)
    return [(name.encode(), value.encode("latin-1")) for name, value in ids]


async def _send_all(call: Call, answers: AsyncIterator[bytes]) -> None:
    """Each answer as it comes; headers go out with the first one."""
    async for answer in answers:
        if not call.has_started:
            await call.send(_START)
        await call.send({"type": "http.response.body", "body": frame(answer), "more_body": True})


def _failure(path: str, call: Call, error: BaseException) -> KilnError:
    """What the caller is told of the exception that is being handled; raised again is what no caller is told."""
    if isinstance(error, KilnError):
        return error.with_traceback(None)  # whose frames have the call's: a cycle that would keep all they hold
    if isinstance(error, asyncio.CancelledError):
        return _told(call)
    if isinstance(error, Left) or not isinstance(error, Exception):
        raise error
    return unforeseen(path)


def _told(call: Call) -> KilnError:
    """What the caller of a cancelled call is told; `Left` if it is not there any more.

    Raises:
        asyncio.CancelledError: neither the caller nor `stop` cancelled it: the event loop ends.
    """
    if call.left:
        raise Left
    if call.is_stopped:
        return Unavailable(_STOPPING)
    raise asyncio.CancelledError


def _error_headers(failure: KilnError) -> list[tuple[bytes, bytes]]:
    status, text, trailers = status_of(failure)
    return [
        _CONTENT,
        (b"grpc-status", b"%d" % status.value[0]),
        (b"grpc-message", escape(text)),
        (b"grpc-accept-encoding", ENCODINGS),
        *((name.encode(), value.encode()) for name, value in trailers),
    ]


async def _fail(call: Call, headers: list[tuple[bytes, bytes]]) -> None:
    """End a call with a status: as trailers after its answers, or as headers where there are none."""
    if not call.has_started:
        await call.send({"type": "http.response.start", "status": 200, "headers": headers})
        await call.send({"type": "http.response.body", "body": b""})
        return
    await call.send({"type": "http.response.body", "body": b""})
    await call.send({"type": "http.response.trailers", "headers": headers[1:]})


def _not_grpc(scope: Scope, headers: _Headers) -> tuple[int, str] | None:
    """The HTTP status and text for a request that is not gRPC's; None for one that is."""
    if scope["method"] != "POST":
        return 405, "POST expected, this port speaks gRPC"
    kind, _, _ = headers.get(b"content-type", b"").partition(b";")
    if kind not in (b"application/grpc", b"application/grpc+proto"):
        return 415, f"content-type application/grpc expected, got {kind.decode('latin-1')!r}"
    if headers.get(b"te") != b"trailers" or scope["http_version"].startswith("1"):
        return 400, "HTTP/2 and header te: trailers expected, without them a status cannot be sent"
    return None


async def _answer_plainly(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
