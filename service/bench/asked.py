"""The server that is asked: what it tells of a model, what its metrics have counted, and one that is started for it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prometheus_client.parser import text_string_to_metric_families

from service.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from service.tensors import DEFAULT_SIGNATURE, DataType, Signature, TensorSpec

_ASK_S = 10.0
_START_S = 600.0
"""How long a server may take to be ready: files are converted first."""
_STOP_S = 30.0
_LOG_CHARACTERS = 1500
_TYPES = {each.value: each for each in DataType}
_SUMS = {
    "cpu_s": "process_cpu_seconds_total",
    "batches": "kiln_batch_rows_count",
    "rows": "kiln_batch_rows_sum",
    "queue_s": "kiln_queue_seconds_sum",
    "execution_s": "kiln_execution_seconds_sum",
    "decode_s": "kiln_decode_seconds_sum",
    "encode_s": "kiln_encode_seconds_sum",
    "answered": "kiln_encode_seconds_count",
}


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    rest_port: int
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://{_bracketed(self.host)}:{self.rest_port}"

    @property
    def grpc(self) -> str:
        return f"{_bracketed(self.host)}:{self.grpc_port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class Counters:
    """What a server has counted so far of one model, CPU excepted: that is the whole process's."""

    cpu_s: float
    batches: float
    rows: float
    queue_s: float
    execution_s: float
    decode_s: float
    encode_s: float
    answered: float


@dataclass(frozen=True)
class ServerShare:
    """What the server did during a trial.

    `cores` is CPU time over time, `cpu_us` a request's; `decode_us`, `queue_us` and `encode_us` are what a request took
    on the average, `execute_us` its part of the batches' runs. None where nothing was counted.
    """

    cores: float
    cpu_us: float | None
    batch_rows: float | None
    decode_us: float | None
    queue_us: float | None
    execute_us: float | None
    encode_us: float | None


def share(before: Counters, after: Counters, seconds: float) -> ServerShare:
    """The difference of two counts that are `seconds` apart."""
    answered = after.answered - before.answered
    batches = after.batches - before.batches

    def each_us(name: str) -> float | None:
        return (getattr(after, name) - getattr(before, name)) / answered * 1e6 if answered > 0 else None

    return ServerShare(
        cores=(after.cpu_s - before.cpu_s) / max(seconds, 1e-9),
        cpu_us=each_us("cpu_s"),
        batch_rows=(after.rows - before.rows) / batches if batches > 0 else None,
        decode_us=each_us("decode_s"),
        queue_us=each_us("queue_s"),
        execute_us=each_us("execution_s"),
        encode_us=each_us("encode_s"),
    )


def parse_counters(page: str, model: str, protocol: str) -> Counters | None:
    """The sums in a page of metrics, over all versions of `model`; None if it is not Kiln's."""
    found = dict.fromkeys(_SUMS, 0.0)
    names = {sample: field for field, sample in _SUMS.items()}
    is_known = False
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            is_known = is_known or sample.name == "kiln_ready"
            field = names.get(sample.name)
            of_model = sample.labels.get("model", model) == model
            if field is not None and of_model and sample.labels.get("protocol", protocol) == protocol:
                found[field] += sample.value
    return Counters(**found) if is_known else None


def parse_goal_ms(page: str, model: str) -> float | None:
    """The goal that the page tells of `model`, in ms."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "kiln_slo_seconds" and sample.labels.get("model") == model:
                return sample.value * 1e3
    return None


def metrics_page(address: Address) -> str:
    """The server's page of metrics; empty if it has none."""
    try:
        return _get(f"{address.url}/metrics").decode()
    except (NotFound, UnicodeDecodeError):
        return ""


