"""Byte-level handlers and how grpcio calls them.

A handler takes the request's bytes and an absolute deadline, and returns the response's bytes or
raises a `KilnError`; that of a stream takes the bytes of its messages and what limits each of them,
and gives those of its answers. Nothing in them knows the transport.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc

from service.batching.queue import Spent
from service.errors import INTERNAL_ERROR, Internal, KilnError, Overloaded, TooLarge
from service.rpc.codes import GRPC_STATUS
from service.timing import RETURNED, is_returned, server_timing
from service.trace_context import follow

_log = logging.getLogger("kiln.rpc")

_LONGEST_TEXT = 500
"""Characters of an error that are sent: each may take 12 bytes, and clients refuse over 8 KB of metadata."""


class Timed(NamedTuple):
    """The bytes of an answer, and where the time of its request went."""

    data: bytes
    spent: Spent


Refused = Callable[[str, KilnError], None]
"""Is told of the method and the error of each call that fails, whether or not it became a request."""
Handler = Callable[[bytes, float], Awaitable[bytes | Timed]]
Handlers = Mapping[str, Handler]
Trailers = tuple[tuple[str, str], ...]
"""Trailing metadata."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What each message of a stream may take: `deadline` is that of one that begins now."""

    max_message_bytes: int
    deadline: Callable[[], float]


StreamHandler = Callable[[AsyncIterator[bytes], CallLimits], AsyncGenerator[bytes, None]]
StreamHandlers = Mapping[str, StreamHandler]


class GenericHandlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handlers by method path, as grpcio asks for them; without serializers, so bytes go through."""

    def __init__(
        self,
        handlers: Handlers,
        streams: StreamHandlers,
        refused: Refused,
        *,
        request_timeout_s: float,
        max_message_bytes: int,
    ) -> None:
        self._methods = {
            path: grpc.unary_unary_rpc_method_handler(
                _bind(path, handler, refused, request_timeout_s=request_timeout_s, max_message_bytes=max_message_bytes)
            )
            for path, handler in handlers.items()
        }
        self._methods |= {
            path: grpc.stream_stream_rpc_method_handler(
                _bind_stream(path, handler, request_timeout_s=request_timeout_s, max_message_bytes=max_message_bytes)
            )
            for path, handler in streams.items()
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._methods.get(details.method)


def _bind(
    path: str, handler: Handler, refused: Refused, *, request_timeout_s: float, max_message_bytes: int
) -> Callable[[bytes, Any], Awaitable[bytes]]:
    async def call(data: bytes, context: Any) -> bytes:
        remaining_s = context.time_remaining()
        deadline = time.monotonic() + (request_timeout_s if remaining_s is None else remaining_s)
        ids = ids_of(context.invocation_metadata())
        if ids:  # the task is of this call alone
            follow_ids(ids)
        try:
            if len(data) > max_message_bytes:
                raise too_large(len(data), max_message_bytes)
            answer = await handler(data, deadline)
        except KilnError as error:
            refused(path, error)
            failure = error.with_traceback(None)  # whose frames have this one: a cycle that would keep all they hold
        except Exception:  # noqa: BLE001 - whatever it is, its caller is told
            failure = unforeseen(path)
        else:
            if isinstance(answer, Timed):
                context.set_trailing_metadata((timing_trailer(answer.spent), *ids))
                return answer.data
            if ids:
                context.set_trailing_metadata(ids)
            return answer
        await _abort(context, failure, ids)
        raise AssertionError("abort raises")  # for the type checker

    return call


def _bind_stream(
    path: str, handler: StreamHandler, *, request_timeout_s: float, max_message_bytes: int
) -> Callable[[AsyncIterator[bytes], Any], AsyncIterator[bytes]]:
    async def call(messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        ids = ids_of(context.invocation_metadata())
        if ids:
            context.set_trailing_metadata(ids)
            follow_ids(ids)
        limits = stream_limits(
            context.time_remaining(), request_timeout_s=request_timeout_s, max_message_bytes=max_message_bytes
        )
        try:
            async with contextlib.aclosing(handler(messages, limits)) as answers:
                async for answer in answers:
                    yield answer
        except KilnError as error:
            failure = error
        except Exception:  # noqa: BLE001 - whatever it is, its caller is told
            failure = unforeseen(path)
        else:
            return
        await _abort(context, failure, ids)

    return call


async def _abort(context: Any, failure: KilnError, ids: Trailers) -> None:
    """End a call with an error; raises what grpcio ends it with."""
    status, text, trailers = status_of(failure)
    await context.abort(status, text, (*trailers, *ids))


def ids_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> Trailers:
    """Of a call's metadata what its caller gets back: its trace and its request id."""
    given = [(name, value) for name, value in metadata or () if name in RETURNED]
    return tuple([(name, value) for name, value in given if isinstance(value, str) and is_returned(name, value)])


def follow_ids(ids: Trailers) -> None:
    """The current task answers a call with these ids."""
    given = {name: value.encode() for name, value in ids}
    follow(given.get("traceparent"), given.get("x-request-id"))


def timing_trailer(spent: Spent) -> tuple[str, str]:
    """The trailing metadata that tell where a request's time went."""
    return ("server-timing", server_timing(spent))


def status_of(failure: KilnError) -> tuple[grpc.StatusCode, str, Trailers]:
    """What a caller is sent of `failure`: status, text of bounded length, and trailing metadata."""
    trailers: Trailers = ()
    if isinstance(failure, Overloaded):
        trailers = (("retry-after", str(max(1, math.ceil(failure.retry_after_s)))),)
    text = str(failure)
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "…"
    return GRPC_STATUS[failure.code], text, trailers


def unforeseen(path: str) -> KilnError:
    """Log the exception being handled; its caller is told no more than that there was one."""
    _log.exception("%s failed", path)
    return Internal(INTERNAL_ERROR)


def too_large(size_bytes: int, max_message_bytes: int) -> TooLarge:
    """The refusal of a message."""
    return TooLarge(f"the message has {size_bytes} bytes, over the limit of {max_message_bytes}")


def stream_limits(remaining_s: float | None, *, request_timeout_s: float, max_message_bytes: int) -> CallLimits:
    """Of a stream whose caller waits `remaining_s` for its end, or for ever."""
    end = math.inf if remaining_s is None else time.monotonic() + remaining_s
    return CallLimits(max_message_bytes, lambda: min(end, time.monotonic() + request_timeout_s))
