"""Open Inference Protocol over REST: JSON and binary tensors, in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import FailedPrecondition, InvalidArgument
from service.predictor import Decoded, ModelInfo
from service.rest.openinference_codec import Wanted, decode_infer, encode_infer, model_metadata
from service.tensors import Array, DataType, Signature, TensorSpec, pack_strings
from tests.signatures import arrays_of, assert_same, many, one, only, prediction

PAIR = many(a=DataType.FP32, b=DataType.INT16)


def tensor(data: Any = (1, 2, 3), **changes: Any) -> dict[str, Any]:
    """A good tensor for the input ``x``, with some keys changed; None takes a key away."""
    keys = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": data, **changes}
    return {key: value for key, value in keys.items() if value is not None}


def decode(
    body: Any, tail: bytes | None = None, signatures: Mapping[str, Signature] | None = None
) -> tuple[Decoded, Wanted]:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    length = None if tail is None else len(text)
    return decode_infer(text + (tail or b""), length, signatures or only(one()), 100)


def refusal(body: Any, tail: bytes | None = None, signature: Signature | None = None) -> str:
    with pytest.raises(InvalidArgument) as refused:
        decode(body, tail, only(signature or one()))
    return str(refused.value)


def binary_body(*arrays: tuple[str, DataType, Array], **keys: Any) -> tuple[dict[str, Any], bytes]:
    """A body of binary tensors and what follows it."""
    blobs = [pack_strings(a) if t is DataType.BYTES else a.tobytes() for _, t, a in arrays]
    inputs = [
        tensor(None, name=name, datatype=t.value, shape=list(a.shape), parameters={"binary_data_size": len(blob)})
        for (name, t, a), blob in zip(arrays, blobs, strict=True)
    ]
    return {"inputs": inputs, **keys}, b"".join(blobs)


# Requests


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
@pytest.mark.parametrize("outputs", [None, [{"name": "y"}]])
def test_json_data_is_flat_or_nested(data: list[Any], outputs: list[Any] | None):
    """Row-major either way, and shapes are enforced."""
    body = {"inputs": [tensor(data, shape=[2, 3])]} | ({"outputs": outputs} if outputs else {})
    decoded, _ = decode(body)
    assert decoded.strict_shapes
    assert_same(decoded.inputs["x"], np.array([[1, 2, 3], [4, 5, 6]], np.float32))


def test_inputs_of_json_and_binary_may_be_mixed():
    """Binary tensors follow the JSON in the order of the inputs, whatever the order of the signature."""
    b = np.array([7, -8], np.int16)
    body, tail = binary_body(("b", DataType.INT16, b))
    body["inputs"].append(tensor([1, 2], name="a", shape=[2]))
    decoded, _ = decode(body, tail, only(PAIR))
    assert decoded.inputs["a"].tolist() == [1, 2]
    assert_same(decoded.inputs["b"], b)


@pytest.mark.parametrize("dtype", DataType)
@settings(max_examples=25)
@given(data=st.data())
def test_binary_tensors_of_every_type_come_back_as_they_went(dtype: DataType, data: st.DataObject):
    """Encoding what was decoded gives the same bytes: two outputs, of any type and shape."""
    dtypes = {"p": dtype, "q": data.draw(st.sampled_from(list(DataType)))}
    arrays = {name: data.draw(arrays_of(each)) for name, each in dtypes.items()}
    specs = tuple(TensorSpec(name, each, None) for name, each in dtypes.items())
    signature = Signature("s", specs, specs)
    answer, length = encode_infer(prediction(signature, *arrays.values()), Wanted(binary=True))
    assert length is not None
    outputs = json.loads(answer[:length])["outputs"]
    decoded, _ = decode(json.dumps({"inputs": outputs}).encode(), answer[length:], only(signature))
    for name, array in arrays.items():
        assert_same(decoded.inputs[name], array)


@pytest.mark.parametrize("dtype", [t for t in DataType if t not in {DataType.FP16, DataType.BF16, DataType.BYTES}])
@settings(max_examples=25)
@given(data=st.data())
def test_json_tensors_come_back_as_they_went(dtype: DataType, data: st.DataObject):
    """What JSON can carry it carries exactly, NaN and the infinities included."""
    array = data.draw(arrays_of(dtype))
    signature = one(dtype, None)
    answer, length = encode_infer(prediction(signature, array), Wanted())
    assert length is None
    outputs = json.loads(answer)["outputs"]
    outputs[0]["name"] = "x"
    decoded, _ = decode({"inputs": outputs}, None, only(signature))
    assert decoded.inputs["x"].dtype == array.dtype
    np.testing.assert_array_equal(decoded.inputs["x"], array)


@pytest.mark.parametrize(
    ("signature", "expected_shape"),
    [(one(), (2, 3)), (one(shape=(2, 3)), (2, 3)), (one(shape=(6,)), (6,)), (one(shape=(3, None)), (3, 2))],
)
def test_a_raw_request_is_one_tensor(signature: Signature, expected_shape: tuple[int, ...]):
    """With a JSON part of length 0 the body is the only input; its open dimension is told from the size."""
    array = np.arange(6, dtype=np.float32).reshape(expected_shape)
    decoded, wanted = decode(b"", array.tobytes(), only(signature))
    assert_same(decoded.inputs["x"], array)
    assert wanted == Wanted(binary=True)


@pytest.mark.parametrize(
    ("signature", "size", "text"),
    [
        (PAIR, 4, "a raw binary request needs a model of one input, this has a, b"),
        (one(DataType.BYTES, (None,)), 4, "a raw binary request cannot tell the shape of input 'x': send JSON with it"),
        (one(shape=(None, None)), 4, "a raw binary request cannot tell the shape of input 'x'"),
        (one(shape=None), 4, "a raw binary request cannot tell the shape of input 'x'"),
        (one(), 13, "input 'x': 12 bytes expected for FP32 [1, 3], got 13"),
        (one(shape=(None, 0)), 5, "input 'x': 0 bytes expected for FP32 [5, 0], got 5"),
    ],
)
def test_a_raw_request_must_have_one_meaning(signature: Signature, size: int, text: str):
    """Several inputs, strings, or several open sizes cannot be told from bytes alone."""
    with pytest.raises(InvalidArgument) as refused:
        decode(b"", bytes(size), only(signature))
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({}, Wanted()),
        ({"id": "é"}, Wanted("é")),
        ({"id": ""}, Wanted("")),
        ({"parameters": {"signature_name": "other"}}, Wanted(signature_name="other")),
        ({"parameters": {"binary_data_output": True}}, Wanted(binary=True)),
        ({"outputs": [{"name": "y"}]}, Wanted(outputs={"y": False})),
        ({"outputs": [{"name": "y", "parameters": {"binary_data": True}}]}, Wanted(outputs={"y": True})),
        (
            {"parameters": {"binary_data_output": True}, "outputs": [{"name": "y", "parameters": {"extra": [1]}}]},
            Wanted(binary=True, outputs={"y": True}),
        ),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
            },
            Wanted(binary=True, outputs={"y": False}),
        ),
        ({"outputs": []}, Wanted()),
    ],
)
def test_what_the_request_wants_of_its_answer(keys: dict[str, Any], wanted: Wanted):
    """Its id, its signature, which outputs, and which of them as binary."""
    signatures = {name: one(name=name) for name in ("serving_default", "other")}
    decoded, got = decode({"inputs": [tensor()], **keys}, None, signatures)
    assert got == wanted
    assert decoded.signature.name == (wanted.signature_name or "serving_default")


def test_a_signature_that_is_not_there_is_a_failed_precondition():
    """In the same words as in TensorFlow Serving's dialect."""
    with pytest.raises(FailedPrecondition, match='"no" not found in signature def'):
        decode({"inputs": [tensor()], "parameters": {"signature_name": "no"}})


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "'inputs' must be a list of tensors, got null"),
        ({"inputs": {"x": 1}}, "'inputs' must be a list of tensors, got {\"x\": 1}"),
        ({"inputs": [1]}, "element 0 of 'inputs' must be an object with a 'name'"),
        ({"inputs": [{"name": 5}]}, "element 0 of 'inputs' must be an object with a 'name'"),
        ({"inputs": []}, "input 'x' is missing: signature 'serving_default' takes x; received none"),
        ({"inputs": [tensor(), tensor()]}, "input 'x' is given twice"),
        ({"inputs": [tensor(name="z")]}, "unknown input 'z': signature 'serving_default' takes x"),
        ({"inputs": [tensor(datatype="INT8")]}, "input 'x': expected datatype FP32, got \"INT8\""),
        ({"inputs": [tensor(datatype=None)]}, "input 'x': expected datatype FP32, got null"),
        ({"inputs": [tensor(shape=None)]}, "input 'x': shape must be a list of sizes, got null"),
        ({"inputs": [tensor(shape=[1, "3"])]}, "input 'x': shape must be a list of sizes, got [1, \"3\"]"),
        ({"inputs": [tensor(shape=[True, 3])]}, "input 'x': shape must be a list of sizes, got [true, 3]"),
        ({"inputs": [tensor(shape=[1, -3])]}, "input 'x': a shape has no negative sizes, got [1, -3]"),
        (
            {"inputs": [tensor(shape=[2**70])]},
            "input 'x': at most 16777216 elements expected",
        ),
        ({"inputs": [tensor([1, 2])]}, "input 'x': shape [1, 3] has 3 elements, the data has 2 in shape [2]"),
        ({"inputs": [tensor([1, [2], 3])]}, "input 'x' is ragged: a value expected at [1], got a list"),
        ({"inputs": [tensor([[1], [2, 3]])]}, "input 'x' is ragged: 1 elements expected at [1], got 2 elements"),
        ({"inputs": [tensor([1, 2, "3"])]}, "input 'x': FP32 expected at [2], got \"3\""),
        ({"inputs": [tensor("abc")]}, "input 'x': data must be a list, got \"abc\""),
        ({"inputs": [tensor(None)]}, "input 'x': data must be a list, got null"),
        ({"inputs": [tensor(parameters=5)]}, "input 'x': parameters must be an object, got 5"),
        ({"inputs": [tensor()], "parameters": []}, "parameters must be an object, got []"),
        ({"inputs": [tensor()], "parameters": {"signature_name": 5}}, "parameter signature_name: a string expected"),
        (
            {"inputs": [tensor()], "parameters": {"binary_data_output": "yes"}},
            "parameter binary_data_output: true or false expected, got 'yes'",
        ),
        ({"inputs": [tensor()], "id": 5}, "'id' must be a string, got 5"),
        ({"inputs": [tensor()], "id": "\ud800"}, "'id' must be text, got a lone surrogate"),
        ({"inputs": [tensor()], "outputs": "y"}, "'outputs' must be a list of tensors, got \"y\""),
        ({"inputs": [tensor()], "outputs": [{"name": "z"}]}, "unknown output 'z': signature 'serving_default' gives y"),
        ({"inputs": [tensor()], "outputs": [{"name": "y", "parameters": 1}]}, "output 'y': parameters must be an obj"),
        (b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "INT8", "data": [NaN, 1, 2]}]}', "input 'x': expec"),
    ],
)
def test_a_wrong_body_is_told_what_was_expected(body: Any, text: str):
    """Names the field, what was expected and what came."""
    assert refusal(body).startswith(text)


