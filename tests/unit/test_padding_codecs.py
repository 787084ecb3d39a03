"""Rows of different lengths in the dialects that can say them, in and out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from service.bounds import Bounds
from service.errors import InvalidArgument
from service.examples import Method, decode_examples
from service.predictor import Decoded, Prediction, validate
from service.registry.config import ModelConfig
from service.registry.padding import with_padding
from service.rest.door_answer_codec import answers_of, encode_answers
from service.rest.door_body_codec import JSON_TYPE, Records
from service.rest.door_records_codec import decode_records
from service.rest.tfserving_codec import decode_predict, encode_predict
from service.tensors import DataType, Signature, TensorSpec
from tests.signatures import one, only
from tests.unit.test_examples import Rows, floats, ints, row

INT32, FP32, BYTES = DataType.INT32, DataType.FP32, DataType.BYTES
FEW = Bounds(max_tensor_elements=8)


def padded(signature: Signature, said: Any = True) -> Signature:
    return with_padding(only(signature), ModelConfig(padding=said))[signature.name]


def decode(body: Any, signature: Signature, bounds: Bounds | None = None) -> tuple[Decoded, str]:
    return decode_predict(json.dumps(body).encode(), only(signature), 100, bounds or Bounds())


TOKENS = padded(one(INT32, (None, None)))
WIDE = padded(one(INT32, (None, None, None)), {"inputs": {"x": {"axis": 1}}})
SERIES = padded(one(FP32, (None, None, 2)))


@pytest.mark.parametrize(
    ("body", "signature", "array", "lengths"),
    [
        ({"instances": [[1, 2, 3], [4]]}, TOKENS, [[1, 2, 3], [4, 0, 0]], [3, 1]),
        ({"instances": [[4], [1, 2, 3]]}, TOKENS, [[4, 0, 0], [1, 2, 3]], [1, 3]),
        ({"instances": [{"x": [1]}, {"x": [2, 3]}]}, TOKENS, [[1, 0], [2, 3]], [1, 2]),
        ({"inputs": [[1], [2, 3]]}, TOKENS, [[1, 0], [2, 3]], [1, 2]),
        ({"inputs": {"x": [[1], [2, 3]]}}, TOKENS, [[1, 0], [2, 3]], [1, 2]),
        ({"instances": [[[1, 2]], [[3, 4], [5, 6]]]}, SERIES, [[[1, 2], [0, 0]], [[3, 4], [5, 6]]], [1, 2]),
        ({"instances": [["a", "b"], ["c"]]}, padded(one(BYTES, (None, None))), [[b"a", b"b"], [b"c", b""]], [2, 1]),
    ],
)
def test_ragged_rows_are_padded_to_the_longest(body: Any, signature: Signature, array: Any, lengths: list[int]):
    """In each form of TensorFlow Serving's JSON."""
    decoded, _ = decode(body, signature)
    assert decoded.inputs["x"].tolist() == array
    assert decoded.lengths == {"x": lengths}
    validate(decoded)


def test_rectangular_rows_need_no_lengths():
    """They are read as ever."""
    decoded, _ = decode({"instances": [[1, 2], [3, 4]]}, TOKENS)
    assert decoded.lengths is None
    assert decoded.inputs["x"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("body", "signature", "text"),
    [
        ({"instances": [[1, 2], ["a"]]}, TOKENS, "row 1: input 'x': INT32 expected at [0], got \"a\""),
        ({"instances": [[1, 2], 3]}, TOKENS, "row 1: input 'x': [-1] expected, got []"),
        ({"instances": [[1, 2], [[3]]]}, TOKENS, "row 1: input 'x': [-1] expected, got [1, 1]"),
        ({"instances": [[[1, 2]], [[3], [4]]]}, SERIES, "row 1: input 'x': [-1, 2] expected, got [2, 1]"),
        ({"inputs": {"x": [[[1]], 2]}}, WIDE, "row 1: input 'x': [-1, -1] expected, got []"),
        ({"inputs": {"x": [[[1, 2]], [[3]]]}}, WIDE, "input 'x' is ragged"),
        ({"instances": [[[1, 2]], [[3, 4], [5]]]}, SERIES, "row 1: input 'x' is ragged"),
        ({"instances": [[1, 2], [3]]}, one(INT32, (None, None)), "input 'x' is ragged"),
        ({"instances": [[1], [1, 2, 3, 4, 5, 6]]}, TOKENS, "input 'x': at most 8 elements expected"),
    ],
)
def test_rows_that_differ_in_more_are_refused(body: Any, signature: Signature, text: str):
    """As are types, what is not padded, and what would be too large when padded."""
    with pytest.raises(InvalidArgument) as refused:
        decode(body, signature, FEW)
    assert text in str(refused.value)


