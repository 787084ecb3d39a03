"""TensorFlow Serving's REST bodies: rows and columns, in and out."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import FailedPrecondition, InvalidArgument
from service.rest import tfserving_codec
from service.rest.tfserving_codec import decode_predict, encode_predict, signature_def
from service.tensors import Array, DataType, Signature, TensorSpec
from tests.signatures import many, one, only, prediction

PAIR = many(a=DataType.FP32, b=DataType.BYTES)
TEXT = one(DataType.BYTES, (None,))


def decode(body: object, signatures: Mapping[str, Signature] | None = None) -> Any:
    """The inputs, the form and the rest of a body."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode_predict(text, signatures or only(one()), 100)


def refusal(body: object, signature: Signature) -> str:
    with pytest.raises(InvalidArgument) as refused:
        decode(body, only(signature))
    return str(refused.value)


@pytest.mark.parametrize(
    ("body", "signature", "expected"),
    [
        ({"instances": [[1, 2, 3], [4, 5, 6]]}, one(), {"x": [[1, 2, 3], [4, 5, 6]]}),
        ({"instances": [{"x": [1, 2, 3]}]}, one(), {"x": [[1, 2, 3]]}),
        ({"instances": [1, 2]}, one(), {"x": [1, 2]}),
        ({"inputs": [[1, 2, 3]]}, one(), {"x": [[1, 2, 3]]}),
        ({"inputs": {"x": [[1, 2, 3]]}}, one(), {"x": [[1, 2, 3]]}),
        ({"inputs": 5}, one(DataType.INT32, ()), {"x": 5}),
        ({"instances": [{"a": 1, "b": "p"}, {"b": "q", "a": 2}]}, PAIR, {"a": [1, 2], "b": [b"p", b"q"]}),
        ({"inputs": {"b": ["p", "q"], "a": [1, 2]}}, PAIR, {"a": [1, 2], "b": [b"p", b"q"]}),
        ({"inputs": {"a": [1], "b": [{"b64": "/w=="}]}}, PAIR, {"a": [1], "b": [b"\xff"]}),
        ({"instances": [{"b64": "/w=="}, "é"]}, TEXT, {"x": [b"\xff", "é".encode()]}),
        ({"instances": [{"x": {"b64": "/w=="}}]}, TEXT, {"x": [b"\xff"]}),
        ({"inputs": {"b64": "/w=="}}, one(DataType.BYTES, ()), {"x": b"\xff"}),
        ({"inputs": {"b64": "/w"}}, one(DataType.BYTES, ()), {"x": b"\xff"}),
        ({"inputs": {"b64": [1, 2]}}, many(b64=DataType.FP32), {"b64": [1, 2]}),
        ({"instances": [{"b64": 1}, {"b64": 2}]}, many(b64=DataType.FP32), {"b64": [1, 2]}),
        ({"inputs": {"x": {"b64": "/w=="}}}, one(DataType.BYTES, ()), {"x": b"\xff"}),
        (b'{"instances": [[NaN, Infinity, -1]]}', one(DataType.FP16), None),
        (b'{"instances": [{"x": [NaN, 1, 2]}]}', one(), None),
        (b'{"inputs": {"x": [[NaN, 1, 2]]}}', one(), None),
    ],
)
def test_rows_and_columns_become_tensors(body: object, signature: Signature, expected: dict[str, object] | None):
    """Every form that TensorFlow Serving documents; the shape is left to the graph."""
    decoded, form = decode(body, only(signature))
    assert form in (body.decode() if isinstance(body, bytes) else body)  # type: ignore[operator]
    assert decoded.signature is signature
    assert not decoded.strict_shapes
    assert list(decoded.inputs) == [spec.name for spec in signature.inputs]
    for spec in signature.inputs:
        assert decoded.inputs[spec.name].dtype == spec.dtype.numpy
    if expected is not None:
        assert {name: array.tolist() for name, array in decoded.inputs.items()} == expected


_NUMBERS: st.SearchStrategy[Any] = st.one_of(
    st.floats(-1e6, 1e6), st.integers(-(2**25), 2**25), st.sampled_from([1e39, -0.0, 2**63, 1e400, True, None, "1", {}])
)
_ROWS = st.one_of(
    st.lists(st.lists(_NUMBERS, min_size=2, max_size=4), max_size=4),
    st.lists(st.lists(st.lists(_NUMBERS, min_size=1, max_size=2), min_size=2, max_size=3), max_size=3),
    st.lists(_NUMBERS | st.lists(_NUMBERS, max_size=3), max_size=6),
)
_SHAPES: list[tuple[int | None, ...]] = [(None, 3), (None,), (None, 3, 1), (None, 2, 2), (None, None), (None, 1, 3), ()]