@pytest.mark.parametrize(
    ("size", "data", "tail", "text"),
    [
        (13, None, 12, "at most the 12 bytes that follow expected, got 13"),
        (-1, None, 12, "at most the 12 bytes that follow expected, got -1"),
        (True, None, 12, "at most the 12 bytes that follow expected, got True"),
        ("12", None, 12, "at most the 12 bytes that follow expected, got '12'"),
        (8, None, 12, "12 bytes expected for FP32 [1, 3], got 8"),
        (12, [1, 2, 3], 12, "either data or binary_data_size expected, got both"),
        (12, None, 14, "2 bytes follow the last binary input: the sizes do not add up to the body"),
    ],
)
def test_binary_sizes_must_add_up(size: Any, data: list[int] | None, tail: int, text: str):
    """Every byte after the JSON belongs to exactly one input."""
    assert text in refusal({"inputs": [tensor(data, parameters={"binary_data_size": size})]}, bytes(tail))


@pytest.mark.parametrize("length", [3, 10**17])
def test_the_json_part_must_lie_within_the_body(length: int):
    """The header and the body have to agree."""
    with pytest.raises(InvalidArgument, match=f"Inference-Header-Content-Length: {length} is not within the body of 2"):
        decode_infer(b"{}", length, only(one()), 100)


