"""Where the highest rate lies that still holds a goal: rates to try, by bracketing, then by bisecting. Pure."""

from __future__ import annotations

import math

_STEP_UP, _STEP_DOWN = 2.0, 4.0


class Search:
    """Tells the next rate to try, and is told whether it held.

    A rate has failed once it failed twice in a row, for one stall of a neighbour on the machine is no limit of the
    server. The answer is right to a share of `tolerance`. After `most_trials` it ends with what it has.
    """

    def __init__(
        self, start: float, *, least: float, most: float = 1e6, tolerance: float = 0.05, most_trials: int = 40
    ) -> None:
        self.low = 0.0
        """The highest rate that held; 0 while none did."""
        self.high = math.inf
        """The lowest rate that failed."""
        self.trials = 0
        self._least, self._most = least, most
        self._tolerance = tolerance
        self._most_trials = most_trials
        self._next = min(max(start, least), most)
        self._again = False
        self._bracket = 0.0

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to try."""
        if self.trials >= self._most_trials or self.low >= self._most:
            return True
        if not self.low:
            return self.high <= self._least
        return self.high <= self.low * (1 + self._tolerance)

    @property
    def progress(self) -> float:
        """About how much of the way is gone, 0 to 1."""
        if self.is_done:
            return 1.0
        if not self.low or math.isinf(self.high):
            return 0.4 * self.trials / (self.trials + 2)
        goal = math.log1p(self._tolerance)
        return 0.4 + 0.6 * (1 - (math.log(self.high / self.low) - goal) / max(self._bracket - goal, 1e-9))

    def next_rate(self) -> float | None:
        """What to try now; None if `is_done`."""
        return None if self.is_done else self._next

    def tell(self, *, held: bool) -> None:
        """Whether the rate that `next_rate` told held."""
        self.trials += 1
        if not held and not self._again:
            self._again = True
            return
        self._again = False
        if held:
            self.low = max(self.low, self._next)
        else:
            self.high = min(self.high, self._next)
        if not self.low:
            self._next = max(self.high / _STEP_DOWN, self._least)
        elif math.isinf(self.high):
            self._next = min(self.low * _STEP_UP, self._most)
        else:
            self._bracket = self._bracket or math.log(self.high / self.low)
            self._next = math.sqrt(self.low * self.high)