def test_an_empty_row_is_refused():
    """When it is validated: before it is queued."""
    decoded, _ = decode({"instances": [[], [1]]}, TOKENS)
    with pytest.raises(InvalidArgument, match="a length of 1 or more expected on axis 1, got 0"):
        validate(decoded)


def test_long_lists_of_numbers_may_be_ragged_too():
    """What is read in pieces where it can be is read whole then."""
    rows = [[1] * 300_000, [2] * 299_999]
    decoded, _ = decode({"instances": rows}, TOKENS)
    assert decoded.lengths == {"x": [300_000, 299_999]}
    assert int(decoded.inputs["x"].sum()) == 300_000 + 2 * 299_999


def test_a_long_list_of_another_type_is_refused_as_ever():
    """Numbers where truths are expected are not read as rows at all."""
    with pytest.raises(InvalidArgument, match="input 'x' is ragged: 0 elements expected at"):
        decode({"instances": [[], [1] * 600_000]}, padded(one(DataType.BOOL, (None, None))))


TAGS = Signature(
    "serving_default",
    (TensorSpec("x", INT32, (None, None)),),
    (TensorSpec("tags", DataType.BF16, (None, None)), TensorSpec("topic_bytes", BYTES, (None,))),
)


def answer(signature: Signature, *names: str) -> Prediction:
    outputs = {
        "tags": np.array([[1, 2, 3], [4, 0, 0]]).astype(DataType.BF16.numpy),
        "topic_bytes": np.array([b"a", b"b"], object),
    }
    return Prediction("m", 1, signature, {name: outputs[name] for name in names}, lengths={"x": [3, 1]})


def test_outputs_that_follow_are_answered_ragged():
    """Bare, by name, row by row and as columns; others stay as they are."""
    signature = padded(TAGS)
    assert json.loads(encode_predict(answer(signature, "tags"), "instances")) == {"predictions": [[1, 2, 3], [4]]}
    both = answer(signature, "tags", "topic_bytes")
    rows = [{"tags": [1, 2, 3], "topic_bytes": {"b64": "YQ=="}}, {"tags": [4], "topic_bytes": {"b64": "Yg=="}}]
    assert json.loads(encode_predict(both, "instances")) == {"predictions": rows}
    columns = {"tags": [[1, 2, 3], [4]], "topic_bytes": [{"b64": "YQ=="}, {"b64": "Yg=="}]}
    assert json.loads(encode_predict(both, "inputs")) == {"outputs": columns}


def test_records_may_differ_in_length():
    """Those of ``/predict`` too, and their answers."""
    records = Records([{"x": [1, 2, 3]}, {"x": [4]}], is_list=True)
    signature = padded(TAGS)
    (decoded,) = decode_records(records, signature, Bounds(), 1)
    assert decoded.inputs["x"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert decoded.lengths == {"x": [3, 1]}
    text = encode_answers(answers_of([answer(signature, "tags", "topic_bytes")], 2), signature, JSON_TYPE, is_list=True)
    assert [each["tags"] for each in json.loads(text)] == [[1, 2, 3], [4]]
    with pytest.raises(InvalidArgument, match="records differ in shape"):
        decode_records(records, TAGS, Bounds(), 1)


def test_examples_may_differ_in_length():
    """A feature has as many values as its row is long; what is wrong is told of its example."""
    specs = (TensorSpec("x", FP32, (None, None, 2)), TensorSpec("n", INT32, (None,)))
    signature = padded(Signature("serving_default", specs, (TensorSpec("scores", FP32, (None, 2)),)))
    rows = Rows(row(x=floats(1, 2), n=ints(7)), row(x=floats(3, 4, 5, 6), n=ints(8)))
    decoded = decode_examples(Method.CLASSIFY, rows, only(signature), "")
    assert decoded.inputs["x"].tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert decoded.lengths == {"x": [1, 2]}
    validate(decoded)
    bad = Rows(row(x=floats(1, 2), n=ints(7)), row(x=np.array([b"a"] * 4, object), n=ints(8)))
    with pytest.raises(InvalidArgument, match="feature 'x' of example 1: integers or floats expected"):
        decode_examples(Method.CLASSIFY, bad, only(signature), "")
