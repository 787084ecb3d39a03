"""Requests of which only the tensor is new, over REST and gRPC: read without parsing, and never mistaken."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest

from service.bounds import Bounds
from service.errors import InvalidArgument
from service.predictor import Decoded, ModelRef, Prediction
from service.rest import known_headers
from service.rest.known_headers import KnownHeaders
from service.rpc import open_inference_codec as rpc
from service.rpc import tfserving_codec as tfs
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs_pb
from service.rpc.known_requests import KnownRequests
from service.tensors import DataType, Signature, TensorSpec


def signature(output: str = "y", dtype: DataType = DataType.FP32) -> Signature:
    shape = (None, 3)
    return Signature("serving_default", (TensorSpec("x", dtype, shape),), (TensorSpec(output, DataType.FP32, shape),))


def message(value: float = 1.0, dtype: str = "FP32", **keys: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[np.full(3, value, np.float32).tobytes()], **keys)
    request.inputs.add(name="x", datatype=dtype, shape=[1, 3])
    return request


def known(request: pb.ModelInferRequest, model: Signature) -> KnownRequests:
    requests = KnownRequests()
    decoded = rpc.decode_infer(request, {model.name: model})
    remember(requests, request, decoded)
    return requests


def remember(requests: KnownRequests, request: pb.ModelInferRequest, decoded: Decoded) -> None:
    """As the handler does."""
    if rpc.is_plain(request):
        encode = partial(rpc.encode_infer, rpc.without_tensor(request))
        requests.add(request.SerializeToString(), request.raw_input_contents[0], ModelRef("m"), decoded, encode)


def test_the_next_message_is_read_without_parsing():
    """Its tensor is its own."""
    model = signature()
    data = message(7.0).SerializeToString()
    found = known(message(), model).find(data)
    assert found is not None
    assert found.ref == ModelRef("m")
    decoded = found.decode(data, {model.name: model})
    assert decoded is not None
    assert decoded.signature is model
    assert decoded.inputs["x"].tolist() == [[7.0, 7.0, 7.0]]


def test_an_answer_is_the_same_as_the_first_one():
    """Written whole once, then put together; a model that answers otherwise is written whole."""
    model = signature()
    found = known(message(), model).find(message().SerializeToString())
    assert found is not None
    for value in (1.0, 2.0):
        prediction = Prediction("m", 1, model, {"y": np.full((1, 3), value, np.float32)})
        assert found.encode(prediction) == rpc.encode_infer(message(), prediction)
    other = signature("z")
    prediction = Prediction("m", 2, other, {"z": np.ones((1, 3), np.float32)})
    assert found.encode(prediction) == rpc.encode_infer(message(), prediction)


def test_a_predict_message_of_tensorflow_serving():
    """Its answer has the model after the tensor; that its tensor is like another part of it does no harm."""
    model = Signature("s", (TensorSpec("x", DataType.INT8, (None,)),), (TensorSpec("y", DataType.INT8, (None,)),))
    request = tfs_pb.PredictRequest(model_spec={"name": "m"})
    tensor = request.inputs["x"]
    tensor.dtype = DataType.INT8.number  # type: ignore[assignment]
    tensor.tensor_shape.dim.add(size=1)
    tensor.tensor_content = b"\x05"
    data, requests = request.SerializeToString(), KnownRequests()
    decoded = tfs.decode_predict(request, {"s": model})
    requests.add(data, tensor.tensor_content, ModelRef("m"), decoded, partial(tfs.encode_predict, request))
    found = requests.find(data[:-1] + b"\x07")
    assert found is not None
    again = found.decode(data[:-1] + b"\x07", {"s": model})
    assert again is not None
    assert (again.inputs["x"].tolist(), again.strict_shapes) == ([7], False)
    for value in [*b"smy\x00\x01\x02", *range(-128, 128)]:
        prediction = Prediction("m", 1, model, {"y": np.array([value], np.int8)})
        assert found.encode(prediction) == tfs.encode_predict(request, prediction)
    assert found._answers


def test_a_model_that_has_changed_is_asked_anew():
    """The signature is the loaded one's, or the message is parsed again."""
    found = known(message(), signature()).find(message().SerializeToString())
    assert found is not None
    assert found.decode(message().SerializeToString(), {"serving_default": signature()}) is None


