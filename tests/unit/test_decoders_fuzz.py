"""Whatever bytes a caller sends, each of the decoders gives tensors or refuses with a `KilnError`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidArgument, KilnError
from service.examples import Examples, Method, decode_examples
from service.predictor import Decoded, validate
from service.rest import openinference_codec as rest_oip
from service.rest import tfserving_codec as rest_tfs
from service.rest.examples_codec import decode_examples_body
from service.rpc import open_inference_codec as rpc_oip
from service.rpc import tfserving_codec as rpc_tfs
from service.rpc._generated.inference import open_inference_pb2 as oip_pb
from service.rpc._generated.kiln.tensorflow.example_pb2 import Example
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs_pb
from service.rpc.examples_codec import ProtoExamples
from service.rpc.messages import parse
from service.tensors import DataType, Signature, TensorSpec
from tests.signatures import many, one, only

Decode = Callable[[bytes, Mapping[str, Signature]], Decoded]
SIGNATURES = [
    one(),
    one(DataType.BYTES, ()),
    many(x=DataType.UINT8, y=DataType.BYTES),
    many(x=DataType.FP16, y=DataType.BOOL),
    Signature("serving_default", (TensorSpec("x", DataType.INT64, None),), ()),
]


def _rest_oip(body: bytes, signatures: Mapping[str, Signature]) -> Decoded:
    """The first two bytes stand for the header: 0 for none, else one more than the length of the JSON part."""
    head, body = int.from_bytes(body[:2], "big"), body[2:]
    length = head - 1 if head else None
    decoded, wanted = rest_oip.decode_infer(body, length, signatures, 100)
    json.dumps(wanted.id).encode()
    return decoded


def _decode_examples(examples: Examples, name: str, signatures: Mapping[str, Signature]) -> Decoded:
    """By whichever method the signature can be asked; the examples must be messages that protobuf reads."""
    for data in examples.serialized():
        Example.FromString(data)
    for method in Method:
        with contextlib.suppress(KilnError):
            return decode_examples(method, examples, signatures, name)
    raise InvalidArgument("by neither")


def _rest_examples(body: bytes, signatures: Mapping[str, Signature]) -> Decoded:
    return _decode_examples(*decode_examples_body(body, 100), signatures)


def _grpc_examples(data: bytes, signatures: Mapping[str, Signature]) -> Decoded:
    request = parse(tfs_pb.ClassificationRequest, data)
    return _decode_examples(ProtoExamples(request.input), request.model_spec.signature_name, signatures)


DECODERS: dict[str, Decode] = {
    "rest-tfs": lambda body, signatures: rest_tfs.decode_predict(body, signatures, 100)[0],
    "rest-v2": _rest_oip,
    "grpc-tfs": lambda data, signatures: rpc_tfs.decode_predict(parse(tfs_pb.PredictRequest, data), signatures),
    "grpc-v2": lambda data, signatures: rpc_oip.decode_infer(parse(oip_pb.ModelInferRequest, data), signatures),
    "rest-examples": _rest_examples,
    "grpc-examples": _grpc_examples,
}


def _tfs_message() -> bytes:
    request = tfs_pb.PredictRequest(model_spec={"name": "m"}, output_filter=["out_x"])
    x, y = request.inputs["x"], request.inputs["y"]
    x.dtype, y.dtype = DataType.UINT8.number, DataType.BYTES.number  # type: ignore[assignment]
    x.tensor_shape.dim.add(size=2)
    x.int_val.extend([1, 2])
    y.tensor_shape.dim.add(size=2)
    y.string_val.extend([b"ab", b""])
    return request.SerializeToString()


def _oip_message(*, raw: bool) -> bytes:
    request = oip_pb.ModelInferRequest(model_name="m", id="1")
    request.parameters["binary_data_output"].bool_param = True
    x = request.inputs.add(name="x", datatype="UINT8", shape=[2])
    y = request.inputs.add(name="y", datatype="BYTES", shape=[2])
    request.outputs.add(name="out_x")
    if raw:
        request.raw_input_contents.extend([b"\x01\x02", b"\x02\0\0\0ab\0\0\0\0"])
    else:
        x.contents.uint_contents.extend([1, 2])
        y.contents.bytes_contents.extend([b"ab", b""])
    return request.SerializeToString()


def _examples_message(*, with_context: bool) -> bytes:
    request = tfs_pb.ClassificationRequest()
    example = request.input.example_list.examples.add()
    if with_context:
        context = request.input.example_list_with_context.context
        context.features.feature["x"].int64_list.value.append(1)
        example = request.input.example_list_with_context.examples.add()
        example.features.feature["y"].bytes_list.value.append(b"a")
    else:
        example.features.feature["x"].float_list.value.extend([1, 2, 3])
    return request.SerializeToString()


_ROWS = b'{"signature_name": "serving_default", "instances": [{"x": 1, "y": "a"}, {"x": 2, "y": {"b64": "YQ=="}}]}'
_INFER = (
    b'{"id": "1", "parameters": {"binary_data_output": true}, "outputs": [{"name": "out_x"}], "inputs": ['
    b'{"name": "x", "shape": [2], "datatype": "UINT8", "data": [1, 2]},'
    b'{"name": "y", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}]}'
)
VALID: dict[str, list[bytes]] = {
    "rest-tfs": [
        _ROWS,
        b'{"inputs": {"x": [1, 2], "y": ["a", "b"]}}',
        b'{"instances": [[1, 2, 3], [4e0, NaN, -0]]}',
        b'{"inputs": {"b64": "YQ=="}}',
    ],
    "rest-v2": [
        b"\0\0" + b'{"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [[1,2,3],[4,5,6]]}]}',
        (len(_INFER) + 1).to_bytes(2, "big") + _INFER + b"\x01\0\0\0a",
        b"\0\1" + bytes(12),
    ],
    "grpc-tfs": [_tfs_message()],
    "grpc-v2": [_oip_message(raw=True), _oip_message(raw=False)],
    "rest-examples": [
        b'{"signature_name": "serving_default", "examples": [{"x": [1.5, NaN, -1.0]}]}',
        b'{"context": {"x": 1}, "examples": [{"y": "a"}, {"x": [2], "y": {"b64": "YQ=="}}]}',
    ],
    "grpc-examples": [_examples_message(with_context=False), _examples_message(with_context=True)],
}
WORDS = (
    "instances inputs outputs examples context signature_name serving_default x y name shape datatype data parameters "
    "id FP32 UINT8 BYTES INT64 binary_data_size binary_data_output b64 YQ=="
).split()
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(st.characters(categories=["L", "Cs"]), max_size=3)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)
TENSOR = st.fixed_dictionaries(
    {"name": st.sampled_from(["x", "y"])},
    optional={
        "shape": st.lists(st.integers(0, 3), max_size=3) | JSON,
        "datatype": st.sampled_from([t.value for t in DataType]) | JSON,
        "data": st.lists(st.integers(0, 9), max_size=4) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 9)}) | JSON,
    },
)
BODY = (
    st.fixed_dictionaries({"instances": JSON})
    | st.fixed_dictionaries({"examples": st.lists(JSON, max_size=3) | JSON}, optional={"context": JSON})
    | st.fixed_dictionaries({"inputs": JSON})
    | st.fixed_dictionaries({"inputs": st.lists(TENSOR, max_size=3)}, optional={"outputs": JSON, "id": JSON})
    | JSON
)


def feed(name: str, data: bytes) -> None:
    """Decode for every kind of signature; what is decoded must be fit for validation."""
    for signature in SIGNATURES:
        with contextlib.suppress(KilnError):
            decoded = DECODERS[name](data, only(signature))
            assert all(isinstance(array, np.ndarray) for array in decoded.inputs.values())
            validate(decoded)


@pytest.mark.parametrize("name", DECODERS)
def test_the_valid_requests_are_valid(name: str):
    """Each of the bodies that are mutated below is good for one signature at least."""
    for data in VALID[name]:
        good = 0
        for signature in SIGNATURES:
            with contextlib.suppress(KilnError):
                DECODERS[name](data, only(signature))
                good += 1
        assert good, data


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=200))
def test_any_bytes(name: str, data: bytes):
    """Garbage is refused."""
    feed(name, data)


@pytest.mark.parametrize("name", ["rest-tfs", "rest-v2", "rest-examples"])
@given(body=BODY, has_header=st.booleans(), tail=st.binary(max_size=12))
def test_any_json(name: str, body: Any, has_header: bool, tail: bytes):
    """JSON of any form, with the words that mean something in it, lone surrogates and numbers of any size."""
    text = json.dumps(body).encode()
    head = min(len(text) + 1, 2**16 - 1) if has_header else 0
    feed(name, text if name != "rest-v2" else head.to_bytes(2, "big") + text + tail)


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """A valid request with some of its bytes replaced, taken out, doubled or inserted."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = min(start + draw(st.integers(0, 6)), len(data))
        data[start:stop] = draw(
            st.binary(max_size=4)
            | st.sampled_from(
                [b"[", b"]", b"{", b'"', b"NaN", b"1e999", b"\\ud800", b"-1", b",[]", bytes(data[start:stop]) * 2]
            )
        )
    return bytes(data)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.data())
