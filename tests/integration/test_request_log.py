"""The request log from request to file, and from file to warm-up and replay."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from load_tests.kept_requests import Question, questions
from load_tests.kept_requests import records as replayed
from service.errors import FailedPrecondition, ModelLoadError
from service.metrics import Metrics
from service.observers import Observers, observers
from service.rpc.warmup_codec import decode_warm_up
from service.runtime.record_file import TfRecordFile
from service.runtime.warmup import records
from service.settings import Settings
from service.tensors import DataType, Signature, TensorSpec
from tests.fakes import DOUBLE, FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln, start_kiln
from tests.integration.rpc import Caller
from tests.integration.test_metrics import OIP_BODY, ROW, ask_each_dialect

FORMATS = pytest.mark.parametrize("form", ["tfrecord", "jsonl"])


def settings(folder: Path, form: str, **others: Any) -> Settings:
    given = {"models": "models", "request_log": folder, "request_log_share": 1.0, "request_log_format": form}
    return Settings.model_validate(given | others)


@contextlib.asynccontextmanager
async def logging_kiln(folder: Path, form: str, model: FakeModel | None = None) -> AsyncIterator[tuple[Kiln, Metrics]]:
    """A server that keeps all requests; on leaving, all of them are written."""
    metrics = Metrics()
    built = observers(settings(folder, form), metrics)
    kiln = await start_kiln({"double": model or FakeModel()}, following=built.following)
    try:
        yield kiln, metrics
    finally:
        await kiln.stop(5.0, 0.5)
        built.close()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(autouse=True, scope="module")
def tensorflow() -> Any:
    """Loaded, as in a server that has models."""
    import tensorflow as tf

    return tf


def kept(metrics: Metrics, outcome: str) -> float | None:
    return metrics.registry.get_sample_value("kiln_request_log_records_total", {"outcome": outcome})


@FORMATS
async def test_a_file_is_a_warm_up_file(form: str, tmp_path: Path):
    """What was asked in whichever dialect is what the model would be warmed up with; failures are not in it."""
    async with logging_kiln(tmp_path, form) as (kiln, metrics):
        async with kiln.channel("asgi") as channel:
            await ask_each_dialect(Client(kiln.app), Caller(channel))
        assert (await Client(kiln.app).post("/predict/double", {"x": ROW})).status == 200
        assert (await Client(kiln.app).post("/v2/models/double/infer", {"inputs": []})).status == 400
    (path,) = files(tmp_path)
    assert path.match(f"double/1/requests-*.{form}")
    found = [decode_warm_up(record, {"serving_default": DOUBLE}) for record in records(path)]
    assert [(signature, inputs["x"].tolist()) for ((signature, inputs),) in found] == [(DOUBLE, [ROW])] * 5
    assert [kept(metrics, outcome) for outcome in ("written", "dropped", "failed")] == [5, 0, 0]
    assert list(replayed(path)) == list(records(path))


@FORMATS
async def test_what_was_kept_is_asked_again(form: str, tmp_path: Path):
    """The replay's requests are answered as the first ones were, strings of any bytes and numbers of none included."""
    words = Signature(
        "words",
        (TensorSpec("w", DataType.BYTES, (None, 2), "w:0"), TensorSpec("x", DataType.FP32, (None, 2), "x:0")),
        (TensorSpec("y", DataType.BYTES, (None, 2), "y:0"), TensorSpec("z", DataType.FP32, (None, 2), "z:0")),
    )
    body = {
        "signature_name": "words",
        "inputs": {"w": [["YQ==", {"b64": "/w=="}]], "x": [[float("inf"), 0.1]]},
    }
    model = FakeModel({"words": words})
    async with logging_kiln(tmp_path, form, model) as (kiln, _):
        first = await Client(kiln.app).post("/v1/models/double:predict", body)
        assert first.status == 200
    (question,) = questions(tmp_path)
    assert question.path == "/v1/models/double:predict"
    kiln = await start_kiln({"double": FakeModel({"words": words})})
    again = await Client(kiln.app).post(question.path, question.body)
    await kiln.stop(5.0, 0.5)
    assert (again.status, again.body) == (200, first.body)


