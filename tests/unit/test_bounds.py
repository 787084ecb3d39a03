"""What one request may ask for is bounded in every dialect, before memory is spent on it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from service.bounds import Bounds
from service.errors import InvalidArgument
from service.rest import openinference_codec as rest_v2
from service.rest import tfserving_codec as rest_tfs
from service.rpc import open_inference_codec as rpc_v2
from service.rpc import tfserving_codec as rpc_tfs
from service.rpc._generated.inference import open_inference_pb2 as v2_pb
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs_pb
from service.settings import load_settings
from service.tensors import DataType, Signature, TensorSpec
from tests.signatures import one, only

Ask = Callable[[Signature, list[Any], list[int], Bounds], Any]


def _rest_tfs(signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> Any:
    return rest_tfs.decode_predict(json.dumps({"instances": values}).encode(), only(signature), 100, bounds)


def _rest_tfs_inputs(signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> Any:
    return rest_tfs.decode_predict(json.dumps({"inputs": {"x": values}}).encode(), only(signature), 100, bounds)


def _rest_v2(signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> Any:
    tensor = {"name": "x", "datatype": signature.inputs[0].dtype.value, "shape": shape, "data": values}
    return rest_v2.decode_infer(json.dumps({"inputs": [tensor]}).encode(), None, only(signature), 100, bounds=bounds)


def _rest_v2_binary(signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> Any:
    tail = b"".join(_raw(value) for value in values)
    tensor = {"name": "x", "datatype": signature.inputs[0].dtype.value, "shape": shape}
    text = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(tail)}}]}).encode()
    return rest_v2.decode_infer(text + tail, len(text), only(signature), 100, bounds=bounds)


def _rpc_v2(signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> Any:
    request = v2_pb.ModelInferRequest()
    tensor = request.inputs.add(name="x", datatype=signature.inputs[0].dtype.value, shape=shape)
    if signature.inputs[0].dtype is DataType.BYTES:
        tensor.contents.bytes_contents.extend(value.encode() for value in values)
    else:
        tensor.contents.int64_contents.extend(values)
    return rpc_v2.decode_infer(request, only(signature), bounds=bounds)


def _rpc_v2_raw(signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> Any:
    request = v2_pb.ModelInferRequest(raw_input_contents=[b"".join(_raw(value) for value in values)])
    request.inputs.add(name="x", datatype=signature.inputs[0].dtype.value, shape=shape)
    return rpc_v2.decode_infer(request, only(signature), bounds=bounds)


def _rpc_tfs(signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> Any:
    request = tfs_pb.PredictRequest()
    proto = request.inputs["x"]
    proto.dtype = signature.inputs[0].dtype.number  # type: ignore[assignment]
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    if signature.inputs[0].dtype is DataType.BYTES:
        proto.string_val.extend(value.encode() for value in values)
    else:
        proto.int64_val.extend(values)
    return rpc_tfs.decode_predict(request, only(signature), bounds)


def _raw(value: Any) -> bytes:
    if isinstance(value, str):
        return len(value).to_bytes(4, "little") + value.encode()
    return int(value).to_bytes(8, "little")


WAYS: dict[str, Ask] = {
    "rest-tfs": _rest_tfs,
    "rest-tfs-inputs": _rest_tfs_inputs,
    "rest-v2": _rest_v2,
    "rest-v2-binary": _rest_v2_binary,
    "grpc-v2": _rpc_v2,
    "grpc-v2-raw": _rpc_v2_raw,
    "grpc-tfs": _rpc_tfs,
}
CLAIMS = [name for name in WAYS if not name.startswith("rest-tfs")]
"""Dialects whose requests tell a shape."""
INTEGERS, STRINGS = one(DataType.INT64, (None,)), one(DataType.BYTES, (None,))


def refusal(way: str, signature: Signature, values: list[Any], shape: list[int], bounds: Bounds) -> str:
    with pytest.raises(InvalidArgument) as refused:
        WAYS[way](signature, values, shape, bounds)
    return str(refused.value)


@pytest.mark.parametrize("way", WAYS)
def test_elements_are_bounded(way: str):
    """As many as the limit are taken, one more is refused: the input, the limit and what came are told."""
    bounds = Bounds(max_tensor_elements=160)
    WAYS[way](INTEGERS, [0] * 160, [160], bounds)
    text = refusal(way, INTEGERS, [0] * 161, [161], bounds)
    assert text.startswith("input 'x': at most 160 elements expected (max_tensor_elements), got ")
    assert "161" in text


@pytest.mark.parametrize("way", WAYS)
def test_a_string_counts_as_sixteen(way: str):
    """Each becomes an object, which takes more than a number."""
    bounds = Bounds(max_tensor_elements=160)
    WAYS[way](STRINGS, [""] * 10, [10], bounds)
    text = refusal(way, STRINGS, [""] * 11, [11], bounds)
    assert text.startswith("input 'x': at most 10 elements expected (max_tensor_elements), got ")


@pytest.mark.parametrize("way", WAYS)
def test_strings_are_bounded(way: str):
    """Each element by its own bytes."""
    bounds = Bounds(max_string_bytes=100)
    WAYS[way](STRINGS, ["a" * 100, ""], [2], bounds)
    text = refusal(way, STRINGS, ["", "a" * 101], [2], bounds)
    assert text == "input 'x': strings of at most 100 bytes expected (max_string_bytes), got one of 101"


@pytest.mark.parametrize("way", CLAIMS)
@pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [0, 2**40], [2**63 - 1, 2**63 - 1], [2**25, 0]])
def test_a_shape_alone_costs_nothing(way: str, shape: list[int]):
    """Whatever elements it claims, none is made; a size of 0 hides no size that NumPy cannot hold."""
    tracemalloc.start()
    try:
        text = refusal(way, INTEGERS, [1], shape, Bounds())
        assert tracemalloc.get_traced_memory()[1] < 2**17
    finally:
        tracemalloc.stop()
    assert text.startswith("input 'x': at most 16777216 elements expected (max_tensor_elements), got shape ")


@pytest.mark.parametrize("way", CLAIMS)
@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([1] * 65, "a shape has at most 64 dimensions, got 65"),
        ([2, -3], "a shape has no negative sizes, got [2, -3]"),
    ],
)
def test_a_shape_must_be_possible(way: str, shape: list[int], text: str):
    """In rank and in sign."""
    assert refusal(way, INTEGERS, [1], shape, Bounds()) == f"input 'x': {text}"


def test_a_raw_body_is_bounded_as_well():
    """Triton's raw binary request tells no shape, but has one."""
    bounds = Bounds(max_tensor_elements=16)
    rest_v2.decode_infer(bytes(16), 0, only(one(DataType.UINT8, (None,))), 100, bounds=bounds)
    with pytest.raises(InvalidArgument, match="input 'x': at most 16 elements"):
        rest_v2.decode_infer(bytes(17), 0, only(one(DataType.UINT8, (None,))), 100, bounds=bounds)


