"""A real Prometheus that scrapes a running server, and the dashboards' queries as it is asked them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
RULES = ROOT / "helm" / "rules" / "kiln.yaml"
DASHBOARDS = ROOT / "helm" / "dashboards"
SCRAPE_S = 1
RATE_INTERVAL = "30s"
"""What Grafana's ``$__rate_interval`` stands for here."""
_START_S = 60.0
_TIMEOUT_S = 30.0


def missing() -> str:
    """Which of the programs needed is not installed; empty if none is missing."""
    absent = [program for program in ("prometheus", "promtool") if shutil.which(program) is None]
    return f"{' and '.join(absent)} not installed (Debian's package prometheus)" if absent else ""


@dataclass(frozen=True)
class Query:
    """One query of a panel, with Grafana's variables filled in to mean everything."""

    dashboard: str
    row: str
    panel: str
    kind: str
    unit: str
    legend: str
    expr: str


def queries(dashboard: str) -> list[Query]:
    """All queries of a dashboard's file, in its order."""
    found = []
    row = ""
    for panel in json.loads((DASHBOARDS / dashboard).read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        unit = panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            expr = re.sub(r"\$(job|model|version)\b", ".*", target["expr"].replace("$__rate_interval", RATE_INTERVAL))
            found.append(Query(dashboard, row, panel["title"], panel["type"], unit, target["legendFormat"], expr))
    return found


class Prometheus:
    """A running one; `get` asks its API."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._port = 0

    def get(self, what: str, **parameters: str) -> Any:
        """The data of an answer of ``/api/v1/…``."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[tuple[Mapping[str, str], float]]:
        """Each series of `expr` now: its labels and value."""
        result = self.get("query", query=expr)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def query_range(
        self, expr: str, start: float, end: float, step_s: float
    ) -> list[tuple[Mapping[str, str], list[tuple[float, float]]]]:
        """Each series of `expr` from `start` to `end`, in seconds since the epoch: its labels, times and values."""
        data = self.get("query_range", query=expr, start=str(start), end=str(end), step=str(step_s))
        return [
            (each["metric"], [(float(at), float(value)) for at, value in each["values"]]) for each in data["result"]
        ]

    def wait(self) -> None:
        """Until it answers; `SystemExit` if it does not in time."""
        stop = time.monotonic() + _START_S
        while time.monotonic() < stop and self._process.poll() is None:
            for connection in psutil.Process(self._process.pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    self._port = connection.laddr.port
            if self._port:
                with suppress(OSError):
                    self.get("query", query="1")
                    return
            time.sleep(0.05)
        raise SystemExit("Prometheus did not start")


@contextmanager
def prometheus(rest_port: int, folder: Path) -> Iterator[Prometheus]:
    """One that scrapes the server on `rest_port` each second, by the chart's rules; what it keeps is in `folder`."""
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "kiln", "static_configs": [{"targets": [f"127.0.0.1:{rest_port}"]}]}],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [  # noqa: S607 - wherever it is installed
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        running = Prometheus(process)
        running.wait()
        yield running
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
