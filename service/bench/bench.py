"""The bench itself: for each protocol a search for the highest rate that holds the goal, one trial after another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.bench.asked import Address, Counters, metrics_page, parse_counters, parse_goal_ms, read_signature, share
from service.bench.clients import Client, closed_loop_rate
from service.bench.driving import IN_TIME_SHARE, Misses, arrivals, drive, measure
from service.bench.progress import Progress
from service.bench.report import Capacity, Measured, Report, driver_is_late, limit_of, trial_line
from service.bench.requests import made_up, open_client, read_records
from service.bench.search import Search
from service.bench.wire import PROTOCOLS
from service.errors import KilnError, Unavailable
from service.tensors import Signature, Tensors

DEFAULT_GOAL_MS = 50.0
"""For a model without `slo_ms`."""
_LEAST_REQUESTS = 5
"""In a trial, at the lowest rate; of so few p99 is the longest."""
_LOOK_S = 1.0
"""How long the closed loop runs that tells where the search begins."""
_START_SHARE = 0.5
"""Of what the closed loop got."""
_SETTLE = 20
"""Requests one after another before each trial, so that what waits of the last one is gone."""
_PATIENCE_S = 1.0
"""How long answers are waited for after a trial, or twice the goal if that is longer."""


@dataclass(frozen=True)
class Wanted:
    """What is to be found out; `slo_ms` None is the model's own goal. `records` is a file with requests."""

    model: str
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    slo_ms: float | None = None
    seconds: float = 5.0
    rows: int = 1
    records: Path | None = None


@dataclass(frozen=True)
class Asking:
    """One protocol of one server, by an open client."""

    address: Address
    model: str
    protocol: str
    client: Client
    slo_s: float
    seconds: float

    async def trial(self, rate_per_s: float, seed: int = 1, *, patient: bool = False) -> Measured:
        """Offer a rate for `seconds`; a trial that is `patient` is not cut short once the goal is missed."""
        for number in range(_SETTLE):
            await self.client.send(number)
        due = arrivals(rate_per_s, self.seconds, seed)
        misses = None if patient else Misses(self.slo_s, len(due) * (1 - IN_TIME_SHARE))
        before = await self._counters()
        start, cpu_s = time.monotonic(), time.process_time()
        record = await drive(due, self.client.send, patience_s=max(_PATIENCE_S, 2 * self.slo_s), hopeless=misses)
        seconds, cpu_s = time.monotonic() - start, time.process_time() - cpu_s
        after = await self._counters()
        trial = measure(record, rate_per_s, self.slo_s, driver_cores=cpu_s / seconds, planned=len(due))
        server = share(before, after, seconds) if before is not None and after is not None else None
        return Measured(trial, server)

    async def _counters(self) -> Counters | None:
        page = await asyncio.to_thread(metrics_page, self.address)
        return parse_counters(page, self.model, PROTOCOLS[self.protocol].label)


async def bench(address: Address, wanted: Wanted, report: Report, progress: Progress) -> None:
    """Find the capacity of each protocol, one after another; `report` has at any time what is known by then.

    Raises:
        KilnError: the server, the model or its inputs cannot be had; what goes wrong with one protocol is its `error`.
    """
    signature = await asyncio.to_thread(read_signature, address, wanted.model)
    if wanted.records is None:
        inputs = await made_up(address, wanted.model, signature, wanted.rows)
    else:
        inputs = await asyncio.to_thread(read_records, wanted.records, signature)
    for place, protocol in enumerate(wanted.protocols):
        capacity = Capacity(protocol)
        report.protocols.append(capacity)
        shares = (place / len(wanted.protocols), 1 / len(wanted.protocols))
        try:
            await _find(address, wanted, report, capacity, _Told(progress, shares), _Questions(signature, inputs))
        except (KilnError, ValueError) as error:
            capacity.error = str(error)
        capacity.is_final = True
        if capacity.error:
            progress.tell(f"{protocol}: {capacity.error}")
    progress.end()


def goal_ms(address: Address, wanted: Wanted) -> float:
    """The goal that is asked for, else the model's own, else `DEFAULT_GOAL_MS`; in ms.

    Raises:
        Unavailable: no server answers there.
    """
    if wanted.slo_ms is not None:
        return wanted.slo_ms
    return parse_goal_ms(metrics_page(address), wanted.model) or DEFAULT_GOAL_MS


@dataclass(frozen=True)
class _Told:
    progress: Progress
    shares: tuple[float, float]
    """Where the protocol begins on the whole bar, and how much of it it takes."""

    def bar(self, share_of_it: float, text: str) -> None:
        self.progress.bar(self.shares[0] + self.shares[1] * share_of_it, text)


@dataclass(frozen=True)
class _Questions:
    signature: Signature
    inputs: Sequence[Tensors]

    def of(self, protocol: str, model: str) -> list[bytes]:
        return [PROTOCOLS[protocol].build(model, self.signature, each) for each in self.inputs]


async def _find(
    address: Address, wanted: Wanted, report: Report, capacity: Capacity, told: _Told, questions: _Questions
) -> None:
    """Fill in `capacity`.

    Raises:
        KilnError: the protocol cannot carry the inputs, or its first request is not answered.
    """
    protocol = capacity.protocol
    told.bar(0.0, f"{protocol}: looking where to begin")
    client = open_client(address, protocol, questions.of(protocol, wanted.model))
    try:
        about = await closed_loop_rate(client, _LOOK_S)
        if not about:
            raise Unavailable(f"the first requests were not answered: {client.error}")
        asking = Asking(address, wanted.model, protocol, client, report.slo_ms / 1e3, wanted.seconds)
        search = Search(about * _START_SHARE, least=_LEAST_REQUESTS / wanted.seconds)
        while (rate := search.next_rate()) is not None:
            told.bar(search.progress, f"{protocol}: {rate:,.0f} requests/s")
            measured = await asking.trial(rate, seed=search.trials + 1)
            capacity.trials.append(measured)
            search.tell(held=measured.trial.holds)
            capacity.per_s = search.low or None
            told.progress.tell(trial_line(protocol, measured))
    finally:
        await client.close()
    conclude(capacity, report.slo_ms)


def conclude(capacity: Capacity, slo_ms: float) -> None:
    """Say why the next rate up did not hold, and what is wrong where none did."""
    failed = [each.trial for each in capacity.trials if not each.trial.holds]
    above = [trial for trial in failed if capacity.per_s is None or trial.rate_per_s > capacity.per_s]
    if above:
        capacity.limit = limit_of(min(above, key=lambda trial: trial.rate_per_s), slo_ms)
    if capacity.per_s is not None or not failed:
        return
    lowest = min(trial.rate_per_s for trial in failed)
    known = [trial.p99_ms for trial in failed if trial.p99_ms is not None]
    seen = f"the lowest p99 seen is {min(known):,.2f} ms" if known else "requests were refused or not answered"
    failures = max(trial.failed for trial in failed)
    because = f"; up to {failures:,} requests of a trial failed" if failures else ""
    if any(driver_is_late(trial, slo_ms) for trial in failed):
        because += f"; the driver itself was late by up to {max(t.late_p99_ms for t in failed):,.2f} ms (p99)"
    capacity.error = f"{slo_ms:g} ms are not kept even at {lowest:,.1f} requests/s, the lowest tried; {seen}{because}"
