"""When requests come: arrival times in seconds from the start, in order, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]
Trace = Callable[[float, float, int], Times]
"""Mean rate in requests a second, length in seconds, seed."""


def constant(rate: float, seconds: float, seed: int = 0) -> Times:
    """Evenly spaced."""
    del seed
    return np.arange(int(rate * seconds)) / rate


def poisson(rate: float, seconds: float, seed: int = 0) -> Times:
    """Independent callers: gaps are exponential."""
    return _varying(lambda times: np.full_like(times, rate), rate, seconds, seed)


def bursty(rate: float, seconds: float, seed: int = 0) -> Times:
    """Poisson at four times the rate for one second of ten on the average, else at two thirds of it."""
    generator = np.random.default_rng([seed, 1])
    edges = [0.0]
    is_burst: list[bool] = []
    while edges[-1] < seconds:
        is_burst.append(len(is_burst) % 2 == 1)
        edges.append(edges[-1] + generator.exponential(0.5 if is_burst[-1] else 4.5))
    levels = np.where(is_burst, 4 * rate, rate * 2 / 3)
    return _varying(lambda times: levels[np.searchsorted(edges, times, "right") - 1], 4 * rate, seconds, seed)


def diurnal(rate: float, seconds: float, seed: int = 0) -> Times:
    """Poisson with a rate that goes as a sine from a tenth to 1.9 times the mean: one day."""
    return _varying(lambda times: rate * (1 - 0.9 * np.cos(2 * np.pi * times / seconds)), 1.9 * rate, seconds, seed)


def heavy_tailed(rate: float, seconds: float, seed: int = 0) -> Times:
    """Gaps of a Pareto distribution with exponent 1.5: long silences and dense crowds."""
    generator = np.random.default_rng([seed, 2])
    shape = 1.5
    gaps = (generator.pareto(shape, int(rate * seconds * 2) + 100) + 1) * (shape - 1) / shape / rate
    times = np.cumsum(gaps)
    return times[times < seconds]


def from_file(path: Path) -> Times:
    """One arrival a line, in seconds; the first one is the start.

    Raises:
        ValueError: a line is no number, or earlier than the one before.
    """
    times: list[float] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            time = float(line)
        except ValueError:
            raise ValueError(f"{path}:{number}: seconds expected, got {line!r}") from None
        if not np.isfinite(time) or (times and time < times[-1]):
            raise ValueError(f"{path}:{number}: no earlier time than the one before expected, got {line!r}")
        times.append(time)
    if not times:
        raise ValueError(f"{path}: no arrivals")
    return np.array(times) - times[0]


TRACES: dict[str, Trace] = {
    "constant": constant,
    "poisson": poisson,
    "bursty": bursty,
    "diurnal": diurnal,
    "heavy-tailed": heavy_tailed,
}


def _varying(rate_at: Callable[[Times], Times], most: float, seconds: float, seed: int) -> Times:
    """A Poisson process whose rate varies up to `most`: by thinning one of that rate."""
    generator = np.random.default_rng([seed, 0])
    times = np.sort(generator.uniform(0.0, seconds, generator.poisson(most * seconds)))
    return times[generator.uniform(0.0, most, len(times)) < rate_at(times)]
