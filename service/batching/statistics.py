"""What one version has done: counts and nanoseconds, as Triton's statistics extension has them.

Plain adds without a lock: it belongs to the event loop's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_MOST_SIZES = 1024
"""Batch sizes that are told apart: where requests are not fused, clients choose them."""


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something was done, and how long it took in all."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True)
class BatchSize:
    """All runs of batches of so many rows."""

    rows: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class Statistics:
    """Counts of one version.

    A request counts for each part that it was split into; every request of a batch counts the whole
    of the batch's run as its own time, as with Triton. Callers who left are in neither count.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds since the epoch."""
        self.last_inference_s = 0.0
        self.inference_count = 0
        self.execution_count = 0
        self._clock = clock
        self._requests = 0
        self._queue_ns = 0
        self._input_ns = 0
        self._infer_ns = 0
        self._output_ns = 0
        self._failed = 0
        self._failed_ns = 0
        self._sizes: dict[int, list[int]] = {}

    def executed(self, rows: int, requests: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One batch of `rows` rows has run; `queue_ns` is what its `requests` requests waited in all."""
        self.last_inference_s = self._clock()
        self.inference_count += rows
        self.execution_count += 1
        self._requests += requests
        self._queue_ns += queue_ns
        self._input_ns += requests * input_ns
        self._infer_ns += requests * infer_ns
        self._output_ns += requests * output_ns
        size = self._sizes.get(rows)
        if size is None:
            if len(self._sizes) >= _MOST_SIZES:
                return
            size = self._sizes[rows] = [0, 0, 0, 0]
        size[0] += 1
        size[1] += input_ns
        size[2] += infer_ns
        size[3] += output_ns

    def failed(self, requests: int = 1, ns: int = 0) -> None:
        """So many requests were refused by the queue, expired in it or failed in the model, after `ns` in all."""
        self._failed += requests
        self._failed_ns += ns

    @property
    def success(self) -> Duration:
        """Requests that were answered, from enqueued to cut out of the batch."""
        return Duration(self._requests, self._queue_ns + self._input_ns + self._infer_ns + self._output_ns)

    @property
    def fail(self) -> Duration:
        return Duration(self._failed, self._failed_ns)

    @property
    def queue(self) -> Duration:
        return Duration(self._requests, self._queue_ns)

    @property
    def compute_input(self) -> Duration:
        """Fusing the inputs."""
        return Duration(self._requests, self._input_ns)

    @property
    def compute_infer(self) -> Duration:
        """Running the plan."""
        return Duration(self._requests, self._infer_ns)

    @property
    def compute_output(self) -> Duration:
        """Cutting the outputs."""
        return Duration(self._requests, self._output_ns)

    @property
    def batches(self) -> list[BatchSize]:
        """By number of rows, the smallest first."""
        return [
            BatchSize(rows, Duration(count, input_ns), Duration(count, infer_ns), Duration(count, output_ns))
            for rows, (count, input_ns, infer_ns, output_ns) in sorted(self._sizes.items())
        ]


@dataclass(frozen=True)
class VersionStatistics:
    """Whose statistics they are, and the memory that it holds, in bytes by device (``CPU``, ``GPU:0``)."""

    model: str
    version: int
    statistics: Statistics
    memory_bytes: dict[str, int]
