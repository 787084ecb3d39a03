"""The ASGI application that speaks gRPC, called without a server: what it sends, and when it gives up."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError

from service.errors import INTERNAL_ERROR, InvalidArgument, KilnError, Overloaded
from service.rpc import calls
from service.rpc.asgi import GrpcApp
from service.rpc.framing import frame
from service.rpc.handlers import CallLimits
from service.rpc.health import HealthService
from service.rpc.options import RpcOptions
from service.rpc.services import Services
from tests.asgi_channel import HEADERS, AsgiCall, AsgiChannel, scope

LIMIT = 1000


class Handlers:
    """``/a/Echo`` and ``/a/Stream`` answer what they get; the words in it make them fail or wait."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []
        self.waiting = asyncio.Event()
        self.cancelled = 0
        self.failures: list[tuple[str, KilnError]] = []
        services = Services({"/a/Echo": self.echo}, {"/a/Stream": self.stream}, HealthService(()), self.refused)
        self.app = GrpcApp(services, RpcOptions("", LIMIT, 30.0))

    def refused(self, path: str, error: KilnError) -> None:
        self.failures.append((path, error))

    async def echo(self, data: bytes, deadline: float) -> bytes:
        self.deadlines.append(deadline)
        if data == b"full":
            raise Overloaded("the queue is full", 2.5)
        if data == b"fault":
            raise ZeroDivisionError("secret")
        if data == b"wait":
            try:
                self.waiting.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return data

    async def stream(self, messages: AsyncIterator[bytes], limits: CallLimits) -> AsyncGenerator[bytes, None]:
        self.deadlines.append(limits.deadline())
        async for data in messages:
            if len(data) > limits.max_message_bytes:
                yield b"too large"
            elif data == b"wrong":
                raise InvalidArgument("wrong")
            else:
                yield await self.echo(data, limits.deadline())


