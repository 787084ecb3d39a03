"""``kiln bench``: its arguments, and what it prints where."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from service.bench.asked import Address, started
from service.bench.bench import DEFAULT_GOAL_MS, Wanted, bench, goal_ms
from service.bench.plot import svg, terminal
from service.bench.progress import Progress
from service.bench.report import Report, as_json, table
from service.bench.wire import PROTOCOLS
from service.errors import KilnError

_GRPC_PORT = 8500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything that ``kiln bench`` takes."""
    parser.add_argument("model", metavar="MODEL", help="name of the model")
    parser.add_argument(
        "models", metavar="MODELS", nargs="?", type=Path,
        help="folder of models, or the model itself: a server of it is started; without it a running one is asked",
    )  # fmt: skip
    parser.add_argument("--url", type=_url, help="REST address of a running server (default: http://localhost:8501)")
    parser.add_argument("--rest-port", type=_port, metavar="PORT", help="the same, for a server on this machine")
    parser.add_argument("--grpc-port", type=_port, metavar="PORT", help=f"its port for gRPC (default: {_GRPC_PORT})")
    parser.add_argument(
        "--slo-ms", type=_positive, metavar="MS",
        help=f"goal for p99, in ms (default: the model's own slo_ms, else {DEFAULT_GOAL_MS:g})",
    )  # fmt: skip
    parser.add_argument(
        "--protocols", type=_protocols, default=tuple(PROTOCOLS), metavar="NAMES",
        help=f"which, with commas between (default: {','.join(PROTOCOLS)})",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=_positive, default=5.0, metavar="S", help="length of one trial (default: %(default)s)"
    )
    parser.add_argument("--rows", type=_count, default=1, metavar="N", help="rows of a request (default: %(default)s)")
    parser.add_argument("--records", type=Path, metavar="FILE", help="ask with those of a warm-up file or request log")
    parser.add_argument("--json", metavar="FILE", help="write all figures there; - is stdout, without the table")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot there")


def run(given: argparse.Namespace, tell: Callable[[str], None]) -> int:
    """Bench as the arguments say; `tell` takes what goes to stdout. Returns the exit code.

    0: every protocol has a capacity; 1: one has none, or it was interrupted; 2: wrongly called.
    """
    progress = Progress(sys.stderr)
    if given.models is not None and (given.url or given.rest_port or given.grpc_port):
        progress.tell("kiln bench: MODELS to start a server, or the ports of a running one expected, got both")
        return 2
    if given.url and given.rest_port:
        progress.tell("kiln bench: one of --url and --rest-port expected, got both")
        return 2
    # A shell may have jobs of a script ignore SIGINT; and a server that was started is not to be left behind.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT)),
    }
    try:
        if given.models is None:
            host, port = given.url or ("localhost", given.rest_port or 8501)
            return _bench(Address(host, port, given.grpc_port or _GRPC_PORT), given, tell, progress)
        with started(given.models, given.model, progress.tell) as address:
            return _bench(address, given, tell, progress)
    except KeyboardInterrupt:
        progress.tell("kiln bench: interrupted before anything was measured")
        return 1
    except (KilnError, OSError) as error:
        progress.tell(f"kiln bench: {error}")
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bench(address: Address, given: argparse.Namespace, tell: Callable[[str], None], progress: Progress) -> int:
    wanted = Wanted(given.model, given.protocols, given.slo_ms, given.seconds, given.rows, given.records)
    report = Report(given.model, address.url, goal_ms(address, wanted), given.seconds, given.rows)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(bench(address, wanted, report, progress))
    except KeyboardInterrupt:
        report.interrupted = True
    progress.end()
    _write(report, given, tell)
    return 0 if report.is_complete and not report.interrupted else 1


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return None
    return uvloop.new_event_loop


def _write(report: Report, given: argparse.Namespace, tell: Callable[[str], None]) -> None:
    text = json.dumps(as_json(report), indent=1)
    if given.json == "-":
        tell(text)
    else:
        tell(f"{report.model} at {report.url}, goal {report.slo_ms:g} ms, {report.rows} rows a request\n")
        tell(table(report))
        if plot := terminal(report):
            tell(f"\n{plot}")
        if given.json:
            Path(given.json).write_text(text + "\n")
    if given.svg:
        given.svg.write_text(svg(report))


def _url(text: str) -> tuple[str, int]:
    parts = urlsplit(text if "//" in text else f"//{text}", "http")
    try:
        port = parts.port
    except ValueError:
        port = None
        parts = urlsplit("")
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
        raise argparse.ArgumentTypeError(f"http://HOST:PORT expected, got {text!r}")
    return parts.hostname, port or 80


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"1 to 65535 expected, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 expected, got {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 expected, got {text!r}")
    return int(text)


def _protocols(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    wrong = [name for name in names if name not in PROTOCOLS]
    if wrong or not names:
        got = wrong[0] if wrong else text
        raise argparse.ArgumentTypeError(f"some of {', '.join(PROTOCOLS)} expected, got {got!r}")
    return names
