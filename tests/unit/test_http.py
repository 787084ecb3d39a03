"""The ASGI of the hot paths, with a caller made by hand: bodies, limits, gzip, deadlines, and callers who leave."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest

from service.errors import INTERNAL_ERROR, Cancelled, InvalidArgument, KilnError, Overloaded, TooLarge, Unavailable
from service.rest import http
from service.rest.http import answer_content, answer_json, deadline, guarded, read_body, takes_gzip

LIMIT = 64
Message = MutableMapping[str, Any]
Handle = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


class Caller:
    """Sends a body in `parts`, each after `turns` of the event loop; then stays until `leave`.

    With `stalls` there should be more of the body, which never comes.
    """

    def __init__(
        self, *parts: bytes, headers: dict[str, str] | None = None, turns: int = 0, stalls: bool = False
    ) -> None:
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        self.scope: Message = {"type": "http", "method": "POST", "path": "/p", "headers": encoded}
        self.sent: list[Message] = []
        self.received = 0
        self._parts = list(parts or (b"",))
        self._turns = turns
        self._stalls = stalls
        self._left = asyncio.Event()
        self.is_idle = asyncio.Event()
        """Set once there is nothing more to send."""

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        for _ in range(self._turns):
            await asyncio.sleep(0)
        if self._parts and not self._left.is_set():
            self.received += 1
            return {"type": "http.request", "body": self._parts.pop(0), "more_body": bool(self._parts) or self._stalls}
        self.is_idle.set()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def call(self, handle: Handle) -> None:
        await guarded(handle)(self.scope, self.receive, self.send)

    @property
    def answer(self) -> tuple[int, dict[bytes, bytes], Any]:
        """Status, headers and JSON of the whole response that was sent."""
        start, body = self.sent
        headers = dict(start["headers"])
        assert int(headers[b"content-length"]) == len(body["body"])
        return start["status"], headers, json.loads(body["body"])


def body_of(caller: Caller) -> Awaitable[bytes]:
    return read_body(caller.scope, caller.receive, LIMIT)


async def echo(scope: Message, receive: Any, send: Any) -> None:
    """Answer with the body's text."""
    body = await read_body(scope, receive, LIMIT)
    await answer_json(send, 200, body.decode())


# Bodies


@pytest.mark.parametrize("parts", [[b""], [b"abc"], [b"a", b"b", b"c"], [b"", b"abc"], [b"abc", b""], [b"x" * LIMIT]])
async def test_a_body_comes_whole(parts: list[bytes]):
    """In one part or several, empty ones too, up to the limit exactly."""
    assert await body_of(Caller(*parts)) == b"".join(parts)


async def test_a_slow_body_comes_whole_though_the_caller_is_watched(monkeypatch: pytest.MonkeyPatch):
    """The watch for leaving callers takes no part of a body that comes slower than the watch begins."""
    monkeypatch.setattr(http, "_WATCH_AFTER_S", 0.0)
    caller = Caller(b"a", b"b", b"c", b"d", turns=20)
    await caller.call(echo)
    assert caller.answer[0] == 200
    assert caller.answer[2] == "abcd"


@pytest.mark.parametrize(
    ("parts", "headers", "read"),
    [
        ([b"x" * 65], {"content-length": "65"}, 0),
        ([b"x" * 65], {}, 1),
        ([b"x" * 40, b"x" * 25, b"x"], {}, 2),
        ([b"x" * 65, b"x"], {}, 1),
        ([gzip.compress(b"x" * 65)], {"content-encoding": "gzip"}, 1),
        ([gzip.compress(b"x" * 10**4)], {"content-encoding": "gzip"}, 1),
    ],
)
async def test_a_body_over_the_limit_is_refused_as_soon_as_it_is_known(
    parts: list[bytes], headers: dict[str, str], read: int
):
    """By its stated length, by what has come, or by what it inflates to; the text has the limit."""
    caller = Caller(*parts, headers=headers)
    with pytest.raises(
        TooLarge, match=r"^the body (has 65 bytes, over the limit of 64|\w+ (to )?over 64 bytes, the limit)$"
    ):
        await body_of(caller)
    assert caller.received == read


@pytest.mark.parametrize("parts", [[b""], [b"a", b"b"]])
async def test_a_caller_who_leaves_before_the_end_is_not_answered(parts: list[bytes]):
    """Half a body is no request."""

    async def read(scope: Message, receive: Any, send: Any) -> None:
        with pytest.raises(Cancelled):
            await read_body(scope, receive, LIMIT)
        raise Cancelled("left")

    caller = Caller(*parts, stalls=True)
    call = asyncio.ensure_future(caller.call(read))
    await caller.is_idle.wait()
    caller.leave()
    await call
    assert caller.sent == []