@pytest.fixture
async def handlers() -> Handlers:
    return Handlers()


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers are looked after without delay."""
    monkeypatch.setattr(calls, "_LOOK_S", 0.0)


def echo(handlers: Handlers, *parts: bytes, headers: Any = ()) -> AsgiCall:
    call = AsgiCall(handlers.app, "/a/Echo", headers=headers)
    for number, part in enumerate(parts, start=1):
        call.feed(part, is_last=number == len(parts))
    return call


async def refusal(call: AsgiCall) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


async def test_a_call_as_it_is_sent(handlers: Handlers):
    """Headers, one frame, and the status as trailers."""
    call = echo(handlers, frame(b"abc"))
    assert await call == b"abc"
    assert call.sent == [
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/grpc")],
            "trailers": True,
        },
        {"type": "http.response.body", "body": b"\0\0\0\0\3abc"},
        {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]},
    ]


async def test_a_refusal_as_it_is_sent(handlers: Handlers):
    """Everything in the headers, and no body."""
    call = echo(handlers, frame(b"full"))
    assert await refusal(call) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
    start, body = call.sent
    assert start == {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (b"content-type", b"application/grpc"),
            (b"grpc-status", b"8"),
            (b"grpc-message", b"the queue is full"),
            (b"grpc-accept-encoding", b"identity,deflate,gzip"),
            (b"retry-after", b"3"),
        ],
    }
    assert body == {"type": "http.response.body", "body": b""}


async def test_a_fault(handlers: Handlers, caplog: pytest.LogCaptureFixture):
    """The log has it, the caller a text without it."""
    assert await refusal(echo(handlers, frame(b"fault"))) == (grpc.StatusCode.INTERNAL, INTERNAL_ERROR)
    assert "/a/Echo failed" in caplog.text
    assert "secret" in caplog.text


async def test_a_body_in_pieces_is_read_until_its_message_is_there(handlers: Handlers):
    """However small they are; the end of the body is not waited for."""
    call = AsgiCall(handlers.app, "/a/Echo")
    for byte in frame(b"abc"):
        call.feed(bytes([byte]), is_last=False)
    assert await call == b"abc"


async def test_a_compressed_message(handlers: Handlers):
    """Inflated; the answer is not compressed."""
    packed = gzip.compress(b"abc" * 100)
    call = echo(handlers, b"\1" + len(packed).to_bytes(4, "big") + packed, headers=[(b"grpc-encoding", b"gzip")])
    assert await call == b"abc" * 100


@pytest.mark.parametrize(
    ("parts", "headers", "code", "text"),
    [
        ((b"",), [], grpc.StatusCode.INVALID_ARGUMENT, "one message expected, got none"),
        ((b"\0\0\0",), [], grpc.StatusCode.INVALID_ARGUMENT, "the message is cut off: 3 bytes of it came"),
        ((frame(b"ab")[:-1], b""), [], grpc.StatusCode.INVALID_ARGUMENT, "the message is cut off: 6 bytes of it came"),
        (
            (frame(bytes(LIMIT + 1)),),
            [],
            grpc.StatusCode.INVALID_ARGUMENT,
            "the message has 1001 bytes, over the limit of 1000",
        ),
        (
            (frame(bytes(LIMIT + 1))[:9], b""),
            [],
            grpc.StatusCode.INVALID_ARGUMENT,
            "the message has 1001 bytes, over the limit of 1000",
        ),
        (
            (frame(b"ab"),),
            [(b"grpc-encoding", b"br")],
            grpc.StatusCode.UNIMPLEMENTED,
            "header grpc-encoding: one of identity, deflate, gzip expected, got 'br'",
        ),
        (
            (frame(b"ab"),),
            [(b"grpc-timeout", b"soon")],
            grpc.StatusCode.INVALID_ARGUMENT,
            "header grpc-timeout: up to eight digits and one of H, M, S, m, u, n expected, got 'soon'",
        ),
    ],
)
async def test_wrong_requests(handlers: Handlers, parts: Any, headers: Any, code: grpc.StatusCode, text: str):
    """Refused before any handler."""
    assert await refusal(echo(handlers, *parts, headers=headers)) == (code, text)
    assert handlers.deadlines == []


async def test_an_unknown_method(handlers: Handlers):
    """UNIMPLEMENTED, in grpcio's words."""
    call = AsgiCall(handlers.app, "/a/Nothing")
    assert await refusal(call) == (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"method": "GET"}, 405, b"POST expected, this port speaks gRPC"),
        ({"headers": []}, 415, b"content-type application/grpc expected, got ''"),
        (
            {"headers": [(b"content-type", b"application/grpc-web"), HEADERS[1]]},
            415,
            b"content-type application/grpc expected, got 'application/grpc-web'",
        ),
        ({"headers": HEADERS[:1]}, 400, b"HTTP/2 and header te: trailers expected, without them a status cannot be"),
        ({"http_version": "1.1"}, 400, b"HTTP/2 and header te: trailers expected, without them a status cannot be"),
    ],
)
async def test_requests_that_are_not_grpc(handlers: Handlers, changes: dict[str, Any], status: int, text: bytes):
    """An HTTP status, and words that say what is spoken here."""
    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    async def receive() -> Any:
        raise AssertionError("the body is not read")

    await handlers.app(scope("/a/Echo", **changes), receive, send)
    assert sent[0]["status"] == status
    assert sent[1]["body"].startswith(text)


@pytest.mark.parametrize("kind", [b"application/grpc+proto", b"application/grpc; charset=utf-8"])
async def test_other_names_of_the_same_content(handlers: Handlers, kind: bytes):
    """Taken too."""
    assert await echo(handlers, frame(b"abc"), headers=[(b"content-type", kind)]) == b"abc"


@pytest.mark.parametrize(("path", "end"), [("/a/Echo", True), ("/a/Stream", False)])
async def test_deadlines(handlers: Handlers, path: str, end: bool):
    """The caller's, else the server's."""
    for timeout, expected in ((b"2S", 2.0), (b"", 30.0)):
        call = AsgiCall(handlers.app, path, headers=[(b"grpc-timeout", timeout)] if timeout else [])
        call.feed(frame(b"a"), is_last=True)
        await call.task
        assert handlers.deadlines[0] - time.monotonic() == pytest.approx(expected, abs=1.0)
        handlers.deadlines.clear()


