"""A running server asked in each dialect: arrays by name in, arrays by name out; and ``/predict`` by records."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from service.tensors import DataType, data_type_of, pack_strings, unpack_raw
from tests.e2e.process import Server

Arrays = dict[str, NDArray[Any]]
Ask = Callable[..., Arrays]
_TIMEOUT_S = 60
_TYPES = {dtype.value: dtype for dtype in DataType}
_BY_TENSORFLOW = {dtype.tensorflow: dtype for dtype in DataType}
_NUMBERS = {dtype.number: dtype for dtype in DataType}
_HALVES = (DataType.FP16, DataType.BF16)
_JSON_BYTES = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Meant:
    """A version and a signature of a model; the default ones where nothing is said."""

    model: str
    version: int = 0
    signature: str = ""

    @property
    def path(self) -> str:
        return f"{self.model}/versions/{self.version}" if self.version else self.model


@dataclass
class Asking:
    """The running server in each dialect: held-out inputs, ``(rows, …)`` by name, to outputs."""

    server: Server
    channel: grpc.Channel

    def signatures(self, meant: Meant) -> dict[str, Any]:
        """The signatures by name, as TensorFlow Serving's metadata have them."""
        metadata = self.server.get(f"/v1/models/{meant.path}/metadata")[1]
        signatures: dict[str, Any] = metadata["metadata"]["signature_def"]["signature_def"]
        return signatures

    def types(self, meant: Meant) -> dict[str, DataType]:
        """Types of the signature's outputs, as the server declares them."""
        outputs = self.signatures(meant)[meant.signature or "serving_default"]["outputs"]
        return {name: _BY_TENSORFLOW[output["dtype"]] for name, output in outputs.items()}

    def rest(self, meant: Meant, inputs: Arrays) -> Arrays:
        types = self.types(meant)
        values = {name: _as_json(array) for name, array in inputs.items()}
        body = {"inputs": values} | ({"signature_name": meant.signature} if meant.signature else {})
        status, answer = self.server.predict(body, meant.path)
        assert status == 200, answer
        outputs = answer["outputs"]
        if len(types) == 1:
            outputs = {next(iter(types)): outputs}
        return {name: _from_json(outputs[name], dtype) for name, dtype in types.items()}

    def open_inference(self, meant: Meant, inputs: Arrays) -> Arrays:
        request = oip.ModelInferRequest(model_name=meant.model, model_version=str(meant.version or ""))
        if meant.signature:
            request.parameters["signature_name"].string_param = meant.signature
        for name, array in inputs.items():
            request.inputs.add(name=name, datatype=data_type_of(array).value, shape=array.shape)
            request.raw_input_contents.append(pack_strings(array) if array.dtype.kind == "O" else array.tobytes())
        call = self.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = oip.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=_TIMEOUT_S))
        return {
            output.name: unpack_raw(raw, _TYPES[output.datatype], tuple(output.shape), output.name)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }

    def open_inference_rest(self, meant: Meant, inputs: Arrays) -> Arrays:
        """Tensors as JSON, but for what JSON has no form of: half precision, and bytes that are no text."""
        types = self.types(meant)
        blobs: list[bytes] = []
        entries = [_as_entry(name, array, blobs) for name, array in inputs.items()]
        outputs = [{"name": name, "parameters": {"binary_data": dtype in _HALVES}} for name, dtype in types.items()]
        body: dict[str, Any] = {"inputs": entries, "outputs": outputs}
        if meant.signature:
            body["parameters"] = {"signature_name": meant.signature}
        text = json.dumps(body).encode()
        headers = {_JSON_BYTES: str(len(text))} if blobs else {}
        status, answer, told = self.server.exchange(
            "POST", f"/v2/models/{meant.path}/infer", b"".join((text, *blobs)), headers
        )
        assert status == 200, answer
        length = int(told.get(_JSON_BYTES, len(answer)))
        entries, rest = json.loads(answer[:length])["outputs"], answer[length:]
        got = {}
        for entry in entries:
            size = entry.get("parameters", {}).get("binary_data_size", 0)
            got[entry["name"]] = _from_entry(entry, rest[:size])
            rest = rest[size:]
        assert not rest
        return got

    def tensorflow_serving(self, meant: Meant, inputs: Arrays) -> Arrays:
        spec = tfs.ModelSpec(name=meant.model, signature_name=meant.signature)
        if meant.version:
            spec.version.value = meant.version
        request = tfs.PredictRequest(model_spec=spec)
        for name, array in inputs.items():
            proto: Any = request.inputs[name]
            proto.dtype = data_type_of(array).number
            for size in array.shape:
                proto.tensor_shape.dim.add(size=size)
            if array.dtype.kind == "O":
                proto.string_val.extend(array.ravel())
            else:
                proto.tensor_content = array.tobytes()
        call = self.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        answer = tfs.PredictResponse.FromString(call(request.SerializeToString(), timeout=_TIMEOUT_S))
        return {name: _from_proto(proto) for name, proto in answer.outputs.items()}

    def door(self, meant: Meant, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of ``POST /predict/{model}`` to records by field name."""
        query = f"?signature={meant.signature}" if meant.signature else ""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        path = f"/predict/{meant.path}{query}"
        status, answer = self.server.request("POST", path, json.dumps(records).encode(), headers)
        assert status == 200, answer
        answers: list[dict[str, Any]] = json.loads(answer)
        return answers


def _as_json(array: NDArray[Any]) -> Any:
    if array.dtype.kind != "O":
        return array.tolist()
    return np.vectorize(lambda item: {"b64": base64.b64encode(item).decode()}, otypes=[object])(array).tolist()


def _from_json(values: Any, dtype: DataType) -> NDArray[Any]:
    if dtype is not DataType.BYTES:
        return np.array(values, dtype.numpy)
    texts = np.array(values, object)
    return np.vectorize(lambda text: text.encode(), otypes=[object])(texts)  # type: ignore[no-any-return]


def _as_entry(name: str, array: NDArray[Any], blobs: list[bytes]) -> dict[str, Any]:
    """An input of the Open Inference Protocol's REST; what goes as binary is put behind the others of `blobs`."""
    dtype = data_type_of(array)
    entry = {"name": name, "datatype": dtype.value, "shape": list(array.shape)}
    values = array.ravel().tolist()
    try:
        if dtype not in _HALVES:
            texts = [each.decode() for each in values] if dtype is DataType.BYTES else values
            return entry | {"data": texts}
    except UnicodeDecodeError:
        pass
    blobs.append(pack_strings(array) if dtype is DataType.BYTES else array.tobytes())
    return entry | {"parameters": {"binary_data_size": len(blobs[-1])}}


def _from_entry(entry: dict[str, Any], blob: bytes) -> NDArray[Any]:
    dtype, shape = _TYPES[entry["datatype"]], tuple(entry["shape"])
    if "data" not in entry:
        return unpack_raw(blob, dtype, shape, entry["name"])
    return _from_json(entry["data"], dtype).reshape(shape)


def _from_proto(proto: Any) -> NDArray[Any]:
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    dtype = _NUMBERS[proto.dtype]
    if dtype is DataType.BYTES:
        return np.array(list(proto.string_val), object).reshape(shape)
    return np.frombuffer(proto.tensor_content, dtype.numpy).reshape(shape)


def records_of(inputs: Arrays, *, batched: bool = True) -> list[dict[str, Any]]:
    """Each row as a record of plain values; the whole as one where there are no rows."""
    rows = len(next(iter(inputs.values()))) if batched else 1
    return [{name: _plain(array[row] if batched else array) for name, array in inputs.items()} for row in range(rows)]


def _plain(value: Any) -> Any:
    """Numbers and texts; bytes that are no text, such as a file's, as base64."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value] if value.ndim else _plain(value.item())
    if np.asarray(value).dtype.kind == "V":  # bfloat16
        return np.asarray(value, np.float32).tolist()
    return value.tolist()


def assert_told(told: Any, want: NDArray[Any], about: dict[str, Any]) -> None:
    """What the door tells of an output is the row `want`, by what ``model.yaml`` says of it."""
    kind = about.get("kind")
    if kind == "labels":
        _assert_classes(told, np.asarray(want, np.float64).ravel(), about)
    elif kind == "image":
        pixels = np.clip(np.rint(want * about.get("scale", 1) + about.get("offset", 0)), 0, 255)
        with Image.open(io.BytesIO(base64.b64decode(told.partition(",")[2]))) as image:
            np.testing.assert_allclose(np.asarray(image), np.squeeze(pixels, -1), atol=1)
    elif want.dtype.kind == "O":
        assert told == _plain(want)
    else:
        if isinstance(told, dict):
            assert told["unit"] == about["unit"]
            told = told["value"] if "value" in told else told["values"]
        rounding = 0.51 * 10.0 ** -about["decimals"] if "decimals" in about else 1e-5
        np.testing.assert_allclose(np.array(told, np.float64), want.astype(np.float64), rtol=1e-4, atol=rounding)


def _assert_classes(told: list[dict[str, Any]], want: NDArray[np.float64], about: dict[str, Any]) -> None:
    if about.get("logits"):
        want = np.exp(want - want.max())
        want /= want.sum()
    if want.size == 1:
        want = np.array([1 - want[0], want[0]])
    assert len(told) == min(about.get("top_k", want.size), want.size)
    np.testing.assert_allclose([each["probability"] for each in told], np.sort(want)[::-1][: len(told)], 1e-4, 1e-5)
    np.testing.assert_allclose([each["probability"] for each in told], want[[each["id"] for each in told]], 1e-4, 1e-5)
    if "labels" in about:
        assert [each["label"] for each in told] == [about["labels"][each["id"]] for each in told]
