"""What ``kiln bench`` found: as JSON, as a table, and one line for each trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from service.bench.asked import ServerShare
from service.bench.driving import Trial

Limit = Literal["goal", "failures", "refusals", "driver", "none"]
_LATE_SHARE = 0.25
"""A driver that sends later than this share of the goal is no judge of the server."""
_BUSY_CORES = 0.9
"""It has one thread."""


@dataclass(frozen=True)
class Measured:
    """A trial, and what the server did in it; None for a server without Kiln's metrics."""

    trial: Trial
    server: ServerShare | None


@dataclass
class Capacity:
    """What was found of one protocol.

    `per_s` is the highest rate that held, in requests/s, None if none did; `at` its trial, `limit` why the next one up
    did not hold, `error` why there is no answer; `is_final` is False while the search goes on.
    """

    protocol: str
    per_s: float | None = None
    limit: Limit = "none"
    error: str = ""
    is_final: bool = False
    trials: list[Measured] = field(default_factory=list)

    @property
    def at(self) -> Measured | None:
        """The best trial of the highest rate that held."""
        held = [each for each in self.trials if each.trial.holds]
        return max(held, key=lambda each: each.trial.rate_per_s, default=None)


@dataclass
class Report:
    """All protocols of one model; a request has `rows` rows, a trial takes `seconds`."""

    model: str
    url: str
    slo_ms: float
    seconds: float
    rows: int
    protocols: list[Capacity] = field(default_factory=list)
    interrupted: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every protocol has a capacity."""
        return bool(self.protocols) and all(each.is_final and not each.error for each in self.protocols)


def driver_is_late(trial: Trial, slo_ms: float) -> bool:
    """Whether the driver itself may be why a goal was missed."""
    return trial.late_p99_ms > _LATE_SHARE * slo_ms or trial.driver_cores > _BUSY_CORES


def limit_of(trial: Trial, slo_ms: float) -> Limit:
    """Why a trial did not hold."""
    if driver_is_late(trial, slo_ms):
        return "driver"
    if trial.failed:
        return "failures"
    return "refusals" if trial.refused > (trial.ok + trial.refused) / 100 else "goal"


def as_json(report: Report) -> dict[str, Any]:
    """All figures; latencies in ms, times of the server in µs a request, None where there is nothing to tell."""
    return {
        "model": report.model,
        "url": report.url,
        "slo_ms": report.slo_ms,
        "seconds": report.seconds,
        "rows": report.rows,
        "interrupted": report.interrupted,
        "protocols": [
            {
                "protocol": each.protocol,
                "capacity_per_s": each.per_s,
                "rows_per_s": None if each.per_s is None else each.per_s * report.rows,
                "limit": each.limit,
                "error": each.error or None,
                "is_final": each.is_final,
                "at_capacity": None if each.at is None else _measured(each.at),
                "trials": [_measured(one) for one in each.trials],
            }
            for each in report.protocols
        ],
    }


def _measured(measured: Measured) -> dict[str, Any]:
    server = None if measured.server is None else asdict(measured.server)
    return {**asdict(measured.trial), "server": server}


_HEADS = (
    "protocol", "requests/s", "p50 ms", "p99 ms", "rows/batch", "server cores", "driver cores", "CPU µs",
    "decode µs", "queue µs", "execute µs", "encode µs", "limit",
)  # fmt: skip


def table(report: Report) -> str:
    """A line for each protocol, at the highest rate that held; then what went wrong."""
    rows: list[Sequence[str]] = [_HEADS]
    for each in report.protocols:
        at = each.at
        if at is None:
            rows.append((each.protocol, *["–"] * (len(_HEADS) - 2), each.limit))
            continue
        s = at.server
        figures = (None,) * 7 if s is None else (
            s.batch_rows, s.cores, s.cpu_us, s.decode_us, s.queue_us, s.execute_us, s.encode_us
        )  # fmt: skip
        batch_rows, cores, *times = figures
        rows.append((
            each.protocol + ("" if each.is_final else " (so far)"), _figure(at.trial.rate_per_s, 0),
            _figure(at.trial.p50_ms, 2), _figure(at.trial.p99_ms, 2), _figure(batch_rows, 1), _figure(cores, 2),
            _figure(at.trial.driver_cores, 2), *(_figure(value, 0) for value in times), each.limit,
        ))  # fmt: skip
    widths = [max(len(row[place]) for row in rows) for place in range(len(_HEADS))]
    lines = [
        "  ".join(c.rjust(w) if 0 < i < len(_HEADS) - 1 else c.ljust(w)
                  for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip
    return "\n".join([*lines, *notes(report)])


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def notes(report: Report) -> list[str]:
    """What a reader must know of the table, a line each."""
    lines = [f"{each.protocol}: {each.error}" for each in report.protocols if each.error]
    for each in report.protocols:
        blamed = [one.trial for one in each.trials if not one.trial.holds and driver_is_late(one.trial, report.slo_ms)]
        if each.limit == "driver" and blamed and not each.error:
            worst = max(blamed, key=lambda trial: trial.late_p99_ms)
            lines.append(
                f"{each.protocol}: the driver is the limit, not the server: at {worst.rate_per_s:,.0f} requests/s it "
                f"sent {worst.late_p99_ms:.1f} ms late (p99) and used {worst.driver_cores:.2f} of a core"
            )
    if report.interrupted:
        lines.append("interrupted: this is what was measured until then")
    return lines


def trial_line(protocol: str, measured: Measured) -> str:
    """One trial in a few words."""
    trial = measured.trial
    p99 = "without answer" if trial.p99_ms is None else f"{trial.p99_ms:,.2f} ms"
    bad = "".join(
        f", {count:,} {what}" for what, count in
        (("refused", trial.refused), ("failed", trial.failed), ("unanswered", trial.unanswered)) if count
    )  # fmt: skip
    return f"{protocol}: {trial.rate_per_s:,.0f}/s {'holds' if trial.holds else 'does not hold'}: p99 {p99}{bad}"