@pytest.mark.parametrize("other", [message(model_version="1"), message(id="7"), message(dtype="INT32")])
def test_another_message_is_not_found(other: pb.ModelInferRequest):
    """All bytes before the tensor must be the same."""
    assert known(message(), signature()).find(other.SerializeToString()) is None


def test_what_is_a_requests_own_is_not_kept():
    """An id, parameters, and elements that are more than their bytes."""
    own = message()
    own.parameters["timeout"].int64_param = 10**6
    for request in (message(id="7"), own):
        assert known(request, signature()).find(request.SerializeToString()) is None
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(3)])
    request.inputs.add(name="x", datatype="BOOL", shape=[1, 3])
    assert known(request, signature(dtype=DataType.BOOL)).find(request.SerializeToString()) is None


def test_only_so_many_are_kept():
    """Sizes of messages, and messages of a size: callers choose both."""
    model, requests = signature(), KnownRequests()
    for index in range(600):
        request = message(model_version=str(10**6 + index) if index < 10 else "1" * (index - 9))
        decoded = rpc.decode_infer(request, {model.name: model})
        remember(requests, request, decoded)
    assert len(requests._by_size) <= 256
    assert all(len(same) <= 4 for same in requests._by_size.values())


def binary(value: float = 1.0, **keys: Any) -> tuple[bytes, int]:
    tail = np.full(3, value, np.float32).tobytes()
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": len(tail)}}
    text = json.dumps({"inputs": [tensor], **keys}).encode()
    return text + tail, len(text)


def test_a_rest_header_is_read_once():
    """The second request with it has its own tensor, and all that was asked for."""
    model = signature()
    signatures = {model.name: model}
    headers, outputs = KnownHeaders(100), [{"name": "y", "parameters": {"binary_data": True}}]
    first = headers.decode(*binary(outputs=outputs), signatures)
    again = headers.decode(*binary(5.0, outputs=outputs), signatures)
    assert again[1] is first[1]
    assert again[0].inputs["x"].tolist() == [[5.0, 5.0, 5.0]]


def test_a_rest_header_is_read_again_for_another_body_or_model():
    """A body of another size is refused as ever, and a new model is looked at; another app has its own bounds."""
    model = signature()
    signatures = {model.name: model}
    body, length = binary()
    headers = KnownHeaders(100)
    headers.decode(body, length, signatures)
    with pytest.raises(InvalidArgument, match="4 bytes follow the last binary input"):
        headers.decode(body + bytes(4), length, signatures)
    with pytest.raises(InvalidArgument, match="max_tensor_elements"):
        KnownHeaders(100, bounds=Bounds(max_tensor_elements=2)).decode(body, length, signatures)
    changed = signature(dtype=DataType.INT32)
    with pytest.raises(InvalidArgument, match="expected datatype INT32"):
        headers.decode(body, length, {changed.name: changed})


@pytest.mark.parametrize("too_much", [1, 10**6])
def test_a_known_header_is_no_pass_for_a_length_that_is_wrong(too_much: int):
    """Also where no tensor follows, so that the header is the whole body."""
    model = signature()
    tensor = {"name": "x", "datatype": "FP32", "shape": [0, 3], "parameters": {"binary_data_size": 0}}
    body = json.dumps({"inputs": [tensor]}).encode()
    headers = KnownHeaders(100)
    headers.decode(body, len(body), {model.name: model})
    with pytest.raises(InvalidArgument, match="not within the body"):
        headers.decode(body, len(body) + too_much, {model.name: model})


