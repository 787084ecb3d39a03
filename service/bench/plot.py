"""Latency against rate, for a terminal and as SVG: pure text both, with logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from service.bench.report import Report

_MARKS = "ox+*#@"
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 24, 48


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from `low` to `high`, whole decades at least a little apart."""

    low: float
    high: float

    def share(self, value: float) -> float:
        """Where `value` lies, 0 to 1; beyond an end it lies at the end."""
        place = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return min(max(place, 0.0), 1.0)

    def ticks(self) -> Iterator[float]:
        """1, 2 and 5 times the powers of ten that lie within."""
        for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            for step in (1, 2, 5):
                if self.low <= (value := step * 10.0**power) <= self.high:
                    yield value


def scale_of(values: Sequence[float]) -> Scale:
    """An axis that holds all `values` with a little room, ten times as far as it begins; none is below 0."""
    positive = [value for value in values if value > 0]
    low, high = min(positive, default=1.0), max(positive, default=1.0)
    return Scale(min(low / 1.3, high / 8), high * 1.3)


Points = list[tuple[str, list[tuple[float, float]]]]
"""By protocol: (requests/s, p99 in ms), by rate."""


def points_of(report: Report) -> Points:
    """The trials that have a p99."""
    return [
        (
            each.protocol,
            sorted((one.trial.rate_per_s, one.trial.p99_ms) for one in each.trials if one.trial.p99_ms is not None),
        )
        for each in report.protocols
    ]


def _axes(report: Report, points: Points) -> tuple[Scale, Scale]:
    rates = scale_of([rate for _, found in points for rate, _ in found])
    return rates, scale_of([report.slo_ms, *(p99 for _, found in points for _, p99 in found)])


def terminal(report: Report, columns: int = 72, lines: int = 16) -> str:
    """A grid of characters: a mark for each trial by protocol, a dashed line for the goal; empty without trials."""
    points = points_of(report)
    if not any(found for _, found in points):
        return ""
    rates, latencies = _axes(report, points)
    grid = [[" "] * columns for _ in range(lines)]
    goal = _line(latencies, report.slo_ms, lines)
    grid[goal] = ["-", " "] * (columns // 2) + ["-"] * (columns % 2)
    for number, (_, found) in enumerate(points):
        for rate, p99 in found:
            column = round(rates.share(rate) * (columns - 1))
            grid[_line(latencies, p99, lines)][column] = _MARKS[number % len(_MARKS)]
    labels = {_line(latencies, tick, lines): f"{tick:g}" for tick in latencies.ticks()} | {goal: f"{report.slo_ms:g}"}
    rows = [f"{labels.get(place, ''):>8} |{''.join(row)}".rstrip() for place, row in enumerate(grid)]
    key = "   ".join(f"{_MARKS[number % len(_MARKS)]} {name}" for number, (name, _) in enumerate(points))
    return "\n".join([
        f"p99 ms, goal {report.slo_ms:g} ms (- -)", *rows, f"{'':8} +{'-' * columns}", _rates_line(rates, columns),
        f"{'':10}{key}",
    ])  # fmt: skip


def _line(latencies: Scale, value: float, lines: int) -> int:
    return round((1 - latencies.share(value)) * (lines - 1))


def _rates_line(rates: Scale, columns: int) -> str:
    line = ""
    for tick in rates.ticks():
        column = round(rates.share(tick) * (columns - 1)) + 10
        if column > len(line) or not line:
            line = line.ljust(column) + f"{tick:,.10g}"
    return f"{line} requests/s"


def svg(report: Report) -> str:
    """The same as an SVG document, with a line for each protocol."""
    points = points_of(report)
    rates, latencies = _axes(report, points)

    def x(rate: float) -> float:
        return round(_LEFT + rates.share(rate) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(p99: float) -> float:
        return round(_TOP + (1 - latencies.share(p99)) * (_HEIGHT - _TOP - _BOTTOM), 1)

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="black"/>',
    ]
    for tick in rates.ticks():
        parts.append(f'<path d="M{x(tick)} {_TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:,.10g}</text>')
    for tick in latencies.ticks():
        parts.append(f'<path d="M{_LEFT} {y(tick)}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<path d="M{_LEFT} {y(report.slo_ms)}H{right}" stroke="black" stroke-dasharray="6 4"/>')
    parts.append(f'<text x="{right + 8}" y="{y(report.slo_ms) + 4}">goal {report.slo_ms:g} ms</text>')
    for number, (name, found) in enumerate(points):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x(rate)},{y(p99)}" for rate, p99 in found)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts += [f'<circle cx="{x(rate)}" cy="{y(p99)}" r="3" fill="{colour}"/>' for rate, p99 in found]
        parts.append(f'<text x="{right + 8}" y="{_TOP + 14 + 16 * number}" fill="{colour}">{escape(name)}</text>')
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 10}" text-anchor="middle">requests/s to {escape(report.model)}'
        f'</text><text transform="translate(14 {(_TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">p99, ms</text>'
    )
    return "\n".join([*parts, "</svg>", ""])
