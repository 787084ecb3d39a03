"""When a load test has failed (pure)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """The most that a run may show; 0 for no bound of a percentile."""

    error_ratio: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0


def exceeded(limits: Thresholds, *, requests: int, failures: int, p95_ms: float, p99_ms: float) -> list[str]:
    """What was exceeded, with bound and measurement; a run without any request has failed too."""
    if not requests:
        return ["no request was sent"]
    problems = []
    if failures / requests > limits.error_ratio:
        problems.append(f"{failures} of {requests} requests failed, at most {limits.error_ratio:.2%} may")
    for name, limit, found in (("p95", limits.p95_ms, p95_ms), ("p99", limits.p99_ms, p99_ms)):
        if limit and found > limit:
            problems.append(f"{name} is {found:.1f} ms, at most {limit:.1f} ms expected")
    return problems
