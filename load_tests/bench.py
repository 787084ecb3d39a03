"""The bench: starts the server, drives each protocol from another process, and writes a table.

``python -m load_tests.bench [--seconds 5] [--repeat 1] [--grpc-transport envoy] [--plan auto] [--out FILE.json]``; see
README.md here for what the columns mean. Plans are found out before anything is measured.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from load_tests.driver import Plan, Result
from load_tests.payloads import GRPC_METHOD, PATHS
from load_tests.payloads import Path as Way
from service.tensors import Array

_WARM_UP_S = 1.5
_IDLE_SHARE = 0.05
_SHAPES = {
    "digits": ("image", (8, 8, 1)),
    "dense": ("x", (784,)),
    "five_ms": ("x", (28, 28, 1)),
    "one_ms": ("x", (64,)),
    "cnn": ("x", (28, 28, 1)),
    "mobilenet": ("x", (96, 96, 3)),
    "lstm": ("x", (50, 8)),
}


class Case(NamedTuple):
    """So many connections that ask a model with `rows` rows a request."""

    model: str
    connections: int
    rows: int = 1


_CASES = (
    Case("digits", 16),
    Case("dense", 1),
    Case("dense", 16),
    Case("dense", 64),
    Case("five_ms", 16),
    Case("five_ms", 8, rows=8),
    Case("one_ms", 8, rows=64),
    Case("cnn", 8, rows=64),
    Case("mobilenet", 16),
    Case("lstm", 16),
)


@dataclass(frozen=True)
class Row:
    """One line of the table; `efficiency` is against the bare plan, None for the echo server.

    `device_rows_per_s` is rows over the time that the plan ran.
    """

    model: str
    connections: int
    rows: int
    path: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    batch_rows: float | None
    device_rows_per_s: float | None
    efficiency: float | None
    errors: int


def main() -> int:
    """Run all cases; returns 1 if any request failed or the protocols disagree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured seconds per cell")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the table has the medians")
    parser.add_argument("--models", default="digits,dense,five_ms,one_ms,cnn", help="which of the bench's models")
    parser.add_argument("--plan", default="auto", help="the server's setting of that name")
    parser.add_argument("--grpc-transport", choices=("grpcio", "envoy"), default="grpcio", help="that of the server")
    parser.add_argument("--out", type=Path, help="write all figures there as JSON")
    options = parser.parse_args()
    chosen = [case for case in _CASES if case.model in options.models.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        names = list(dict.fromkeys(case.model for case in chosen))
        _python("-m", "load_tests.bench_models", str(work / "models"), *sorted(names))
        settings = ["--cache-dir", str(work / "cache"), "--plan", options.plan]
        _python("-m", "service", "plan", str(work / "models"), *settings)
        plans = {model: _BarePlan(work, model, options.plan) for model in names}
        rounds = [_round(work, chosen, plans, options) for _ in range(options.repeat)]
        bare = {model: plan.found for model, plan in plans.items()}
        for plan in plans.values():
            plan.close()
    cells = list(zip(*rounds, strict=True))
    print(_table(cells, bare))
    if options.out:
        report = {
            "machine": machine(),
            "grpc_transport": options.grpc_transport,
            "plan": options.plan,
            "bare": bare,
            "rounds": [[asdict(r) for r in cells] for cells in rounds],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row.errors for of in cells for row in of))


