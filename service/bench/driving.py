"""Open loop: requests are sent when they are due, whatever has become of those before, and what came of it is measured.

A request's latency counts from the moment it was due, so that what waits, here or there, is not left out: a closed loop
stops asking while the server stalls, and so hides the stall from its percentiles (coordinated omission).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from service.bench.clients import Answer

Times = npt.NDArray[np.float64]
Send = Callable[[int], Awaitable[Answer]]
"""Sends the request of that number, and waits for its answer."""
IN_TIME_SHARE = 0.99
"""The goal is one for p99."""


@dataclass
class Record:
    """When each request was due, was sent and was answered, in seconds, and what became of it."""

    due: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def arrivals(rate_per_s: float, seconds: float, seed: int = 1) -> Times:
    """Of independent callers (Poisson), in seconds from the start, in order."""
    rng = np.random.default_rng([seed, 0])
    return np.sort(rng.uniform(0.0, seconds, max(round(rate_per_s * seconds), 1)))


async def drive(
    due: Times,
    send: Send,
    *,
    patience_s: float | None = None,
    hopeless: Callable[[Record], bool] | None = None,
) -> Record:
    """Send each request when it is due, in seconds from now by the loop's clock, and wait for the answers.

    After the last one was sent answers are waited for `patience_s` (None: until all are there); what has none is
    given up as UNANSWERED. Nothing more is sent once `hopeless` says so. What `send` raises is raised at the end.
    """
    loop = asyncio.get_running_loop()
    start = loop.time()
    record = Record()
    under_way: set[asyncio.Task[None]] = set()
    errors: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            errors.append(error)

    async def ask(number: int, due_s: float) -> None:
        sent, answer = loop.time() - start, Answer.UNANSWERED
        try:
            answer = await send(number)
        finally:
            record.due.append(due_s)
            record.sent.append(sent)
            record.done.append(loop.time() - start)
            record.answers.append(answer)

    try:
        for number, due_s in enumerate(due.tolist()):
            if hopeless is not None and hopeless(record):
                break
            while (ahead_s := start + due_s - loop.time()) > 0:  # noqa: ASYNC110 - time itself is waited for
                await asyncio.sleep(ahead_s)
            task = asyncio.create_task(ask(number, due_s))
            under_way.add(task)
            task.add_done_callback(ended)
        if under_way:
            await asyncio.wait(under_way, timeout=patience_s)
    finally:
        left = list(under_way)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    if errors:
        raise errors[0]
    return record


class Misses:
    """Whether more than `most` requests of a record were not answered within `slo_s`; looks at each once."""

    def __init__(self, slo_s: float, most: float) -> None:
        self._slo_s, self._most = slo_s, most
        self._seen = self._count = 0

    def __call__(self, record: Record) -> bool:
        for place in range(self._seen, len(record.done)):
            is_ok = record.answers[place] is Answer.OK
            self._count += not is_ok or record.done[place] - record.due[place] > self._slo_s
        self._seen = len(record.done)
        return self._count > self._most


@dataclass(frozen=True)
class Trial:
    """What came of one rate. Latencies are in ms, from when requests were due; None is a request without an answer.

    Percentiles are over all requests: one that was refused, failed or not answered is later than any other;
    `p99_of_answered_ms` leaves those out.
    `late_p99_ms` is how late the driver itself sent, `driver_cores` the CPU it used. With `cut_short` it was ended
    early because the goal was missed. `holds`: p99 is within the goal, and nothing failed.
    """

    rate_per_s: float
    offered_per_s: float
    in_time_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    p99_of_answered_ms: float | None
    ok: int
    refused: int
    failed: int
    unanswered: int
    late_p99_ms: float
    driver_cores: float
    cut_short: bool
    holds: bool


def measure(record: Record, rate_per_s: float, slo_s: float, *, driver_cores: float, planned: int) -> Trial:
    """Count what `drive` wrote down of `planned` requests."""
    due, sent, done = (np.array(times, float) for times in (record.due, record.sent, record.done))
    is_ok = np.array([answer is Answer.OK for answer in record.answers], bool)
    latencies = np.where(is_ok, done - due, math.inf)
    p50, p90, p99, most = (
        np.percentile(latencies, (50, 90, 99, 100), method="higher").tolist() if len(due) else (math.inf,) * 4
    )
    counts = {answer: record.answers.count(answer) for answer in Answer}
    seconds = max(float(due.max(initial=0.0)), len(due) / rate_per_s, 1e-9)
    return Trial(
        rate_per_s=rate_per_s,
        offered_per_s=len(due) / seconds,
        in_time_per_s=int(np.count_nonzero(latencies <= slo_s)) / seconds,
        p50_ms=_ms(p50),
        p90_ms=_ms(p90),
        p99_ms=_ms(p99),
        max_ms=_ms(most),
        p99_of_answered_ms=_ms(float(np.percentile(latencies[is_ok], 99))) if is_ok.any() else None,
        ok=counts[Answer.OK],
        refused=counts[Answer.REFUSED],
        failed=counts[Answer.FAILED],
        unanswered=counts[Answer.UNANSWERED],
        late_p99_ms=_ms(float(np.percentile(sent - due, 99))) or 0.0 if len(due) else 0.0,
        driver_cores=driver_cores,
        cut_short=len(due) < planned,
        holds=len(due) == planned and p99 <= slo_s and not counts[Answer.FAILED],
    )


def _ms(seconds: float) -> float | None:
    return round(max(seconds, 0.0) * 1e3, 4) if math.isfinite(seconds) else None
