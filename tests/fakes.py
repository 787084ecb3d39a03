"""Stand-ins for what is slow, random or far: a clock, a model, a runner, an observer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from service.batching.queue import Lane
from service.runtime.memory import MemoryUse
from service.runtime.records import SignatureRecord
from service.tensors import DataType, Signature, Tensors, TensorSpec

DOUBLE = Signature(
    "serving_default",
    (TensorSpec("x", DataType.FP32, (None, 3), "x:0"),),
    (TensorSpec("y", DataType.FP32, (None, 3), "y:0"),),
)
"""Twice its input."""


def rows(*values: float) -> Tensors:
    """Inputs for `DOUBLE`: one row of three equal numbers for each value."""
    return {"x": np.array([[value] * 3 for value in values], np.float32)}


class FakeClock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeModel:
    """Doubles its inputs; can refuse rows, answer with too many rows, and block until released.

    Every run is kept in `batches`: the rows it was given, in order.
    """

    device = "CPU:0"
    devices: tuple[str, ...] = ("CPU:0",)
    parallel = 1
    needs_planning = False
    is_planned = True
    is_known = False

    def __init__(self, signatures: Mapping[str, Signature] | None = None) -> None:
        self.memory: dict[str, MemoryUse] = {}
        self.plans: dict[str, SignatureRecord] = {}
        self.best_rows = 0
        """Most rows of a batch, 0 for no bound of its own."""
        self.left_out: dict[str, str] = {}
        self.signatures: dict[str, Signature] = dict(signatures or {"serving_default": DOUBLE})
        self.batches: list[Tensors] = []
        self.poison: float | None = None
        """A batch with this number in it fails."""
        self.error: Exception = ValueError("poisoned")
        self.surplus_rows = 0
        self.bucket: int | None = None
        self.seconds = float("inf")
        self.released = threading.Event()
        self.released.set()
        self.entered = threading.Semaphore(0)
        """Released once for every run that begins."""
        self.closed = False

    def block(self) -> None:
        """From now on a run waits for `unblock`."""
        self.released.clear()

    def unblock(self) -> None:
        self.released.set()

    def bucket_rows(self, lane: Lane, rows: int) -> int:
        return max(rows, self.bucket or rows)

    def expected_s(self, lane: Lane, rows: int) -> float:
        return self.seconds

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        self.batches.append(inputs)
        self.entered.release()
        assert self.released.wait(30), "nobody unblocked the model"
        if self.poison is not None and any(np.any(array == self.poison) for array in inputs.values()):
            raise self.error
        outputs = {}
        for source, target in zip(lane.signature.inputs, lane.signature.outputs, strict=True):
            array = inputs[source.name]
            doubled = array + array if array.dtype.kind != "b" else array
            if self.surplus_rows:
                doubled = np.concatenate([doubled, doubled[: self.surplus_rows]])
            outputs[target.name] = doubled
        return outputs

    def most_rows(self, signature: str) -> int:
        return self.best_rows or 1 << 30

    def warm_up(self) -> dict[str, SignatureRecord]:
        return self.plans

    def plan(self, tell: Callable[[str], None] = lambda line: None) -> bool:
        return False

    def cancel_planning(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class FakeRunner:
    """A `Runner` whose jobs run when the test says so."""

    def __init__(self, parallel: int = 1) -> None:
        self.parallel = parallel
        self.jobs: list[tuple[Callable[[], Any], Callable[[Any], None]]] = []
        self.closed = False

    def widen(self, parallel: int) -> None:
        self.parallel = max(self.parallel, parallel)

    def start(self, job: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.jobs.append((job, done))

    def close(self) -> None:
        self.closed = True

    def run_next(self, position: int = 0) -> None:
        """Run the oldest job, or the one at `position`, and report its result."""
        job, done = self.jobs.pop(position)
        result: Any
        try:
            result = job()
        except Exception as error:  # noqa: BLE001 - as `ThreadRunner` does
            result = error
        done(result)


class FakeObserver:
    """Keeps what a batcher reports."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.runs: list[int] = []
        self.failures = 0
        self.device_s = 0.0
        self.drops: dict[str, int] = {}

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def executed(self, rows: int, given: int, seconds: float) -> None:
        self.runs.append(rows)

    def failed(self) -> None:
        self.failures += 1

    def used(self, device_s: float) -> None:
        self.device_s += device_s

    def dropped(self, reason: str, count: int) -> None:
        if count:
            self.drops[reason] = self.drops.get(reason, 0) + count


class FakeReply:
    """An entry's slot, without an event loop."""

    def __init__(self) -> None:
        self.result: Any = None
        self.exception: BaseException | None = None
        self._done = False

    def done(self) -> bool:
        return self._done

    def set_result(self, result: Any, /) -> None:
        self._done, self.result = True, result

    def set_exception(self, exception: BaseException, /) -> None:
        self._done, self.exception = True, exception

    def cancel(self) -> None:
        self._done = True
