"""Open Inference Protocol messages ↔ tensors.

Source: the protocol's gRPC text. Raw contents are little-endian and row-major; each element of
BYTES is a 4-byte length and the bytes. Contents are raw for all inputs or for none, less those that
lie in shared memory, which have neither (Triton's ``extension_shared_memory``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import InvalidArgument
from service.extensions.classification import CLASSIFICATION, class_count, classified
from service.extensions.parameters import flag, priority, text, timeout_s
from service.predictor import Decoded, ModelInfo, Prediction, choose_signature
from service.registry.lifecycle import VersionStatus
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.shared_memory import OFF, Extent, SharedMemory
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
_NOWHERE: Mapping[str, Extent] = {}


def decode_infer(
    request: pb.ModelInferRequest,
    signatures: Mapping[str, Signature],
    memory: SharedMemory = OFF,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Decoded:
    """The request's inputs as arrays, zero-copy where they are raw.

    Raises:
        InvalidArgument: names the input or output, what was expected and what came.
        NotFound, TooLarge, FailedPrecondition: as `SharedMemory.extent` and `Extent.read`.
    """
    signature_name, own_timeout_s, own_priority = _own_parameters(request) if request.parameters else ("", None, 0)
    signature = choose_signature(signatures, signature_name)
    named = {tensor.name: tensor for tensor in request.inputs}
    check_names(signature, named)
    if len(named) != len(request.inputs):
        raise InvalidArgument("an input is given twice")
    for output in request.outputs:
        if output.name not in signature.output_by_name:
            known = ", ".join(sorted(signature.output_by_name))
            raise InvalidArgument(f"unknown output {output.name!r}: signature {signature.name!r} gives {known}")
    extents = _extents(named, "input", memory)
    if request.outputs:
        class_counts(request, signature)  # only to refuse what cannot be
    raw = request.raw_input_contents
    count = len(request.inputs) - len(extents)
    if raw and len(raw) != count:
        which = "input that is not in shared memory" if extents else "input"
        raise InvalidArgument(f"raw_input_contents: {count} expected, one per {which}, got {len(raw)}")
    contents = iter(raw)
    inputs = {}
    for name, tensor in named.items():
        spec = signature.input_by_name[name]
        shape = _shape(tensor, spec, bounds)
        if name in extents:
            _check_no_contents(tensor, "shared_memory_region")
            inputs[name] = unpack_raw(extents[name].read(), spec.dtype, shape, name)
        elif raw:
            _check_no_contents(tensor, "raw_input_contents")
            inputs[name] = unpack_raw(next(contents), spec.dtype, shape, name)
        else:
            inputs[name] = _typed(tensor, spec, shape)
        if spec.dtype is DataType.BYTES:
            bounds.check_strings(inputs[name].flat, name)
    return Decoded(signature, inputs, timeout_s=own_timeout_s, priority=own_priority)


def _check_no_contents(tensor: pb.ModelInferRequest.InferInputTensor, beside: str) -> None:
    if tensor.HasField("contents"):
        raise InvalidArgument(f"input {tensor.name!r}: contents beside {beside}: one of them expected")


def _own_parameters(request: pb.ModelInferRequest) -> tuple[str, float | None, int]:
    """The signature's name, the timeout in seconds, and the priority; all parameters that are known are checked."""
    parameters = plain_parameters(request.parameters)
    flag(parameters, "binary_data_output")
    return text(parameters, "signature_name"), timeout_s(parameters), priority(parameters)


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, object]:
    """A message's parameters as plain Python; None for one that carries no value."""
    choices = {name: parameter.WhichOneof("parameter_choice") for name, parameter in parameters.items()}
    return {name: choice and getattr(parameters[name], choice) for name, choice in choices.items()}


def class_counts(request: pb.ModelInferRequest, signature: Signature) -> dict[str, int]:
    """How many classes are wanted of each output that is wanted so; `InvalidArgument` where that cannot be."""
    return {
        output.name: class_count(
            plain_parameters(output.parameters)[CLASSIFICATION], signature.output_by_name[output.name]
        )
        for output in request.outputs
        if output.parameters and CLASSIFICATION in output.parameters
    }


def output_extents(request: pb.ModelInferRequest, memory: SharedMemory) -> dict[str, Extent]:
    """Where in shared memory outputs are wanted, by their names; raises as `SharedMemory.extent`."""
    return _extents({output.name: output for output in request.outputs}, "output", memory)


def _extents(named: Mapping[str, Any], kind: str, memory: SharedMemory) -> dict[str, Extent]:
    """Where those of the tensors lie that are in shared memory."""
    extents = {}
    for name, tensor in named.items():
        if tensor.parameters:
            extent = memory.extent(plain_parameters(tensor.parameters), f"{kind} {name!r}")
            if extent is not None:
                extents[name] = extent
    return extents


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
    """Whether the answer is raw: it is if the request was, or lay in shared memory, or asks for binary output."""
    if request.raw_input_contents:
        return True
    if "binary_data_output" in request.parameters and request.parameters["binary_data_output"].bool_param:
        return True
    if any(tensor.HasField("contents") for tensor in request.inputs):
        return False
    return any("shared_memory_region" in tensor.parameters for tensor in request.inputs)


def encode_infer(
    request: pb.ModelInferRequest, prediction: Prediction, extents: Mapping[str, Extent] = _NOWHERE
) -> bytes:
    """The answer's bytes; outputs in the order asked for, else in the signature's.

    Those in `extents` are in shared memory afterwards; among raw contents their place stays empty.

    Raises:
        InvalidArgument: an output has no typed contents and raw was not asked for, or is larger than
            its place in shared memory.
        FailedPrecondition: as `Extent.write`.
    """
    if request.outputs and (counts := class_counts(request, prediction.signature)):
        prediction = classified(prediction, counts)
    response = pb.ModelInferResponse(model_name=prediction.model, model_version=str(prediction.version), id=request.id)
    raw = wants_raw(request)
    names = [output.name for output in request.outputs] or list(prediction.outputs)
    for name in names:
        array = prediction.outputs[name]
        dtype = prediction.signature.output_by_name[name].dtype
        tensor = response.outputs.add(name=name, datatype=dtype.value, shape=array.shape)
        if name in extents:
            _tell(tensor, extents[name].write(_packed(array, dtype)))
            if raw:
                response.raw_output_contents.append(b"")
        elif raw:
            response.raw_output_contents.append(_packed(array, dtype))
        else:
            _fill(tensor.contents, array, dtype, name)
    return response.SerializeToString()


def _packed(array: Array, dtype: DataType) -> bytes:
    return pack_strings(array) if dtype is DataType.BYTES else array.tobytes()


def _tell(tensor: pb.ModelInferResponse.InferOutputTensor, parameters: Mapping[str, str | int]) -> None:
    for name, value in parameters.items():
        if isinstance(value, str):
            tensor.parameters[name].string_param = value
        else:
            tensor.parameters[name].int64_param = value


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


def is_plain(request: pb.ModelInferRequest) -> bool:
    """Whether it has one raw tensor, no id, and no parameters anywhere."""
    if len(request.inputs) != 1 or len(request.raw_input_contents) != 1 or request.id or request.parameters:
        return False
    has_parameters = [bool(tensor.parameters) for tensor in request.inputs]
    return not any([*has_parameters, *(bool(output.parameters) for output in request.outputs)])


def without_tensor(request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    """What the form of the answer to a plain request depends on."""
    rest = pb.ModelInferRequest()
    rest.CopyFrom(request)
    rest.raw_input_contents[:] = [b""]
    return rest


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
