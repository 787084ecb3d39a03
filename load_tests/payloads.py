"""The same rows as a request of each protocol, and how to read the outputs of each protocol's answer."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.bench import wire
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.tensors import Array

Floats = npt.NDArray[np.float32]
GRPC_METHOD, TFSERVING_METHOD = wire.INFER_METHOD, wire.PREDICT_METHOD
HEADER_LENGTH = wire.HEADER_LENGTH


@dataclass(frozen=True)
class Target:
    """A model with one input of floats, to be asked with rows of `shape`."""

    model: str
    input_name: str
    shape: tuple[int, ...]

    def rows(self, count: int, seed: int) -> list[Floats]:
        """So many single rows ``(1, …)``, the same for the same seed."""
        drawn = np.random.default_rng(seed).random((count, 1, *self.shape), np.float32)
        return list(drawn)


def find_target(url: str, model: str) -> Target:
    """What the server at `url` says of `model`; a size that is open is asked with 8.

    Raises:
        SystemExit: it is not there, or takes anything but one tensor of 32-bit floats.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v2/models/{model}", timeout=10) as answer:
            inputs = json.load(answer)["inputs"]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{url}: no metadata of model {model!r}: {error}") from None
    if len(inputs) != 1 or inputs[0]["datatype"] != "FP32":
        raise SystemExit(f"model {model!r}: one input of FP32 expected, it has {inputs}")
    return Target(model, inputs[0]["name"], tuple(size if size > 0 else 8 for size in inputs[0]["shape"][1:]))


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
    return wire.http(f"/v1/models/{model}:predict", tfserving_json(rows))


def rest_binary(model: str, input_name: str, rows: Floats) -> bytes:
    """Open Inference Protocol with the binary tensor extension, both ways."""
    body, header_bytes = v2_binary(input_name, rows)
    return wire.http(f"/v2/models/{model}/infer", body, f"{HEADER_LENGTH}: {header_bytes}\r\n")


def tfserving_json(rows: Floats) -> bytes:
    """The body of TensorFlow Serving's row form."""
    return json.dumps({"instances": np.round(rows.astype(float), 4).tolist()}).encode()


def v2_json(input_name: str, rows: Floats) -> bytes:
    """The body of an Open Inference request with its numbers as JSON."""
    return wire.v2_json({input_name: rows})


def v2_binary(input_name: str, rows: Floats) -> tuple[bytes, int]:
    """The body of an Open Inference request with binary tensors both ways, and the bytes of its JSON header."""
    return wire.v2_binary({input_name: rows})


def tfserving_grpc(model: str, input_name: str, rows: Floats) -> bytes:
    """TensorFlow Serving's Predict with the tensor's bytes."""
    return wire.grpc_predict(model, {input_name: rows})


def grpc_raw(model: str, input_name: str, rows: Floats) -> bytes:
    """Open Inference Protocol over gRPC with raw contents."""
    return wire.grpc_infer(model, {input_name: rows})


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