# Callers who leave, and a server that stops


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("path", ["/a/Echo", "/a/Stream"])
async def test_a_caller_who_leaves(handlers: Handlers, path: str):
    """Its handler is cancelled, and nothing is sent."""
    call = AsgiCall(handlers.app, path)
    call.feed(frame(b"wait"), is_last=path == "/a/Echo")
    await handlers.waiting.wait()
    call.cancel()
    await call.task
    assert (handlers.cancelled, call.sent) == (1, [])


async def test_a_caller_who_leaves_after_the_last_of_a_stream(handlers: Handlers):
    """Noticed as in a unary call."""
    call = AsgiCall(handlers.app, "/a/Stream")
    call.feed(frame(b"wait"), is_last=True)
    await handlers.waiting.wait()
    call.cancel()
    await call.task
    assert handlers.cancelled == 1


async def test_a_server_that_answers_at_once_after_the_body(handlers: Handlers):
    """Envoy gives empty parts, not a disconnect, as long as the caller is there: it is asked again and again."""
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        if asked == 1:
            return {"type": "http.request", "body": frame(b"wait"), "more_body": False}
        return {"type": "http.request", "body": b""} if asked < 5 else {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        raise AssertionError("nobody is there")

    await handlers.app(scope("/a/Echo"), receive, send)
    assert (asked, handlers.cancelled) == (5, 1)


async def test_a_receive_that_fails_while_looking_is_none_of_the_calls_business(handlers: Handlers):
    """The call goes on, and can still be stopped."""
    asked = asyncio.Event()

    async def receive() -> Any:
        if not handlers.deadlines:
            return {"type": "http.request", "body": frame(b"wait")}
        asked.set()
        raise OSError("the server ends")

    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event)

    task = asyncio.ensure_future(handlers.app(scope("/a/Echo"), receive, send))
    await asked.wait()
    await handlers.app.stop(0.0)
    await task
    assert (b"grpc-status", b"14") in sent[0]["headers"]


@pytest.mark.parametrize("path", ["/a/Echo", "/a/Stream"])
async def test_a_caller_who_leaves_within_the_body(handlers: Handlers, path: str):
    """Nothing is handled, nothing sent."""
    call = AsgiCall(handlers.app, path)
    call.feed(frame(b"abc")[:4], is_last=False)
    call.cancel()
    await call.task
    assert call.sent == []


@pytest.mark.parametrize("path", ["/a/Echo", "/a/Stream"])
async def test_a_caller_who_leaves_before_the_answer(handlers: Handlers, path: str):
    """What sending raises then is no fault."""
    events = iter([{"type": "http.request", "body": frame(b"abc"), "more_body": False}])

    async def receive() -> Any:
        return next(events, {"type": "http.disconnect"})

    async def send(event: Any) -> None:
        raise OSError("the caller has left")

    await handlers.app(scope(path), receive, send)


async def test_a_caller_who_leaves_while_an_answer_is_sent(handlers: Handlers):
    """The stream ends though sending did not fail: it would wait for messages for ever."""
    leaving, left = asyncio.Event(), asyncio.Event()
    events = iter([{"type": "http.request", "body": frame(b"abc"), "more_body": True}])

    async def receive() -> Any:
        if (event := next(events, None)) is not None:
            return event
        await leaving.wait()
        left.set()
        return {"type": "http.disconnect"}

    async def send(event: Any) -> None:
        leaving.set()
        await left.wait()
        await asyncio.sleep(0)

    async with asyncio.timeout(10.0):
        await handlers.app(scope("/a/Stream"), receive, send)


@pytest.mark.parametrize("path", ["/a/Echo", "/a/Stream"])
async def test_stopping(handlers: Handlers, path: str):
    """Calls that are not done within the grace are told so, and new ones too."""
    call = AsgiCall(handlers.app, path)
    call.feed(frame(b"wait"), is_last=True)
    await handlers.waiting.wait()
    await handlers.app.stop(0.0)
    await call.task
    told = (grpc.StatusCode.UNAVAILABLE, "the server is stopping and takes no new requests")
    assert (call.error().code(), call.error().details()) == told
    late = AsgiCall(handlers.app, path)
    late.feed(frame(b"abc"), is_last=True)
    await late.task
    assert (late.error().code(), late.error().details()) == told


