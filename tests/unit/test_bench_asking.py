"""How ``kiln bench`` asks: requests of every protocol, clients without a network, errors, the command's arguments."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest

from service.bench import asked, command
from service.bench import bench as benching
from service.bench.asked import Address, read_signature, started
from service.bench.bench import Wanted, bench, goal_ms
from service.bench.clients import Answer, Connection, RestClient, closed_loop_rate
from service.bench.progress import Progress
from service.bench.report import Report
from service.bench.requests import cut, made_up, read_records
from service.bench.wire import PROTOCOLS
from service.cli import main
from service.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from service.registry.samples import Draw
from service.rest.openinference_codec import decode_infer as decode_v2
from service.rest.tfserving_codec import decode_predict as decode_tfs
from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2
from service.rpc.tfserving_codec import decode_predict as decode_grpc_tfs
from service.tensors import DataType, Signature, Tensors, TensorSpec, unpack_raw

SIGNATURE = Signature(
    "serving_default",
    (
        TensorSpec("x", DataType.FP32, (None, 2)),
        TensorSpec("n", DataType.INT64, (None,)),
        TensorSpec("s", DataType.BYTES, (None, 1)),
    ),
    (TensorSpec("y", DataType.FP32, (None, 1)),),
)
SIGNATURES = {SIGNATURE.name: SIGNATURE}
ADDRESS = Address("localhost", 1, 2)


def inputs(rows: int = 2) -> Tensors:
    return Draw().batch(SIGNATURE, rows)


def assert_same(got: Tensors, wanted: Tensors) -> None:
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        if array.dtype.kind == "O":
            assert got[name].tolist() == array.tolist()
        else:
            np.testing.assert_allclose(got[name], array, atol=1e-4)


def read_http(request: bytes) -> tuple[bytes, int | None]:
    """The body of a request, and the length of its header of JSON; its Content-Length is right."""
    head, _, body = request.partition(b"\r\n\r\n")
    headers = dict(line.split(b": ") for line in head.split(b"\r\n")[1:])
    assert int(headers[b"Content-Length"]) == len(body)
    length = headers.get(b"Inference-Header-Content-Length")
    return body, None if length is None else int(length)


def read_grpc_v2(request: bytes) -> Tensors:
    message = oip.ModelInferRequest.FromString(request)
    assert message.model_name == "m"
    return {
        tensor.name: unpack_raw(raw, DataType(tensor.datatype), tuple(tensor.shape), tensor.name)  # type: ignore[call-arg]
        for tensor, raw in zip(message.inputs, message.raw_input_contents, strict=True)
    }


READ: dict[str, Callable[[bytes], Tensors]] = {
    "rest-tfs": lambda request: decode_tfs(read_http(request)[0], SIGNATURES, 64)[0].inputs,
    "rest-v2": lambda request: decode_v2(*read_http(request), SIGNATURES, 64)[0].inputs,
    "rest-v2-binary": lambda request: decode_v2(*read_http(request), SIGNATURES, 64)[0].inputs,
    "grpc-tfs": lambda request: decode_grpc_tfs(serving_pb2.PredictRequest.FromString(request), SIGNATURES).inputs,
    "grpc-v2": read_grpc_v2,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_protocol_carries_the_same_inputs(protocol: str):
    """Numbers, integers and strings arrive as they were, by the server's own decoders."""
    assert_same(READ[protocol](PROTOCOLS[protocol].build("m", SIGNATURE, inputs())), inputs())


@pytest.mark.parametrize(
    ("array", "what"),
    [(np.zeros((1, 1), np.float16), "is FP16"), (np.array([[b"\xff\x00"]], object), "has bytes that are no text")],
)
def test_what_json_cannot_carry_is_told(array: Any, what: str):
    """By the input's name."""
    with pytest.raises(FailedPrecondition, match=f"input 'x' {what}, which JSON cannot carry"):
        PROTOCOLS["rest-v2"].build("m", SIGNATURE, {"x": array})


def test_a_batch_is_cut_into_requests():
    """Of so many rows each; a signature without rows is asked as it is declared."""
    parts = cut(inputs(6), SIGNATURE, 2)
    assert [len(part["x"]) for part in parts] == [2, 2, 2]
    assert_same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, inputs(6))
    fixed = Signature("serving_default", (TensorSpec("x", DataType.FP32, (3,)),), ())
    whole = Draw().batch(fixed, 4)
    assert cut(whole, fixed, 2) == [whole]


def log_line(**request: Any) -> str:
    return json.dumps({"predictLog": {"request": request}})


