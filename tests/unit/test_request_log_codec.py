"""Records of the request log are what warms up a model: what was logged is what is decoded."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from google.protobuf.json_format import Parse

from service.errors import InvalidArgument
from service.following.followed import Asked, Followed
from service.rpc._generated.kiln.tensorflow.serving.prediction_log_pb2 import PredictionLog
from service.rpc.request_log_codec import encode_line, encode_record
from service.rpc.warmup_codec import decode_warm_up, parse_log
from service.tensors import Array, DataType, Signature, TensorSpec
from service.trace_context import NOBODY

ENCODERS = pytest.mark.parametrize("encode", [encode_record, encode_line])
Encode = Callable[[Followed, Asked], bytes]


def logged(encode: Encode, array: Array, dtype: DataType, outputs: Any = None) -> tuple[Signature, bytes]:
    shape = (None, *array.shape[1:])
    signature = Signature("mine", (TensorSpec("x", dtype, shape, "x:0"),), (TensorSpec("y", dtype, shape, "y:0"),))
    followed = Followed(NOBODY, None, is_kept=True, model="double", version=7)
    asked = followed.asks(signature, {"x": array})
    asked.outputs = outputs
    return signature, encode(followed, asked)


@ENCODERS
@pytest.mark.parametrize("dtype", DataType)
def test_every_type_comes_back(encode: Encode, dtype: DataType):
    """Bit for bit, with its shape."""
    array: Array
    if dtype is DataType.BYTES:
        array = np.array([[b"", b"\xff\x00"], [b"a", "é".encode()]], object)
    elif dtype is DataType.BOOL:
        array = np.array([[True, False]])
    else:
        info: Any = (np.iinfo if dtype.numpy.kind in "iu" else ml_dtypes.finfo)(dtype.numpy)
        array = np.array([[info.min, info.max], [0, 1]], dtype.numpy)
    signature, record = logged(encode, array, dtype)
    ((asked, inputs),) = decode_warm_up(record, {"other": signature, "mine": signature})
    assert asked is signature
    assert inputs["x"].dtype == array.dtype
    assert inputs["x"].tolist() == array.tolist()


@ENCODERS
@pytest.mark.parametrize(
    "array",
    [
        np.array([[np.nan, np.inf], [-np.inf, 0.1]], np.float32),
        np.zeros((0, 3), np.float32),
        np.arange(20_000, dtype=np.float32).reshape(2, -1)[:, ::2],
        np.arange(30_000, dtype=np.float32).reshape(1, -1)[:, ::2],
    ],
    ids=["not finite", "no rows", "not contiguous", "large"],
)
def test_numbers_come_back(encode: Encode, array: Array):
    """Also those that JSON does not have, and too many to write out."""
    _, record = logged(encode, array, DataType.FP32)
    request = parse_log(record).predict_log.request
    tensor = request.inputs["x"]
    back = np.frombuffer(tensor.tensor_content, np.float32) if tensor.tensor_content else np.array(tensor.float_val)
    np.testing.assert_array_equal(back.reshape([dim.size for dim in tensor.tensor_shape.dim]), array)


@ENCODERS
def test_who_was_asked_and_what_came(encode: Encode):
    """Model, version and signature stand in log, request and response; the outputs are those answered."""
    _, record = logged(encode, np.ones((1, 2), np.float32), DataType.FP32, {"y": np.full((1, 2), 2, np.float32)})
    log = parse_log(record)
    answer = log.predict_log.response
    for spec in (log.log_metadata.model_spec, log.predict_log.request.model_spec, answer.model_spec):
        assert (spec.name, spec.version.value, spec.signature_name) == ("double", 7, "mine")
    tensor = answer.outputs["y"]
    assert list(tensor.float_val or np.frombuffer(tensor.tensor_content, np.float32)) == [2.0, 2.0]


def test_a_line_is_protobufs_json():
    """Its own parser reads it, and people read the numbers."""
    _, line = logged(encode_line, np.array([[1, 0.1]], np.float32), DataType.FP32)
    assert b"\n" not in line
    assert json.loads(line)["predict_log"]["request"]["inputs"]["x"]["float_val"] == [1.0, 0.1]
    assert Parse(line, PredictionLog()) == parse_log(line)


@pytest.mark.parametrize("record", [b"{", b'{"predict_log": 1}', b'{"nothing": 1}'])
def test_json_that_is_no_record(record: bytes):
    """It is refused as what it is."""
    with pytest.raises(InvalidArgument, match="no PredictionLog"):
        parse_log(record)