async def test_stopping_waits_for_calls(handlers: Handlers):
    """Those that end within the grace are answered."""
    call = AsgiCall(handlers.app, "/a/Stream")
    await call.write(b"a")
    assert await call.read() == b"a"
    stopping = asyncio.ensure_future(handlers.app.stop(30.0))
    await asyncio.sleep(0)
    await call.write(b"b")
    assert await call.read() == b"b"
    await call.done_writing()
    await stopping
    assert call.trailers() == {"grpc-status": "0"}
    await handlers.app.stop(30.0)


async def test_the_end_of_the_loop(handlers: Handlers):
    """A call that is cancelled for neither reason is cancelled."""
    call = AsgiCall(handlers.app, "/a/Echo")
    call.feed(frame(b"wait"), is_last=True)
    await handlers.waiting.wait()
    call.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call.task
    assert call.sent == []


# Streams


async def test_a_stream(handlers: Handlers):
    """Answers go out as they come, with one status at the end."""
    call = AsgiChannel(handlers.app).stream_stream("/a/Stream")()
    for data in (b"a", b"", b"b"):
        await call.write(data)
        assert await call.read() == data
    await call.done_writing()
    await call.task
    assert [event["type"].removeprefix("http.response.") for event in call.sent] == [
        "start",
        "body",
        "body",
        "body",
        "body",
        "trailers",
    ]
    assert call.trailers() == {"grpc-status": "0"}


async def test_a_stream_of_nothing(handlers: Handlers):
    """OK, in the headers."""
    call = AsgiCall(handlers.app, "/a/Stream")
    await call.done_writing()
    await call.task
    assert call.sent[0]["headers"] == [(b"content-type", b"application/grpc"), (b"grpc-status", b"0")]


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (frame(b"wrong"), grpc.StatusCode.INVALID_ARGUMENT, "wrong"),
        (frame(b"fault"), grpc.StatusCode.INTERNAL, INTERNAL_ERROR),
        (b"\0\0", grpc.StatusCode.INVALID_ARGUMENT, "the message is cut off: 2 bytes of it came"),
        (
            b"\1\0\0\0\0",
            grpc.StatusCode.INTERNAL,
            "a message is compressed, but header grpc-encoding names no compression",
        ),
        (b"\0\xff\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT, "the message has 4294967295 bytes, over the limit"),
    ],
)
async def test_a_stream_that_fails(handlers: Handlers, data: bytes, code: grpc.StatusCode, text: str):
    """With the status as trailers, after what was answered."""
    call = AsgiCall(handlers.app, "/a/Stream")
    await call.write(b"a")
    assert await call.read() == b"a"
    call.feed(data, is_last=True)
    await call.task
    assert (call.error().code(), (call.error().details() or "")[: len(text)]) == (code, text)
    assert call.sent[-1]["type"] == "http.response.trailers"


async def test_a_message_over_the_limit_is_the_streams_own_matter(handlers: Handlers):
    """Its handler gets it, and the stream goes on."""
    call = AsgiCall(handlers.app, "/a/Stream")
    for data, answer in ((bytes(LIMIT + 1), b"too large"), (b"a", b"a")):
        await call.write(data)
        assert await call.read() == answer
    await call.done_writing()
    await call.task


async def test_a_handler_that_reads_no_further_holds_the_caller_back(handlers: Handlers):
    """No more is received than a few messages ahead; and what still comes after its end harms nobody."""
    call = AsgiCall(handlers.app, "/a/Stream")
    await call.write(b"wait")
    await handlers.waiting.wait()
    for _ in range(20):
        await call.write(b"a")
    await asyncio.sleep(0)
    await until(lambda: call._events.qsize() <= 16)
    assert call._events.qsize() >= 14
    await handlers.app.stop(0.0)
    await call.task
    assert call.error().code() is grpc.StatusCode.UNAVAILABLE
