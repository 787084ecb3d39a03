"""One neutral question, put in every dialect and form that there is, and its answer as arrays or a status."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from service.batching.queue import Limits
from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from service.rpc.open_inference_codec import _CONTENTS
from service.tensors import Array, DataType, Signature, Tensors, data_type_of, pack_strings, unpack_raw
from tests.asgi_channel import AsgiChannel
from tests.fakes import FakeModel
from tests.integration.asgi import Client, Response
from tests.integration.conftest import Kiln, start_kiln
from tests.integration.rpc import INFER, OIP, PREDICT, Caller

TYPES = {dtype.value: dtype for dtype in DataType}
HALF = (DataType.FP16, DataType.BF16)


@dataclass(frozen=True)
class Question:
    """What to ask; `timeout_s` is the caller's deadline."""

    inputs: Tensors
    model: str = "m"
    version: int | None = None
    signature: str = ""
    timeout_s: float | None = None
    hint_s: float | None = None
    """The same as the Open Inference Protocol's own parameter, for dialects that have it."""
    outputs: tuple[str, ...] = ()
    """The outputs that are wanted, for dialects that can say so; all if empty."""
    types: dict[str, DataType] = field(default_factory=dict)
    """Types of the outputs, for dialects that do not tell them."""


@dataclass(frozen=True)
class Refused:
    """A status of either protocol, or None for a message of a stream, which has none; and the text."""

    status: Any
    text: str


Answer = Tensors | Refused
Way = Callable[[Question], Awaitable[Answer]]