@pytest.mark.parametrize("key", ["inputs", "outputs", "id", "parameters"])
@pytest.mark.parametrize("inner", [b"%s", b'[{"name": "x", "data": %s}]', b'[{"name": "y", "parameters": %s}]'])
def test_a_hostile_depth_is_refused_wherever_it_is(key: str, inner: bytes):
    """A thousand levels that the fast parser lets pass exhaust nobody's stack."""
    deep = b'{"y": ' + b"[" * 1000 + b"]" * 1000 + b"}"
    refusal(b'{"%s": %s}' % (key.encode(), inner % deep))


def test_the_depth_of_the_whole_body_is_bounded():
    """`max_depth` counts from the body's own braces."""
    body = json.dumps({"inputs": [tensor([[1, 2, 3]])]}).encode()
    decode_infer(body, None, only(one()), 5)
    with pytest.raises(InvalidArgument, match="nested deeper than"):
        decode_infer(body, None, only(one()), 4)


# Answers


@pytest.mark.parametrize("request_id", [None, "", "42"])
def test_an_id_is_echoed_if_it_was_given(request_id: str | None):
    """An answer says who made it, and has the request's id, or no such key."""
    text, length = encode_infer(prediction(one(), [[1, 2, 3]]), Wanted(request_id))
    answer = json.loads(text)
    assert length is None
    assert answer.get("id") == request_id
    assert ("id" in answer) is (request_id is not None)
    assert (answer["model_name"], answer["model_version"]) == ("m", "3")
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]