def test_requests_may_come_from_a_log(tmp_path: Path):
    """Records of other kinds are left out; one that does not fit is told with its number."""
    signature = Signature(
        "serving_default", (TensorSpec("x", DataType.FP32, (None, 1)),), (TensorSpec("y", DataType.FP32, (None, 1)),)
    )
    shape = {"dim": [{"size": "1"}, {"size": "1"}]}
    good = log_line(inputs={"x": {"dtype": "DT_FLOAT", "tensorShape": shape, "floatVal": [2.5]}})
    path = tmp_path / "log"
    path.write_text(f"{good}\n{'{}'}\n{good}\n" + f"{good}\n" * 70)
    found = read_records(path, signature)
    assert len(found) == 64
    assert found[0]["x"].tolist() == [[2.5]]
    path.write_text(f"{good}\n{log_line(inputs={'z': {'dtype': 'DT_FLOAT'}})}\n")
    with pytest.raises(InvalidArgument, match=r"log: record 2: .*z"):
        read_records(path, signature)
    path.write_text("{}" + "\n")
    with pytest.raises(InvalidArgument, match="records of predict requests expected, it has none"):
        read_records(path, signature)


class Transport(asyncio.Transport):
    """Answers each request with what `answers` has next; None ends the connection."""

    def __init__(self, connection: Connection, answers: list[bytes | None]) -> None:
        super().__init__()
        self._connection, self._answers = connection, answers
        self.closed = False

    def write(self, data: Any) -> None:
        answer = self._answers.pop(0)
        if answer is None:
            self._connection.connection_lost(None)
        else:
            self._connection.data_received(answer)

    def close(self) -> None:
        self.closed = True


def rest_client(monkeypatch: pytest.MonkeyPatch, *answers: bytes | None) -> tuple[RestClient, list[Transport]]:
    """A client whose connections get `answers`, and the connections that it opened."""
    left, opened = list(answers), []

    async def connect(make: Callable[[], Connection], host: str, port: int) -> tuple[Transport, Connection]:
        connection = make()
        opened.append(Transport(connection, left))
        connection.connection_made(opened[-1])
        return opened[-1], connection

    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", connect)
    return RestClient("h", 1, [b"GET"]), opened


def answer(status: str, body: str = "{}") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def test_an_answer_is_told_by_its_status(monkeypatch: pytest.MonkeyPatch):
    """Connections are used again; what is no success is kept to be told."""
    client, opened = rest_client(
        monkeypatch, answer("200 OK"), answer("429 Too Many", '{"error":"full"}'), answer("500 No"), None,
        b"HTTP/1.1 200 OK\r\n\r\n", answer("200 OK"),
    )  # fmt: skip
    assert await client.send(0) is Answer.OK
    assert await client.send(1) is Answer.REFUSED
    assert client.error == '429: {"error":"full"}'
    assert await client.send(2) is Answer.FAILED
    assert len(opened) == 1
    assert await client.send(3) is Answer.FAILED
    assert client.error == "the server closed the connection"
    assert await client.send(4) is Answer.FAILED
    assert client.error == "an answer without Content-Length came"
    assert opened[1].closed
    assert await client.send(5) is Answer.OK
    await client.close()
    assert opened[2].closed


async def test_a_request_that_is_given_up_takes_its_connection_along(monkeypatch: pytest.MonkeyPatch):
    """Else its answer would be taken for that of the next one."""
    client, opened = rest_client(monkeypatch, b"HTTP/1.1 200 OK\r\n", answer("200 OK"))
    asking = asyncio.create_task(client.send(0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert opened[0].closed
    assert await client.send(1) is Answer.OK
    assert len(opened) == 2


class Fake:
    """A client that answers as it is told to; `count` is how often."""

    def __init__(self, give: Answer, error: str = "why") -> None:
        self.error, self._give, self.count = error, give, 0

    async def send(self, number: int) -> Answer:
        await asyncio.sleep(0)
        self.count += 1
        return self._give

    async def close(self) -> None: ...


@pytest.mark.parametrize("callers", [1, 8])
async def test_a_closed_loop_tells_how_much_a_server_does(callers: int):
    """The answers to all callers count; there are none where the first request is not answered."""
    client = Fake(Answer.OK)
    assert await closed_loop_rate(client, 0.2, callers) == pytest.approx(client.count / 0.2, rel=0.2)
    assert not await closed_loop_rate(Fake(Answer.FAILED), 0.1)


def told(monkeypatch: pytest.MonkeyPatch, pages: dict[str, str | Exception]) -> None:
    """What the server at `ADDRESS` has at each path; nothing elsewhere."""

    def get(url: str) -> bytes:
        page = pages.get(url.removeprefix(ADDRESS.url), NotFound("nothing there"))
        if isinstance(page, Exception):
            raise page
        return page.encode()

    monkeypatch.setattr(asked, "_get", get)


METADATA = {
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}],
}


