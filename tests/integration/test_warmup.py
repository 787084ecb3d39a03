"""Warm-up requests in the form that TensorFlow Serving's users write them, with real TensorFlow."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelLoadError
from service.rpc._generated.kiln.tensorflow import tensor_pb2
from service.rpc._generated.kiln.tensorflow.serving.prediction_log_pb2 import PredictionLog
from service.rpc.tfserving_codec import encode_tensor
from service.rpc.warmup_codec import decode_warm_up
from service.runtime import model as runtime_model
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions, Request
from service.runtime.warmup import WARM_UP_FILE, records
from service.tensors import Array, Tensors, data_type_of
from tests.integration.saved_models import save

OPTIONS = RuntimeOptions(PlanningOptions(4), decode_warm_up=decode_warm_up)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes numbers under ten, rows of any width, and words."""
    import tensorflow as tf

    def under_ten(x: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_less(x, 10.0, message="under ten, please")]):
            return {"y": x * 2.0}

    def thirteens(x: Any) -> Any:
        return {"y": tf.reduce_sum(tf.reshape(x, (tf.shape(x)[0], -1, 13)), -1)}

    signatures: dict[str, Any] = {
        "serving_default": (under_ten, {"x": (tf.float32, (None, 3))}),
        "thirteens": (thirteens, {"x": (tf.float32, (None, None))}),
        "words": (lambda x: {"y": tf.strings.length(x)}, {"x": (tf.string, (None,))}),
    }
    return save(tmp_path_factory.mktemp("warm-up") / "model", signatures)


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def log_of(signature_name: str = "", **inputs: Array) -> bytes:
    """A ``PredictionLog`` as TensorFlow Serving's example writes it."""
    log = PredictionLog()
    request = log.predict_log.request
    request.model_spec.name, request.model_spec.signature_name = "half_plus_two", signature_name
    for name, array in inputs.items():
        tensor = tensor_pb2.TensorProto()
        encode_tensor(array, data_type_of(array), tensor)
        request.inputs[name].CopyFrom(tensor)
    return bytes(log.SerializeToString())


def write(path: Path, logs: Iterable[bytes]) -> Path:
    """The warm-up file of the model at `path`, by TensorFlow's own writer."""
    import tensorflow as tf

    file = path / WARM_UP_FILE
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for log in logs:
            writer.write(log)
    return file


@pytest.fixture
def samples(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
    """What the child that plans is given for each signature."""
    given: dict[str, Tensors] = {}

    class Watched:
        def __init__(self, request: Request, samples: Mapping[str, Tensors]) -> None:
            given.update(samples)

        def run(self, tell: Any) -> None: ...
        def cancel(self) -> None: ...

    monkeypatch.setattr(runtime_model, "Planning", Watched)
    return given


def test_records_are_replayed_before_the_plans_are_chosen(path: Path, samples: dict[str, Tensors]) -> None:
    """Each signature is planned on the rows that its records brought, as many as a batch has; others on drawn ones."""
    ones = np.ones((3, 3), np.float32)
    write(path, [log_of(x=ones), log_of("words", x=np.array([b"caf\xc3\xa9"], object)), log_of(x=2 * ones)])
    model = LoadedModel(path, replace(OPTIONS, plan_dir=path.parent / "plans"))
    model.warm_up()
    model.plan()
    assert {name: sample["x"].tolist() for name, sample in samples.items()} == {
        "serving_default": [[1] * 3, [1] * 3, [1] * 3, [2] * 3],
        "words": [b"caf\xc3\xa9"],
    }
    model.close()


def test_real_inputs_are_measured_where_random_ones_are_refused(path: Path) -> None:
    """A model that takes few widths only is warmed up by its records, on every bucket."""
    write(path, [log_of("thirteens", x=np.ones((2, 26), np.float32))])
    model = LoadedModel(path, OPTIONS)
    chosen = model.warm_up()["thirteens"].chosen
    assert sorted(chosen) == [1, 2, 4]
    assert all(cell.seconds < 60 for cell in chosen.values())
    model.close()


def test_a_record_that_the_model_refuses_fails_the_load(path: Path) -> None:
    """The reason has the record's number and the graph's words."""
    write(path, [log_of(x=np.ones((1, 3), np.float32)), log_of(x=np.full((1, 3), 11, np.float32))])
    model = LoadedModel(path, OPTIONS)
    with pytest.raises(ModelLoadError, match=r"^warm-up record 2 failed: the model refused the input: .*under ten"):
        model.warm_up()
    model.close()


def test_other_kinds_of_records_are_skipped(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that holds a session run as well is replayed as far as it goes."""
    caplog.set_level(logging.WARNING, "kiln.warmup")
    write(path, [PredictionLog(session_run_log=b"\x0a\x00").SerializeToString(), log_of(x=np.ones((1, 3), np.float32))])
    model = LoadedModel(path, OPTIONS)
    model.warm_up()
    model.close()
    assert [record.message for record in caplog.records if record.name == "kiln.warmup"] == [
        "warm-up record 1 is skipped: session_run_log is not replayed",
    ]


@pytest.mark.parametrize("at", [0, 9, 13, -1])
def test_a_changed_byte_fails_the_load(path: Path, at: int) -> None:
    """Lengths and data have checksums, which are checked."""
    file = write(path, [log_of(x=np.ones((1, 3), np.float32))])
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    model = LoadedModel(path, OPTIONS)
    with pytest.raises(ModelLoadError, match=r"^tf_serving_warmup_requests is broken: "):
        model.warm_up()
    model.close()


@pytest.mark.parametrize(("count", "is_refused"), [(1000, False), (1001, True)])
def test_a_thousand_records_are_taken(path: Path, count: int, is_refused: bool) -> None:
    """TensorFlow Serving's limit is ours."""
    file = write(path, [b""] * count)
    if is_refused:
        with pytest.raises(ModelLoadError, match="at most 1000 records expected, got 1001"):
            list(records(file))
    else:
        assert len(list(records(file))) == count


def test_without_a_decoder_the_file_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Records that nothing decodes are not passed over in silence."""
    caplog.set_level(logging.WARNING, "kiln.runtime")
    file = write(path, [log_of()])
    model = LoadedModel(path, RuntimeOptions(PlanningOptions(2)))
    assert set(model.warm_up()) == {"serving_default", "thirteens", "words"}
    model.close()
    told = [record.message for record in caplog.records if record.name == "kiln.runtime"]
    assert told == [f"{file} is not replayed: nothing here decodes it"]
