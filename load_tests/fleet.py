"""One server of one model for a load test: planned, started, ready; and tables in Markdown."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from load_tests.bench import free_port, machine, server_process, wait_for
from service.bench.asked import Address


@dataclass(frozen=True)
class Served:
    """A running server, with its process and the model that it was started for."""

    address: Address
    process: psutil.Process
    model: str


def prepare(work: Path, model: str, settings: Sequence[Sequence[str]] = ((),)) -> None:
    """Write `model` (one of `bench_models`) below `work`; find out its plans for servers with each of `settings`."""
    _python("-m", "load_tests.bench_models", str(work / "models"), model)
    _write_config(work, model, {})
    for each in dict.fromkeys(map(tuple, settings)):
        _python("-m", "service", "plan", str(work / "models"), *_settings(work, model), *each)


@contextlib.contextmanager
def serving(work: Path, model: str, config: Mapping[str, object], settings: Sequence[str] = ()) -> Iterator[Served]:
    """A server of what `prepare` left in `work`, ready; `config` is the model's, `settings` are more flags."""
    _write_config(work, model, config)
    address = Address("127.0.0.1", free_port(), free_port())
    ports = ["--rest-port", str(address.rest_port), "--grpc-port", str(address.grpc_port)]
    command = ["-m", "service", "serve", str(work / "models"), "--host", address.host, *ports]
    with server_process(*command, *_settings(work, model), *settings) as process:
        wait_for(f"{address.url}/v2/health/ready")
        yield Served(address, process, model)


def _settings(work: Path, model: str) -> list[str]:
    return ["--cache-dir", str(work / "cache"), "--models-config", str(work / f"{model}.json")]


def _write_config(work: Path, model: str, config: Mapping[str, object]) -> None:
    (work / f"{model}.json").write_text(json.dumps({"models": {model: dict(config)}}))  # JSON is YAML


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=1800)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first two are numbers."""
    rule = ["---" if place < 2 else "--:" for place in range(len(heads))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def put_between(path: Path, name: str, text: str) -> None:
    """Write `text` between the lines ``<!-- name -->`` and ``<!-- /name -->`` of a file.

    Raises:
        SystemExit: the file has no such lines.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = path.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{path}: the lines {start} and {end} expected")
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")


def tell(options: argparse.Namespace, name: str, text: str, figures: Mapping[str, object]) -> None:
    """Print `text`; write the figures as JSON to ``--out``, and the text between the marks `name` of ``--table``."""
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "model": options.model, "slo_ms": options.slo_ms, **figures}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.table:
        put_between(options.table, name, text)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Least / median / most."""
    ordered = sorted(values)
    three = (ordered[0], ordered[len(ordered) // 2], ordered[-1])
    return " / ".join(f"{value:,.{digits}f}" for value in three)
