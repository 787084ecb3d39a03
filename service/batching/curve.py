"""What batches of one lane take: the plan's measurement, corrected by the runs since."""

from __future__ import annotations

import math
from collections.abc import Callable

_MEMORY = 0.9
"""Weight of the past in the estimate of a size that runs."""
_DRIFT = 0.02
"""By such a share the estimates of other sizes follow what all sizes take: none is shunned for good for one stall."""
_SPREAD_MEMORY = 0.95
_FIRST_SPREAD = 0.1
"""Spread before anything has run, as a share of the mean."""
_SPREADS = 3.0
"""Mean and so many mean deviations are what 99 % of the runs keep to; 2.9 for a normal distribution."""
_MOST_SPREAD = 0.25
"""More than that is not reckoned with: on a machine that is so uneven refusing still more would help nobody."""
_MOST_OFF = 1.0
"""One run counts as at most twice what was expected: a stall is no new curve."""


class Curve:
    """Seconds by number of rows, and their spread; rows are told apart by the next power of two.

    What neither ran nor was measured is guessed from what did, and is 0 where nothing is known: nobody is
    refused for a guess without ground.
    """

    def __init__(self, measured: Callable[[int], float]) -> None:
        """`measured` gives the plan's seconds for so many rows, infinite where they are not known."""
        self._measured = measured
        self._means: dict[int, float] = {}
        """Seconds by size, of those that were not measured."""
        self._ratios: dict[int, float] = {}
        """Seconds over those measured, by size."""
        self._ratio = 1.0
        """The same of all sizes together."""
        self._spread = _FIRST_SPREAD

    def expected_s(self, rows: int) -> float:
        """Mean seconds of a batch of `rows` rows."""
        bucket = _bucket(rows)
        measured = self._measured(rows)
        if measured < math.inf:
            return measured * self._ratios.get(bucket, self._ratio)
        mean = self._means.get(bucket)
        return self._guess(bucket) if mean is None else mean

    def late_s(self, rows: int) -> float:
        """Seconds that 99 % of batches of `rows` rows keep to."""
        return self.expected_s(rows) * (1 + _SPREADS * self._spread)

    def learn(self, rows: int, seconds: float) -> None:
        """A batch of `rows` rows has taken `seconds`."""
        bucket = _bucket(rows)
        expected = self.expected_s(rows)
        if not expected:
            self._means[bucket] = seconds
            return
        off = min(seconds / expected - 1, _MOST_OFF)
        self._spread = min(_SPREAD_MEMORY * self._spread + (1 - _SPREAD_MEMORY) * abs(off), _MOST_SPREAD)
        factor = 1 + (1 - _MEMORY) * off
        if self._measured(rows) == math.inf:
            self._means[bucket] = expected * factor
            return
        ratio = self._ratios.get(bucket, self._ratio)
        self._ratio += (1 - _MEMORY) * (ratio * (1 + off) - self._ratio)
        for other in self._ratios:
            self._ratios[other] += _DRIFT * (self._ratio - self._ratios[other])
        self._ratios[bucket] = ratio * factor

    def _guess(self, bucket: int) -> float:
        """By the nearest size that ran, as if rows cost in proportion."""
        if not self._means:
            return 0.0
        nearest = min(self._means, key=lambda known: abs(math.log2(known / bucket)))
        return self._means[nearest] * max(bucket / nearest, 1.0)


def _bucket(rows: int) -> int:
    return 1 << (max(rows, 1) - 1).bit_length()
