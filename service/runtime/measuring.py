"""How long batches take: runs of several plans in turn, so that what disturbs one disturbs all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RUNS = 15
_SECONDS_PER_PLAN = 0.3
_PAUSE_S = 200e-6
"""Before a timed run, as between batches of a server: threads that spin through it show as CPU time."""
_MOST_PAUSES = 25
_IDLE_SHARE = 0.25
"""Threads of the plan before may spin on: a short one begins once they take less of a pause, or after so many."""
_CLOSE = 1.3
"""Plans within that of the fastest are run `_ENOUGH` times, however long that takes: one run says little."""
_HOPELESS = 4.0
"""A plan that is so many times slower than the fastest is timed three times only, or for a second."""
_ENOUGH, _LONG_S = 3, 1.0
_QUANTILE = 0.2
"""What counts of a plan's runs: below the median, for whatever else runs on the machine only ever adds."""
_APART = 1.5
_SHORT_S = 0.02
"""Runs shorter than that are timed after one that is not."""
_MOST_ROUNDS = 3
_STREAM_SECONDS = 0.4


@dataclass(frozen=True)
class Cost:
    """What one batch takes: seconds until it is done, and CPU seconds of all threads."""

    seconds: float
    cpu_s: float


UNKNOWN = Cost(float("inf"), float("inf"))
Job = Callable[[], object]


def measure(
    jobs: Mapping[str, Job], *, runs: int = _RUNS, seconds_per_plan: float = _SECONDS_PER_PLAN
) -> dict[str, Cost]:
    """The cost of each job, by its name; run in turn, at least once each.

    There are `runs` rounds, where the time allows it; three times as many where the machine is
    disturbed. What may be the fastest is run `_ENOUGH` times at least. Raises whatever a job does.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    stop = time.perf_counter() + seconds_per_plan * len(jobs)
    for number in range(_MOST_ROUNDS * runs):
        for name in _turned(list(jobs), number):
            if not _is_hopeless(name, times):
                if times[name] and times[name][-1][0] < _SHORT_S:
                    _come_to_rest()
                    jobs[name]()  # after another plan caches are cold
                times[name].append(_time(jobs[name]))
        if time.perf_counter() >= stop or (number + 1 >= runs and not _is_disturbed(times)):
            break
    while len(close := _close(times)) > 1 and (few := [name for name in close if len(times[name]) < _ENOUGH]):
        for name in few:
            times[name].append(_time(jobs[name]))
    return {name: _cost(seen) for name, seen in times.items()}


def rows_per_s(job: Job, rows: int, streams: int) -> float:
    """Rows a second of `streams` threads that run `job`, of `rows` rows, over and over."""
    counts = [0] * streams
    stop = time.perf_counter() + _STREAM_SECONDS

    def work(number: int) -> None:
        while time.perf_counter() < stop:
            job()
            counts[number] += 1

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return rows * sum(counts) / (time.perf_counter() - start)


def _turned(names: list[str], number: int) -> list[str]:
    """The names, each time beginning with the next: nobody always follows the same."""
    first = number % max(len(names), 1)
    return names[first:] + names[:first]


def _time(job: Job) -> tuple[float, float]:
    cpu_start = time.process_time()
    time.sleep(_PAUSE_S)
    start = time.perf_counter()
    job()
    seconds = time.perf_counter() - start
    return seconds, time.process_time() - cpu_start


def _come_to_rest() -> None:
    """Wait for the threads of this process, but not for long: a plan must not be charged for what another's do."""
    for _ in range(_MOST_PAUSES):
        start = time.process_time()
        time.sleep(_PAUSE_S)
        if time.process_time() - start < _IDLE_SHARE * _PAUSE_S:
            return


def _close(times: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """Which jobs may be the fastest by the runs so far."""
    least = {name: min(s for s, _ in seen) for name, seen in times.items()}
    return [name for name, seconds in least.items() if seconds <= _CLOSE * min(least.values())]


def _is_hopeless(name: str, times: Mapping[str, Sequence[tuple[float, float]]]) -> bool:
    if len(times[name]) < (_ENOUGH if sum(s for s, _ in times[name]) < _LONG_S else 1):
        return False  # one run may have been disturbed
    fastest = min(min(s for s, _ in seen) for seen in times.values() if seen)
    return min(s for s, _ in times[name]) > _HOPELESS * fastest


def _is_disturbed(times: Mapping[str, Sequence[tuple[float, float]]]) -> bool:
    """Whether the fastest plan's runs are far apart."""
    seconds = min(([s for s, _ in seen] for seen in times.values()), key=min)
    return float(np.median(seconds)) > _APART * min(seconds)


def _cost(seen: Sequence[tuple[float, float]]) -> Cost:
    seconds, cpu_s = np.quantile(np.array(seen), _QUANTILE, axis=0)
    return Cost(float(seconds), float(cpu_s))
