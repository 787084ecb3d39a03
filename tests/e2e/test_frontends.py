"""``kiln serve --frontends``: real processes, asked while they die, while models change, and while they stop."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from service.rpc._generated.inference import open_inference_pb2 as oip
from tests.e2e.conftest import Digits, Start
from tests.e2e.process import DIGITS, ROOT, Server, command, environment, wait_for

FRONTENDS = ("--frontends", "2")
PORTS = ("--host", "127.0.0.1", "--rest-port", "0", "--grpc-port", "0")
LOST = ("ConnectionResetError", "ConnectionRefusedError", "RemoteDisconnected", "BrokenPipeError", "IncompleteRead")
"""What callers see of a process that is gone."""


def front_ends(server: Server) -> dict[int, psutil.Process]:
    """By their numbers."""
    found = {}
    for child in server.children():
        arguments = child.cmdline()
        if "service.frontend" in arguments:
            found[int(arguments[arguments.index("service.frontend") + 1])] = child
    return found


class Callers:
    """Threads that ask one row each, on connections of their own, and count answers and failures."""

    def __init__(self, server: Server, digits: Digits, count: int = 4) -> None:
        self.answers = 0
        self.failures: list[str] = []
        self._over = threading.Event()
        self._port = server.rest_port
        self._body = json.dumps({"instances": digits.images[:1].tolist()}).encode()
        self._expected = digits.probabilities[0]
        self._threads = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(count)]

    @contextmanager
    def asking(self) -> Iterator[Callers]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join(30.0)

    def _ask_on(self) -> None:
        while not self._over.is_set():
            with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)) as connection:
                try:
                    while not self._over.is_set():
                        connection.request("POST", "/v1/models/digits:predict", self._body)
                        response = connection.getresponse()
                        body = response.read()
                        if response.status != 200:
                            self.failures.append(f"{response.status} {body!r}")
                            break
                        assert np.allclose(json.loads(body)["predictions"][0], self._expected, atol=1e-4)
                        self.answers += 1
                        if response.getheader("connection") == "close":
                            break
                except (OSError, http.client.HTTPException) as error:
                    self.failures.append(repr(error))

    def wait_for_more(self, count: int = 50) -> None:
        wanted = self.answers + count
        wait_for(lambda: self.answers >= wanted, "answers")


def infer(port: int, digits: Digits) -> Any:
    request = oip.ModelInferRequest(model_name="digits")
    request.inputs.add(name="image", datatype="FP32", shape=[1, 8, 8, 1])
    request.raw_input_contents.append(digits.images[:1].tobytes())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        data = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(
            request.SerializeToString(), timeout=30
        )
    response = oip.ModelInferResponse.FromString(data)
    return np.frombuffer(response.raw_output_contents[0], np.float32)


def test_one_server_in_several_processes(start: Start, digits: Digits):
    """REST and gRPC on one port each, one page of metrics, one log that names its processes, one end."""
    server = start(DIGITS, *FRONTENDS)
    assert sorted(front_ends(server)) == [1, 2]
    for _ in range(8):  # whichever front end a connection comes to
        status, answer = server.predict({"instances": digits.images[:2].tolist()})
        assert status == 200
        assert np.allclose(answer["predictions"], digits.probabilities[:2], atol=1e-4)
    for _ in range(4):
        assert np.allclose(infer(server.grpc_port, digits), digits.probabilities[0], atol=1e-4)
    for _ in range(4):
        assert server.metric("kiln_requests_total") == 12
        assert server.metric("kiln_frontends") == 2
        assert server.get("/v2/models/digits/stats")[1]["model_stats"][0]["inference_count"] == 20
    assert " engine " in server.log
    server.signal()
    assert server.exit_code() == 0
    assert front_ends_are_gone(server)


def front_ends_are_gone(server: Server) -> bool:
    return not any(
        "service.frontend" in process.info["cmdline"] and process.info["ppid"] == server.process.pid
        for process in psutil.process_iter(["cmdline", "ppid"])
        if process.info["cmdline"]
    )


def test_a_front_end_that_is_killed_costs_its_own_requests_alone(start: Start, digits: Digits):
    """It is started anew; who asked the other one has not noticed, and a new connection finds both."""
    server = start(DIGITS, *FRONTENDS)
    before = front_ends(server)
    with Callers(server, digits, 8).asking() as callers:
        callers.wait_for_more()
        assert callers.failures == []
        before[1].kill()
        callers.wait_for_more()
        server.wait(lambda: 1 in front_ends(server) and front_ends(server)[1].pid != before[1].pid, "started anew")
        server.wait(lambda: server.metric("kiln_frontends") == 2, "both there")
        callers.wait_for_more()
    assert len(callers.failures) <= 8, "no caller fails twice"
    assert [failure for failure in callers.failures if not failure.startswith(LOST)] == []
    assert front_ends(server)[2].pid == before[2].pid
    assert server.metric("kiln_frontend_restarts_total") == 1
    assert "front end 1 has died (signal 9); it is started anew" in server.log


def is_served_alone(server: Server, number: int) -> bool:
    return [status["version"] for status in server.get("/status")[1]] == [number]


def test_models_change_without_a_lost_request(start: Start, digits: Digits, tmp_path: Path):
    """A new version takes over while front ends go on; the one before it is let go."""
    models = tmp_path / "models"
    shutil.copytree(DIGITS, models / "digits" / "1")
    server = start(models, *FRONTENDS, "--poll-s", "0.1")
    with Callers(server, digits).asking() as callers:
        for number in (2, 3):
            callers.wait_for_more()
            shutil.copytree(DIGITS, tmp_path / "next")
            (tmp_path / "next").rename(models / "digits" / str(number))
            server.wait(partial(is_served_alone, server, number), "the new version alone")
        callers.wait_for_more()
    assert callers.failures == []


def test_a_stop_finishes_what_was_accepted(start: Start, digits: Digits):
    """SIGTERM to the group, as a terminal sends it: no answer is lost, and all processes end."""
    server = start(DIGITS, *FRONTENDS)
    with Callers(server, digits).asking() as callers:
        callers.wait_for_more()
        for process in (*front_ends(server).values(), psutil.Process(server.process.pid)):
            process.send_signal(signal.SIGTERM)
        assert server.exit_code() == 0
    assert [failure for failure in callers.failures if not failure.startswith(("503", *LOST))] == []
    assert "Traceback" not in server.log


def test_the_end_of_the_engine_is_the_end_of_all(start: Start):
    """Front ends do not outlive it, and its exit code is the server's."""
    server = start(DIGITS, *FRONTENDS)
    left = front_ends(server).values()
    server.signal(signal.SIGKILL)
    assert server.exit_code() == -signal.SIGKILL
    psutil.wait_procs(left, timeout=10)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in left)