def test_a_rest_header_with_an_id_is_not_kept():
    """Each has its own."""
    model, headers = signature(), KnownHeaders(100)
    for request_id in ("a", "b"):
        _, wanted = headers.decode(*binary(id=request_id), {model.name: model})
        assert wanted.id == request_id
        assert not len(headers)


def in_json(data: Any, **keys: Any) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 3]}
    return json.dumps({**keys, "inputs": [{**tensor, "data": data}], "outputs": [{"name": "y"}]}).encode()


def test_a_json_request_is_read_once_but_for_its_numbers(monkeypatch: pytest.MonkeyPatch):
    """The second request in that frame has its own numbers, and all that was asked for."""
    model, headers = signature(), KnownHeaders(100)
    first = headers.decode(in_json([1, 2, 3, 4, 5, 6]), None, {model.name: model})
    monkeypatch.setattr(known_headers, "read_infer", None)
    decoded, wanted = headers.decode(in_json([0.5, -1, 1e3, 4, 5, 7]), None, {model.name: model})
    assert wanted is first[1]
    assert decoded.signature is model
    assert decoded.inputs["x"].dtype == np.float32
    assert decoded.inputs["x"].tolist() == [[0.5, -1, 1e3], [4, 5, 7]]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (in_json([1, 2, 3, 4, 5]), "6 elements, the data has 5"),
        (in_json([1, 2, 3, 4, 5, "6"]), "FP32 expected"),
        (in_json([1, 2, 3, 4, 5, [6]]), "FP32 expected|ragged"),
        (in_json([1, 2, 3, 4, 5, 1e39]), "does not fit FP32"),
        (in_json([]), "6 elements, the data has 0"),
        (in_json([1, 2, 3, 4, 5, 6]).replace(b"6]", b"6,]"), "JSON"),
    ],
)
def test_other_numbers_in_a_known_frame_are_refused_as_ever(body: bytes, text: str):
    """What the frame came to says nothing about them."""
    model, headers = signature(), KnownHeaders(100)
    headers.decode(in_json([1, 2, 3, 4, 5, 6]), None, {model.name: model})
    assert len(headers) == 1
    with pytest.raises(InvalidArgument, match=text):
        headers.decode(body, None, {model.name: model})


@pytest.mark.parametrize(
    "body",
    [
        in_json([1, 2, 3, 4, 5, 6], id="a"),
        in_json([[1, 2, 3], [4, 5, 6]]),
        in_json([1, 2, 3, 4, 5, 6], parameters={"data": 1}),
        in_json([1, 2, 3, 4, 5, 6], parameters={"data": [1, 2, 3, 4, 5, 6]}),
        in_json([1, 2, 3, 4, 5, 6], parameters={"note": '"data": ['}),
        in_json([1, 2, 3, 4, 5, 6], parameters={"note": "x" * 5000}),
    ],
)
def test_a_json_request_that_may_mean_another_thing_is_not_kept(body: bytes):
    """An id is its own, nested lists have a shape, and elsewhere ``data`` is no tensor's; all are answered."""
    model, headers = signature(), KnownHeaders(100)
    for _ in range(2):
        decoded, _ = headers.decode(body, None, {model.name: model})
        assert decoded.inputs["x"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not len(headers)


def test_a_frame_is_read_again_for_another_model():
    """It is only known for the signature that it was read with."""
    model, headers = signature(), KnownHeaders(100)
    body = in_json([1, 2, 3, 4, 5, 6])
    headers.decode(body, None, {model.name: model})
    changed = signature(dtype=DataType.INT32)
    with pytest.raises(InvalidArgument, match="expected datatype INT32"):
        headers.decode(body, None, {changed.name: changed})


def test_only_so_many_rest_headers_are_kept():
    """Callers choose them."""
    model, headers = signature(), KnownHeaders(100)
    for index in range(300):
        headers.decode(*binary(parameters={"other": index}), {model.name: model})
    assert 0 < len(headers) <= 256
