"""The series that one thing is counted in, bound once, so that counting is plain adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.tallies import Count, Sum, Tally


class Goal:
    """What a model's requests of one outcome are held to; with a goal of less than nothing each is missed."""

    __slots__ = ("_goal_s", "_met", "_missed")

    def __init__(self, goal_s: float, met: Count, missed: Count) -> None:
        self._goal_s = goal_s
        self._met = met
        self._missed = missed

    def count(self, elapsed_s: float) -> None:
        (self._met if elapsed_s <= self._goal_s else self._missed).value += 1


@dataclass(frozen=True, slots=True)
class RequestSeries:
    """Where the requests of one version, protocol and outcome are counted; `goal` where they are held to one."""

    requests: Count
    latency: Tally
    decode: Sum
    encode: Sum
    goal: Goal | None


class VersionMetrics:
    """What the batcher of one version reports; labels are bound once."""

    def __init__(  # noqa: PLR0913 - one for each series
        self,
        *,
        queue: Tally,
        execution: Tally,
        rows: Tally,
        fill: Tally,
        failed: Count,
        device_s: Count,
        dropped: Mapping[str, Count],
    ) -> None:
        self.waited = queue.observe
        self._execution = execution
        self._rows = rows
        self._fill = fill
        self._failed = failed
        self._device_s = device_s
        self._dropped = dropped

    def executed(self, rows: int, given: int, seconds: float) -> None:
        """A batch of `rows` rows ran in a plan that was given `given`, padding included."""
        self._rows.observe(rows)
        self._fill.observe(rows / given)
        self._execution.observe(seconds)

    def failed(self) -> None:
        self._failed.value += 1

    def used(self, device_s: float) -> None:
        """A run had the device for so many seconds, or a part of it for longer."""
        self._device_s.value += device_s

    def dropped(self, reason: str, count: int) -> None:
        """`reason` is cancelled, expired, overloaded or late."""
        self._dropped[reason].value += count
