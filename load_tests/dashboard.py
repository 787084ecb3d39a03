"""A picture of the dashboard *Kiln: overview* from real data: ``python -m load_tests.dashboard docs/dashboard.svg``.

A server of the bench's models gets load in three waves; Prometheus scrapes it; then each panel's query is put to
Prometheus for that time, and plotted where Grafana would have it.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from load_tests.bench import _SHAPES, free_port, server_process, wait_for
from load_tests.driver import Plan
from load_tests.payloads import GRPC_METHOD, PATHS
from load_tests.prometheus import Prometheus, Query, prometheus, queries

_SECONDS = 75.0
_STEP_S = 1.0
_START_S = 600.0
"""With three models to convert, and whatever else the machine does."""
_ROWS = ("Requests", "Time", "Batches", "Resources")
_UNITS = {"s": (1e3, " ms"), "percentunit": (100, " %"), "bytes": (2**-20, " MiB"), "reqps": (1, "/s")}
"""How a unit of Grafana's is written here: a factor, and what follows the number."""


@dataclass(frozen=True)
class Wave:
    """So many connections that ask for one model in one way, from `start_s` on for `seconds`."""

    model: str
    path: int
    connections: int
    start_s: float
    seconds: float


_WAVES = (
    Wave("digits", 0, 2, 0.0, _SECONDS),
    Wave("dense", 1, 8, 15.0, 45.0),
    Wave("five_ms", 2, 24, 30.0, 20.0),
)


def main() -> None:
    """Serve, load, scrape, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the file to write: .svg or .png")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, "-m", "load_tests.bench_models", str(work / "models")], check=True)
        (work / "models.yaml").write_text(yaml.safe_dump({"models": {model: {"slo_ms": 25} for model in _SHAPES}}))
        rest, grpc = free_port(), free_port()
        command = ["-m", "service", "serve", str(work / "models"), "--models-config", str(work / "models.yaml")]
        command += ["--host", "127.0.0.1", "--rest-port", str(rest), "--grpc-port", str(grpc)]
        with server_process(*command, "--cache-dir", str(work / "cache")):
            wait_for(f"http://127.0.0.1:{rest}/v2/health/ready", _START_S)
            with prometheus(rest, work / "prometheus") as running:
                start = time.time()
                with _mistakes(rest):
                    _drive((rest, grpc))
                figure = _figure(running, start, time.time())
    out.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kiln"}):
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    if out.suffix == ".svg":
        out.write_text(shortened(out.read_text()))
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def shortened(svg: str) -> str:
    """`svg` with paths to a tenth of a point, and any font without serifs: the rest is a third of its size."""
    shorten = re.compile(r"(\d\.\d)\d+")
    svg = re.sub(r'\bd="[^"]*"', lambda path: shorten.sub(r"\1", path[0]), svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def _drive(ports: tuple[int, int]) -> None:
    """All waves; returns when the last one is over."""
    drivers = []
    begun = time.monotonic()
    for wave in sorted(_WAVES, key=lambda wave: wave.start_s):
        time.sleep(max(begun + wave.start_s - time.monotonic(), 0))
        way = PATHS[wave.path]
        name, shape = _SHAPES[wave.model]
        request = way.build(wave.model, name, np.random.default_rng(7).random((1, *shape), np.float32))
        port = ports[way.protocol == "grpc"]
        encoded = base64.b64encode(request).decode()
        plan = Plan(way.protocol, port, wave.connections, 0.0, wave.seconds, encoded, GRPC_METHOD)
        driver = subprocess.Popen(
            [sys.executable, "-m", "load_tests.driver"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert driver.stdin is not None
        driver.stdin.write(json.dumps(asdict(plan)) + "\n")
        driver.stdin.flush()
        drivers.append(driver)
    for driver in drivers:
        driver.wait(_SECONDS + 60)


@contextmanager
def _mistakes(port: int) -> Iterator[None]:
    """A caller who asks for what there is not, and in the wrong shape, a few times a second."""
    over = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for path in itertools.cycle(("/v1/models/digits:predict", "/v1/models/nothing:predict")):
            connection.request("POST", path, b'{"instances": [[1]]}')
            connection.getresponse().read()
            if over.wait(0.2):
                break
        connection.close()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _figure(running: Prometheus, start: float, end: float) -> Figure:
    """The numbers of the first row over a panel's plot for each of the other rows' panels."""
    found = queries("overview.json")
    panels = {row: [*dict.fromkeys(query.panel for query in found if query.row == row)] for row in _ROWS}
    columns = max(map(len, panels.values()))
    figure = Figure(figsize=(14, 11), layout="constrained", facecolor="#f4f5f5")
    parts: Any = figure.subfigures(len(_ROWS) + 1, 1, height_ratios=[0.35, *[1.0] * len(_ROWS)])
    numbers, *rest = parts
    middle = start + _SECONDS * 0.6
    _show_numbers(numbers.subplots(1, 6), [query for query in found if query.row == "Now"], running, middle)
    for part, (row, titles) in zip(rest, panels.items(), strict=True):
        for axes, title in zip(part.subplots(1, columns), titles, strict=True):
            _plot(
                axes, title, [query for query in found if (query.row, query.panel) == (row, title)], running, start, end
            )
    return figure


def _show_numbers(places: np.ndarray, shown: list[Query], running: Prometheus, at: float) -> None:
    for axes, query in zip(places, shown, strict=True):
        ((_, points),) = running.query_range(query.expr, at, at, _STEP_S)
        factor, suffix = _UNITS.get(query.unit, (1, ""))
        axes.text(0.5, 0.35, f"{points[0][1] * factor:,.4g}{suffix}", ha="center", va="center", fontsize=20)
        axes.set_title(query.panel, fontsize=10, loc="left")
        axes.set(xticks=(), yticks=())


def _plot(axes: Axes, title: str, shown: list[Query], running: Prometheus, start: float, end: float) -> None:
    factor, suffix = _UNITS.get(shown[0].unit, (1, ""))
    for query in shown:
        for labels, points in running.query_range(query.expr, start, end, _STEP_S):
            finite = [(at, value * factor) for at, value in points if math.isfinite(value)]
            axes.plot(
                [at - start for at, _ in finite], [value for _, value in finite], label=_legend(query, labels), lw=1.3
            )
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}{suffix}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="upper left")


def _legend(query: Query, labels: Mapping[str, str]) -> str:
    """The legend with the labels' values; what has no model is a request for none that there is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), query.legend)


if __name__ == "__main__":
    main()
