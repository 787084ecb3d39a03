"""Swap versions under load: ``python -m load_tests.swap [--swaps 200]``.

Starts the server on a folder of its own and Locust against it; brings in version after version, moves a label to
each, deletes the ones before, and drops broken versions in between. Prints a report; returns 1 if any request failed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from load_tests.bench import free_port, machine, server_process, wait_for

_USERS = 8
_POLL_S = 0.25
_LONGEST_SWAP_S = 60.0
_BROKEN_EVERY = 25


def main() -> int:
    """Run it all; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=200, help="how many versions follow the first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = _run(Path(folder), options.swaps)
    print(_text(report))
    return int(report["failures"] > 0 or report["requests"] == 0)


def _run(work: Path, swaps: int) -> dict[str, Any]:
    made, models, config = work / "made", work / "models", work / "models.yaml"
    _publish(_made(made, [1])[0], models / "tagged", 1)
    _write_config(config, 1)
    port = free_port()
    command = ["-m", "service", "serve", str(models), "--rest-port", str(port), "--grpc-port", "0"]
    command += ["--host", "127.0.0.1", "--models-config", str(config), "--poll-s", str(_POLL_S), "--plan", "signature"]
    command += ["--max-batch-rows", "16", "--cache-dir", str(work / "cache")]
    url = f"http://127.0.0.1:{port}"
    seconds: list[float] = []
    with server_process(*command):
        wait_for(f"{url}/v2/health/ready")
        locust = _start_locust(url, work / "report")
        for start in range(2, swaps + 2, 20):
            numbers = list(range(start, min(start + 20, swaps + 2)))
            for number, version in zip(numbers, _made(made, numbers), strict=True):
                seconds.append(_swap(url, version, models / "tagged", config, number))
        locust.terminate()  # Locust ends its users and writes its report
        locust.wait(timeout=60)
    return _report(work / "report_stats.csv", work / "report_failures.csv", swaps, seconds)


def _made(folder: Path, numbers: list[int]) -> list[Path]:
    """SavedModels that answer with their numbers, made in a process that ends."""
    subprocess.run(
        [sys.executable, "-m", "load_tests.tagged_models", str(folder), *map(str, numbers)],
        check=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stderr=subprocess.DEVNULL,
    )
    return [folder / str(number) for number in numbers]


def _publish(made: Path, model: Path, number: int) -> None:
    """Copy file after file, as an operator would: the server must wait until all are there."""
    model.mkdir(parents=True, exist_ok=True)
    shutil.copytree(made, model / str(number))


def _write_config(config: Path, stable: int) -> None:
    text = json.dumps({"models": {"tagged": {"versions": {"latest": 2}, "labels": {"stable": stable}}}})
    config.with_suffix(".new").write_text(text)
    config.with_suffix(".new").rename(config)


def _swap(url: str, made: Path, model: Path, config: Path, number: int) -> float:
    """Bring one version in, put the label on it, let the one before the last go; returns the seconds it took."""
    start = time.monotonic()
    _publish(made, model, number)
    _until(lambda: (number, "READY") in _versions(url))
    _write_config(config, number)
    _until(lambda: _labelled(url) == number)
    if number % _BROKEN_EVERY == 0:
        _break(url, model, number + 100_000)
    shutil.rmtree(model / str(number - 1))
    shutil.rmtree(made)
    return time.monotonic() - start


def _break(url: str, model: Path, number: int) -> None:
    """A version that cannot be loaded; it must show as failed, and cost nobody anything."""
    folder = model / str(number)
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"this is no graph")
    _until(lambda: (number, "FAILED") in _versions(url))
    shutil.rmtree(folder)


def _versions(url: str) -> set[tuple[int, str]]:
    with urllib.request.urlopen(f"{url}/status", timeout=10) as answer:
        return {(version["version"], version["state"]) for version in json.load(answer)}


def _labelled(url: str) -> int:
    with urllib.request.urlopen(f"{url}/v1/models/tagged/labels/stable", timeout=10) as answer:
        return int(json.load(answer)["model_version_status"][0]["version"])


def _until(is_true: Any) -> None:
    stop = time.monotonic() + _LONGEST_SWAP_S
    while not is_true():
        if time.monotonic() > stop:
            raise SystemExit("a version did not come within a minute")
        time.sleep(0.05)


def _start_locust(url: str, report: Path) -> subprocess.Popen[bytes]:
    file = Path(__file__).with_name("swap_users.py")
    command = [sys.executable, "-m", "locust", "--locustfile", str(file), "--headless", "--host", url]
    command += ["--users", str(_USERS), "--spawn-rate", str(_USERS), "--csv", str(report), "--loglevel", "ERROR"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _report(stats: Path, failures: Path, swaps: int, seconds: list[float]) -> dict[str, Any]:
    with stats.open() as file:
        rows = list(csv.DictReader(file))
    with failures.open() as file:
        errors = sorted({row["Error"] for row in csv.DictReader(file)})
    total = next(row for row in rows if row["Name"] == "Aggregated")
    return {
        "swaps": swaps,
        "median_swap_s": sorted(seconds)[len(seconds) // 2],
        "requests": int(total["Request Count"]),
        "failures": int(total["Failure Count"]),
        "requests_per_s": float(total["Requests/s"]),
        "p50_ms": float(total["50%"]),
        "p99_ms": float(total["99%"]),
        "p999_ms": float(total["99.9%"]),
        "max_ms": float(total["Max Response Time"]),
        "errors": errors,
    }


def _text(report: dict[str, Any]) -> str:
    lines = [
        "| swaps | median s a swap | requests | failed | requests/s | p50 ms | p99 ms | p99.9 ms | longest ms |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        f"| {report['swaps']} | {report['median_swap_s']:.2f} | {report['requests']:,} | {report['failures']} "
        f"| {report['requests_per_s']:,.0f} | {report['p50_ms']:.0f} | {report['p99_ms']:.0f} "
        f"| {report['p999_ms']:.0f} | {report['max_ms']:.0f} |",
        "",
        *report["errors"],
        machine(),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
