"""What batches of one lane take: the plan's measurement, corrected by the runs since."""

from __future__ import annotations

import math
from collections.abc import Callable

_MEMORY = 0.9
"""Weight of the past in the running estimates."""
_FIRST_SPREAD = 0.1
"""Spread of what has not run yet, as a share of its mean."""
_SPREADS = 3.0
"""Mean and so many mean deviations are what 99 % of the runs keep to; 2.9 for a normal distribution."""
_MOST_AT_ONCE = 4.0
"""One run moves an estimate as if it had taken so many times of it at most: a stall is no new curve."""


class Curve:
    """Seconds by number of rows, with their spread; rows are told apart by the next power of two.

    What neither ran nor was measured is guessed from what did, and is 0 where nothing is known: nobody is
    refused for a guess without ground.
    """

    def __init__(self, measured: Callable[[int], float]) -> None:
        """`measured` gives the plan's seconds for so many rows, infinite where they are not known."""
        self._measured = measured
        self._means: dict[int, float] = {}
        self._spreads: dict[int, float] = {}
        self._ratio = 1.0
        """Seconds of runs over those measured."""

    def expected_s(self, rows: int) -> float:
        """Mean seconds of a batch of `rows` rows."""
        bucket = _bucket(rows)
        mean = self._means.get(bucket)
        return self._guess(bucket, rows) if mean is None else mean

    def late_s(self, rows: int) -> float:
        """Seconds that 99 % of batches of `rows` rows keep to."""
        mean = self.expected_s(rows)
        return mean + _SPREADS * self._spreads.get(_bucket(rows), _FIRST_SPREAD * mean)

    def learn(self, rows: int, seconds: float) -> None:
        """A batch of `rows` rows has taken `seconds`."""
        bucket = _bucket(rows)
        mean = self.expected_s(rows)
        if not mean:
            self._means[bucket], self._spreads[bucket] = seconds, _FIRST_SPREAD * seconds
            return
        seconds = min(seconds, _MOST_AT_ONCE * mean)
        spread = self._spreads.get(bucket, _FIRST_SPREAD * mean)
        self._means[bucket] = _MEMORY * mean + (1 - _MEMORY) * seconds
        self._spreads[bucket] = _MEMORY * spread + (1 - _MEMORY) * abs(seconds - mean)
        measured = self._measured(rows)
        if 0 < measured < math.inf:
            self._ratio = _MEMORY * self._ratio + (1 - _MEMORY) * seconds / measured

    def _guess(self, bucket: int, rows: int) -> float:
        """By the plan's measurement; else by the nearest bucket that ran, as if rows cost in proportion."""
        measured = self._measured(rows)
        if measured < math.inf:
            return measured * self._ratio
        if not self._means:
            return 0.0
        nearest = min(self._means, key=lambda known: abs(math.log2(known / bucket)))
        return self._means[nearest] * max(bucket / nearest, 1.0)


def _bucket(rows: int) -> int:
    return 1 << (max(rows, 1) - 1).bit_length()