@given(
    rows=_ROWS,
    shape=st.sampled_from(_SHAPES),
    dtype=st.sampled_from([DataType.FP32, DataType.FP64, DataType.FP16, DataType.INT8, DataType.BOOL]),
    form=st.sampled_from(["instances", "inputs"]),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" ,\n ", " :\t")]),
    end=st.sampled_from([b"}", b" } \n", b"", b"]}", b', "x": [1]}', b"}}"]),
)
def test_the_common_body_is_read_as_any_other(
    rows: Any, shape: tuple[int | None, ...], dtype: DataType, form: str, separators: tuple[str, str], end: bytes
):
    """The short way gives what the long one gives, bit for bit, or leaves the body to that."""
    body = json.dumps({form: rows}, separators=separators).encode()[:-1] + end
    signatures = only(one(dtype, shape))

    def outcome() -> tuple[Any, ...]:
        try:
            decoded, form = decode(body, signatures)
        except InvalidArgument as error:
            return (str(error),)
        array = decoded.inputs["x"]
        return form, array.dtype, array.shape, array.tobytes(), decoded.strict_shapes, decoded.signature

    with pytest.MonkeyPatch.context() as without:
        without.setattr(tfserving_codec, "rows_of", lambda text, spec: None)
        expected = outcome()
    assert outcome() == expected


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((None, 3), 1), ((None, 3), 2), ((None, 200), 2), ((None, 2, 2), 1), ((None, 1, 3), 1), ((None,), 4)],
)
def test_rows_as_the_signature_has_them_take_the_short_way(
    shape: tuple[int | None, ...], rows: int, monkeypatch: pytest.MonkeyPatch
):
    """However many lists they are in."""
    monkeypatch.setattr(tfserving_codec, "Document", None)
    values = np.arange(rows * math.prod(shape[1:]), dtype=np.float32).reshape(rows, *shape[1:])  # type: ignore[arg-type]
    decoded, form = decode({"instances": values.tolist()}, only(one(shape=shape)))
    assert form == "instances"
    assert np.array_equal(decoded.inputs["x"], values)


@pytest.mark.parametrize(("name", "chosen"), [("", "serving_default"), ("other", "other"), (None, "serving_default")])
def test_the_signature_may_be_named(name: str | None, chosen: str):
    """Without a name, or with an empty one, it is the default."""
    signatures = {key: one(name=key) for key in ("serving_default", "other")}
    decoded, _ = decode({"signature_name": name, "instances": [[1, 2, 3]]}, signatures)
    assert decoded.signature.name == chosen


def test_a_signature_that_is_not_there_is_a_failed_precondition():
    """In TensorFlow Serving's words."""
    with pytest.raises(FailedPrecondition, match='Serving signature name: "no" not found in signature def'):
        decode({"signature_name": "no", "instances": [[1, 2, 3]]})


@pytest.mark.parametrize(
    ("body", "signature", "text"),
    [
        ({}, one(), "Missing 'inputs' or 'instances' key"),
        ({"inputs": 1, "instances": [1]}, one(), "one of 'instances' and 'inputs' is expected, got both"),
        ({"signature_name": [1], "inputs": 1}, one(), "'signature_name' must be a string, got [1]"),
        ({"instances": 5}, one(), "'instances' must be a list of rows"),
        ({"instances": {"x": 1}}, one(), "'instances' must be a list of rows"),
        ({"instances": []}, one(), "'instances' has no rows: at least one is expected, got an empty batch"),
        ({"instances": [[1], [2, 3]]}, one(), "input 'x' is ragged: 1 elements expected at [1], got 2 elements"),
        ({"instances": [[1], {"x": 1}]}, one(), "input 'x' is ragged: 1 elements expected at [1], got {\"x\": 1}"),
        ({"instances": [{"x": 1}, 2]}, one(), "element 1 of 'instances' must be an object, as the first is"),
        (
            {"instances": [{"x": 1}, {"y": 1}]},
            one(),
            "element 1 of 'instances': unknown input 'y': signature 'serving_default' takes x",
        ),
        (
            {"instances": [{"a": 1}]},
            PAIR,
            "element 0 of 'instances': input 'b' is missing: signature 'serving_default' takes a, b; received a",
        ),
        ({"instances": [1]}, PAIR, "each row of 'instances' must be an object with the inputs a, b"),
        ({"inputs": [1]}, PAIR, "'inputs' must be an object with the inputs a, b"),
        ({"inputs": {"a": [1]}}, PAIR, "input 'b' is missing: signature 'serving_default' takes a, b; received a"),
        ({"inputs": {"a": [1], "b": [1]}}, PAIR, "input 'b': BYTES expected at [0], got 1"),
        ({"instances": [{"b64": 1}]}, TEXT, "element 0 of 'instances': unknown input 'b64'"),
        (b'{"inputs": [1e400]}', one(), "JSON Parse error: number too big to be stored in double: 1e400"),
        ({"inputs": None}, one(), "input 'x': FP32 expected at the top, got null"),
        ({"instances": [{"a": [1, 2], "b": ""}, {"a": 3, "b": ""}]}, PAIR, "input 'a' is ragged: 2 elements"),
    ],
)
def test_a_wrong_body_is_told_what_was_expected(body: object, signature: Signature, text: str):
    """Names the field, the place, what was expected and what came."""
    assert refusal(body, signature).startswith(text)


