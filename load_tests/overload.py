"""Ten times what a server can do: ``python -m load_tests.overload [--minutes 1] [--times 10] [--repeat 1]``.

First the peak of goodput within the goal is found (`service.bench`), then so many times of it are offered, open-loop,
and after that a tenth of the peak. Told are goodput over peak, p99 of what was answered, the server's memory over time,
and when the last late answer or refusal of the low rate was due: that is how long the recovery took.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from load_tests.bench import machine
from load_tests.fleet import Served, markdown, prepare, serving, spread, tell
from service.bench.asked import read_signature
from service.bench.bench import Asking
from service.bench.clients import Answer, Client, closed_loop_rate
from service.bench.driving import Record, arrivals, drive
from service.bench.requests import made_up, open_client
from service.bench.search import Search
from service.bench.wire import PROTOCOLS

_HERE = Path(__file__).parent
_ABOVE = (0.9, 1.0, 1.2, 1.5)
"""Shares of the capacity at which the peak of goodput is looked for."""
_LOW = 0.1
_AFTER_S = 10.0
_SAMPLE_S = 0.5
_PROTOCOL = "rest-v2-binary"


@dataclass(frozen=True)
class Outcome:
    """What came of one run; rates are a second, `memory_mib` is the server's by time since the begin, in order.

    `recovery_s` is from the end of the overload to when the last request was due that was not answered within the
    goal; 0 if all were.
    """

    peak_per_s: float
    offered_per_s: float
    goodput_per_s: float
    accepted_p99_ms: float
    refused_share: float
    failed: int
    driver_late_p99_ms: float
    memory_mib: list[tuple[float, float]]
    recovery_s: float

    @property
    def goodput_share(self) -> float:
        return self.goodput_per_s / self.peak_per_s

    @property
    def memory_growth(self) -> float:
        """The last fifth's median over that of the second fifth: the first one fills pools and queues."""
        values = [mib for _, mib in self.memory_mib]
        fifth = max(len(values) // 5, 1)
        return float(np.median(values[-fifth:]) / np.median(values[fifth : 2 * fifth] or values))


def judge(
    record: Record, *, peak_per_s: float, end_s: float, slo_s: float, memory: list[tuple[float, float]]
) -> Outcome:
    """What a record says whose overload lasts until `end_s`, and whose low rate comes after it."""
    due, sent, done = (np.array(times) for times in (record.due, record.sent, record.done))
    is_ok = np.array([answer is Answer.OK for answer in record.answers], bool)
    in_time = is_ok & (done - due <= slo_s)
    during = due < end_s
    refused = np.array([answer is Answer.REFUSED for answer in record.answers], bool)
    missed_after = due[~during & ~in_time]
    accepted = (done - due)[during & is_ok]
    return Outcome(
        peak_per_s=peak_per_s,
        offered_per_s=int(during.sum()) / end_s,
        goodput_per_s=int((during & in_time).sum()) / end_s,
        accepted_p99_ms=float(np.percentile(accepted, 99) * 1e3) if len(accepted) else float("nan"),
        refused_share=float((during & refused).sum() / max(during.sum(), 1)),
        failed=sum(answer in (Answer.FAILED, Answer.UNANSWERED) for answer in record.answers),
        driver_late_p99_ms=float(np.percentile(sent - due, 99) * 1e3),
        memory_mib=memory,
        recovery_s=float(missed_after.max() - end_s) if len(missed_after) else 0.0,
    )


async def run(
    server: Served, *, slo_s: float, seconds: float, times: float, rows: int = 1, trial_s: float = 5.0
) -> Outcome:
    """Find the peak by trials of `trial_s`, offer `times` as much for `seconds`, then little.

    A request has `rows` rows.
    """
    signature = await asyncio.to_thread(read_signature, server.address, server.model)
    inputs = await made_up(server.address, server.model, signature, rows)
    build = PROTOCOLS[_PROTOCOL].build
    client = open_client(server.address, _PROTOCOL, [build(server.model, signature, each) for each in inputs])
    try:
        peak = await _peak(Asking(server.address, server.model, _PROTOCOL, client, slo_s, trial_s))
        low = seconds + arrivals(peak * _LOW, _AFTER_S)
        due = np.concatenate([arrivals(peak * times, seconds), low])
        record, memory = await _watched(server.process, due, client)
    finally:
        await client.close()
    return judge(record, peak_per_s=peak, end_s=seconds, slo_s=slo_s, memory=memory)


async def _peak(asking: Asking) -> float:
    """The most answers within the goal, a second, of all rates about the capacity."""
    search = Search(0.5 * await closed_loop_rate(asking.client, 2.0), least=1.0)
    goodput = [1e-9]
    while (rate := search.next_rate()) is not None:
        trial = (await asking.trial(rate)).trial
        search.tell(held=trial.holds)
        goodput += [trial.in_time_per_s] if not trial.cut_short else []
    for share in _ABOVE:
        goodput.append((await asking.trial(share * max(search.low, 1.0), patient=True)).trial.in_time_per_s)
    return max(goodput)


async def _watched(
    process: psutil.Process, due: np.ndarray[tuple[int, ...], np.dtype[np.float64]], client: Client
) -> tuple[Record, list[tuple[float, float]]]:
    """Drive, and look at the process's memory meanwhile."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    memory: list[tuple[float, float]] = []

    async def sample() -> None:
        while True:
            memory.append((loop.time() - start, process.memory_info().rss / 2**20))
            await asyncio.sleep(_SAMPLE_S)

    sampling = asyncio.create_task(sample())
    try:
        return await drive(due, client.send, patience_s=30.0), memory
    finally:
        sampling.cancel()


def table(outcomes: Sequence[Outcome], model: str, slo_ms: float, rows: int = 1) -> str:
    """Least / median / most of the runs."""
    heads = ("model", "rows", "goal ms",
             "peak/s", "offered/s", "goodput/s", "goodput ÷ peak", "p99 of accepted, ms", "refused",
             "memory, last ÷ first", "recovery s")  # fmt: skip
    row = (
        model, f"{rows}", f"{slo_ms:g}",
        spread([o.peak_per_s for o in outcomes]), spread([o.offered_per_s for o in outcomes]),
        spread([o.goodput_per_s for o in outcomes]), spread([o.goodput_share for o in outcomes], 2),
        spread([o.accepted_p99_ms for o in outcomes], 1), f"{np.median([o.refused_share for o in outcomes]):.1%}",
        spread([o.memory_growth for o in outcomes], 3), spread([o.recovery_s for o in outcomes], 2),
    )  # fmt: skip
    return markdown(heads, [row])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; returns 1 where a request failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="five_ms", help="one of the bench's models (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="of a request (default: %(default)s)")
    parser.add_argument("--slo-ms", type=float, default=150.0, help="its goal (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of overload (default: %(default)s)")
    parser.add_argument("--times", type=float, default=10.0, help="the peak, offered (default: %(default)s)")
    parser.add_argument("--trial-s", type=float, default=5.0, help="of each trial for the peak (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="runs, of one server (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all figures there as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="put the table between FILE's marks, too")
    options = parser.parse_args(None if arguments is None else list(arguments))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.model)
        with serving(Path(folder), options.model, {"slo_ms": options.slo_ms}) as server:
            outcomes = [_one(server, options) for _ in range(options.repeat)]
    found = table(outcomes, options.model, options.slo_ms, options.rows)
    text = f"{found}\n\n{options.minutes:g} min of overload. {machine()}"
    tell(options, "overload", text, {"minutes": options.minutes, "runs": [asdict(o) for o in outcomes]})
    return int(any(outcome.failed for outcome in outcomes))


def _one(server: Served, options: argparse.Namespace) -> Outcome:
    import uvloop

    return uvloop.run(
        run(
            server,
            slo_s=options.slo_ms / 1e3,
            seconds=options.minutes * 60,
            times=options.times,
            rows=options.rows,
            trial_s=options.trial_s,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