def test_a_signature_is_read_from_the_metadata(monkeypatch: pytest.MonkeyPatch):
    """-1 is a size that is open."""
    told(monkeypatch, {"/v2/models/m": json.dumps(METADATA)})
    found = read_signature(ADDRESS, "m")
    assert found.describe() == "x FP32 [-1, 2] → y FP32 [-1, 1]"
    assert found.batched


@pytest.mark.parametrize(
    ("pages", "error", "text"),
    [
        ({}, NotFound, "http://localhost:1 has no model 'm'; it has none"),
        ({"/status": '[{"model": "b"}, {"model": "a"}]'}, NotFound, "has no model 'm'; it has a, b"),
        (
            {"/status": '[{"model": "m", "version": 3, "state": "FAILED", "reason": "it is broken"}]'},
            Unavailable,
            r"model 'm' is not ready: version 3 is FAILED \(it is broken\)",
        ),
        ({"/v2/models/m": "{}"}, FailedPrecondition, "does not tell what model 'm' takes: KeyError"),
        ({"/v2/models/m": "no JSON"}, FailedPrecondition, "does not tell what model 'm' takes"),
        ({"/v2/models/m": Unavailable("no server answers")}, Unavailable, "no server answers"),
    ],
)
def test_a_model_that_cannot_be_asked_is_told(
    monkeypatch: pytest.MonkeyPatch, pages: dict[str, Any], error: type[Exception], text: str
):
    """With those that there are, or why it is not ready."""
    told(monkeypatch, pages)
    with pytest.raises(error, match=text):
        read_signature(ADDRESS, "m")


@pytest.mark.parametrize(
    ("raised", "error", "text"),
    [
        (HTTPError("u", 404, "", {}, io.BytesIO(b"not here")), NotFound, "not here"),  # type: ignore[arg-type]
        (HTTPError("u", 503, "", {}, io.BytesIO(b"wait")), Unavailable, "http://localhost:1/metrics: 503: wait"),  # type: ignore[arg-type]
        (HTTPError("u", 500, "", {}, io.BytesIO(b"oh")), FailedPrecondition, "500: oh"),  # type: ignore[arg-type]
        (OSError("refused"), Unavailable, "no server answers at http://localhost:1/metrics: refused"),
    ],
)
def test_what_http_says_is_an_error_of_kiln(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[Exception], text: str
):
    """A page that is not there is no page."""

    def opened(url: str, timeout: float) -> None:
        raise raised

    monkeypatch.setattr("urllib.request.urlopen", opened)
    if error is NotFound:
        assert not asked.metrics_page(ADDRESS)
        return
    with pytest.raises(error, match=text):
        asked.metrics_page(ADDRESS)


def test_the_goal_is_the_given_one_then_the_models_own(monkeypatch: pytest.MonkeyPatch):
    """Else 50 ms."""
    told(monkeypatch, {"/metrics": '# TYPE kiln_slo_seconds gauge\nkiln_slo_seconds{model="m"} 0.02\n'})
    assert goal_ms(ADDRESS, Wanted("m", slo_ms=7.0)) == 7.0
    assert goal_ms(ADDRESS, Wanted("m")) == 20.0
    assert goal_ms(ADDRESS, Wanted("other")) == 50.0
    assert Address("::1", 1, 2).grpc == "[::1]:2"


async def test_a_model_that_refuses_all_that_is_made_up(monkeypatch: pytest.MonkeyPatch):
    """Is told with its first reason, and the way out."""
    monkeypatch.setattr("service.bench.requests.open_client", lambda *_: Fake(Answer.FAILED, "400: no"))
    with pytest.raises(FailedPrecondition, match=r"refuses inputs that are made up for x .*: 400: no; give a warm-up"):
        await made_up(ADDRESS, "m", SIGNATURE, 1)
    monkeypatch.setattr("service.bench.requests.open_client", lambda *_: Fake(Answer.OK))
    assert len(await made_up(ADDRESS, "m", SIGNATURE, 3)) == 64


