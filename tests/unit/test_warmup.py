"""Warm-up requests without TensorFlow: what is kept of them, what fails, and how a record is decoded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import FailedPrecondition, Internal, InvalidArgument, ModelLoadError, Unimplemented
from service.rpc._generated.kiln.tensorflow.example_pb2 import Example
from service.rpc._generated.kiln.tensorflow.serving.prediction_log_pb2 import PredictionLog
from service.rpc.warmup_codec import decode_warm_up
from service.runtime import warmup
from service.runtime.warmup import replay
from service.tensors import DataType, Signature, Tensors, TensorSpec
from tests.fakes import DOUBLE, rows
from tests.signatures import one

FIXED = one(DataType.FP32, (2,), "fixed")
OPEN = one(DataType.FP32, (None, None), "open")
SIGNATURES = {signature.name: signature for signature in (DOUBLE, FIXED, OPEN)}


class Warmed:
    """A model that is run on records, which stand for what they decode to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[str, Tensors]] = []
        self.error: Exception | None = None
        self._monkeypatch = monkeypatch

    def replay(self, *given: tuple[Signature, Tensors] | Exception, keep_rows: int = 4) -> dict[str, Tensors]:
        self._monkeypatch.setattr(warmup, "records", lambda path: (str(n).encode() for n in range(len(given))))

        def decode(record: bytes, signatures: Mapping[str, Signature]) -> list[tuple[Signature, Tensors]]:
            assert signatures is SIGNATURES
            item = given[int(record)]
            if isinstance(item, Exception):
                raise item
            return [item]

        return replay(Path("file"), SIGNATURES, decode=decode, run=self.run, keep_rows=keep_rows)

    def run(self, signature: Signature, inputs: Tensors) -> None:
        self.runs.append((signature.name, inputs))
        if self.error is not None:
            raise self.error


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Warmed:
    return Warmed(monkeypatch)


def kept(seen: dict[str, Tensors]) -> dict[str, Any]:
    return {name: inputs["x"].tolist() for name, inputs in seen.items()}


def test_every_record_is_run_in_order(model: Warmed) -> None:
    """Each record runs on the signature that it names, with all its rows."""
    two = {"x": np.array([1, 2], np.float32)}
    model.replay((DOUBLE, rows(1)), (FIXED, two), (DOUBLE, rows(*range(9))))
    assert [(name, len(inputs["x"])) for name, inputs in model.runs] == [
        ("serving_default", 1), ("fixed", 2), ("serving_default", 9),
    ]  # fmt: skip


def test_rows_are_kept_for_the_planner(model: Warmed) -> None:
    """Of a batched signature as many rows as a batch may have, of any other the first record."""
    one_two, three_four = ({"x": np.array(values, np.float32)} for values in ([1, 2], [3, 4]))
    seen = model.replay((DOUBLE, rows(1, 2)), (FIXED, one_two), (DOUBLE, rows(3, 4, 5)), (FIXED, three_four))
    assert kept(seen) == {"serving_default": [[n] * 3 for n in (1, 2, 3, 4)], "fixed": [1, 2]}


def test_rows_of_one_shape_are_kept(model: Warmed) -> None:
    """Of sizes that the signature leaves open those of the first record are kept; undeclared shapes never."""
    narrow, wide = ({"x": np.ones((1, size), np.float32)} for size in (2, 3))
    undeclared = {"x": np.ones((1, 4), np.float32)}
    assert kept(model.replay((OPEN, narrow), (OPEN, wide), (OPEN, narrow), (DOUBLE, undeclared))) == {
        "open": [[1, 1], [1, 1]]
    }
    assert len(model.runs) == 4


def test_other_kinds_of_records_are_skipped(model: Warmed, caplog: pytest.LogCaptureFixture) -> None:
    """A record that is not replayed is told with its number, and does no harm."""
    caplog.set_level(logging.WARNING, "kiln.warmup")
    seen = model.replay((DOUBLE, rows(1)), Unimplemented("regress_log is not replayed"), (DOUBLE, rows(2)))
    assert len(seen["serving_default"]["x"]) == 2
    assert caplog.messages == ["warm-up record 2 is skipped: regress_log is not replayed"]


def test_a_record_that_does_not_fit_fails_the_load(model: Warmed) -> None:
    """The reason has the record's number."""
    with pytest.raises(ModelLoadError) as caught:
        model.replay((DOUBLE, rows(1)), InvalidArgument("input 'x' is missing"))
    assert str(caught.value) == "warm-up record 2 failed: input 'x' is missing"


@pytest.mark.parametrize("error", [InvalidArgument("the model refused the input"), Internal("out of memory")])
def test_a_record_that_the_model_refuses_fails_the_load(model: Warmed, error: Exception) -> None:
    """A model that cannot answer its own warm-up requests is not served."""
    model.error = error
    with pytest.raises(ModelLoadError) as caught:
        model.replay((DOUBLE, rows(1)))
    assert str(caught.value) == f"warm-up record 1 failed: {error}"


