"""NVIDIA's load generator finds in Kiln the server that it expects, in each of its modes.

``KILN_PERF_ANALYZER`` is the command that runs it. Its wheel needs a newer C library than many systems have, and so
it is no dependency of the tests.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.process import DIGITS, Server

COMMAND = os.environ.get("KILN_PERF_ANALYZER", "")
_REQUESTS = 50
_COUNT = ("--measurement-mode", "count_windows", "--measurement-request-count", str(_REQUESTS))
_LOAD = ("--max-trials", "3", "--stability-percentage", "999", "--concurrency-range", "2")
_SHARED = ("--shared-memory", "system", "--output-shared-memory-size", "1024")
_JSON = ("--input-tensor-format", "json", "--output-tensor-format", "json")
_TFSERVING = ("--service-kind", "tfserving")
MODES: dict[str, tuple[str, ...]] = {
    "http, binary": ("-i", "http"),
    "http, JSON": ("-i", "http", *_JSON),
    "http, batches, asynchronous": ("-i", "http", "-b", "8", "--async"),
    "http, shared memory": ("-i", "http", *_SHARED),
    "grpc": ("-i", "grpc"),
    "grpc, one version": ("-i", "grpc", "-x", "1"),
    "grpc, compressed": ("-i", "grpc", "--grpc-compression-algorithm", "gzip"),
    "grpc, streams": ("-i", "grpc", "--streaming"),
    "grpc, shared memory": ("-i", "grpc", *_SHARED),
    "grpc, streams, shared memory": ("-i", "grpc", "--streaming", *_SHARED),
    "TensorFlow Serving": ("-i", "grpc", *_TFSERVING, "--shape", "image:1,8,8,1"),
    "TensorFlow Serving, batches": ("-i", "grpc", *_TFSERVING, "-b", "4"),
}

pytestmark = pytest.mark.skipif(not COMMAND, reason="KILN_PERF_ANALYZER names no command that runs perf_analyzer")


@pytest.fixture(scope="module")
def shared(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of ``digits`` that takes tensors in shared memory."""
    running = Server(DIGITS, "--cache-dir", cache, "--shared-memory", log=tmp_path_factory.mktemp("shared") / "log")
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


@pytest.mark.parametrize("mode", MODES)
def test_it_measures(shared: Server, mode: str):
    """It ends well and tells a throughput; the server answered its requests in the dialect meant, and refused none."""
    arguments = MODES[mode]
    port = shared.rest_port if "http" in arguments else shared.grpc_port
    dialect = "grpc-tfs" if "tfserving" in arguments else "rest-v2" if "http" in arguments else "grpc-v2"
    before = answered(shared)
    done = subprocess.run(
        [*shlex.split(COMMAND), "-m", "digits", "-u", f"127.0.0.1:{port}", *_COUNT, *_LOAD, *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    throughput = re.search(r"^Concurrency: 2, throughput: ([\d.]+) infer/sec", told, re.MULTILINE)
    assert throughput, told
    assert float(throughput[1]) > 0
    asked = answered(shared) - before
    assert asked[dialect, "ok"] >= _REQUESTS
    assert {*asked} <= {(dialect, "ok"), (dialect, "cancelled")}  # it leaves in the middle of its last requests
    if dialect != "grpc-tfs":  # statistics are Triton's
        counted = re.search(r"Inference count: (\d+)", told)
        assert counted, told
        assert int(counted[1]) >= _REQUESTS


def answered(server: Server) -> Counter[tuple[str, str]]:
    """How many requests there were of each dialect, by outcome."""
    text = server.request("GET", "/metrics")[1].decode()
    found = re.findall(r'^kiln_requests_total\{code="(\w+)",.*protocol="([\w-]+)".*\} (\S+)$', text, re.MULTILINE)
    return Counter({(protocol, code): int(float(count)) for code, protocol, count in found})