# Encodings


@pytest.mark.parametrize("name", ["gzip", "x-gzip", " GZIP ", "identity", ""])
async def test_a_body_is_inflated(name: str):
    """Gzip under both of its names; identity is the body itself."""
    data = gzip.compress(b"abc") if "gzip" in name.lower() else b"abc"
    assert await body_of(Caller(data[:5], data[5:], headers={"content-encoding": name})) == b"abc"


async def test_a_body_may_inflate_to_the_limit():
    """The bound is not one less than it says."""
    caller = Caller(gzip.compress(b"x" * LIMIT), headers={"content-encoding": "gzip"})
    assert await body_of(caller) == b"x" * LIMIT


@pytest.mark.parametrize(
    ("data", "name", "text"),
    [
        (b"", "gzip", "the gzip body is cut off"),
        (gzip.compress(b"abc")[:-1], "gzip", "the gzip body is cut off"),
        (gzip.compress(b"abc")[:12], "gzip", "the gzip body is cut off"),
        (b"abc", "gzip", "the gzip body is broken: Error -3 while decompressing data: incorrect header check"),
        (gzip.compress(b"abc")[:-8] + bytes(8), "gzip", "the gzip body is broken: Error -3"),
        (gzip.compress(b"abc") + b"xy", "gzip", "one gzip member expected as the body, 2 bytes follow it"),
        (gzip.compress(b"a") * 2, "gzip", "one gzip member expected as the body, 21 bytes follow it"),
        (b"abc", "br", "header Content-Encoding: gzip or identity expected, got 'br'"),
        (b"abc", "gzip, gzip", "header Content-Encoding: gzip or identity expected, got 'gzip, gzip'"),
    ],
)
async def test_an_encoding_that_cannot_be_undone_is_refused(data: bytes, name: str, text: str):
    """Unknown, broken, cut off, or with more behind it: never silently read in part."""
    with pytest.raises(InvalidArgument) as refused:
        await body_of(Caller(data, headers={"content-encoding": name}))
    assert str(refused.value).startswith(text)


# Deadlines


@pytest.mark.parametrize(
    ("headers", "seconds"), [({}, 30.0), ({"kiln-timeout-ms": "1500"}, 1.5), ({"kiln-timeout-ms": " 0.5"}, 5e-4)]
)
async def test_a_deadline_is_the_callers_or_the_default(headers: dict[str, str], seconds: float):
    """Absolute, on the monotonic clock."""
    before = time.monotonic()
    due = deadline(Caller(headers=headers).scope, 30.0)
    assert before + seconds <= due <= time.monotonic() + seconds


@pytest.mark.parametrize("text", ["0", "-5", "abc", "", "nan", "inf", "1e999", "\xff"])
async def test_a_deadline_that_is_no_positive_number_is_refused(text: str):
    """The text names the header and what came."""
    with pytest.raises(InvalidArgument) as refused:
        deadline(Caller(headers={"kiln-timeout-ms": text}).scope, 30.0)
    assert str(refused.value) == f"header Kiln-Timeout-Ms: a positive number expected, got {text!r}"


# Errors


def failing(error: Exception) -> Handle:
    async def fail(scope: Message, receive: Any, send: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (InvalidArgument("wrong"), 400, {}),
        (InvalidArgument("lone \ud800"), 400, {}),
        (TooLarge("large"), 413, {b"connection": b"close"}),
        (Overloaded("full", 0.2), 429, {b"retry-after": b"1"}),
        (Overloaded("full", 2.1), 429, {b"retry-after": b"3"}),
        (Unavailable("loading"), 503, {}),
    ],
)
async def test_errors_are_answered_in_one_shape(error: KilnError, status: int, headers: dict[bytes, bytes]):
    """``{"error": text}``; a full queue says when to come back, and what is not read is not waited for."""
    caller = Caller()
    await caller.call(failing(error))
    got_status, got_headers, body = caller.answer
    assert got_status == status
    assert body == {"error": str(error).replace("\ud800", "?")}
    got_headers.pop(b"content-length")
    assert got_headers == {b"content-type": b"application/json", **headers}


async def test_an_error_that_nobody_foresaw_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture):
    """The caller is told that something broke, the log what."""
    caller = Caller()
    await caller.call(failing(RuntimeError("secret")))
    assert caller.answer[0] == 500
    assert caller.answer[2] == {"error": INTERNAL_ERROR}
    assert "POST /p failed" in caplog.text
    assert "secret" in caplog.text


# Callers who leave


