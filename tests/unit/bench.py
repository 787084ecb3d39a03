"""A batcher on a bench: its clock, its runner and the event loop's timers move when the test says so."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from service.batching.batcher import Batcher
from service.batching.queue import Limits
from service.tensors import DataType, Signature, Tensors, TensorSpec
from tests.fakes import DOUBLE, FakeClock, FakeModel, FakeObserver, FakeRunner, rows

LIMITS = Limits(max_batch_rows=4, max_queue_rows=16, max_queue_bytes=1 << 20)
TWO_D = Signature(
    "images",
    (TensorSpec("x", DataType.FP32, (None, 2, 2)),),
    (TensorSpec("y", DataType.FP32, (None, 2, 2)),),
    takes_other_shapes=True,
)
"""Its graph may be tried with other shapes."""
_TURNS = 32
"""Turns of the loop in which whatever is ready has run."""


class Bench:
    """`Batcher` among fakes; to be made inside a running event loop, whose clock becomes `clock`."""

    def __init__(self, limits: Limits = LIMITS, *, split_oversize: bool = True, parallel: int = 1) -> None:
        self.clock = FakeClock()
        self.model = FakeModel()
        self.runner = FakeRunner(parallel)
        self.observer = FakeObserver()
        self.batcher = Batcher(
            self.model,
            limits,
            runner=self.runner,
            observer=self.observer,
            split_oversize=split_oversize,
            clock=self.clock,
        )
        loop: Any = asyncio.get_running_loop()
        loop.time = self.clock

    def submit(
        self,
        *values: float,
        deadline: float | None = None,
        priority: int = 0,
        signature: Signature = DOUBLE,
        inputs: Tensors | None = None,
    ) -> asyncio.Future[Tensors]:
        """Submit a row of three equal numbers for each of `values`, or `inputs`."""
        given = rows(*values) if inputs is None else inputs
        return asyncio.ensure_future(self.batcher.submit(signature, given, deadline, None, priority))

    async def turn(self) -> None:
        """Let the event loop do whatever is ready."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    async def advance(self, seconds: float) -> None:
        """Move time, and let the timers that are due do their work."""
        self.clock.advance(seconds)
        await self.turn()

    async def run(self, count: int = 1) -> None:
        """Let the runner run `count` batches."""
        for _ in range(count):
            await self.turn()
            self.runner.run_next()
        await self.turn()

    async def run_all(self) -> None:
        """Let the runner run until it has nothing to do."""
        await self.turn()
        while self.runner.jobs:
            await self.run()

    def ran(self) -> list[list[float]]:
        """The first number of each row of each batch that the model was given."""
        return [[float(row.flat[0]) for row in next(iter(batch.values()))] for batch in self.model.batches]


def firsts(outputs: Tensors) -> list[float]:
    """The first number of each row of an answer."""
    (array,) = outputs.values()
    return [float(x) for x in np.asarray(array)[:, 0]]
