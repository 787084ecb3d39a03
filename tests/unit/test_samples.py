"""Made-up inputs, their JSON, how outputs are compared, and the file that carries them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from service.registry.samples import (
    Draw,
    draws,
    is_close,
    largest_difference,
    predict_body,
    read_batches,
    write_batches,
)
from service.tensors import DataType, Signature, TensorSpec


def signature(*inputs: TensorSpec, name: str = "serving_default") -> Signature:
    rows = inputs[0].shape is not None and inputs[0].is_batched
    return Signature(name, inputs, (TensorSpec("y", DataType.FP32, (None, 1) if rows else (1,)),))


def x(dtype: DataType, *shape: int | None, name: str = "x") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


@pytest.mark.parametrize("dtype", DataType)
def test_every_type_can_be_drawn(dtype: DataType):
    """Each batch has the rows asked for and the declared type, and is the same again."""
    asked = signature(x(dtype, None, 3))
    for draw in draws(asked):
        array = draw.batch(asked, 3)["x"]
        assert (array.shape, array.dtype) == ((3, 3), dtype.numpy)
        assert array.tolist() == draw.batch(asked, 3)["x"].tolist()


def test_what_a_model_may_refuse_is_drawn_in_other_ways():
    """Open sizes grow, whole numbers shrink, floats become whole, words become pictures; nothing is tried in vain."""
    assert [draw.open_size for draw in draws(signature(x(DataType.BOOL, None, None)))] == [8, 32, 128, 256]
    assert [draw.below for draw in draws(signature(x(DataType.INT32, None, 4)))] == [1000, 100, 10, 2]
    floats = list(draws(signature(x(DataType.FP32, None, 4))))
    assert {draw.whole for draw in floats} == {False, True}
    assert not floats[0].whole
    whole = Draw(whole=True, below=10).batch(signature(x(DataType.FP32, None, 50)), 4)["x"]
    assert whole.tolist() == np.round(whole).tolist()
    assert 2 < whole.max() < 10
    words, pictures = draws(signature(x(DataType.BYTES, None)))
    assert words.batch(signature(x(DataType.BYTES, None)), 1)["x"][0].isascii()
    picture = pictures.batch(signature(x(DataType.BYTES, None)), 1)["x"][0]
    assert Image.open(io.BytesIO(picture)).size == (32, 32)


def test_a_signature_without_rows_is_drawn_as_declared():
    """A scalar stays one, whatever number of rows is asked for."""
    assert Draw().batch(signature(x(DataType.FP32)), 3)["x"].shape == ()


@pytest.mark.parametrize(
    ("asked", "rows", "body"),
    [
        (signature(x(DataType.INT32, None, 2)), {"x": np.array([[1, 2]], np.int32)}, {"instances": [[1, 2]]}),
        (
            signature(x(DataType.FP32, None), x(DataType.BOOL, None, name="b")),
            {"x": np.array([0.98761], np.float32), "b": np.array([True])},
            {"instances": [{"x": 0.9876, "b": True}]},
        ),
        (signature(x(DataType.FP32), name="f"), {"x": np.float32(2)}, {"signature_name": "f", "inputs": 2.0}),
        (
            signature(x(DataType.FP32), x(DataType.FP32, name="z")),
            {"x": np.float32(2), "z": np.float32(1)},
            {"inputs": {"x": 2.0, "z": 1.0}},
        ),
        (
            signature(x(DataType.BYTES, None)),
            {"x": np.array([b"it's", b"\x89"], object)},
            {"instances": ["it's", {"b64": "iQ=="}]},
        ),
        (signature(x(DataType.BF16, None)), {"x": np.array([0.5], ml_dtypes.bfloat16)}, {"instances": [0.5]}),
    ],
)
def test_inputs_become_a_request(asked: Signature, rows: dict, body: dict):
    """By rows or by columns, as the signature has it; bytes that are no text as base64."""
    arrays = {name: np.asarray(value) for name, value in rows.items()}
    assert json.loads(predict_body(asked, arrays)) == body


def test_differences():
    """The largest one counts; what cannot be compared is infinitely far apart, and never close."""
    one, nan = np.array([1.0, np.nan]), np.array([1.5, np.nan])
    assert largest_difference({"a": one}, {"a": nan}) == 0.5
    assert largest_difference({"a": one}, {"a": one}) == 0.0
    assert is_close({"a": one}, {"a": one + 5e-5}, rtol=1e-4, atol=0)
    assert not is_close({"a": one}, {"a": nan}, rtol=1e-4, atol=1e-5)
    strings = np.array([b"a"], object)
    assert largest_difference({"a": strings}, {"a": strings.copy()}) == 0.0
    assert is_close({"a": strings}, {"a": strings.copy()}, rtol=0, atol=0)
    for other in ({"a": np.zeros(3)}, {"b": one}, {"a": np.array([b"b", b"c"], object)}, {"a": np.array([1.0, 2.0])}):
        assert largest_difference({"a": one}, other) == math.inf
        assert not is_close({"a": one}, other, rtol=1.0, atol=10.0)


def test_batches_survive_their_file(tmp_path: Path):
    """Any name, any shape, strings of any bytes; half precision of the other kind comes back as float32."""
    batches = [
        {"a/b:0": np.arange(6, dtype=np.int64).reshape(2, 3), "s": np.array([[b"\x00", b""], [b"ab", "é"]], object)},
        {"empty": np.zeros((0, 2), np.float16), "half": np.array([0.5], ml_dtypes.bfloat16), "scalar": np.array(True)},
    ]
    write_batches(tmp_path / "x.npz", batches)
    first, second = read_batches(tmp_path / "x.npz")
    assert first["a/b:0"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first["s"].tolist() == [[b"\x00", b""], [b"ab", "é".encode()]]
    assert second["empty"].shape == (0, 2)
    assert second["empty"].dtype == np.float16
    assert second["half"].dtype == np.float32
    assert second["half"].tolist() == [0.5]
    assert second["scalar"].shape == ()
