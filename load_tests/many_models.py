"""Many models in one server, one of them hot: ``python -m load_tests.many_models [--models 200] [--out FILE.json]``.

Tells what an idle model costs (memory, and CPU time of the server while nobody asks anything), and what one that is hot
answers beside all the others, against what it answers alone in a server of its own: both servers run, and are asked in
turns. Returns 1 if the idle server takes 1 % of a core or more, or the hot model has less than 0.95 of its requests.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from load_tests.bench import cores_used, free_port, machine, server_process, wait_for
from load_tests.driver import Plan, driven
from load_tests.payloads import PATHS

_MOST_IDLE_PERCENT = 1.0
_LEAST_OF_ALONE = 0.95
_WIDTH = 784
_WAY = next(path for path in PATHS if path.protocol == "http")


def main() -> int:
    """Run it all; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200, help="how many are loaded")
    parser.add_argument("--idle-s", type=float, default=30.0, help="seconds for which nobody asks anything")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured seconds of each round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds beside the others and alone, in turns")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("load_tests/results/many_models.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = {"machine": machine(), "models": options.models, **_measure(Path(folder), options)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(_text(report))
    return int(report["idle_percent"] >= _MOST_IDLE_PERCENT or report["of_alone"]["median"] < _LEAST_OF_ALONE)


def _measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    made = _made(work / "made")
    for number in range(options.models):
        shutil.copytree(made, work / "many" / f"model_{number:03}" / "1")
    shutil.copytree(made, work / "one" / "model_000" / "1")
    with _server(work / "one", work / "cache") as (one, one_port):
        alone_bytes, threads_alone = _settled(one), one.num_threads()
        with _server(work / "many", work / "cache") as (many, many_port):
            many_bytes, threads = _settled(many), many.num_threads()
            idle_percent = _idle_percent(many, options.idle_s)
            ports = {"alone": one_port, "beside": many_port}
            rates: dict[str, list[float]] = {"alone": [], "beside": []}
            for number in range(options.rounds):
                for name in sorted(ports, reverse=bool(number % 2)):
                    rates[name].append(_requests_per_s(ports[name], options))
    others = max(options.models - 1, 1)
    return {
        "bytes_per_idle_model": (many_bytes - alone_bytes) / others,
        "threads_per_idle_model": (threads - threads_alone) / others,
        "idle_percent": idle_percent,
        "idle_s": options.idle_s,
        "requests_per_s": rates,
        "of_alone": _spread([b / a for a, b in zip(rates["alone"], rates["beside"], strict=True)]),
    }


def _made(folder: Path) -> Path:
    """The SavedModel of a small dense net, written once by a process that ends."""
    subprocess.run(
        [sys.executable, "-c", f"from load_tests.many_models import save; save({str(folder)!r})"],
        check=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return folder


def save(folder: str) -> None:
    """Write a net of 784 inputs, 128 units and 10 classes to `folder`: 0.4 MB of weights."""
    import keras

    layers = [keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    keras.Sequential([keras.Input((_WIDTH,), name="x"), *layers]).export(folder)


@contextlib.contextmanager
def _server(models: Path, cache: Path) -> Iterator[tuple[psutil.Process, int]]:
    """Kiln on `models`, ready, by the plan that needs no planning."""
    port = free_port()
    command = ["-m", "service", "serve", str(models), "--rest-port", str(port), "--grpc-port", "0"]
    command += ["--host", "127.0.0.1", "--plan", "signature", "--cache-dir", str(cache)]
    with server_process(*command) as process:
        wait_for(f"http://127.0.0.1:{port}/v2/health/ready", 600.0)
        yield process, port


def _settled(process: psutil.Process) -> int:
    """Resident bytes once what comes after the start has been done."""
    while _idle_percent(process, 2.0) > 20 * _MOST_IDLE_PERCENT:
        pass
    return int(process.memory_info().rss)


def _idle_percent(process: psutil.Process, seconds: float) -> float:
    """CPU time of the process over `seconds`, in percent of one core."""
    return 100 * cores_used(process, seconds)


def _input_name(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/model_000", timeout=30) as answer:
        return str(json.load(answer)["inputs"][0]["name"])


def _requests_per_s(port: int, options: argparse.Namespace) -> float:
    """What ``model_000`` answers, asked for one row at a time by a process of its own."""
    row = np.random.default_rng(7).random((1, _WIDTH), np.float32)
    request = base64.b64encode(_WAY.build("model_000", _input_name(port), row)).decode()
    plan = Plan("http", port, options.connections, 1.0, options.seconds, request)
    return driven(plan).requests_per_s


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _text(report: dict[str, Any]) -> str:
    share = report["of_alone"]
    return (
        f"{report['models']} models: {report['bytes_per_idle_model'] / 2**20:.2f} MiB and "
        f"{report['threads_per_idle_model']:.1f} threads for each idle one; "
        f"idle CPU {report['idle_percent']:.2f} % of a core; "
        f"one hot answers {share['median']:.3f} of alone (min {share['min']:.3f}, max {share['max']:.3f})\n"
        f"{report['machine']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