@pytest.mark.parametrize(
    "body", [{"instances": [[[[1]]]]}, {"inputs": [[[[1]]]]}, {"inputs": {"x": [[[1]]]}}, {"instances": [{"x": [[1]]}]}]
)
def test_the_depth_of_the_whole_body_is_bounded(body: dict[str, Any]):
    """`max_depth` counts from the body's own braces."""
    text = json.dumps(body).encode()
    decode_predict(text, only(one()), 5)
    with pytest.raises(InvalidArgument, match="nested deeper than"):
        decode_predict(text, only(one()), 4)


@pytest.mark.parametrize("where", ["instances", "inputs", "signature_name", "x"])
def test_a_hostile_depth_is_refused_wherever_it_is(where: str):
    """A thousand levels that the fast parser lets pass exhaust nobody's stack."""
    deep = b'{"y": ' + b"[" * 1000 + b"]" * 1000 + b"}"
    body = b'{"inputs": {"x": [%s]}}' % deep if where == "x" else b'{"%s": [%s], "inputs": 1}' % (where.encode(), deep)
    with pytest.raises(InvalidArgument):
        decode(body)


# Answers


@pytest.mark.parametrize(
    ("signature", "outputs", "form", "expected"),
    [
        (one(), [[[1, 2, 3]]], "instances", {"predictions": [[1, 2, 3]]}),
        (one(), [[[1, 2, 3]]], "inputs", {"outputs": [[1, 2, 3]]}),
        (one(DataType.INT8, ()), [5], "inputs", {"outputs": 5}),
        (
            PAIR,
            [[1, 2], [b"p", "q"]],
            "instances",
            {"predictions": [{"out_a": 1, "out_b": "p"}, {"out_a": 2, "out_b": "q"}]},
        ),
        (PAIR, [[1, 2], [b"p", b"\xff"]], "inputs", {"outputs": {"out_a": [1, 2], "out_b": ["p", {"b64": "/w=="}]}}),
        (many(a=DataType.BOOL), [[True]], "instances", {"predictions": [True]}),
        (one(DataType.BF16), [[[1.5, 2, 3]]], "instances", {"predictions": [[1.5, 2, 3]]}),
    ],
)
def test_outputs_are_answered_in_the_form_of_the_request(
    signature: Signature, outputs: list[Any], form: str, expected: object
):
    """Rows for rows and columns for columns; one output comes bare, several by name."""
    assert json.loads(encode_predict(prediction(signature, *outputs), form)) == expected


@pytest.mark.parametrize("form", ["instances", "inputs"])
def test_an_output_called_bytes_comes_as_base64(form: str):
    """A name that ends in ``_bytes`` says that its values are no text."""
    signature = Signature("s", (), (TensorSpec("image_bytes", DataType.BYTES, (None,)),))
    (values,) = json.loads(encode_predict(prediction(signature, [b"a"]), form)).values()
    assert values == [{"b64": base64.b64encode(b"a").decode()}]


@pytest.mark.parametrize("outputs", [([1, 2], [b"p"]), ([1], b"p")])
def test_outputs_without_common_rows_can_only_be_asked_for_as_columns(outputs: tuple[Any, Any]):
    """The refusal says how to ask instead."""
    answer = prediction(PAIR, *outputs)
    with pytest.raises(InvalidArgument, match="ask with 'inputs' instead of 'instances'"):
        encode_predict(answer, "instances")
    assert b"out_a" in encode_predict(answer, "inputs")


@given(values=st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_predictions_can_be_sent_back_as_instances(values: list[list[float]]):
    """What is answered for a row is read as the same row, NaN and infinities included."""
    array: Array = np.array(values, np.float32)
    answer = encode_predict(prediction(one(), array), "instances")
    decoded, _ = decode(answer.replace(b"predictions", b"instances"))
    np.testing.assert_array_equal(decoded.inputs["x"], array)


def test_a_signature_is_shown_as_proto3_json():
    """int64 sizes are strings, -1 is any size, and an unknown rank has no sizes."""
    signature = Signature(
        "s",
        (TensorSpec("x", DataType.FP32, (None, 3), "x:0"), TensorSpec("any", DataType.BYTES, None)),
        (TensorSpec("y", DataType.INT64, (), "y:0"),),
        "method",
    )
    assert signature_def(signature) == {
        "inputs": {
            "x": {
                "dtype": "DT_FLOAT",
                "tensor_shape": {"dim": [{"size": "-1", "name": ""}, {"size": "3", "name": ""}], "unknown_rank": False},
                "name": "x:0",
            },
            "any": {"dtype": "DT_STRING", "tensor_shape": {"dim": [], "unknown_rank": True}, "name": ""},
        },
        "outputs": {"y": {"dtype": "DT_INT64", "tensor_shape": {"dim": [], "unknown_rank": False}, "name": "y:0"}},
        "method_name": "method",
    }
