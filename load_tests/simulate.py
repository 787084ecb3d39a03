"""The simulator: ``python -m load_tests.simulate [--slo-ms 150] [--seconds 20] [--seed 1] [--curve FILE]``.

Replays arrivals with a fake clock against a plan's curve, on Kiln's own queue, for several ways to batch.
Everything follows from the seed: the same call gives the same table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from load_tests.contenders import Aimd, Contender, Deferred, Fixed, Goal, Line
from load_tests.traces import Times, bursty, diurnal, heavy_tailed, poisson
from service.batching.queue import Entry, Lane
from service.batching.slo import SloPolicy
from service.errors import Overloaded
from service.tensors import DataType, Signature, TensorSpec

_HERE = Path(__file__).parent
_SPREAD = 0.08
"""Standard deviation of the logarithm of a run's time."""
_MOST_ARRIVALS = 60_000
"""A trace ends with these, so that one at ten times what can be run does not take ten times as long."""
_AS_GOOD = 0.99
"""The grid's best point is chosen after the fact, and Kiln keeps a tenth of the goal for what it does besides."""
_STALL_EVERY, _STALL = 500, 4.0
"""One run in so many takes so many times of its time: a collection of garbage, a neighbour on the core."""
_LOADS: Mapping[str, tuple[Callable[[float, float, int], Times], float]] = {
    "poisson 0.3": (poisson, 0.3),
    "poisson 0.8": (poisson, 0.8),
    "poisson 2": (poisson, 2.0),
    "poisson 10": (poisson, 10.0),
    "bursty 0.6": (bursty, 0.6),
    "diurnal 0.8": (diurnal, 0.8),
    "heavy-tailed 0.8": (heavy_tailed, 0.8),
}
"""Traces by name, with their mean rate as a share of the rows/s of the best batch."""
_SIGNATURE = Signature(
    "serving_default", (TensorSpec("x", DataType.FP32, (None, 1)),), (TensorSpec("y", DataType.FP32, (None, 1)),)
)
_LANE = Lane(_SIGNATURE, ((1,),), conforms=True, fuses=True)


class Curve:
    """Seconds of a batch by its rows, from those of a few sizes."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._rows = np.array(sorted(seconds), float)
        self._seconds = np.array([seconds[rows] for rows in sorted(seconds)])
        self.most_rows = max(seconds)

    def bucket_s(self, lane: Lane, rows: int) -> float:
        """What the plan measured: the seconds of the bucket that holds `rows`; infinite beyond the largest."""
        del lane
        place = int(np.searchsorted(self._rows, rows))
        return float(self._seconds[place]) if place < len(self._rows) else math.inf

    def true_s(self, rows: int) -> float:
        """What a batch takes on the average: between two sizes, between their times."""
        return float(np.interp(rows, self._rows, self._seconds))

    @property
    def best_rows_per_s(self) -> float:
        return float(np.max(self._rows / self._seconds))


class _Slot:
    """An entry's answer: nobody waits for it here."""

    def done(self) -> bool:
        return False

    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What came of one trace with one way to batch; latencies of what was answered, None where nothing was."""

    offered_per_s: float
    goodput_per_s: float
    answered: int
    refused: int
    p50_ms: float | None
    p99_ms: float | None
    batch_rows: float


def simulate(
    arrivals: Times, contender: Contender, curve: Curve, *, slo_s: float, seconds: float, seed: int
) -> Outcome:
    """Replay `arrivals`, each a request of one row, for a runner that runs one batch at a time."""
    noise = np.random.default_rng([seed, 3])
    queue = contender.queue
    slot = _Slot()
    latencies: list[float] = []
    running: list[Entry] = []
    batches = refused = place = 0
    ends, run_s = math.inf, 0.0
    times = arrivals.tolist()
    while place < len(times) or queue.rows or running:
        look = queue.next_look() if not running and queue.rows else None
        arrival = times[place] if place < len(times) else math.inf
        now = min(arrival, ends, math.inf if look is None else max(look, 0.0))
        if now == ends:
            latencies += [now - entry.enqueued for entry in running]
            contender.ended(len(running), run_s, now)
            running, ends = [], math.inf
        elif now == arrival:
            place += 1
            try:
                queue.offer([Entry(_LANE, {}, 1, 0, now, None, slot)])
            except Overloaded:
                refused += 1
        if not running and queue.rows:
            taken = queue.take(now)
            refused += len(taken.late)
            running = taken.entries
            if running:
                batches += 1
                stall = _STALL if noise.integers(_STALL_EVERY) == 0 else 1.0
                run_s = curve.true_s(len(running)) * float(noise.lognormal(0.0, _SPREAD)) * stall
                contender.begun(_LANE, len(running), now)
                ends = now + run_s
    return _outcome(len(times), latencies, refused, batches, slo_s, seconds)


def _outcome(offered: int, latencies: list[float], refused: int, batches: int, slo_s: float, seconds: float) -> Outcome:
    found = np.array(latencies)
    p50, p99 = (np.percentile(found, [50, 99]) * 1e3).tolist() if latencies else (None, None)
    in_time = int(np.count_nonzero(found <= slo_s))
    return Outcome(
        offered / seconds, in_time / seconds, len(latencies), refused, p50, p99, len(latencies) / max(batches, 1)
    )


def contenders(curve: Curve, slo_s: float) -> dict[str, Callable[[], list[Contender]]]:
    """By name: each makes the points to try, of which the best counts."""
    most = curve.most_rows
    rows = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size <= most]
    waits = [share * slo_s for share in (0.0, 0.05, 0.1, 0.2, 0.4)]

    def goal(policy: type[SloPolicy]) -> Contender:
        return Goal(policy(slo_s, curve.bucket_s, {_SIGNATURE.name: most}.__getitem__), most)

    def grid() -> list[Contender]:
        return [
            Fixed(size, wait_s, queue_rows)
            for size, wait_s in itertools.product(rows[-4:], waits)
            for queue_rows in (size, 2 * size, 4 * size, 4096)
        ]

    return {
        "none": lambda: [Fixed(1)],
        "fixed, best of grid": grid,
        "AIMD": lambda: [Aimd(most, slo_s, _SIGNATURE.name)],
        "line": lambda: [Line(most, slo_s)],
        "Kiln, no goal": lambda: [Fixed(most)],
        "Kiln, deferred": lambda: [goal(Deferred)],
        "Kiln, slo_ms": lambda: [goal(SloPolicy)],
    }


def compare(curve: Curve, *, slo_s: float, seconds: float, seed: int) -> dict[str, dict[str, Outcome]]:
    """By trace and way to batch; of several points the one with the most goodput, chosen after the fact."""
    table: dict[str, dict[str, Outcome]] = {}
    for name, (trace, load) in _LOADS.items():
        rate = load * curve.best_rows_per_s
        length = min(seconds, _MOST_ARRIVALS / rate)
        arrivals = trace(rate, length, seed)
        table[name] = {}
        for way, points in contenders(curve, slo_s).items():
            outcomes = (simulate(arrivals, point, curve, slo_s=slo_s, seconds=length, seed=seed) for point in points())
            table[name][way] = max(outcomes, key=lambda outcome: outcome.goodput_per_s)
    return table


def read_curve(path: Path) -> Curve:
    """``{"seconds": {rows: seconds}}``, or a plan's ``record.json`` from the cache folder, of its first signature."""
    document = json.loads(path.read_text())
    if "plans" in document:
        chosen = next(iter(document["plans"].values()))["chosen"]
        return Curve({int(rows): float(cell["seconds"]) for rows, cell in chosen.items()})
    return Curve({int(rows): float(seconds) for rows, seconds in document["seconds"].items()})