def frame(data: bytes, length: int | None = None) -> bytes:
    """A TFRecord with checksums of zero."""
    return (len(data) if length is None else length).to_bytes(8, "little") + bytes(4) + data + bytes(4)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (frame(b"ab") + frame(b"ab")[:-1], "file is broken: record 2 goes past its end"),
        (frame(b"ab")[:5], "file is broken: record 1 goes past its end"),
        (frame(b"ab", 2**50), "file is broken: record 1 goes past its end"),
        (frame(b"ab", 2**64 - 1), "file is broken: record 1 goes past its end"),
    ],
)
def test_lengths_are_checked_before_they_are_believed(tmp_path: Path, content: bytes, text: str) -> None:
    """A file that is cut off, or states a length that no memory holds, is refused before TensorFlow reads it."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ModelLoadError) as caught:
        warmup._count(tmp_path / "file")
    assert str(caught.value) == text


def test_records_are_counted(tmp_path: Path) -> None:
    """An empty file has no record; a file that cannot be read is told."""
    (tmp_path / "file").write_bytes(frame(b"") + frame(b"abc") * 2)
    assert warmup._count(tmp_path / "file") == 3
    (tmp_path / "file").write_bytes(b"")
    assert warmup._count(tmp_path / "file") == 0
    with pytest.raises(ModelLoadError, match=r"^gone cannot be read: "):
        warmup._count(tmp_path / "gone")


def logged(signature_name: str = "", *, dtype: int = 1, shape: tuple[int, ...] = (1, 3)) -> PredictionLog:
    """A predict request of ones for `DOUBLE`."""
    log = PredictionLog()
    log.predict_log.request.model_spec.name = "any"
    log.predict_log.request.model_spec.signature_name = signature_name
    tensor = log.predict_log.request.inputs["x"]
    tensor.dtype = dtype  # type: ignore[assignment]
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    tensor.float_val.append(1.0)
    return log


@pytest.mark.parametrize(("name", "signature"), [("", DOUBLE), ("serving_default", DOUBLE), ("open", OPEN)])
def test_a_predict_log_is_decoded_as_a_request_is(name: str, signature: Signature) -> None:
    """The signature is the one named, else the default; the model's name does not matter."""
    ((found, inputs),) = decode_warm_up(logged(name).SerializeToString(), SIGNATURES)
    assert found is signature
    assert inputs["x"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("record", "error", "text"),
    [
        (logged("none").SerializeToString(), FailedPrecondition, 'Serving signature name: "none" not found'),
        (logged(dtype=3).SerializeToString(), InvalidArgument, "expected datatype DT_FLOAT, got DT_INT32"),
        (logged(shape=(1, 4)).SerializeToString(), InvalidArgument, "input 'x': [3] expected, got [4]"),
        (logged(shape=(0, 3)).SerializeToString(), InvalidArgument, "float_val with up to 0 values expected"),
        (b"\xff", InvalidArgument, "the request cannot be parsed as tensorflow.serving.PredictionLog"),
        (b"", Unimplemented, "an empty record is not replayed"),
    ],
)
def test_a_record_that_does_not_fit_is_told(record: bytes, error: type[Exception], text: str) -> None:
    """What is wrong with it is said as it is of a request."""
    with pytest.raises(error) as caught:
        decode_warm_up(record, SIGNATURES)
    assert text in str(caught.value)


KINDS = ("session_run_log", "predict_streamed_log")


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_not_decoded(kind: str) -> None:
    """Any other kind is named, not mistaken for a broken record."""
    log: Any = PredictionLog(**{kind: b"\x0a\x00"})  # type: ignore[arg-type]
    with pytest.raises(Unimplemented) as caught:
        decode_warm_up(log.SerializeToString(), SIGNATURES)
    assert str(caught.value) == f"{kind} is not replayed"


def example(**features: float) -> Any:
    message = Example()
    for name, value in features.items():
        message.features.feature[name].float_list.value.extend([value] * 3)
    return message


@pytest.mark.parametrize("kind", ["classify_log", "regress_log"])
def test_classify_and_regress_logs_are_decoded(kind: str) -> None:
    """Their examples as inputs."""
    log: Any = PredictionLog()
    outputs = (TensorSpec("y", DataType.FP32, (None, None)),)
    taking = Signature("s", DOUBLE.inputs, outputs)
    request = getattr(log, kind).request
    request.model_spec.signature_name = "s"
    request.input.example_list.examples.append(example(x=1))
    ((found, inputs),) = decode_warm_up(log.SerializeToString(), {"s": taking})
    assert found is taking
    assert inputs["x"].tolist() == [[1, 1, 1]]


def test_a_multi_inference_log_is_decoded() -> None:
    """One entry for each task."""
    log: Any = PredictionLog()
    request = log.multi_inference_log.request
    for name in ("serving_default", "open"):
        request.tasks.add(model_spec={"name": "m", "signature_name": name}, method_name="tensorflow/serving/classify")
    request.input.example_list.examples.append(example(x=1))
    asked = decode_warm_up(log.SerializeToString(), SIGNATURES)
    assert [signature.name for signature, _ in asked] == ["serving_default", "open"]
    assert [inputs["x"].tolist() for _, inputs in asked] == [[[1, 1, 1]]] * 2
