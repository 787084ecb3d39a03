"""What is in the files of ``--request-log``, and in warm-up files, as requests for TensorFlow Serving's REST API."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.bounds import Bounds
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.rpc.tfserving_codec import decode_tensor
from service.rpc.warmup_codec import parse_log
from service.tensors import BY_TENSORFLOW_NUMBER, Array, TensorSpec

_LENGTH_BYTES, _HEADER_BYTES, _FOOTER_BYTES = 8, 12, 4
_BOUNDS = Bounds(max_tensor_elements=2**30, max_filled_elements=2**24)


@dataclass(frozen=True)
class Question:
    """One request: its path and its JSON body."""

    path: str
    body: dict[str, Any]


def questions(path: Path) -> list[Question]:
    """All predict requests of a file, or of the files in a folder by their names."""
    files = sorted(path.rglob("requests-*")) if path.is_dir() else [path]
    logs = (parse_log(record) for file in files for record in records(file))
    return [_question(log.predict_log.request) for log in logs if log.HasField("predict_log")]


def records(file: Path) -> Iterator[bytes]:
    """The records of a file of TFRecords, or of one with JSON on each line; a record that is cut off ends it."""
    data = file.read_bytes()
    if data.startswith(b"{") and int.from_bytes(data[:_LENGTH_BYTES], "little") > len(data):
        yield from filter(None, data.splitlines())
        return
    at = 0
    while (start := at + _HEADER_BYTES) <= len(data):
        end = start + int.from_bytes(data[at : at + _LENGTH_BYTES], "little")
        at = end + _FOOTER_BYTES
        if at <= len(data):
            yield data[start:end]


def _question(request: pb.PredictRequest) -> Question:
    inputs = {name: _json_of(_decode(name, tensor)) for name, tensor in request.inputs.items()}
    body: dict[str, Any] = {"inputs": inputs}
    if request.model_spec.signature_name:
        body["signature_name"] = request.model_spec.signature_name
    return Question(f"/v1/models/{request.model_spec.name}:predict", body)


def _decode(name: str, tensor: Any) -> Array:
    return decode_tensor(tensor, TensorSpec(name, BY_TENSORFLOW_NUMBER[tensor.dtype], None, name), _BOUNDS)


def _json_of(array: Array) -> Any:
    """Nested lists; strings as TensorFlow Serving's JSON has bytes."""
    if array.dtype.kind != "O":
        return array.tolist()
    texts = np.frompyfunc(lambda text: {"b64": base64.b64encode(text).decode()}, 1, 1)(array)
    return texts.tolist() if array.ndim else texts