class Slow:
    """A handler that reads the body and then waits for ever."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self.cancelled = False

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        await read_body(scope, receive, LIMIT)
        self.waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_a_caller_who_leaves_cancels_the_handler(monkeypatch: pytest.MonkeyPatch):
    """What nobody waits for is given up, and nothing is answered."""
    monkeypatch.setattr(http, "_WATCH_AFTER_S", 0.0)
    caller, slow = Caller(b"a", b"b"), Slow()
    call = asyncio.ensure_future(caller.call(slow))
    await slow.waiting.wait()
    caller.leave()
    await call
    assert slow.cancelled
    assert caller.sent == []


async def test_a_handler_that_is_cancelled_by_its_server_stays_cancelled():
    """Only the caller's leaving is kept quiet."""
    caller, slow = Caller(), Slow()
    call = asyncio.ensure_future(caller.call(slow))
    await slow.waiting.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert slow.cancelled


async def test_a_caller_who_stays_is_watched_without_harm(monkeypatch: pytest.MonkeyPatch):
    """A watch that has begun ends with the answer, and one that has not never begins."""
    monkeypatch.setattr(http, "_WATCH_AFTER_S", 0.0)
    before = asyncio.all_tasks()

    async def slow_echo(scope: Message, receive: Any, send: Any) -> None:
        body = await read_body(scope, receive, LIMIT)
        for _ in range(10):
            await asyncio.sleep(0)
        await answer_json(send, 200, body.decode())

    caller = Caller(b"ab")
    await caller.call(slow_echo)
    assert caller.answer[2] == "ab"
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


async def test_a_message_that_is_no_leaving_is_no_leaving(monkeypatch: pytest.MonkeyPatch):
    """Should a server send more after the end of a body, the handler goes on."""
    monkeypatch.setattr(http, "_WATCH_AFTER_S", 0.0)
    messages = [{"type": "http.request", "body": b"a"}, {"type": "http.request", "body": b""}]
    caller = Caller()
    all_received = asyncio.Event()

    async def receive() -> Message:
        if len(messages) == 1:
            all_received.set()
        return messages.pop(0)

    async def late(scope: Message, receive: Any, send: Any) -> None:
        await read_body(scope, receive, LIMIT)
        await all_received.wait()
        await asyncio.sleep(0)  # the watch has ended
        await answer_json(send, 200, "done")

    await guarded(late)(caller.scope, receive, caller.send)
    assert caller.answer[2] == "done"


# Answers as gzip


async def content(size: int, minimum: int, accept: str | None = "gzip") -> tuple[bytes, dict[bytes, bytes]]:
    caller = Caller(headers={} if accept is None else {"accept-encoding": accept})
    await answer_content(caller.scope, caller.send, b"a" * size, [http.JSON], minimum)
    start, body = caller.sent
    headers = dict(start["headers"])
    assert start["status"] == 200
    assert int(headers[b"content-length"]) == len(body["body"])
    return body["body"], headers


@pytest.mark.parametrize("size", [100, 5000, http._DEFLATE_APART_BYTES])
async def test_an_answer_of_some_size_is_compressed(size: int):
    """For a caller who takes gzip; very large ones in a thread."""
    body, headers = await content(size, 100)
    assert gzip.decompress(body) == b"a" * size
    assert (headers[b"content-encoding"], headers[b"vary"]) == (b"gzip", b"accept-encoding")


@pytest.mark.parametrize("accept", [None, "identity", "gzip;q=0"])
async def test_a_caller_who_takes_no_gzip_gets_none(accept: str | None):
    """A cache is told that others may."""
    body, headers = await content(100, 100, accept)
    assert body == b"a" * 100
    assert b"content-encoding" not in headers
    assert headers[b"vary"] == b"accept-encoding"


@pytest.mark.parametrize(("size", "minimum"), [(99, 100), (1000, 0)])
async def test_a_small_answer_is_sent_as_it_is(size: int, minimum: int):
    """As is every one where the setting is 0."""
    body, headers = await content(size, minimum)
    assert body == b"a" * size
    assert headers == {b"content-type": b"application/json", b"content-length": b"%d" % size}


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (None, False),
        (b"", False),
        (b"gzip", True),
        (b"deflate, GZIP;q=0.5, br", True),
        (b"x-gzip", True),
        (b"*", True),
        (b"gzip; q=0", False),
        (b"gzip;q=0.000, *", False),
        (b"*;q=0", False),
        (b"gzip;q=0.001", True),
        (b"br", False),
    ],
)
def test_accept_encoding(header: bytes | None, taken: bool):
    """Names with weights; 0 means no, and a star any other."""
    assert takes_gzip(header) is taken
