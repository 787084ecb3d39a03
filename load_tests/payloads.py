"""The same rows as a request of each protocol, and the classes in each protocol's answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.rpc._generated.inference import open_inference_pb2 as pb
from service.tensors import Array

Floats = npt.NDArray[np.float32]
GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Path:
    """One way to ask: how to write the request, and how to read the outputs of the answer."""

    name: str
    protocol: str
    build: Callable[[str, str, Floats], bytes]
    read: Callable[[bytes], Array]


def rest_json(model: str, input_name: str, rows: Floats) -> bytes:
    """TensorFlow Serving's row form."""
    del input_name
    body = json.dumps({"instances": json.loads(json.dumps(np.round(rows.astype(float), 4).tolist()))}).encode()
    return _http(f"/v1/models/{model}:predict", body, "")


def rest_binary(model: str, input_name: str, rows: Floats) -> bytes:
    """Open Inference Protocol with the binary tensor extension, both ways."""
    raw = rows.tobytes()
    tensor = {
        "name": input_name,
        "shape": list(rows.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(raw)},
    }
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return _http(f"/v2/models/{model}/infer", header + raw, f"Inference-Header-Content-Length: {len(header)}\r\n")


def grpc_raw(model: str, input_name: str, rows: Floats) -> bytes:
    """Open Inference Protocol over gRPC with raw contents."""
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[rows.tobytes()])
    request.inputs.add(name=input_name, datatype="FP32", shape=rows.shape)
    return request.SerializeToString()


def _http(path: str, body: bytes, headers: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: kiln\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _read_json(body: bytes) -> Array:
    return np.array(json.loads(body)["predictions"], np.float32)


def _read_binary(body: bytes) -> Array:
    header, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    return np.frombuffer(body[end:], np.float32).reshape(header["outputs"][0]["shape"])


def _read_grpc(body: bytes) -> Array:
    response = pb.ModelInferResponse.FromString(body)
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(tuple(response.outputs[0].shape))


PATHS = (
    Path("REST JSON", "http", rest_json, _read_json),
    Path("REST binary", "http", rest_binary, _read_binary),
    Path("gRPC", "grpc", grpc_raw, _read_grpc),
)
