"""What a request from a front end in another process costs the engine: its CPU time over its requests.

The model does nothing, so all of it is Kiln's: frames, tensors out of shared memory, batching, answers.
``python -m load_tests.bench_engine`` prints a table: callers at once, requests a second, CPU µs per request of
the engine and of the front end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from service.batching.queue import Lane, Limits
from service.frontend.channel import Channel
from service.frontend.hub import Hub
from service.frontend.link import Link
from service.frontend.loop import loop_factory, spare_garbage_collector
from service.frontend.memory import RING_BYTES, Inbox, Outbox, create
from service.frontend.remote import RemoteEngine
from service.metrics import Metrics
from service.predictor import ModelRef
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from service.shared_memory import OFF
from service.tensors import DataType, Signature, Tensors, TensorSpec

FLOATS = 784
SIGNATURE = Signature(
    "serving_default",
    (TensorSpec("x", DataType.FP32, (None, FLOATS)),),
    (TensorSpec("y", DataType.FP32, (None, 10)),),
)


class NoModel:
    """Answers zeros, at once."""

    devices: tuple[str, ...] = ("CPU:0",)
    device = "CPU:0"
    parallel = 1
    needs_planning = False
    is_planned = True
    is_known = True

    def __init__(self) -> None:
        self.signatures = {SIGNATURE.name: SIGNATURE}
        self.memory: dict[str, Any] = {}
        self.plans: dict[str, Any] = {}
        self.left_out: dict[str, str] = {}

    def bucket_rows(self, lane: Lane, rows: int) -> int:  # noqa: ARG002
        return rows

    def expected_s(self, lane: Lane, rows: int) -> float:  # noqa: ARG002
        return 20e-6

    def most_rows(self, signature: str) -> int:  # noqa: ARG002
        return 64

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:  # noqa: ARG002
        return {"y": np.zeros((len(inputs["x"]), 10), np.float32)}

    def warm_up(self) -> dict[str, Any]:
        return {}

    def plan(self, tell: Any = None) -> bool:  # noqa: ARG002
        return False

    def cancel_planning(self) -> None: ...

    def close(self) -> None: ...


class _Owner:
    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def accepts(self) -> None: ...

    def fails(self, reason: str) -> None: ...

    def ended(self) -> None:
        self.gone.set()


async def engine(callers: int, requests: int) -> str:
    """Serve one front end that has `callers` callers and `requests` requests; a row of the table."""
    metrics = Metrics()
    hub = Hub(metrics)
    limits = Limits(64, 4096, 1 << 29)
    options = RegistryOptions(lambda source: source.path, lambda path, config: NoModel(), limits)  # noqa: ARG005
    registry = Registry(Repository((Source("m", 1, Kind.KERAS, Path("m")),)), options, metrics, follower=hub)
    hub.follow(registry, lambda: True)
    await registry.load_all()
    mine, theirs = socket.socketpair()
    rings = create(RING_BYTES), create(RING_BYTES)
    owner = _Owner()
    channel = Channel(mine, Inbox(rings[0]), Outbox(rings[1]))
    given = (theirs.fileno(), *rings)
    child = subprocess.Popen(  # noqa: ASYNC220 - it does not wait
        [sys.executable, "-m", "load_tests.bench_engine", "--child", *map(str, (callers, requests, *given))],
        pass_fds=given,
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    link = Link(1, channel, hub, owner)
    channel.open(link)
    while not registry.statistics_of("m")[0].statistics.execution_count:  # noqa: ASYNC110 - the child is starting
        await asyncio.sleep(0.01)
    spare_garbage_collector()
    before, begun = time.process_time(), time.perf_counter()
    done_before = registry.statistics_of("m")[0].statistics
    rows_before, batches_before = done_before.inference_count, done_before.execution_count
    await owner.gone.wait()
    cpu_s, wall_s = time.process_time() - before, time.perf_counter() - begun
    done = registry.statistics_of("m")[0].statistics
    rows, batches = done.inference_count - rows_before, done.execution_count - batches_before
    output, _ = child.communicate()
    await registry.stop(1.0)
    for each in rings:
        os.close(each)
    return (
        f"| {callers} | {rows / wall_s:,.0f} | {rows / batches:.1f} | {cpu_s / rows * 1e6:.1f} "
        f"| {float(output) * 1e6:.1f} |"
    )


async def front_end(callers: int, requests: int, descriptors: list[int]) -> None:
    """Ask, from this process; prints CPU seconds per request."""
    connection, outbox, inbox = descriptors
    channel = Channel(socket.socket(fileno=connection), Inbox(inbox), Outbox(outbox))
    remote = RemoteEngine(channel, Metrics(), OFF, lambda: None)
    channel.open(remote)
    await channel.call("joined")
    spare_garbage_collector()
    row = {"x": np.random.default_rng(0).random((1, FLOATS), np.float32)}
    left = requests

    async def ask() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            handle = remote.acquire(ModelRef("m"))
            await handle.submit(SIGNATURE, row, time.monotonic() + 30.0)
            handle.release()

    begun = resource.getrusage(resource.RUSAGE_SELF)
    await asyncio.gather(*(ask() for _ in range(callers)))
    ended = resource.getrusage(resource.RUSAGE_SELF)
    print((ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime) / requests)
    channel.close()


def main() -> None:
    """Print the table, or be the front end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--child", type=int, nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if given.child:
            callers, requests, *descriptors = given.child
            runner.run(front_end(callers, requests, descriptors))
            return
        print("| callers | requests/s | rows per batch | engine, CPU µs | front end, CPU µs |\n|---|---|---|---|---|")
        for callers in (1, 16, 64, 256):
            print(runner.run(engine(callers, given.requests // (4 if callers == 1 else 1))), flush=True)


if __name__ == "__main__":
    main()