def read_signature(address: Address, model: str) -> Signature:
    """What the server says that `model` takes.

    Raises:
        Unavailable: no server answers there, or the model is not ready.
        NotFound: it has no such model; the text has those that there are.
        FailedPrecondition: what it says is not as the protocol has it.
    """
    try:
        told = json.loads(_get(f"{address.url}/v2/models/{quote(model, safe='')}"))
        inputs, outputs = (tuple(_spec(each) for each in told[side]) for side in ("inputs", "outputs"))
    except NotFound:
        models, states = _models(address), _states(address, model)
        if states:
            raise Unavailable(f"model {model!r} is not ready: {states}") from None
        raise NotFound(f"{address.url} has no model {model!r}; it has {models or 'none'}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(f"{address.url} does not tell what model {model!r} takes: {error!r}") from None
    return Signature(DEFAULT_SIGNATURE, inputs, outputs)


def _spec(told: Any) -> TensorSpec:
    shape = tuple(None if size < 0 else size for size in told["shape"])
    return TensorSpec(str(told["name"]), _TYPES[told["datatype"]], shape)


def _states(address: Address, model: str) -> str:
    return "; ".join(
        f"version {each['version']} is {each['state']}" + (f" ({each['reason']})" if each.get("reason") else "")
        for each in _status(address)
        if each.get("model") == model
    )


def _models(address: Address) -> str:
    return ", ".join(sorted({str(each.get("model")) for each in _status(address)}))


def _status(address: Address) -> list[dict[str, Any]]:
    """Empty for a server that is not Kiln."""
    try:
        return list(json.loads(_get(f"{address.url}/status")))
    except (NotFound, FailedPrecondition, ValueError):
        return []


def _get(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_ASK_S) as answer:  # noqa: S310 - the user's own
            body: bytes = answer.read()
            return body
    except urllib.error.HTTPError as error:
        text = error.read(300).decode(errors="replace")
        if error.code == 404:
            raise NotFound(text) from None
        kind = Unavailable if error.code == 503 else FailedPrecondition
        raise kind(f"{url}: {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise Unavailable(f"no server answers at {url}: {error}") from None


def free_ports() -> tuple[int, int]:
    """Two TCP ports that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]


@contextlib.contextmanager
def started(models: Path, model: str, tell: Any) -> Iterator[Address]:
    """A server of `model` in the folder `models`, its plans known, on free ports; ended with the context.

    `models` may also be the model itself: its file, or the folder of its versions.

    Raises:
        InvalidArgument: there is no such path.
        Unavailable: the server ends, or is not ready in time; the text has the end of its log.
    """
    if not models.exists():
        raise InvalidArgument(f"{models}: no such file or folder")
    path = models / model if (models / model).is_dir() else models
    tell(f"finding out the plans of {model}")
    arguments = [str(path), "--name", model]
    rest_port, grpc_port = free_ports()
    address = Address("127.0.0.1", rest_port, grpc_port)
    with tempfile.TemporaryFile() as log:
        _plan(arguments, log)
        command = [*_python("serve"), *arguments, "--host", address.host, "--rest-port", str(rest_port)]
        tell(f"starting a server of {path}")
        process = subprocess.Popen([*command, "--grpc-port", str(grpc_port)], stdout=log, stderr=log)
        try:
            _wait_ready(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _python(command: str) -> list[str]:
    return [sys.executable, "-P", "-m", "service", command]


def _plan(arguments: list[str], log: Any) -> None:
    done = subprocess.run([*_python("plan"), *arguments], stdout=log, stderr=log, check=False)
    if done.returncode:
        raise Unavailable(f"kiln plan {' '.join(arguments)} left with {done.returncode}:\n{_end_of(log)}")


def _wait_ready(address: Address, process: subprocess.Popen[bytes], log: Any) -> None:
    stop = time.monotonic() + _START_S
    while time.monotonic() < stop:
        if process.poll() is not None:
            raise Unavailable(f"the server left with {process.returncode}:\n{_end_of(log)}")
        with contextlib.suppress(Unavailable, FailedPrecondition, NotFound):
            _get(f"{address.url}/v2/health/ready")
            return
        time.sleep(0.1)
    raise Unavailable(f"the server was not ready within {_START_S:.0f} s:\n{_end_of(log)}")


def _end_of(log: Any) -> str:
    log.seek(0)
    text: str = log.read().decode(errors="replace")
    return text[-_LOG_CHARACTERS:].strip()