def test_each_output_is_json_or_binary_as_asked():
    """Outputs come in the order asked for; binary ones follow the JSON in that order."""
    answer = prediction(PAIR, [1.5], [7])
    text, length = encode_infer(answer, Wanted(outputs={"out_b": True, "out_a": False}))
    assert length is not None
    first, second = json.loads(text[:length])["outputs"]
    assert first == {"name": "out_b", "datatype": "INT16", "shape": [1], "parameters": {"binary_data_size": 2}}
    assert second == {"name": "out_a", "datatype": "FP32", "shape": [1], "data": [1.5]}
    assert text[length:] == b"\x07\x00"


def test_strings_are_flat_json_too():
    """BYTES come as text; what is no UTF-8 as base64."""
    array = np.array([[b"a", b"\xff"]], object)
    text, _ = encode_infer(prediction(one(DataType.BYTES, (None, 2)), array), Wanted())
    assert json.loads(text)["outputs"][0]["data"] == ["a", {"b64": "/w=="}]


@pytest.mark.parametrize("dtype", [DataType.FP16, DataType.BF16])
def test_half_precision_is_answered_in_binary_only(dtype: DataType):
    """As a JSON number it is taken, but not given: the text says how to ask."""
    answer = prediction(one(dtype), [[1, 2, 3]])
    with pytest.raises(InvalidArgument) as refused:
        encode_infer(answer, Wanted())
    assert str(refused.value) == (
        f"output 'y' is {dtype.value}, which JSON cannot carry: ask for it as binary (parameters.binary_data: true)"
    )
    assert encode_infer(answer, Wanted(binary=True))[0].endswith(answer.outputs["y"].tobytes())


def test_metadata_is_that_of_the_default_signature():
    """-1 stands for a dimension of any size."""
    signature = many(a=DataType.FP32)
    info = ModelInfo("m", 3, (2, 3), "keras", only(signature))
    assert model_metadata(info) == {
        "name": "m",
        "versions": ["2", "3"],
        "platform": "keras",
        "inputs": [{"name": "a", "datatype": "FP32", "shape": [-1]}],
        "outputs": [{"name": "out_a", "datatype": "FP32", "shape": [-1]}],
    }
