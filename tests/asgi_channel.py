"""A channel like grpc.aio's whose calls go straight to an ASGI application, framed as on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

import grpc
from grpc.aio import AioRpcError, Metadata

from service.rpc.asgi import GrpcApp
from service.rpc.framing import frame

_STATUS = {status.value[0]: status for status in grpc.StatusCode}
HEADERS = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]


def scope(path: str, *more: tuple[bytes, bytes], **changes: Any) -> dict[str, Any]:
    """Of a good request, with further headers."""
    return {
        "type": "http",
        "http_version": "2",
        "method": "POST",
        "path": path,
        "headers": [*HEADERS, *more],
        **changes,
    }


class AsgiCall:
    """One call: feed its body, read what comes back; awaited it is the one answer of a unary call."""

    def __init__(self, app: GrpcApp, path: str, *, timeout_s: float | None = None, headers: Any = ()) -> None:
        more = list(headers)
        if timeout_s is not None:
            more.append((b"grpc-timeout", b"%dm" % round(timeout_s * 1e3)))
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._left = asyncio.Event()
        self._is_sent = False
        self._timeout_s = timeout_s
        self.sent: list[dict[str, Any]] = []
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.task = asyncio.ensure_future(app(scope(path, *more), self._receive, self._send))
        self.task.add_done_callback(lambda _: self._answers.put_nowait(None))

    async def _receive(self) -> dict[str, Any]:
        if self._is_sent and self._events.empty():
            await self._left.wait()
            return {"type": "http.disconnect"}
        return await self._events.get()

    async def _send(self, event: Any) -> None:
        if self._left.is_set():
            raise OSError("the caller has left")
        self.sent.append(event)
        if event["type"] == "http.response.body" and event["body"]:
            self._answers.put_nowait(event["body"])

    def feed(self, data: bytes, *, is_last: bool) -> None:
        self._is_sent = self._is_sent or is_last
        self._events.put_nowait({"type": "http.request", "body": data, "more_body": not is_last})

    async def write(self, message: bytes) -> None:
        self.feed(frame(message), is_last=False)

    async def done_writing(self) -> None:
        self.feed(b"", is_last=True)

    async def read(self) -> bytes:
        """The next answer; the error that ended the call where there is none."""
        data = await self._answers.get()
        if data is None:
            raise self.error()
        assert (data[0], int.from_bytes(data[1:5], "big")) == (0, len(data) - 5)
        return data[5:]

    def cancel(self) -> None:
        self._is_sent = True
        self._left.set()
        self._events.put_nowait({"type": "http.disconnect"})

    def trailers(self) -> dict[str, str]:
        """Those that ended the call, or the headers of a response that had nothing else."""
        last = self.sent[-1] if self.sent[-1]["type"] == "http.response.trailers" else self.sent[0]
        return {name.decode(): value.decode() for name, value in last["headers"]}

    async def trailing_metadata(self) -> Metadata:
        """What grpcio gives of them."""
        return Metadata(*self.trailers().items())

    def error(self) -> AioRpcError:
        trailers = self.trailers()
        status = _STATUS[int(trailers.pop("grpc-status"))]
        return AioRpcError(status, Metadata(), Metadata(*trailers.items()), unquote(trailers.get("grpc-message", "")))

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(self.task)
        except TimeoutError:
            self.cancel()
            raise AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, Metadata(), Metadata(), "Deadline Exceeded") from None
        if self.trailers()["grpc-status"] != "0":
            raise self.error()
        assert [event["type"] for event in self.sent] == [
            "http.response.start",
            "http.response.body",
            "http.response.trailers",
        ]
        return await self.read()


class AsgiChannel:
    """As much of `grpc.aio.Channel` as the tests use."""

    def __init__(self, app: GrpcApp) -> None:
        self._app = app

    def unary_unary(self, path: str) -> Callable[..., AsgiCall]:
        def call(data: bytes, timeout: float | None = None, metadata: Iterable[tuple[str, str]] = ()) -> AsgiCall:
            headers = [(name.encode(), value.encode()) for name, value in metadata]
            started = AsgiCall(self._app, path, timeout_s=timeout, headers=headers)
            started.feed(frame(data), is_last=True)
            return started

        return call

    def unary_stream(self, path: str) -> Callable[..., AsgiCall]:
        return self.unary_unary(path)

    def stream_stream(self, path: str) -> Callable[..., AsgiCall]:
        def call(metadata: Iterable[tuple[str, str]] = ()) -> AsgiCall:
            return AsgiCall(self._app, path, headers=[(name.encode(), value.encode()) for name, value in metadata])

        return call