async def test_a_scalar_string_is_replayed(tmp_path: Path):
    """Also a tensor without dimensions can be asked again."""
    from service.rpc._generated.kiln.tensorflow.serving.prediction_log_pb2 import PredictionLog
    from service.rpc.tfserving_codec import encode_tensor

    log = PredictionLog()
    log.predict_log.request.model_spec.name = "m"
    encode_tensor(np.array(b"a", object), DataType.BYTES, log.predict_log.request.inputs["s"])
    file = TfRecordFile(tmp_path / "file")
    for record in (log.SerializeToString(), PredictionLog().SerializeToString()):
        file.write(record)
    file.close()
    assert questions(tmp_path / "file") == [Question("/v1/models/m:predict", {"inputs": {"s": {"b64": "YQ=="}}})]
    cut = tmp_path / "cut"
    cut.write_bytes((tmp_path / "file").read_bytes()[:-1])
    assert len(list(replayed(cut))) == 1


async def test_a_share_of_nothing_keeps_nothing(tmp_path: Path):
    """The folder is there, and empty."""
    built = observers(settings(tmp_path, "jsonl", request_log_share=0.0), Metrics())
    kiln = await start_kiln({"double": FakeModel()}, following=built.following)
    await Client(kiln.app).post("/v2/models/double/infer", OIP_BODY)
    await kiln.stop(5.0, 0.5)
    built.close()
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_used(tmp_path: Path):
    """Told at the start: the setting, the folder and why."""
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match=r"request_log: .*file cannot be used: .*File exists"):
        observers(settings(tmp_path / "file", "jsonl"), Metrics())


def test_everything_is_built_as_the_settings_say(tmp_path: Path):
    """Nothing unless asked for; an endpoint is asked for spans only when there are any."""
    nothing = observers(Settings.model_validate({"models": "models"}), Metrics())
    assert nothing == Observers(nothing.following)
    assert not nothing.following.is_needed
    nothing.close()
    spans = observers(
        Settings.model_validate({"models": "models", "otlp_endpoint": "http://127.0.0.1:9", "access_log": True}),
        Metrics(),
    )
    assert spans.following.trace_share == 0.01
    spans.close()


@pytest.fixture
def full() -> Path:
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")
    return device


def test_tensorflow_tells_of_a_full_disk(full: Path, tmp_path: Path):
    """As an error of the system, like any other file."""
    with pytest.raises(OSError, match="nowhere"):
        TfRecordFile(tmp_path / "nowhere" / "file")
    file = TfRecordFile(full)
    with pytest.raises(OSError, match="full"):
        file.write(b"record")
    with contextlib.suppress(OSError):
        file.close()


def test_a_warm_up_file_of_lines(tmp_path: Path):
    """Is told from TFRecords by its beginning, and bounded in the same way."""
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"predict_log":{}}\n\n{"log_metadata":{}}\n')
    assert list(records(path)) == [b'{"predict_log":{}}', b'{"log_metadata":{}}']
    path.write_bytes(b'{"predict_log":{}}\n' * 1001)
    with pytest.raises(ModelLoadError, match="at most 1000 records expected, got 1001"):
        list(records(path))
    with pytest.raises(ModelLoadError, match="nothing cannot be read"):
        list(records(tmp_path / "nothing"))
    record = b"x" * ord("{")  # its length is the first byte
    file = TfRecordFile(tmp_path / "brace")
    file.write(record)
    file.close()
    assert (tmp_path / "brace").read_bytes().startswith(b"{")
    assert list(records(tmp_path / "brace")) == list(replayed(tmp_path / "brace")) == [record]
