"""Ways to batch on the real server: ``python -m load_tests.live [--slo-ms 60] [--seconds 20] [--repeat 5]``.

The simulator's Poisson and bursty traces are replayed open-loop, over REST with binary tensors, at servers that differ
in nothing but how they batch: not at all, by a largest batch and a wait (a grid, of which the best point for each
trace counts, chosen after the fact), and by `slo_ms`. The runs take turns; each has a server of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from load_tests.bench import machine
from load_tests.fleet import Served, markdown, prepare, serving, spread, tell
from load_tests.traces import bursty, poisson
from service.bench.asked import read_signature
from service.bench.clients import closed_loop_rate
from service.bench.driving import Times, Trial, drive, measure
from service.bench.requests import made_up, open_client
from service.bench.wire import PROTOCOLS

_HERE = Path(__file__).parent
_PROTOCOL = "rest-v2-binary"
_TRACES = {"poisson 0.8": (poisson, 0.8), "bursty 0.6": (bursty, 0.6)}
"""As the simulator's, with the mean rate as a share of what the server does when it is asked without pause."""
_CALLERS = 64
_NONE, _GRID, _GOAL = "none", "fixed, best of grid", "Kiln, slo_ms"


@dataclass(frozen=True)
class Point:
    """One way to batch: flags of the server, and the model's config."""

    way: str
    settings: tuple[str, ...] = ()
    slo_ms: float | None = None

    @property
    def name(self) -> str:
        return " ".join((self.way, *self.settings))


def points(slo_ms: float, most_rows: int) -> list[Point]:
    """What is compared; `most_rows` is the largest batch that the model gains from."""
    grid = [
        Point(_GRID, ("--max-batch-rows", str(rows), "--batch-wait-ms", f"{wait_ms:g}"))
        for rows in (max(most_rows // 4, 2), most_rows)
        for wait_ms in (0.0, 0.1 * slo_ms)
    ]
    return [Point(_NONE, ("--max-batch-rows", "1")), *grid, Point(_GOAL, slo_ms=slo_ms)]


async def capacity(server: Served) -> float:
    """Answers a second that the server gives to callers who ask without pause."""
    client = open_client(server.address, _PROTOCOL, await _requests(server))
    try:
        await closed_loop_rate(client, 2.0, _CALLERS)
        return await closed_loop_rate(client, 4.0, _CALLERS)
    finally:
        await client.close()


async def replay(server: Served, due: Times, slo_s: float) -> Trial:
    """Send a trace, and see what came of it."""
    client = open_client(server.address, _PROTOCOL, await _requests(server))
    try:
        for number in range(50):
            await client.send(number)
        record = await drive(due, client.send, patience_s=10.0)
    finally:
        await client.close()
    return measure(record, len(due) / float(due[-1]), slo_s, driver_cores=0.0, planned=len(due))


async def _requests(server: Served) -> list[bytes]:
    signature = await asyncio.to_thread(read_signature, server.address, server.model)
    inputs = await made_up(server.address, server.model, signature, 1)
    return [PROTOCOLS[_PROTOCOL].build(server.model, signature, each) for each in inputs]


Found = dict[str, dict[str, list[Trial]]]
"""By trace and point: a trial for each repeat."""


def best_of_ways(found: Mapping[str, Mapping[str, Sequence[Trial]]], tried: Sequence[Point]) -> Found:
    """By trace and way: the trials of its point with the highest median goodput."""
    best: Found = {}
    for trace, by_point in found.items():
        best[trace] = {}
        for way in dict.fromkeys(point.way for point in tried):
            names = [point.name for point in tried if point.way == way]
            name = max(
                names, key=lambda name: sorted(t.in_time_per_s for t in by_point[name])[len(by_point[name]) // 2]
            )
            best[trace][way] = list(by_point[name])
    return best


def table(best: Mapping[str, Mapping[str, Sequence[Trial]]]) -> str:
    """Least / median / most of the repeats."""
    heads = ("trace", "way to batch", "offered/s", "goodput/s", "p50 ms", "p99 ms", "refused")
    rows = [
        (
            trace, way, f"{trials[0].offered_per_s:,.0f}", spread([t.in_time_per_s for t in trials]),
            _ms([t.p50_ms for t in trials]), _ms([t.p99_of_answered_ms for t in trials]),
            spread([100 * t.refused / max(t.ok + t.refused, 1) for t in trials], 1) + " %",
        )
        for trace, ways in best.items() for way, trials in ways.items()
    ]  # fmt: skip
    return markdown(heads, rows)


def _ms(values: Sequence[float | None]) -> str:
    return spread([float("inf") if value is None else value for value in values], 1)


def main(arguments: Iterable[str] | None = None) -> int:
    """Replay, print, write; returns 1 if `slo_ms` is behind the best point of the grid on a trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mobilenet", help="one of the bench's models (default: %(default)s)")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="the goal (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each trace (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="largest batch of the grid (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write all figures there as JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="put the table between FILE's marks, too")
    options = parser.parse_args(None if arguments is None else list(arguments))
    tried = points(options.slo_ms, options.rows)
    with tempfile.TemporaryDirectory() as folder:
        found = _rounds(Path(folder), tried, options)
    best = best_of_ways(found, tried)
    text = f"{table(best)}\n\n`{options.model}`, goal {options.slo_ms:g} ms. {machine()}"
    trials = {trace: {name: [asdict(t) for t in each] for name, each in by.items()} for trace, by in found.items()}
    tell(options, "live", text, {"seconds": options.seconds, "trials": trials})
    behind = [
        trace for trace, ways in best.items()
        if _median_goodput(ways[_GOAL]) < 0.99 * _median_goodput(ways[_GRID])
    ]  # fmt: skip
    if behind:
        print(f"behind the best point of the grid: {', '.join(behind)}")
    return int(bool(behind))


def _median_goodput(trials: Sequence[Trial]) -> float:
    return sorted(trial.in_time_per_s for trial in trials)[len(trials) // 2]


def _rounds(work: Path, tried: Sequence[Point], options: argparse.Namespace) -> Found:
    """The points in turn, as often as is wanted, each with the same arrivals."""
    import uvloop

    prepare(work, options.model, [(), *(point.settings for point in tried)])
    with serving(work, options.model, {}) as server:
        rate = uvloop.run(capacity(server))
    dues = {name: trace(load * rate, options.seconds, 1) for name, (trace, load) in _TRACES.items()}
    found: Found = {name: {point.name: [] for point in tried} for name in _TRACES}
    for _ in range(options.repeat):
        for point in tried:
            config = {} if point.slo_ms is None else {"slo_ms": point.slo_ms}
            with serving(work, options.model, config, point.settings) as server:
                for name, due in dues.items():
                    found[name][point.name].append(uvloop.run(replay(server, due, options.slo_ms / 1e3)))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