def test_mutated_requests(name: str, data: st.DataObject):
    """A good request with a few bytes changed."""
    feed(name, data.draw(mutated(VALID[name])))


DIMENSION = st.sampled_from([0, 1, 2, 3, -1, 2**24 + 1, 2**33, 2**63 - 1])
INTEGERS = st.integers(-(2**31), 2**31 - 1)


@given(
    dtype=st.integers(0, 25),
    dims=st.lists(DIMENSION, max_size=4),
    content=st.binary(max_size=9),
    ints=st.lists(INTEGERS, max_size=4),
    names=st.lists(st.sampled_from(["x", "y", "z"]), max_size=3),
)
def test_any_tfs_tensor(dtype: int, dims: list[int], content: bytes, ints: list[int], names: list[str]):
    """Every type, shape and list of TensorFlow's tensors, sensible or not."""
    request = tfs_pb.PredictRequest()
    for name in names:
        proto = request.inputs[name]
        proto.dtype = dtype  # type: ignore[assignment]
        for size in dims:
            proto.tensor_shape.dim.add(size=size)
        proto.tensor_content = content
        proto.int_val.extend(ints)
        proto.half_val.extend(ints)
        proto.int64_val.extend(ints)
        proto.bool_val.extend(value > 0 for value in ints)
        proto.string_val.append(content)
    feed("grpc-tfs", request.SerializeToString())


@given(
    datatype=st.sampled_from([*(t.value for t in DataType), "", "FP8"]),
    dims=st.lists(DIMENSION, max_size=4),
    raw=st.lists(st.binary(max_size=12), max_size=3),
    ints=st.lists(INTEGERS, max_size=4),
    names=st.lists(st.sampled_from(["x", "y", "z"]), max_size=3),
)
def test_any_oip_tensor(datatype: str, dims: list[int], raw: list[bytes], ints: list[int], names: list[str]):
    """Every type, shape and list of the Open Inference Protocol's tensors, sensible or not."""
    request = oip_pb.ModelInferRequest(raw_input_contents=raw)
    for name in names:
        tensor = request.inputs.add(name=name, datatype=datatype, shape=dims)
        if ints:
            tensor.contents.int_contents.extend(ints)
    feed("grpc-v2", request.SerializeToString())
