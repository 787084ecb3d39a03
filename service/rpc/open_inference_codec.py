"""Open Inference Protocol messages ↔ tensors, pure.

Source: the protocol's gRPC text. Raw contents are little-endian and row-major; each element of
BYTES is a 4-byte length and the bytes. Contents are raw for all inputs or for none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import InvalidArgument
from service.predictor import Decoded, ModelInfo, Prediction, choose_signature
from service.registry.lifecycle import INDEX_STATES, VersionStatus
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.tensors import (
    Array,
    DataType,
    Signature,
    TensorSpec,
    check_names,
    integers_fit,
    pack_strings,
    unpack_raw,
)

_CONTENTS = {
    DataType.BOOL: "bool_contents",
    DataType.INT8: "int_contents",
    DataType.INT16: "int_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}
"""The list that carries each type; FP16 and BF16 have none and are raw."""


def decode_infer(
    request: pb.ModelInferRequest, signatures: Mapping[str, Signature], bounds: Bounds = DEFAULT_BOUNDS
) -> Decoded:
    """The request's inputs as arrays, zero-copy where they are raw.

    Raises:
        InvalidArgument: names the input or output, what was expected and what came.
    """
    parameter = request.parameters.get("signature_name") if request.parameters else None
    signature = choose_signature(signatures, parameter.string_param if parameter is not None else "")
    named = {tensor.name: tensor for tensor in request.inputs}
    check_names(signature, named)
    if len(named) != len(request.inputs):
        raise InvalidArgument("an input is given twice")
    for output in request.outputs:
        if output.name not in signature.output_by_name:
            known = ", ".join(sorted(signature.output_by_name))
            raise InvalidArgument(f"unknown output {output.name!r}: signature {signature.name!r} gives {known}")
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgument(f"raw_input_contents: {len(request.inputs)} expected, one per input, got {len(raw)}")
    inputs = {}
    for index, tensor in enumerate(request.inputs):
        spec = signature.input_by_name[tensor.name]
        shape = _shape(tensor, spec, bounds)
        if raw:
            if tensor.HasField("contents"):
                raise InvalidArgument(f"input {spec.name!r}: contents and raw_input_contents are both given")
            inputs[spec.name] = unpack_raw(raw[index], spec.dtype, shape, spec.name)
        else:
            inputs[spec.name] = _typed(tensor, spec, shape)
        if spec.dtype is DataType.BYTES:
            bounds.check_strings(inputs[spec.name].flat, spec.name)
    return Decoded(signature, inputs)


def _shape(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, bounds: Bounds) -> tuple[int, ...]:
    if tensor.datatype != spec.dtype.value:
        raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.dtype.value}, got {tensor.datatype!r}")
    bounds.check_shape(tensor.shape, spec)
    return tuple(tensor.shape)


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
    field = _CONTENTS.get(spec.dtype)
    if field is None:
        raise InvalidArgument(f"input {spec.name!r}: {spec.dtype.value} must come in raw_input_contents")
    given = [other.name for other, _ in tensor.contents.ListFields()]
    if any(name != field for name in given):
        raise InvalidArgument(f"input {spec.name!r}: {field} expected for {spec.dtype.value}, got {', '.join(given)}")
    values = getattr(tensor.contents, field)
    if len(values) != math.prod(shape):
        raise InvalidArgument(
            f"input {spec.name!r}: {math.prod(shape)} elements expected for shape {list(shape)}, got {len(values)}"
        )
    if spec.dtype is DataType.BYTES:
        items = np.empty(len(values), object)
        items[:] = values
        return items.reshape(shape)
    return integers_fit(np.fromiter(values, _wide(spec), len(values)), spec).reshape(shape)


def _wide(spec: TensorSpec) -> np.dtype[Any]:
    """The type that the message's list holds, from which narrow integers are then checked."""
    kind = spec.dtype.numpy.kind
    return np.dtype({"i": np.int64, "u": np.uint64}.get(kind, spec.dtype.numpy))


def wants_raw(request: pb.ModelInferRequest) -> bool:
    """Whether the answer is raw: it is if the request was, or asks for binary output."""
    if request.raw_input_contents:
        return True
    return "binary_data_output" in request.parameters and request.parameters["binary_data_output"].bool_param


def encode_infer(request: pb.ModelInferRequest, prediction: Prediction) -> bytes:
    """The answer's bytes; outputs in the order asked for, else in the signature's.

    Raises:
        InvalidArgument: an output has no typed contents and raw was not asked for.
    """
    response = pb.ModelInferResponse(model_name=prediction.model, model_version=str(prediction.version), id=request.id)
    raw = wants_raw(request)
    names = [output.name for output in request.outputs] or list(prediction.outputs)
    for name in names:
        array = prediction.outputs[name]
        dtype = prediction.signature.output_by_name[name].dtype
        tensor = response.outputs.add(name=name, datatype=dtype.value, shape=array.shape)
        if raw:
            response.raw_output_contents.append(pack_strings(array) if dtype is DataType.BYTES else array.tobytes())
        else:
            _fill(tensor.contents, array, dtype, name)
    return response.SerializeToString()


def _fill(contents: pb.InferTensorContents, array: Array, dtype: DataType, name: str) -> None:
    field = _CONTENTS.get(dtype)
    if field is None:
        raise InvalidArgument(
            f"output {name!r} is {dtype.value}, which has no typed contents: "
            "send raw_input_contents, or the parameter binary_data_output"
        )
    values = array.ravel().tolist()
    if dtype is DataType.BYTES:
        values = [item.encode() if isinstance(item, str) else item for item in values]
    getattr(contents, field).extend(values)


def encode_metadata(info: ModelInfo, status: VersionStatus) -> bytes:
    """`ModelMetadataResponse` of a loaded model's default signature; the version's facts are its properties."""
    signature = choose_signature(info.signatures)
    response = pb.ModelMetadataResponse(
        name=info.name, versions=[str(version) for version in info.versions], platform=info.platform
    )
    response.properties.update({name: str(value) for name, value in status.told().items() if value != ""})
    for spec in signature.inputs:
        response.inputs.add(name=spec.name, datatype=spec.dtype.value, shape=spec.wire_shape())
    for spec in signature.outputs:
        response.outputs.add(name=spec.name, datatype=spec.dtype.value, shape=spec.wire_shape())
    return response.SerializeToString()


def encode_index(statuses: list[VersionStatus]) -> bytes:
    """`RepositoryIndexResponse` of these versions."""
    response = pb.RepositoryIndexResponse()
    for status in statuses:
        response.models.add(
            name=status.model,
            version=str(status.version),
            state=INDEX_STATES[status.state],
            reason=status.reason,
        )
    return response.SerializeToString()
