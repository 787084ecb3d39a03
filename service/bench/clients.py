"""Clients that cost little, for open-loop load: HTTP/1.1 on asyncio's protocols, grpc.aio with bytes for messages."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

_ERROR_BYTES = 300
"""Of an answer that is no success, so much is kept to be told."""
_PROBE_S = 30.0
"""How long the first answer may take."""


class Answer(Enum):
    """What became of a request."""

    OK = "ok"
    REFUSED = "refused"
    FAILED = "failed"
    UNANSWERED = "unanswered"


class Client(Protocol):
    """What sends requests in one protocol; `error` tells of the last one that failed."""

    error: str

    async def send(self, number: int) -> Answer:
        """Send the request of that number, and wait for its answer."""

    async def close(self) -> None:
        """Close all connections."""


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._data = b""
        self._reply: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, blank, body = self._data.partition(b"\r\n\r\n")
        if not blank or self._reply is None:
            return
        at = head.lower().find(b"content-length:")
        if at < 0:
            self._end(OSError("an answer without Content-Length came"))
        elif len(body) >= int(head[at + 15 :].partition(b"\r\n")[0]):
            reply, self._reply, answer, self._data = self._reply, None, self._data, b""
            if not reply.done():
                reply.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._end(error or ConnectionError("the server closed the connection"))

    def _end(self, error: Exception) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)

    async def ask(self, request: bytes) -> bytes:
        """The answer, head and body; `OSError` if there is none."""
        assert self.transport is not None
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._reply = reply
        self.transport.write(request)
        return await reply

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class RestClient:
    """As many connections as it takes, up to `most`; beyond them requests wait, and their wait counts."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes], most: int = 512) -> None:
        self.error = ""
        self._address = (host, port)
        self._requests = requests
        self._room = asyncio.Semaphore(most)
        self._idle: deque[Connection] = deque()

    async def send(self, number: int) -> Answer:
        """See `Client`. A request that is given up takes its connection along."""
        async with self._room:
            try:
                connection = await self._connection()
            except OSError as error:
                self.error = str(error)
                return Answer.FAILED
            try:
                answer = await connection.ask(self._requests[number % len(self._requests)])
            except OSError as error:
                self.error = str(error)
                connection.close()
                return Answer.FAILED
            except asyncio.CancelledError:
                connection.close()
                raise
            self._idle.append(connection)
        status = answer[9:12]
        if status == b"200":
            return Answer.OK
        body = answer.partition(b"\r\n\r\n")[2][:_ERROR_BYTES]
        self.error = f"{status.decode(errors='replace')}: {body.decode(errors='replace')}"
        return Answer.REFUSED if status == b"429" else Answer.FAILED

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return made

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()


class GrpcClient:
    """grpc.aio over a few channels, with bytes for messages."""

    def __init__(self, address: str, method: str, requests: Sequence[bytes], channels: int = 4) -> None:
        import grpc

        self.error = ""
        self._requests = requests
        self._refused = grpc.StatusCode.RESOURCE_EXHAUSTED
        self._rpc_error = grpc.aio.AioRpcError
        self._channels = [
            grpc.aio.insecure_channel(address, options=[("kiln.channel", number)]) for number in range(channels)
        ]
        self._calls = [channel.unary_unary(method) for channel in self._channels]

    async def send(self, number: int) -> Answer:
        """See `Client`."""
        try:
            await self._calls[number % len(self._calls)](self._requests[number % len(self._requests)])
        except self._rpc_error as error:
            self.error = f"{error.code().name}: {error.details()}"
            return Answer.REFUSED if error.code() is self._refused else Answer.FAILED
        return Answer.OK

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def closed_loop_rate(client: Client, seconds: float, callers: int = 16) -> float:
    """Answers a second that so many callers get who each ask when they were answered; 0 where the first one fails."""
    loop = asyncio.get_running_loop()
    try:
        if await asyncio.wait_for(client.send(0), _PROBE_S) is not Answer.OK:
            return 0.0
    except TimeoutError:
        client.error = f"no answer within {_PROBE_S:.0f} s"
        return 0.0
    start = loop.time()
    numbers = itertools.count()
    answered = 0

    async def call() -> None:
        nonlocal answered
        while loop.time() - start < seconds:
            is_ok = await client.send(next(numbers)) is Answer.OK
            answered += is_ok  # not in one with the waiting: the sum would be read before it, and others' lost

    await asyncio.gather(*(call() for _ in range(callers)))
    return answered / max(loop.time() - start, 1e-9)