class Dialects:
    """Every way to ask one server."""

    def __init__(self, kiln: Kiln, channel: Any) -> None:
        self.kiln = kiln
        self.rest = Client(kiln.app)
        self.rpc = Caller(channel)
        self.over_asgi = copy.copy(self)
        self.over_asgi.rpc = Caller(AsgiChannel(kiln.grpc_app))

    def ways(self, question: Question) -> dict[str, Way]:
        """Those that can express `question`, by name; each of the four dialects is among them, if it can."""
        ways: dict[str, Way] = {
            "rest-v2, json": self.rest_v2_json,
            "rest-v2, binary": self.rest_v2_binary,
            "grpc-v2, raw": self.grpc_v2_raw,
            "grpc-v2, asgi": self.over_asgi.grpc_v2_raw,
            "grpc-v2, stream": self.grpc_v2_stream,
        }
        arrays = question.inputs.values()
        if not any(data_type_of(array) in HALF for array in arrays):
            ways["grpc-v2, typed"] = self.grpc_v2_typed
        if question.hint_s is not None:
            return ways
        ways |= {
            "grpc-tfs, content": self.grpc_tfs_content,
            "grpc-tfs, lists": self.grpc_tfs_lists,
            "grpc-tfs, asgi": self.over_asgi.grpc_tfs_content,
        }
        if question.outputs:
            return ways
        ways["rest-tfs, columns"] = self.rest_tfs_columns
        if len({array.shape[:1] for array in arrays}) == 1 and all(array.ndim for array in arrays):
            ways["rest-tfs, rows"] = self.rest_tfs_rows
        return ways

    # TensorFlow Serving over REST

    async def rest_tfs_columns(self, question: Question) -> Answer:
        inputs = {name: _json(array) for name, array in question.inputs.items()}
        return await self._rest_tfs(question, {"inputs": inputs})

    async def rest_tfs_rows(self, question: Question) -> Answer:
        columns = {name: _json(array) for name, array in question.inputs.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return await self._rest_tfs(question, {"instances": rows})

    async def _rest_tfs(self, question: Question, body: dict[str, Any]) -> Answer:
        version = "" if question.version is None else f"/versions/{question.version}"
        body = body | ({"signature_name": question.signature} if question.signature else {})
        response = await self.rest.post(f"/v1/models/{question.model}{version}:predict", body, **_headers(question))
        if response.status != 200:
            return Refused(response.status, response.error)
        (values,) = response.json.values()
        if len(question.types) == 1:
            values = {next(iter(question.types)): values}
        elif isinstance(values, list):
            values = {name: [row[name] for row in values] for name in question.types}
        return {name: _array(values[name], dtype) for name, dtype in question.types.items()}

    # Open Inference Protocol over REST

    async def rest_v2_json(self, question: Question) -> Answer:
        inputs = [_tensor(name, array) | {"data": _json(array.reshape(-1))} for name, array in question.inputs.items()]
        binary = any(dtype in HALF for dtype in question.types.values())
        return await self._rest_v2(question, inputs, b"", binary=binary)

    async def rest_v2_binary(self, question: Question) -> Answer:
        blobs = [_raw(array) for array in question.inputs.values()]
        inputs = [
            _tensor(name, array) | {"parameters": {"binary_data_size": len(blob)}}
            for (name, array), blob in zip(question.inputs.items(), blobs, strict=True)
        ]
        return await self._rest_v2(question, inputs, b"".join(blobs), binary=True)

    async def _rest_v2(self, question: Question, inputs: list[Any], tail: bytes, *, binary: bool) -> Answer:
        parameters: dict[str, Any] = {"binary_data_output": binary}
        if question.signature:
            parameters["signature_name"] = question.signature
        if question.hint_s is not None:
            parameters["timeout"] = int(question.hint_s * 1e6)
        body: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
        if question.outputs:
            body["outputs"] = [{"name": name, "parameters": {"binary_data": binary}} for name in question.outputs]
        text = json.dumps(body).encode()
        version = "" if question.version is None else f"/versions/{question.version}"
        response = await self.rest.post(
            f"/v2/models/{question.model}{version}/infer",
            text + tail,
            inference_header_content_length=str(len(text)),
            **_headers(question),
        )
        return Refused(response.status, response.error) if response.status != 200 else _read_v2(response)

    # TensorFlow Serving over gRPC

    async def grpc_tfs_content(self, question: Question) -> Answer:
        return await self._grpc_tfs(question, as_content=True)

    async def grpc_tfs_lists(self, question: Question) -> Answer:
        return await self._grpc_tfs(question, as_content=False)

    async def _grpc_tfs(self, question: Question, *, as_content: bool) -> Answer:
        spec = tfs.ModelSpec(name=question.model, signature_name=question.signature)
        request = tfs.PredictRequest(model_spec=spec, output_filter=question.outputs)
        if question.version is not None:
            request.model_spec.version.value = question.version
        for name, array in question.inputs.items():
            _fill_tfs(request.inputs[name], array, as_content=as_content)
        try:
            response = tfs.PredictResponse.FromString(await self.rpc.start(PREDICT, request, question.timeout_s))
        except grpc.aio.AioRpcError as error:
            return Refused(error.code(), error.details() or "")
        numbers = {dtype.number: dtype for dtype in DataType}
        outputs = {}
        for name, proto in response.outputs.items():
            shape = tuple(dim.size for dim in proto.tensor_shape.dim)
            dtype = numbers[proto.dtype]
            if dtype is DataType.BYTES:
                outputs[name] = _array(list(proto.string_val), dtype).reshape(shape)
            else:
                outputs[name] = np.frombuffer(proto.tensor_content, dtype.numpy).reshape(shape)
        return outputs

    # Open Inference Protocol over gRPC

    async def grpc_v2_raw(self, question: Question) -> Answer:
        return await self._grpc_v2(_infer_request(question, raw=True), question.timeout_s)

    async def grpc_v2_typed(self, question: Question) -> Answer:
        return await self._grpc_v2(_infer_request(question, raw=False), question.timeout_s)

    async def _grpc_v2(self, request: oip.ModelInferRequest, timeout_s: float | None) -> Answer:
        try:
            return _read_infer(oip.ModelInferResponse.FromString(await self.rpc.start(INFER, request, timeout_s)))
        except grpc.aio.AioRpcError as error:
            return Refused(error.code(), error.details() or "")

    async def grpc_v2_stream(self, question: Question) -> Answer:
        """As the one message of a stream, whose deadline is the caller's."""
        call = self.rpc.channel.stream_stream(f"/{OIP}/ModelStreamInfer")(timeout=question.timeout_s)
        try:
            await call.write(_infer_request(question, raw=True).SerializeToString())
            await call.done_writing()
            response = oip.ModelStreamInferResponse.FromString(await call.read())
        except grpc.aio.AioRpcError as error:
            return Refused(error.code(), error.details() or "")
        if response.error_message:
            return Refused(None, response.error_message)
        return _read_infer(response.infer_response)


@contextlib.asynccontextmanager
async def serving(
    *signatures: Signature, limits: Limits | None = None, split_oversize: bool = True
) -> AsyncIterator[Dialects]:
    """A server of one model, ``m``, with these signatures."""
    model = FakeModel({signature.name: signature for signature in signatures})
    kiln = await start_kiln({"m": model}, limits, split_oversize=split_oversize)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
            yield Dialects(kiln, channel)
    finally:
        model.unblock()
        await kiln.stop(5.0, 0.0)


def _headers(question: Question) -> dict[str, str]:
    return {} if question.timeout_s is None else {"kiln_timeout_ms": str(question.timeout_s * 1e3)}


def _tensor(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "datatype": data_type_of(array).value, "shape": list(array.shape)}


def _raw(array: Array) -> bytes:
    return pack_strings(array) if array.dtype.kind == "O" else array.tobytes()


def _json(array: Array) -> Any:
    """As a client writes it: bytes that are no text as base64."""
    if array.dtype.kind == "O":
        return np.vectorize(_text, otypes=[object])(array).tolist() if array.size else array.tolist()
    return array.astype(np.float64).tolist() if data_type_of(array) in HALF else array.tolist()


def _text(item: bytes) -> Any:
    return item.decode() if item.isascii() else {"b64": base64.b64encode(item).decode()}


def _array(values: Any, dtype: DataType) -> Array:
    exact = {DataType.BYTES: object, DataType.UINT64: np.uint64}  # the largest would be taken for doubles
    array: Array = np.array(values, exact.get(dtype))
    if dtype is DataType.BYTES:
        array[...] = np.vectorize(_bytes, otypes=[object])(array)
        return array
    return array.astype(dtype.numpy)


def _bytes(item: Any) -> bytes:
    if isinstance(item, dict):
        return base64.b64decode(item["b64"])
    return item.encode() if isinstance(item, str) else bytes(item)


def _fill_tfs(proto: Any, array: Array, *, as_content: bool) -> None:
    dtype = data_type_of(array)
    proto.dtype = dtype.number
    proto.tensor_shape.SetInParent()
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    flat = array.reshape(-1)
    if dtype is DataType.BYTES:
        proto.string_val.extend(flat.tolist())
    elif as_content:
        proto.tensor_content = array.tobytes()
    elif dtype in HALF:
        proto.half_val.extend(flat.view(np.uint16).tolist())
    else:
        narrow = {"BOOL": "bool", "UINT32": "uint32", "UINT64": "uint64", "INT64": "int64", "FP32": "float"}
        prefix = narrow.get(dtype.value, "double" if dtype is DataType.FP64 else "int")
        getattr(proto, f"{prefix}_val").extend(flat.tolist())


def _infer_request(question: Question, *, raw: bool) -> oip.ModelInferRequest:
    version = "" if question.version is None else str(question.version)
    request = oip.ModelInferRequest(model_name=question.model, model_version=version)
    if question.signature:
        request.parameters["signature_name"].string_param = question.signature
    if question.hint_s is not None:
        request.parameters["timeout"].int64_param = int(question.hint_s * 1e6)
    for name in question.outputs:
        request.outputs.add(name=name)
    for name, array in question.inputs.items():
        dtype = data_type_of(array)
        tensor = request.inputs.add(name=name, datatype=dtype.value, shape=array.shape)
        if raw:
            request.raw_input_contents.append(_raw(array))
        else:
            getattr(tensor.contents, _CONTENTS[dtype]).extend(array.reshape(-1).tolist())
    return request


def _read_infer(response: oip.ModelInferResponse) -> Tensors:
    outputs = {}
    for index, output in enumerate(response.outputs):
        dtype, shape = TYPES[output.datatype], tuple(output.shape)
        if response.raw_output_contents:
            outputs[output.name] = unpack_raw(response.raw_output_contents[index], dtype, shape, output.name)
        else:
            values = list(getattr(output.contents, _CONTENTS[dtype]))
            outputs[output.name] = _array(values, dtype).reshape(shape)
    return outputs


def _read_v2(response: Response) -> Tensors:
    length = int(response.headers.get("inference-header-content-length", len(response.body)))
    outputs, at = {}, length
    for output in json.loads(response.body[:length])["outputs"]:
        dtype, shape = TYPES[output["datatype"]], tuple(output["shape"])
        if "data" in output:
            outputs[output["name"]] = _array(output["data"], dtype).reshape(shape)
        else:
            stop = at + output["parameters"]["binary_data_size"]
            outputs[output["name"]] = unpack_raw(response.body[at:stop], dtype, shape, output["name"])
            at = stop
    return outputs