@pytest.mark.parametrize("values", [[], [1]])
def test_a_short_list_stands_for_a_million_at_most(values: list[int]):
    """So a message of some bytes takes 8 MB and no more."""
    decoded = _rpc_tfs(INTEGERS, values, [2**20], Bounds())
    assert decoded.inputs["x"].shape == (2**20,)
    text = refusal("grpc-tfs", INTEGERS, values, [2**20 + 1], Bounds())
    assert text == f"input 'x': {len(values)} values cannot stand for 1048577 elements, only for up to 1048576"


def test_json_of_several_inputs_is_bounded_in_all():
    """Where the text has more values than they may have together, it is refused before they are read."""
    signature = Signature("serving_default", tuple(TensorSpec(n, DataType.INT64, (None,)) for n in "xy"), ())
    body = json.dumps({"inputs": {"x": [0] * 20, "y": [0] * 20}}).encode()
    rest_tfs.decode_predict(body, only(signature), 100, Bounds(max_tensor_elements=20))
    with pytest.raises(InvalidArgument) as refused:
        rest_tfs.decode_predict(body, only(signature), 100, Bounds(max_tensor_elements=16))
    assert str(refused.value) == "input 'x, y': at most 32 elements expected (max_tensor_elements), got 36 or more"
    with pytest.raises(InvalidArgument, match=r"input 'x': at most 19 elements .*, got 20$"):
        rest_tfs.decode_predict(body, only(signature), 100, Bounds(max_tensor_elements=19))


@pytest.mark.parametrize("body", ['{"instances": ["%s"]}', r'{"instances": ["\"%s"]}'])
def test_commas_in_strings_are_no_elements(body: str):
    """A text of a thousand commas is one string."""
    rest_tfs.decode_predict((body % ("," * 1000)).encode(), only(STRINGS), 100, Bounds(max_tensor_elements=160))


@pytest.mark.parametrize("rows", [10, 11])
def test_rows_that_are_objects_are_bounded(rows: int):
    """The members of an object are counted once they are read."""
    body = json.dumps({"instances": [{"x": "a"}] * rows}).encode()
    bounds = Bounds(max_tensor_elements=160)
    if rows <= 10:
        rest_tfs.decode_predict(body, only(STRINGS), 100, bounds)
    else:
        with pytest.raises(InvalidArgument, match=r"input 'x': at most 10 elements .*, got 11$"):
            rest_tfs.decode_predict(body, only(STRINGS), 100, bounds)


def test_the_defaults_are_those_of_the_settings():
    """So what is decoded without bounds is decoded as by a server without flags."""
    settings = load_settings({"models": "."})
    assert Bounds() == Bounds(settings.max_tensor_elements, settings.max_string_bytes)