def test_each_front_end_follows_its_requests(start: Start, digits: Digits, tmp_path: Path):
    """Access log, request log and the counts of both are of one server; files of two processes do not collide."""
    kept = tmp_path / "kept"
    options = ("--access-log", "--log-format", "json", "--request-log", kept, "--request-log-share", "1")
    server = start(DIGITS, *FRONTENDS, *options, "--request-log-format", "jsonl")
    body = json.dumps({"image": digits.images[0].tolist()}).encode()
    ask_until_both_answered(server, body)
    asked = len(access_lines(server))
    server.wait(lambda: server.metric('kiln_request_log_records_total{outcome="written"}') == asked, "all are written")
    assert server.metric("kiln_requests_total") == asked
    assert {line["process"] for line in access_lines(server)} == {"frontend-1", "frontend-2"}
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert sorted({path.name.split("-")[2] for path in files}) == ["frontend1", "frontend2"]
    assert sum(len(path.read_text().splitlines()) for path in files) == asked
    server.signal()
    assert server.exit_code() == 0


def access_lines(server: Server) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["logger"] == "kiln.access"]


def ask_until_both_answered(server: Server, body: bytes) -> None:
    """Whichever the kernel gives a connection to: after a while each has had some."""
    answers = 0

    def both() -> bool:
        nonlocal answers
        status, answer = server.request("POST", "/predict/digits", body)
        assert status == 200, answer
        answers += 1
        lines = access_lines(server)
        return len(lines) == answers and len({line["process"] for line in lines}) == 2

    server.wait(both, "requests at both front ends")


def test_what_keeps_front_ends_from_starting(cache: Path, tmp_path: Path):
    """Is told as without them."""
    (tmp_path / "file").touch()
    done = run(DIGITS, "--cache-dir", cache, *PORTS, *FRONTENDS, "--request-log", tmp_path / "file")
    assert done.returncode == 1
    assert f"request_log: {tmp_path / 'file'} cannot be used" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("side", ["rest", "grpc"])
def test_a_port_that_is_taken(side: str, cache: Path):
    """Is told at once, though front ends could share it with whoever has it."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ports = {"rest": 0, "grpc": 0} | {side: port}
        arguments = [f"--{name}-port={number}" for name, number in ports.items()]
        done = run(DIGITS, "--cache-dir", cache, "--host", "127.0.0.1", *FRONTENDS, *arguments)
    assert done.returncode == 1
    assert f"port 127.0.0.1:{port} cannot be bound: Address already in use" in done.stderr


def test_envoy_has_no_front_ends(cache: Path):
    """The two exclude each other, which is said."""
    done = run(DIGITS, "--cache-dir", cache, *FRONTENDS, "--grpc-transport", "envoy")
    assert done.returncode == 1
    assert "frontends: 0 expected with grpc_transport envoy, got 2" in done.stderr


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_nothing_is_left_in_shared_memory(start: Start, digits: Digits):
    """Whatever ends, and however: the memory between processes has no name."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    server = start(DIGITS, *FRONTENDS)
    server.predict({"instances": digits.images[:1].tolist()})
    server.signal(signal.SIGKILL)
    server.exit_code()
    assert {path.name for path in Path("/dev/shm").iterdir() if "kiln" in path.name} <= before
