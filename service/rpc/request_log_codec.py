"""Requests and their answers as records of TensorFlow Serving's ``PredictionLog``, pure.

Whatever dialect a request came in, and whether it asked to predict, classify or regress, it is logged as the predict
request with the same inputs. Source: TensorFlow Serving's ``prediction_log.proto``, and protobuf's JSON mapping.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson

from service.following.followed import Asked, Followed
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.rpc._generated.kiln.tensorflow.serving.prediction_log_pb2 import PredictionLog
from service.rpc.tfserving_codec import VALUES, encode_tensor
from service.tensors import Array, DataType, Tensors, TensorSpec

_MOST_LISTED = 10_000
"""Elements of a tensor that are written out in JSON, for people to read; more are its bytes."""
_LARGEST_LISTED = 3.4028e38
"""Just under the largest FP32: its shortest form is over it for protobuf's parser. JSON has no infinity either."""
_AS_BITS = (DataType.FP16, DataType.BF16)


def encode_record(followed: Followed, asked: Asked) -> bytes:
    """The bytes of a ``PredictionLog``."""
    log = PredictionLog()
    request, response = log.predict_log.request, log.predict_log.response
    for spec in (log.log_metadata.model_spec, request.model_spec, response.model_spec):
        _name(spec, followed, asked)
    _encode_all(asked.inputs, asked.signature.inputs, request.inputs)
    if asked.outputs is not None:
        _encode_all(asked.outputs, asked.signature.outputs, response.outputs)
    return log.SerializeToString()


def encode_line(followed: Followed, asked: Asked) -> bytes:
    """The same as one line of JSON."""
    spec = {"name": followed.model, "version": str(followed.version), "signature_name": asked.signature.name}
    request = {"model_spec": spec, "inputs": _json_of(asked.inputs, asked.signature.inputs)}
    log: dict[str, Any] = {"request": request}
    if asked.outputs is not None:
        log["response"] = {"outputs": _json_of(asked.outputs, asked.signature.outputs), "model_spec": spec}
    return orjson.dumps({"log_metadata": {"model_spec": spec}, "predict_log": log}, option=orjson.OPT_SERIALIZE_NUMPY)


def _name(spec: pb.ModelSpec, followed: Followed, asked: Asked) -> None:
    spec.name = followed.model
    spec.version.value = followed.version or 0
    spec.signature_name = asked.signature.name


def _encode_all(tensors: Tensors, specs: tuple[TensorSpec, ...], target: Any) -> None:
    for spec in specs:
        if spec.name in tensors:
            encode_tensor(tensors[spec.name], spec.dtype, target[spec.name])


def _json_of(tensors: Tensors, specs: tuple[TensorSpec, ...]) -> dict[str, dict[str, Any]]:
    return {spec.name: _tensor(tensors[spec.name], spec.dtype) for spec in specs if spec.name in tensors}


def _tensor(array: Array, dtype: DataType) -> dict[str, Any]:
    shape = {"dim": [{"size": str(size)} for size in array.shape]}
    return {"dtype": dtype.tensorflow, "tensor_shape": shape, **_values(array, dtype)}


def _values(array: Array, dtype: DataType) -> dict[str, Any]:
    if dtype is DataType.BYTES:
        items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.ravel().tolist()]
        return {VALUES[dtype]: [base64.b64encode(item).decode() for item in items]}
    is_listed = 0 < array.size <= _MOST_LISTED and dtype not in _AS_BITS
    if is_listed and (array.dtype.kind != "f" or bool((np.abs(array) < _LARGEST_LISTED).all())):
        return {VALUES[dtype]: np.ascontiguousarray(array).ravel()}
    return {"tensor_content": base64.b64encode(array.tobytes()).decode()}
