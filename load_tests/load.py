"""A load test from nothing: starts the server on the example models, runs the Locust suite, writes a report.

``python -m load_tests.load [--models models] [--shape step] [--peak 16] [--seconds 40] [-- LOCUST OPTIONS]``;
the exit code is Locust's: 1 where a threshold was exceeded.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from load_tests.bench import free_port, machine, server_process, wait_for

_HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Run it all; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="models", help="folder of models (default: %(default)s)")
    parser.add_argument("--model", default="digits", help="the model to ask (default: %(default)s)")
    parser.add_argument("--shape", default="step", help="see the suite (default: %(default)s)")
    parser.add_argument("--peak", type=int, default=16, help="the most users (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_HERE / "results", help="folder of load.html and load_stats.csv")
    parser.add_argument("locust", nargs="*", help="further options of Locust and of the suite, after --")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with _server(options.models) as (url, grpc_port):
        wait_for(f"{url}/v2/models/{options.model}/ready")
        command = [sys.executable, "-m", "locust", "-f", str(_HERE / "locustfile.py"), "--headless", "--host", url]
        command += ["--kiln-model", options.model, "--kiln-grpc-port", str(grpc_port), "--kiln-shape", options.shape]
        command += ["--kiln-peak", str(options.peak), "--kiln-shape-s", str(options.seconds), "--only-summary"]
        command += ["--html", str(options.out / "load.html"), "--csv", str(options.out / "load"), *options.locust]
        start = time.monotonic()
        code, cpu_s = _run(command)
        elapsed_s = time.monotonic() - start
    requests = _requests(options.out / "load_stats.csv")
    for name in ("load_failures.csv", "load_exceptions.csv", "load_stats_history.csv"):
        (options.out / name).unlink(missing_ok=True)
    print(
        f"{requests} requests in {elapsed_s:.0f} s; "
        f"Locust itself took {cpu_s / max(requests, 1) * 1e6:.0f} µs of CPU each"
    )
    print(machine())
    return code


@contextlib.contextmanager
def _server(models: str) -> Iterator[tuple[str, int]]:
    """Kiln on free ports: its REST address and its gRPC port."""
    port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as cache:
        command = ["-m", "service", "serve", models, "--host", "127.0.0.1", "--rest-port", str(port)]
        command += ["--grpc-port", str(grpc_port), "--cache-dir", cache, "--log-level", "warning"]
        with server_process(*command):
            yield f"http://127.0.0.1:{port}", grpc_port


def _run(command: list[str]) -> tuple[int, float]:
    """The exit code of a command, and the seconds of CPU that it took."""
    before = psutil.Process().cpu_times()
    code = subprocess.run(command, check=False).returncode
    after = psutil.Process().cpu_times()
    children = after.children_user + after.children_system - before.children_user - before.children_system
    return code, float(children)


def _requests(stats: Path) -> int:
    """All requests, by Locust's table."""
    lines = stats.read_text().splitlines() if stats.is_file() else []
    total = [line.split(",") for line in lines if line.startswith(",Aggregated,")]
    return int(total[0][2]) if total else 0


if __name__ == "__main__":
    raise SystemExit(main())