@pytest.mark.parametrize("has_records", [False, True])
async def test_a_protocol_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_records: bool
):
    """Each has its own error in the report, and on stderr."""
    told(monkeypatch, {"/v2/models/m": json.dumps(METADATA), "/metrics": ""})
    monkeypatch.setattr("service.bench.requests.open_client", lambda *_: Fake(Answer.OK))
    kinds = {"grpc-v2": Fake(Answer.FAILED, "UNAVAILABLE"), "rest-v2": Fake(Answer.REFUSED, "429")}
    monkeypatch.setattr(benching, "open_client", lambda _address, protocol, _requests: kinds[protocol])
    records = None
    if has_records:
        records = tmp_path / "log"
        shape = {"dim": [{"size": "1"}, {"size": "2"}]}
        records.write_text(log_line(inputs={"x": {"dtype": "DT_FLOAT", "tensorShape": shape, "floatVal": [1, 2]}}))
    stream = io.StringIO()
    report = Report("m", ADDRESS.url, 50.0, 0.1, 1)
    await bench(ADDRESS, Wanted("m", tuple(kinds), records=records), report, Progress(stream))
    assert [(each.protocol, each.error, each.is_final) for each in report.protocols] == [
        ("grpc-v2", "the first requests were not answered: UNAVAILABLE", True),
        ("rest-v2", "the first requests were not answered: 429", True),
    ]
    assert stream.getvalue().splitlines() == [f"{each.protocol}: {each.error}" for each in report.protocols]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--protocols", "soap"], "some of rest-tfs, rest-v2, .* expected, got 'soap'"),
        (["--protocols", ","], "expected, got ','"),
        (["--slo-ms", "0"], "a number above 0 expected, got '0'"),
        (["--slo-ms", "fast"], "a number above 0 expected, got 'fast'"),
        (["--seconds", "inf"], "a number above 0 expected, got 'inf'"),
        (["--rows", "0"], "a whole number from 1 expected, got '0'"),
        (["--rest-port", "70000"], "1 to 65535 expected, got '70000'"),
        (["--url", "ftp://h"], "http://HOST:PORT expected, got 'ftp://h'"),
        (["--url", "http://h:port"], "http://HOST:PORT expected, got 'http://h:port'"),
        (["--url", "http://h/v1"], "http://HOST:PORT expected"),
    ],
)
def test_wrong_arguments_are_told(capsys: pytest.CaptureFixture[str], flags: list[str], text: str):
    """By the flag, what was expected and what came, as exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(["bench", "m", *flags])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert flags[0] in error
    assert_matches(text, error)


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["m", "models", "--rest-port", "1"], 2, "MODELS to start a server, or the ports of a running one expected"),
        (["m", "--url", "h:1", "--rest-port", "1"], 2, "one of --url and --rest-port expected, got both"),
        (["m", "/nowhere"], 1, "/nowhere: no such file or folder"),
    ],
)
def test_what_does_not_go_together_is_told(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, text: str
):
    """By the command's name."""
    assert main(["bench", *arguments]) == code
    assert capsys.readouterr().err.startswith(f"kiln bench: {text}")


def test_a_url_is_read(monkeypatch: pytest.MonkeyPatch):
    """With or without scheme; the ports default to those of a server."""
    asked_for: list[Address] = []

    def bench_it(address: Address, *_: Any) -> int:
        asked_for.append(address)
        return 0

    monkeypatch.setattr(command, "_bench", bench_it)
    for flags in ([], ["--url", "http://h:7/"], ["--url", "h:7", "--grpc-port", "9"], ["--rest-port", "8"]):
        assert main(["bench", "m", *flags]) == 0
    assert asked_for == [
        Address("localhost", 8501, 8500), Address("h", 7, 8500), Address("h", 7, 9), Address("localhost", 8, 8500)
    ]  # fmt: skip


def test_an_interruption_ends_with_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """The report is written all the same, and says so; the exit code is 1."""
    told(monkeypatch, {})

    async def interrupted(address: Address, wanted: Wanted, report: Report, progress: Progress) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "bench", interrupted)
    path = tmp_path / "report.json"
    assert main(["bench", "m", "--json", str(path), "--svg", str(tmp_path / "plot.svg")]) == 1
    assert "interrupted: this is what was measured until then" in capsys.readouterr().out
    assert json.loads(path.read_text())["interrupted"] is True
    assert (tmp_path / "plot.svg").read_text().startswith("<svg ")
    assert main(["bench", "m", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["interrupted"] is True


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And nothing is left behind."""
    monkeypatch.setattr(asked, "_python", lambda command: ["sh", "-c", f"echo no {command}; exit 3", "sh"])
    with pytest.raises(Unavailable, match=r"(?s)kiln plan .* left with 3:\nno plan"), started(tmp_path, "m", str):
        pass
    monkeypatch.setattr(asked, "_plan", lambda arguments, log: None)
    with pytest.raises(Unavailable, match=r"(?s)the server left with 3:\nno serve"), started(tmp_path, "m", str):
        pass
    monkeypatch.setattr(asked, "_START_S", 0.0)
    with pytest.raises(Unavailable, match="was not ready within 0 s"), started(tmp_path, "m", str):
        pass
