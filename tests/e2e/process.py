"""``kiln serve`` as a process of its own, and the few things that a test asks of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
DIGITS = MODELS / "digits" / "1"
"""What most tests serve: one small model, whose answers differ from one digit to the next."""
START_S = 300.0
"""How long a server may take until it is ready, with all models to convert and a busy machine."""
STOP_S = 30.0
_LISTENS = re.compile(r"REST on .*:(\d+), gRPC on .*:(\d+)")


def wait_for(condition: Callable[[], bool], what: str, deadline_s: float = 30.0) -> None:
    """Poll until `condition` holds; `AssertionError` with `what` if it does not within `deadline_s`."""
    stop = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < stop, f"{what}: not within {deadline_s:.0f} s"
        time.sleep(0.01)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours, without settings of Kiln that the person who runs the tests may have."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KILN_")} | dict(extra or {})


def command(*arguments: str | Path) -> list[str]:
    """``kiln serve`` with `arguments`, as the interpreter of the tests runs it."""
    return [sys.executable, "-m", "service", "serve", *map(str, arguments)]


class Server:
    """A running ``kiln serve`` on free ports of 127.0.0.1; its log goes to the file `log`."""

    def __init__(self, *arguments: str | Path, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log_path = log
        self._ports: tuple[int, int] | None = None
        ports = ("--host", "127.0.0.1", "--rest-port", "0", "--grpc-port", "0")
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command(*arguments, *ports), cwd=ROOT, env=environment(env), stdout=file, stderr=file
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def rest_port(self) -> int:
        return self._listening()[0]

    @property
    def grpc_port(self) -> int:
        return self._listening()[1]

    def _listening(self) -> tuple[int, int]:
        if self._ports is None:
            self.wait(lambda: _LISTENS.search(self.log) is not None, "listening")
            match = _LISTENS.search(self.log)
            assert match
            self._ports = int(match[1]), int(match[2])
        return self._ports

    def wait(self, condition: Callable[[], bool], what: str, deadline_s: float = START_S) -> None:
        """Wait for `condition` of the running process; if it fails the log is shown."""

        def holds() -> bool:
            assert self.process.poll() is None, f"{what}: the server left with {self.process.returncode}"
            return condition()

        try:
            wait_for(holds, what, deadline_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def wait_ready(self) -> None:
        self.wait(lambda: self.get("/v2/health/ready")[0] == 200, "ready")

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One HTTP request on a connection of its own: status and body."""
        return self.exchange(method, path, body, headers)[:2]

    def exchange(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """As `request`, with the headers of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.rest_port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read(), response.headers

    def get(self, path: str) -> tuple[int, Any]:
        status, body = self.request("GET", path)
        return status, json.loads(body)

    def predict(self, body: object, model: str = "digits") -> tuple[int, Any]:
        """TensorFlow Serving's REST predict: status and answer."""
        status, answer = self.request("POST", f"/v1/models/{model}:predict", json.dumps(body).encode())
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        """The sum of all series of `name`, which may have labels written out: ``name{model="a"}``."""
        text = self.request("GET", "/metrics")[1].decode()
        pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$"
        values = re.findall(pattern, text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def children(self) -> list[psutil.Process]:
        """Processes that the server has started and that are still there."""
        children: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return children

    def mapped(self) -> str:
        """The files mapped into the server's memory: its shared libraries."""
        return Path(f"/proc/{self.process.pid}/maps").read_text()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def exit_code(self, deadline_s: float = STOP_S) -> int:
        """Wait for the process to end."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not end within {deadline_s:.0f} s\n{self.log}") from None

    def kill(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
