"""Open-loop load: requests are sent when they are due, whatever has become of those before.

``python -m load_tests.openloop --port 8501 --model digits [--protocol grpc --grpc-port 8500] [--rate 500]
[--arrivals poisson | --trace FILE] [--seconds 10] [--slo-ms 50] [--out FILE.json]``. A request's latency counts from
the moment it was due, so that what waits, here or there, is not left out: a closed loop stops asking while the server
stalls, and so hides the stall from its percentiles (coordinated omission).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from hdrh.histogram import HdrHistogram

from load_tests.payloads import GRPC_METHOD, find_target, grpc_raw, rest_binary
from load_tests.traces import TRACES, Times, from_file
from service.bench.clients import Answer, Client, GrpcClient, RestClient
from service.bench.driving import Record, drive

_LONGEST_US = 3_600_000_000
_DIGITS = 3
_BODIES = 64
"""Different requests, sent in turn."""


@dataclass(frozen=True)
class Report:
    """The outcome; latencies in ms of what was answered, `from_due` and, for comparison, `from_sent`.

    `late_p99_ms` is how late the driver itself sent; `histogram` is HdrHistogram's own form, of `from_due` in µs.
    """

    offered_per_s: float
    goodput_per_s: float
    ok: int
    refused: int
    failed: int
    from_due: dict[str, float]
    from_sent: dict[str, float]
    late_p99_ms: float
    client_cpu_s: float
    histogram: str


def report(record: Record, seconds: float, slo_s: float, client_cpu_s: float = 0.0) -> Report:
    """Count and measure what `drive` wrote down over `seconds`."""
    due, sent, done = (np.array(times) for times in (record.due, record.sent, record.done))
    is_ok = np.array([answer is Answer.OK for answer in record.answers], bool)
    from_due = _histogram((done - due)[is_ok])
    return Report(
        offered_per_s=len(due) / seconds,
        goodput_per_s=int(np.count_nonzero((done - due)[is_ok] <= slo_s)) / seconds,
        ok=int(is_ok.sum()),
        refused=record.answers.count(Answer.REFUSED),
        failed=record.answers.count(Answer.FAILED),
        from_due=_percentiles(from_due),
        from_sent=_percentiles(_histogram((done - sent)[is_ok])),
        late_p99_ms=_percentiles(_histogram(sent - due))["p99"],
        client_cpu_s=client_cpu_s,
        histogram=from_due.encode().decode(),
    )


def _histogram(seconds: Times) -> HdrHistogram:
    histogram = HdrHistogram(1, _LONGEST_US, _DIGITS)
    for value in np.clip(seconds * 1e6, 1, _LONGEST_US).astype(int).tolist():
        histogram.record_value(value)
    return histogram


def _percentiles(histogram: HdrHistogram) -> dict[str, float]:
    points = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}
    return {name: histogram.get_value_at_percentile(point) / 1e3 for name, point in points.items()}


@dataclass(frozen=True)
class Load:
    """What to send where: requests to `model` of the server at `host`, due at times of `due`."""

    host: str
    port: int
    grpc_port: int
    model: str
    due: Times
    protocol: str = "rest"
    connections: int = 512
    seed: int = 1
    warm_up: int = 50


async def run(load: Load, slo_s: float) -> Report:
    """Warm up with a few requests one after another, then drive `load`."""
    target = await asyncio.to_thread(find_target, f"http://{load.host}:{load.port}", load.model)
    build = rest_binary if load.protocol == "rest" else grpc_raw
    requests = [build(load.model, target.input_name, row) for row in target.rows(_BODIES, load.seed)]
    client: Client
    if load.protocol == "rest":
        client = RestClient(load.host, load.port, requests, load.connections)
    else:
        client = GrpcClient(f"{load.host}:{load.grpc_port}", GRPC_METHOD, requests)
    try:
        for number in range(load.warm_up):
            await client.send(number)
        cpu_s = time.process_time()
        record = await drive(load.due, client.send)
        seconds = max(float(load.due[-1]), 1e-9) if len(load.due) else 1.0
        return report(record, seconds, slo_s, time.process_time() - cpu_s)
    finally:
        await client.close()


def main(arguments: list[str] | None = None) -> int:
    """Drive, print, write; returns 1 if a request failed (a refusal is no failure)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8501, help="for REST, and for the model's metadata")
    parser.add_argument("--grpc-port", type=int, default=8500)
    parser.add_argument("--protocol", choices=("rest", "grpc"), default="rest", help="binary tensors over either")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--arrivals", choices=tuple(TRACES), default="poisson")
    parser.add_argument("--trace", type=Path, help="a file with one arrival a line, in seconds, for --arrivals")
    parser.add_argument("--slo-ms", type=float, default=100.0, help="what counts as goodput")
    parser.add_argument("--connections", type=int, default=512, help="most connections, for REST")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the report there as JSON")
    options = parser.parse_args(arguments)
    due = (
        from_file(options.trace)
        if options.trace
        else TRACES[options.arrivals](options.rate, options.seconds, options.seed)
    )
    load = Load(
        options.host, options.port, options.grpc_port, options.model, due,
        options.protocol, options.connections, options.seed,
    )  # fmt: skip
    found = _run(load, options.slo_ms / 1e3)
    print(text(found))
    if options.out:
        options.out.write_text(json.dumps(asdict(found), indent=1) + "\n")
    return int(found.failed > 0)


def _run(load: Load, slo_s: float) -> Report:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(load, slo_s))
    return uvloop.run(run(load, slo_s))


def text(found: Report) -> str:
    """The report in a few lines."""
    rows = [f"offered {found.offered_per_s:,.1f}/s, in time {found.goodput_per_s:,.1f}/s; "
            f"{found.ok} answered, {found.refused} refused, {found.failed} failed"]  # fmt: skip
    for name, points in (("from when due", found.from_due), ("from when sent", found.from_sent)):
        rows.append(f"{name}: " + ", ".join(f"{point} {value:,.2f} ms" for point, value in points.items()))
    rows.append(f"sent late by up to {found.late_p99_ms:.2f} ms (p99)")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
