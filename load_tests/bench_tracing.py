"""What tracing costs: two servers, one with spans and one without, asked in turns; CPU time of each per request.

``python -m load_tests.bench_tracing [--share 0.01] [--rounds 3] [--turns 8] [--seconds 2] [--out FILE.json]``; see
README.md here. CPU time, not time on the clock, so that what else the machine does matters little.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from load_tests.bench import free_port, machine, server_process, wait_for
from load_tests.driver import Plan, driven
from load_tests.payloads import GRPC_METHOD, PATHS
from load_tests.payloads import Path as Way

_MODEL, _INPUT, _SHAPE = "digits", "image", (8, 8, 1)
_CONNECTIONS = 16
_WARM_UP_S = 3.0


@dataclass(frozen=True)
class Served:
    """A running server, and its ports for HTTP and gRPC."""

    process: psutil.Process
    ports: tuple[int, int]

    def cpu_us(self, way: Way, seconds: float) -> float:
        """CPU time of one request, in microseconds, over some seconds of load.

        Raises:
            SystemExit: a request failed.
        """
        requests, begun = self._requests(), self._cpu_s()
        _drive(way, self.ports[way.protocol == "grpc"], seconds)
        spent = self._cpu_s() - begun
        return spent / (self._requests() - requests) * 1e6

    def _cpu_s(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def _requests(self) -> float:
        """Those answered so far, by the server's own count."""
        with urlopen(f"http://127.0.0.1:{self.ports[0]}/metrics", timeout=30) as page:
            families = text_string_to_metric_families(page.read().decode())
        return sum(each.value for family in families for each in family.samples if each.name == "kiln_requests_total")


def main() -> int:
    """Measure all; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.01, help="of the requests that are traced")
    parser.add_argument("--rounds", type=int, default=3, help="how often the servers are started anew")
    parser.add_argument("--turns", type=int, default=8, help="pairs of measurements of each protocol in a round")
    parser.add_argument("--seconds", type=float, default=2.0, help="of load in one measurement")
    parser.add_argument("--out", type=Path, help="write all figures there as JSON")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {way.name: [] for way in PATHS}
    with tempfile.TemporaryDirectory() as folder, _collector() as (endpoint, received):
        models, cache = Path(folder, "models"), Path(folder, "cache")
        for command in (["load_tests.bench_models", models, _MODEL], ["service", "plan", models, "--cache-dir", cache]):
            subprocess.run([sys.executable, "-m", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
        traced = ["--otlp-endpoint", endpoint, "--trace-share", str(options.share)]
        for number in range(options.rounds):
            with ExitStack() as stack:
                # which one is started first is changed from round to round
                commands = [[], traced] if number % 2 else [traced, []]
                servers = {bool(more): stack.enter_context(_served(models, cache, more)) for more in commands}
                _round(servers, options.turns, options.seconds, found)
    print(_table(found, options.share, sum(received)))
    if options.out:
        report = {"machine": machine(), "share": options.share, "cpu_us_off_on": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(not received)


def _round(
    servers: dict[bool, Served], turns: int, seconds: float, found: dict[str, list[tuple[float, float]]]
) -> None:
    """Add pairs to `found`: CPU µs of a request without spans, and with them, one measured right after the other."""
    for way in PATHS:
        for server in servers.values():
            server.cpu_us(way, _WARM_UP_S)
        for turn in range(turns):
            order = (False, True) if turn % 2 else (True, False)
            taken = {is_traced: servers[is_traced].cpu_us(way, seconds) for is_traced in order}
            found[way.name].append((taken[False], taken[True]))


@contextmanager
def _served(models: Path, cache: Path, more: list[str]) -> Iterator[Served]:
    ports = free_port(), free_port()
    command = ["-m", "service", "serve", str(models), "--cache-dir", str(cache), "--host", "127.0.0.1", *more]
    with server_process(*command, "--rest-port", str(ports[0]), "--grpc-port", str(ports[1])) as process:
        wait_for(f"http://127.0.0.1:{ports[0]}/v2/health/ready")
        yield Served(process, ports)


def _drive(way: Way, port: int, seconds: float) -> None:
    rows = np.random.default_rng(7).random((1, *_SHAPE), np.float32)
    request = base64.b64encode(way.build(_MODEL, _INPUT, rows)).decode()
    plan = Plan(way.protocol, port, _CONNECTIONS, 0.0, seconds, request, GRPC_METHOD)
    driven(plan)


@contextmanager
def _collector() -> Iterator[tuple[str, list[int]]]:
    """A URL at which spans are taken, and the sizes of what came, in bytes."""
    received: list[int] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _table(found: dict[str, list[tuple[float, float]]], share: float, received_bytes: int) -> str:
    """Medians, and the middle half of the pairs' ratios."""
    lines = [
        "| path | off, CPU µs/request | on, CPU µs/request | on / off | middle half of the pairs |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, pairs in found.items():
        off, on = (statistics.median(pair[place] for pair in pairs) for place in (0, 1))
        low, middle, high = statistics.quantiles([on / off for off, on in pairs], n=4)
        lines.append(f"| {name} | {off:.1f} | {on:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    pairs_each = len(next(iter(found.values())))
    lines += ["", f"{share:.0%} traced, {pairs_each} pairs each, {received_bytes / 1e3:,.0f} kB of spans. {machine()}"]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
