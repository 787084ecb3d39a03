"""``kiln serve --grpc-transport envoy``: the process becomes Envoy, and is a Kiln all the same."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2

from service.rpc._generated.inference import open_inference_pb2 as pb
from tests.e2e.callers import OpenInferenceGrpc
from tests.e2e.conftest import CLIENTS, Digits, Start, run_python
from tests.e2e.process import DIGITS, ROOT, Server, command, environment

pytest.importorskip("pyvoy", reason="the package pyvoy is not there: this platform has no Envoy")
INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def envoy(server: Server, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One over Envoy, ready; SIGTERM ends it with exit code 0."""
    log = tmp_path_factory.mktemp("envoy") / "log"
    running = Server(DIGITS, "--cache-dir", cache, "--grpc-transport", "envoy", "--max-queue-rows", "50000", log=log)
    try:
        running.wait_ready()
        yield running
        running.signal(signal.SIGTERM)
        assert running.exit_code() == 0, running.log
    finally:
        running.kill()


@pytest.fixture
def channel(envoy: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{envoy.grpc_port}") as channel:
        yield channel


def test_the_process_stays_the_same(envoy: Server):
    """Envoy runs under the id that was started, with the models in it, beside Envoy's own malloc."""
    mapped = envoy.mapped()
    assert all(part in mapped for part in ("_bin/envoy", "_pyvoy"))
    assert any(part in mapped for part in ("libopenvino", "libtensorflow", "ai_edge_litert"))
    assert envoy.get("/status")[1][0]["plans"]


@pytest.mark.parametrize("client", ["triton_grpc.py", "tfserving_grpc.py"])
def test_the_clients_that_people_use(envoy: Server, digits: Digits, tmp_path: Path, client: str):
    """Tritonclient and TensorFlow Serving's stubs get Keras's own probabilities."""
    images = tmp_path / "images.npy"
    np.save(images, digits.images[:20])
    report = json.loads(run_python(CLIENTS / client, f"127.0.0.1:{envoy.grpc_port}", images).stdout)
    assert report["versions"] == ["1"]
    assert np.allclose(report["probabilities"], digits.probabilities[:20], rtol=0, atol=1e-4)


def test_many_callers_at_once_each_get_their_own_answer(envoy: Server, digits: Digits):
    """Over eight connections, in shared batches."""
    chosen = digits.distinct(32)

    def ask(worker: int) -> bool:
        caller = OpenInferenceGrpc(envoy.grpc_port)
        try:
            rows = [row for row in range(32) if row % 8 == worker] * 10
            answers = [caller.ask(chosen.images[row]) for row in rows]
            return np.allclose(answers, chosen.probabilities[rows], rtol=0, atol=1e-4)
        finally:
            caller.close()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [True] * 8


@pytest.mark.parametrize("compression", list(grpc.Compression))
def test_messages_of_many_megabytes(channel: grpc.Channel, digits: Digits, compression: grpc.Compression):
    """In pieces, compressed or not; and over the limit, where the answer comes before the message is read."""
    rows = np.repeat(digits.images[:1], 40_000, axis=0)
    request = pb.ModelInferRequest(model_name="digits", raw_input_contents=[rows.tobytes()])
    request.inputs.add(name="image", datatype="FP32", shape=rows.shape)
    infer = channel.unary_unary(INFER)
    answer = pb.ModelInferResponse.FromString(infer(request.SerializeToString(), timeout=60, compression=compression))
    got = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(-1, 10)
    assert got.shape == (40_000, 10)
    assert np.allclose(got, digits.probabilities[0], rtol=0, atol=1e-4)
    with pytest.raises(grpc.RpcError) as refused:
        infer(bytes(65 << 20), timeout=60, compression=compression)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == f"the message has {_size(compression)} bytes, over the limit of {64 << 20}"


def _size(compression: grpc.Compression) -> int:
    """What is known of a message of 65 MiB when it is refused: all of it, or that it inflates to too much."""
    return 65 << 20 if compression is grpc.Compression.NoCompression else (64 << 20) + 1


def test_texts_with_any_letters(channel: grpc.Channel):
    """As they are, though HTTP/2 carries ASCII."""
    request = pb.ModelInferRequest(model_name="größe 100 %\n")
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(INFER)(request.SerializeToString(), timeout=30)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert refused.value.details().startswith("Servable not found for request: Latest(größe 100 %\n)")


def test_a_stream_of_requests(channel: grpc.Channel, digits: Digits):
    """Each is answered while the stream is open."""
    request = pb.ModelInferRequest(model_name="digits", raw_input_contents=[digits.images[:1].tobytes()])
    request.inputs.add(name="image", datatype="FP32", shape=[1, 8, 8, 1])
    stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    answers = list(stream(iter([request.SerializeToString()] * 50), timeout=60))
    got = [pb.ModelStreamInferResponse.FromString(answer) for answer in answers]
    assert [answer.error_message for answer in got] == [""] * 50
    for answer in got:
        row = np.frombuffer(answer.infer_response.raw_output_contents[0], np.float32)
        assert np.allclose(row, digits.probabilities[0], rtol=0, atol=1e-4)


def test_plain_http_is_told_what_is_spoken_here(envoy: Server):
    """405, over HTTP/1.1."""
    with socket.create_connection(("127.0.0.1", envoy.grpc_port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: kiln\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.endswith(b"POST expected, this port speaks gRPC")


def test_stopping_is_told_and_clean(start: Start):
    """Those who watch learn that it stops; then the process ends with exit code 0 and without a word of a fault."""
    server = start(DIGITS, "--grpc-transport", "envoy")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=60)
        statuses = (health_pb2.HealthCheckResponse.FromString(data).status for data in watch)
        while next(statuses) != health_pb2.HealthCheckResponse.SERVING:
            pass
        server.signal(signal.SIGINT)
        assert next(statuses) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as ended:
            next(statuses)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.exit_code() == 0, server.log
    assert server.log.splitlines()[-1].endswith("stopped")
    assert "Traceback" not in server.log


def test_stopped_while_models_load(start: Start, tmp_path: Path):
    """The child that converts ends too, and nothing is left behind."""
    cache = tmp_path / "fresh"
    cache.mkdir()
    server = start(DIGITS, "--grpc-transport", "envoy", wait=False, cache=cache)
    server.wait(lambda: "importing digits" in server.log and bool(server.children()), "importing")
    children = server.children()
    server.signal()
    assert server.exit_code(5.0) == 0, server.log
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert [path.name for path in cache.iterdir()] in ([], ["plans"])  # where programs go, with none in it


def test_a_model_is_converted_in_the_child(start: Start, digits: Digits, tmp_path: Path):
    """The child is the interpreter that Kiln was started with, not Envoy."""
    cache = tmp_path / "fresh"
    cache.mkdir()
    server = start(DIGITS, "--grpc-transport", "envoy", cache=cache)
    status, answer = server.predict({"instances": digits.images[:1].tolist()})
    assert status == 200
    assert np.allclose(answer["predictions"], digits.probabilities[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("flag", "name"), [("--grpc-port", "gRPC"), ("--rest-port", "REST")])
def test_a_port_that_is_taken(flag: str, name: str):
    """Exit code 1 and one line that names it, as with grpcio."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = _run(DIGITS, "--host", "127.0.0.1", *_ports(flag, port))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert f"kiln serve: the {name} port 127.0.0.1:{port} cannot be bound: " in done.stderr


def test_models_that_are_not_there(tmp_path: Path):
    """Exit code 1 and one line, though it is only found out within Envoy."""
    done = _run(tmp_path / "no", "--host", "127.0.0.1", *_ports("--rest-port", 0))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("kiln serve: ")
    assert str(tmp_path / "no") in done.stderr


def _ports(flag: str, port: int) -> list[str]:
    ports = {"--rest-port": 0, "--grpc-port": 0} | {flag: port}
    return [part for name, number in ports.items() for part in (name, str(number))]


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, "--grpc-transport", "envoy"),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_the_package(tmp_path: Path):
    """Exit code 1, and what to install."""
    hide = "import sys; sys.modules['pyvoy'] = None; from service.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["serve", str(DIGITS), "--grpc-transport", "envoy"]
    done = subprocess.run(
        [sys.executable, "-c", hide, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("kiln serve: grpc_transport envoy: the package pyvoy is needed, install kiln[envoy]")
