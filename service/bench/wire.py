"""Tensors as whole requests of each protocol, pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.errors import FailedPrecondition
from service.registry.samples import predict_body
from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2
from service.rpc.tfserving_codec import encode_tensor
from service.tensors import Array, DataType, Signature, Tensors, data_type_of, pack_strings

INFER_METHOD = "/inference.GRPCInferenceService/ModelInfer"
PREDICT_METHOD = "/tensorflow.serving.PredictionService/Predict"
HEADER_LENGTH = "Inference-Header-Content-Length"
_WITHOUT_JSON = (DataType.FP16, DataType.BF16)


@dataclass(frozen=True)
class Protocol:
    """One way to ask.

    `build` writes a request to a model, `label` is its name in the server's metrics, `method` gRPC's, empty for REST.
    """

    build: Callable[[str, Signature, Tensors], bytes]
    label: str
    method: str = ""


def tensor_bytes(array: Array) -> bytes:
    """Little-endian and row-major, strings each behind their length, as the Open Inference Protocol has it."""
    return pack_strings(array) if array.dtype.kind == "O" else array.tobytes()


def v2_binary(inputs: Tensors) -> tuple[bytes, int]:
    """The body of an Open Inference request with binary tensors both ways, and the bytes of its JSON header."""
    raw = [tensor_bytes(array) for array in inputs.values()]
    tensors = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": data_type_of(array).value,
            "parameters": {"binary_data_size": len(data)},
        }
        for (name, array), data in zip(inputs.items(), raw, strict=True)
    ]
    header = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
    return header + b"".join(raw), len(header)


def v2_json(inputs: Tensors) -> bytes:
    """The body of an Open Inference request with its data as JSON.

    Raises:
        FailedPrecondition: JSON cannot carry an input: halves, or strings that are no text.
    """
    tensors = [
        {"name": n, "shape": list(a.shape), "datatype": data_type_of(a).value, "data": _json_data(n, a)}
        for n, a in inputs.items()
    ]
    return json.dumps({"inputs": tensors}).encode()


def _json_data(name: str, array: Array) -> list[Any]:
    dtype = data_type_of(array)
    try:
        if dtype is DataType.BYTES:
            return [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    except UnicodeDecodeError:
        raise FailedPrecondition(f"input {name!r} has bytes that are no text, which JSON cannot carry") from None
    if dtype in _WITHOUT_JSON:
        raise FailedPrecondition(f"input {name!r} is {dtype.value}, which JSON cannot carry")
    return [round(value, 4) for value in array.ravel().tolist()] if dtype.is_float else array.ravel().tolist()


def grpc_infer(model: str, inputs: Tensors) -> bytes:
    """Open Inference Protocol over gRPC with raw contents."""
    request = oip.ModelInferRequest(model_name=model, raw_input_contents=map(tensor_bytes, inputs.values()))
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=data_type_of(array).value, shape=array.shape)
    return request.SerializeToString()


def grpc_predict(model: str, inputs: Tensors) -> bytes:
    """TensorFlow Serving's Predict with the tensors' bytes."""
    request = serving_pb2.PredictRequest(model_spec=serving_pb2.ModelSpec(name=model))
    for name, array in inputs.items():
        encode_tensor(array, data_type_of(array), request.inputs[name])
    return request.SerializeToString()


def http(path: str, body: bytes, headers: str = "") -> bytes:
    """A whole POST; `headers` are lines that end with CR LF."""
    head = f"POST {path} HTTP/1.1\r\nHost: kiln\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _rest_tfs(model: str, signature: Signature, inputs: Tensors) -> bytes:
    return http(f"/v1/models/{model}:predict", predict_body(signature, inputs).encode())


def _rest_v2(model: str, signature: Signature, inputs: Tensors) -> bytes:
    del signature
    return http(f"/v2/models/{model}/infer", v2_json(inputs))


def _rest_v2_binary(model: str, signature: Signature, inputs: Tensors) -> bytes:
    del signature
    body, header_bytes = v2_binary(inputs)
    return http(f"/v2/models/{model}/infer", body, f"{HEADER_LENGTH}: {header_bytes}\r\n")


PROTOCOLS = {
    "rest-tfs": Protocol(_rest_tfs, "rest-tfs"),
    "rest-v2": Protocol(_rest_v2, "rest-v2"),
    "rest-v2-binary": Protocol(_rest_v2_binary, "rest-v2"),
    "grpc-tfs": Protocol(lambda model, _, inputs: grpc_predict(model, inputs), "grpc-tfs", PREDICT_METHOD),
    "grpc-v2": Protocol(lambda model, _, inputs: grpc_infer(model, inputs), "grpc-v2", INFER_METHOD),
}
"""What ``--protocols`` takes."""