def text(table: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The table, as Markdown."""
    lines = ["| trace | way to batch | offered/s | goodput/s | p50 ms | p99 ms | refused | rows/batch |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for trace, ways in table.items():
        for way, found in ways.items():
            share = found.refused / max(found.refused + found.answered, 1)
            lines.append(
                f"| {trace} | {way} | {found.offered_per_s:,.0f} | {found.goodput_per_s:,.0f} | {_ms(found.p50_ms)} | "
                f"{_ms(found.p99_ms)} | {share:.1%} | {found.batch_rows:.1f} |"
            )
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def draw(table: Mapping[str, Mapping[str, Outcome]], slo_ms: float, path: Path) -> None:
    """Goodput as a share of what was offered, and p99 over the goal, as bars by trace."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "kiln"
    ways = list(next(iter(table.values())))
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    for number, way in enumerate(ways):
        places = np.arange(len(table)) + (number - len(ways) / 2) * 0.8 / len(ways)
        found = [outcomes[way] for outcomes in table.values()]
        above.bar(places, [o.goodput_per_s for o in found], 0.8 / len(ways), label=way)
        below.bar(places, [(o.p99_ms or 0.0) / slo_ms for o in found], 0.8 / len(ways))
    above.set_ylabel("answered within the goal, rows/s")
    above.legend(ncols=4, fontsize="small", loc="upper left")
    below.set_ylabel("p99 over the goal")
    below.set_yscale("log")
    below.axhline(1.0, color="black", linewidth=0.8)
    below.set_xticks(np.arange(len(table)), list(table))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Iterable[str] | None = None) -> int:
    """Compare, print the table, write it and the plot; returns 1 if Kiln is behind the best point of the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slo-ms", type=float, default=150.0, help="the goal (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each trace (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and run times (default: %(default)s)")
    parser.add_argument("--curve", type=Path, default=_HERE / "curve.json", help="JSON: see `read_curve`")
    parser.add_argument("--out", type=Path, default=_HERE / "results", help="folder of simulation.json and .svg")
    options = parser.parse_args(None if arguments is None else list(arguments))
    curve = read_curve(options.curve)
    table = compare(curve, slo_s=options.slo_ms / 1e3, seconds=options.seconds, seed=options.seed)
    print(text(table))
    options.out.mkdir(parents=True, exist_ok=True)
    report = {
        "slo_ms": options.slo_ms,
        "seed": options.seed,
        "seconds": options.seconds,
        "table": {trace: {way: asdict(found) for way, found in ways.items()} for trace, ways in table.items()},
    }
    (options.out / "simulation.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(table, options.slo_ms, options.out / "simulation.svg")
    behind = [
        trace
        for trace, ways in table.items()
        if ways["Kiln, slo_ms"].goodput_per_s < _AS_GOOD * ways["fixed, best of grid"].goodput_per_s
    ]
    if behind:
        print(f"behind the best point of the grid: {', '.join(behind)}")
    return int(bool(behind))


if __name__ == "__main__":
    raise SystemExit(main())