@dataclass(frozen=True)
class _Target:
    """A running server, with its ports for HTTP and gRPC."""

    process: psutil.Process
    ports: tuple[int, int]
    has_metrics: bool = True

    def measure(self, label: str, case: Case, way: Way, seconds: float) -> tuple[Row, bytes]:
        """Drive one protocol; also returns one answer. CPU time and batches are read within the measured seconds."""
        model = case.model
        driver = self._start_driver(case, way, seconds)
        time.sleep(_WARM_UP_S + 0.5)
        before, start = _cpu_s(self.process), time.monotonic()
        before_batches = self._batches(model)
        time.sleep(max(seconds - 1.0, 0.5))
        rows, runs, run_s = (now - then for now, then in zip(self._batches(model), before_batches, strict=True))
        cpu_share = (_cpu_s(self.process) - before) / (time.monotonic() - start)
        output, _ = driver.communicate(timeout=seconds + 60)
        result = Result(**json.loads(output))
        row = Row(
            label,
            case.connections,
            case.rows,
            way.name,
            result.requests_per_s,
            result.p50_ms,
            result.p99_ms,
            cpu_share / max(result.requests_per_s, 1e-9) * 1e6,
            rows / runs if runs else None,
            rows / run_s if run_s else None,
            None,
            result.errors,
        )
        return row, base64.b64decode(result.first_body)

    def _batches(self, model: str) -> tuple[float, float, float]:
        """Rows, runs and seconds of runs so far, from the server's metrics."""
        if not self.has_metrics:
            return 0.0, 0.0, 0.0
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/metrics", timeout=10) as page:
            families = text_string_to_metric_families(page.read().decode())
        found = {
            sample.name: sample.value
            for family in families
            if family.name in ("kiln_batch_rows", "kiln_execution_seconds")
            for sample in family.samples
            if sample.labels.get("model") == model
        }
        names = ("kiln_batch_rows_sum", "kiln_batch_rows_count", "kiln_execution_seconds_sum")
        rows, runs, run_s = (found.get(name, 0.0) for name in names)
        return rows, runs, run_s

    def _start_driver(self, case: Case, way: Way, seconds: float) -> subprocess.Popen[str]:
        input_name, shape = _SHAPES[case.model]
        rows = np.random.default_rng(7).random((case.rows, *shape), np.float32)
        request = base64.b64encode(way.build(case.model, input_name, rows)).decode()
        port = self.ports[way.protocol == "grpc"]
        plan = Plan(way.protocol, port, case.connections, _WARM_UP_S, seconds, request, GRPC_METHOD)
        driver = subprocess.Popen(
            [sys.executable, "-m", "load_tests.driver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert driver.stdin is not None
        driver.stdin.write(json.dumps(asdict(plan)) + "\n")
        driver.stdin.flush()
        return driver


def _round(work: Path, cases: list[Case], plans: dict[str, _BarePlan], options: argparse.Namespace) -> list[Row]:
    rows = []
    seconds: float = options.seconds
    ports = free_port(), free_port()
    with server_process("-m", "load_tests.echo", *map(str, ports)) as process:
        wait_for(f"http://127.0.0.1:{ports[0]}/")
        echo = _Target(process, ports, has_metrics=False)
        for connections in dict.fromkeys(case.connections for case in cases):
            rows += [echo.measure("echo", Case("dense", connections), way, seconds)[0] for way in PATHS]
    ports = free_port(), free_port()
    command = ["-m", "service", "serve", str(work / "models"), "--rest-port", str(ports[0])]
    command += ["--grpc-port", str(ports[1]), "--cache-dir", str(work / "cache"), "--host", "127.0.0.1"]
    command += ["--grpc-transport", options.grpc_transport, "--plan", options.plan]
    with server_process(*command) as process:
        wait_for(f"http://127.0.0.1:{ports[0]}/v2/health/ready")
        _wait_for_rest(process)
        server = _Target(process, ports)
        for case in cases:
            model, answers = case.model, []
            rates = [plans[model].rows_per_s()]
            for way in PATHS:
                row, answer = server.measure(model, case, way, seconds)
                answers.append(way.read(answer))
                rates.append(plans[model].rows_per_s())  # just before and just after: the machine's pace drifts
                rows.append(replace(row, efficiency=row.requests_per_s * case.rows / statistics.mean(rates[-2:])))
            _check_agreement(model, answers)
    return rows


def _check_agreement(model: str, answers: list[Array]) -> None:
    for answer in answers[1:]:
        if not np.allclose(answers[0], answer, 1e-3, 1e-3):
            raise SystemExit(f"{model}: the protocols disagree: {answers}")


class _BarePlan:
    """A process that runs a model's best plan without a server, when it is asked to."""

    def __init__(self, work: Path, model: str, plan: str) -> None:
        command = ["-m", "load_tests.bare_plan", str(work / "models" / model), str(work / "cache"), plan]
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.found: dict[str, object] = json.loads(self._answer())

    def rows_per_s(self) -> float:
        """Measured now."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the bare plan ended")
        return line


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=1800)
    return done.stdout


@contextlib.contextmanager
def server_process(*arguments: str) -> Iterator[psutil.Process]:
    """Python with `arguments`, ended by SIGTERM."""
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(url: str, timeout_s: float = 180.0) -> None:
    """Until `url` answers; `SystemExit` if it does not in time."""
    stop = time.monotonic() + timeout_s
    while time.monotonic() < stop:
        with contextlib.suppress(OSError, urllib.error.HTTPError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    raise SystemExit(f"{url} did not answer within {timeout_s:.0f} s")


def _wait_for_rest(process: psutil.Process, timeout_s: float = 60.0) -> None:
    """Until a server does next to nothing: one that answers may still be loading what it did not wait for."""
    stop = time.monotonic() + timeout_s
    while time.monotonic() < stop and cores_used(process, 1.0) > _IDLE_SHARE:
        pass


def cores_used(process: psutil.Process, seconds: float) -> float:
    """CPU time of a process over the next `seconds`, as so many cores."""
    before = _cpu_s(process)
    time.sleep(seconds)
    return (_cpu_s(process) - before) / seconds


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _median(cells: tuple[Row, ...]) -> Row:
    by_speed = sorted(cells, key=lambda row: row.requests_per_s)
    return by_speed[len(by_speed) // 2]


def _spread(values: list[float]) -> list[float]:
    """Least, median and most; one value of one."""
    return values if len(values) < 2 else [min(values), statistics.median(values), max(values)]


def _table(cells: list[tuple[Row, ...]], bare: dict[str, dict[str, object]]) -> str:
    """A line for each cell: the median of its rounds; of several rounds the least and the most efficiency too."""
    lines = [
        "| model | connections | rows | path | requests/s | p50 ms | p99 ms "
        "| CPU µs/request | batch rows | device rows/s | efficiency |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for of in cells:
        r = _median(of)
        batch = "–" if r.batch_rows is None else f"{r.batch_rows:.1f}"
        device = "–" if r.device_rows_per_s is None else f"{r.device_rows_per_s:,.0f}"
        efficiency = " / ".join(f"{e:.2f}" for e in _spread([r.efficiency for r in of if r.efficiency is not None]))
        lines.append(
            f"| {r.model} | {r.connections} | {r.rows} | {r.path} | {r.requests_per_s:,.0f} "
            f"| {r.p50_ms:.2f} | {r.p99_ms:.2f} | {r.server_cpu_us:.0f} | {batch} | {device} | {efficiency or '–'} |"
        )
    lines.append("")
    lines += [
        f"Bare `{model}`: {float(str(b['rows_per_s'])):,.0f} rows/s at {b['best_bucket_rows']} rows ({b['plan']}), "
        f"{float(str(b['rows_per_s_alone'])):,.0f} one by one."
        for model, b in bare.items()
    ]
    return "\n".join([*lines, "", machine()])


def machine() -> str:
    """One line: processor, cores and the versions that matter."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = statistics.mode(names) if names else platform.processor()
    return (
        f"Machine: {cpu or 'unknown CPU'}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"TensorFlow {version('tensorflow')}, OpenVINO {version('openvino')}, uvicorn {version('uvicorn')}, "
        f"grpcio {version('grpcio')}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
