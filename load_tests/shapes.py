"""How many users there are over time: stages of a load test (pure)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Until `until_s` seconds from the start there are `users`, started or stopped `spawn_per_s` a second."""

    until_s: float
    users: int
    spawn_per_s: float


def step(peak: int, seconds: float) -> list[Stage]:
    """Four equal steps up to the peak."""
    return [Stage(seconds * n / 4, max(peak * n // 4, 1), peak) for n in (1, 2, 3, 4)]


def spike(peak: int, seconds: float) -> list[Stage]:
    """A tenth of the peak, the peak at once for a fifth of the time, and a tenth again."""
    low = max(peak // 10, 1)
    return [Stage(seconds * 0.4, low, peak), Stage(seconds * 0.6, peak, 10 * peak), Stage(seconds, low, 10 * peak)]


def soak(peak: int, seconds: float) -> list[Stage]:
    """The peak, all the time."""
    return [Stage(seconds, peak, peak)]


def ramp(peak: int, seconds: float) -> list[Stage]:
    """Up to saturation in twenty even steps."""
    return [Stage(seconds * n / 20, max(round(peak * n / 20), 1), peak) for n in range(1, 21)]


SHAPES: dict[str, Callable[[int, float], list[Stage]]] = {"step": step, "spike": spike, "soak": soak, "ramp": ramp}
"""By name: the most users and the seconds it takes → its stages."""


def now_in(stages: Sequence[Stage], run_s: float) -> tuple[int, float] | None:
    """Users and how many are started a second at `run_s`; None once all stages are over."""
    for stage in stages:
        if run_s < stage.until_s:
            return stage.users, stage.spawn_per_s
    return None
