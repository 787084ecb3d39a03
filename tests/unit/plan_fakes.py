"""Plans that are fakes, and the machine that they run on."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from service.errors import Internal
from service.runtime.base import Plan, PlanUnavailable, Run
from service.runtime.parity import STRICT, Tolerance
from service.runtime.planner import Candidate
from service.runtime.records import Difference, Measured
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec

X, Y = TensorSpec("x", DataType.FP32, (None, 3)), TensorSpec("y", DataType.FP32, (None, 3))
BATCHED = Signature("serving_default", (X,), (Y,))
OPEN = Signature(
    "open", (TensorSpec("x", DataType.FP32, (None, None)),), (TensorSpec("y", DataType.FP32, (None, None)),)
)


class Machine:
    """Where fake plans run: a clock that moves as they say, in place of a module's `time`."""

    def __init__(self) -> None:
        self.now = 50.0
        self.cpu = 0.0
        self._lock = threading.Lock()

    monotonic = perf_counter = lambda self: self.now

    def process_time(self) -> float:
        return self.cpu

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float, threads: float = 1.0) -> None:
        with self._lock:
            self.now += seconds
            self.cpu += seconds * threads


class FakePlan:
    """Doubles ``x``; `seconds` per batch are given by its rows, on `threads` threads."""

    pads = False

    def __init__(
        self, machine: Machine, name: str, seconds: float | dict[int, float] = 0.01, threads: float = 1.0
    ) -> None:
        self.name = name
        self.machine, self.seconds, self.threads = machine, seconds, threads
        self.answer: Callable[[Array], Array] = lambda x: x + x
        self.batches: list[Tensors] = []
        self.prepared: list[int] = []
        self.unavailable_from = 1 << 30
        self.closed = 0

    def prepare(self, rows: int) -> Run:
        if rows >= self.unavailable_from:
            raise PlanUnavailable(f"not for {rows} rows")
        self.prepared.append(rows)
        return self.run

    def run(self, inputs: Tensors) -> Tensors:
        self.batches.append(inputs)
        rows = len(inputs["x"]) if inputs["x"].ndim else 1
        self.machine.work(self.seconds[rows] if isinstance(self.seconds, dict) else self.seconds, self.threads)
        return {"y": self.answer(inputs["x"])}

    def close(self) -> None:
        self.closed += 1


def offer(plan: Plan, tolerance: Tolerance = STRICT) -> Candidate:
    """The candidate that builds `plan`."""
    return Candidate(plan.name, lambda: plan, tolerance)


def failing_after(runs: int) -> Callable[[Array], Array]:
    """An answer that fails once it has been given `runs` times."""
    left = iter(range(runs))

    def answer(x: Array) -> Array:
        if next(left, None) is None:
            raise Internal("out of memory")
        return x + x

    return answer


def changing(first: float = 0.0) -> Callable[[Array], Array]:
    """An answer that is another one each time."""
    runs = iter(np.arange(first, 1e6, dtype=np.float32))
    return lambda x: x + next(runs)


def measured(plan: str, rows: int, seconds: float, cpu_s: float | None = None) -> Measured:
    """What was measured of a plan that works in one thread, where nothing else is said."""
    return Measured(plan, rows, seconds, seconds if cpu_s is None else cpu_s, Difference(), 0.0, 0)
