"""Closed-loop load from a process of its own, as cheap as Python allows.

``python -m load_tests.driver`` reads a `Plan` as JSON from stdin and writes a `Result` to stdout:
each connection sends its next request when the last one is answered.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from selectors import EVENT_READ, DefaultSelector

import numpy as np


@dataclass(frozen=True)
class Plan:
    """What to send where: `request` is the whole HTTP request, or the gRPC message, in base64."""

    protocol: str
    port: int
    connections: int
    warm_up_s: float
    seconds: float
    request: str
    method: str = ""


@dataclass(frozen=True)
class Result:
    """What came of it, over the measured seconds; `first_body` is one answer, in base64."""

    requests: int
    errors: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    started: float
    stopped: float
    client_cpu_s: float
    first_body: str


def driven(plan: Plan) -> Result:
    """What comes of `plan`, carried out by a process of its own.

    Raises:
        SystemExit: a request failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "load_tests.driver"],
        input=json.dumps(asdict(plan)) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=plan.warm_up_s + plan.seconds + 60,
    )
    result = Result(**json.loads(done.stdout))
    if result.errors:
        raise SystemExit(f"{result.errors} requests over {plan.protocol} failed")
    return result


class Recorder:
    """Latencies of the requests that end within the measured seconds."""

    def __init__(self, plan: Plan) -> None:
        self.start = time.monotonic() + plan.warm_up_s
        self.stop = self.start + plan.seconds
        self.latencies: list[float] = []
        self.errors = 0
        self.first_body = b""
        self._cpu_at_start: float | None = None

    def record(self, sent: float, now: float, *, ok: bool) -> bool:
        """Count one answer; False once the time is over."""
        if now >= self.start:
            if self._cpu_at_start is None:
                self._cpu_at_start = time.process_time()
            if now >= self.stop:
                return False
            self.latencies.append(now - sent)
            self.errors += not ok
        return True

    def result(self) -> Result:
        milliseconds = np.array(self.latencies or [0.0]) * 1e3
        return Result(
            requests=len(self.latencies),
            errors=self.errors,
            requests_per_s=len(self.latencies) / (self.stop - self.start),
            p50_ms=float(np.percentile(milliseconds, 50)),
            p99_ms=float(np.percentile(milliseconds, 99)),
            started=self.start,
            stopped=self.stop,
            client_cpu_s=time.process_time() - (self._cpu_at_start or 0.0),
            first_body=base64.b64encode(self.first_body).decode(),
        )


def drive_http(plan: Plan, request: bytes) -> Result:
    """One thread, blocking writes, readiness through epoll."""
    selector = DefaultSelector()
    sent: dict[socket.socket, float] = {}
    buffers: dict[socket.socket, bytes] = {}
    for _ in range(plan.connections):
        connection = socket.create_connection(("127.0.0.1", plan.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(connection, EVENT_READ)
    recorder = Recorder(plan)
    for key in list(selector.get_map().values()):
        _send(key.fileobj, request, sent, buffers)  # type: ignore[arg-type]
    going = True
    while going:
        for key, _ in selector.select(timeout=10.0):
            connection = key.fileobj  # type: ignore[assignment]
            data = buffers[connection] + connection.recv(1 << 18)
            body = _complete_body(data)
            if body is None:
                buffers[connection] = data
                continue
            recorder.first_body = recorder.first_body or body
            ok = data.startswith(b"HTTP/1.1 200")
            going = recorder.record(sent[connection], time.monotonic(), ok=ok) and going
            if going:
                _send(connection, request, sent, buffers)
    for connection in sent:
        connection.close()
    return recorder.result()


def _send(
    connection: socket.socket, request: bytes, sent: dict[socket.socket, float], buffers: dict[socket.socket, bytes]
) -> None:
    buffers[connection] = b""
    sent[connection] = time.monotonic()
    connection.sendall(request)


def _complete_body(data: bytes) -> bytes | None:
    """The body of a whole response with a Content-Length; None while it is still coming."""
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0:
        if not data:
            raise ConnectionError("the server closed a connection")
        return None
    head = data[:head_end].lower()
    at = head.find(b"content-length:")
    length = int(head[at + 15 :].partition(b"\r\n")[0])
    body = data[head_end + 4 :]
    return body if len(body) >= length else None


async def drive_grpc(plan: Plan, request: bytes) -> Result:
    """grpc.aio with bytes for messages, over a few connections."""
    import grpc

    channels = [
        grpc.aio.insecure_channel(f"127.0.0.1:{plan.port}", options=[("kiln.channel", index)])
        for index in range(min(plan.connections, 4))
    ]
    recorder: Recorder | None = None

    async def call_in_turn(index: int) -> None:
        call = channels[index % len(channels)].unary_unary(plan.method)
        assert recorder is not None
        going = True
        while going:
            sent = time.monotonic()
            try:
                body = await call(request)
                ok = True
            except grpc.aio.AioRpcError as error:
                body, ok = str(error).encode(), False
            recorder.first_body = recorder.first_body or body
            going = recorder.record(sent, time.monotonic(), ok=ok)

    recorder = Recorder(plan)
    await asyncio.gather(*(call_in_turn(index) for index in range(plan.connections)))
    for channel in channels:
        await channel.close()
    return recorder.result()


def main() -> None:
    """Read the plan, drive, write the result."""
    plan = Plan(**json.loads(sys.stdin.readline()))
    request = base64.b64decode(plan.request)
    if plan.protocol == "http":
        result = drive_http(plan, request)
    else:
        import uvloop

        result = uvloop.run(drive_grpc(plan, request))
    json.dump(asdict(result), sys.stdout)


if __name__ == "__main__":
    main()
