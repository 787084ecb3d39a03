"""Open Inference Protocol messages ↔ tensors, pure.

Source: the protocol's gRPC text. Raw contents are little-endian and row-major; each element of
BYTES is a 4-byte length and the bytes. Contents are raw for all inputs or for none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from service.errors import InvalidArgument
from service.extensions.classification import CLASSIFICATION, class_count, classified
from service.extensions.parameters import flag, text, timeout_s
from service.predictor import Decoded, ModelInfo, Prediction, choose_signature
from service.registry.lifecycle import VersionStatus
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.tensors import (
    Array,
    DataType,
    Signature,
    TensorSpec,
    check_names,
    check_sizes,
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


def decode_infer(request: pb.ModelInferRequest, signatures: Mapping[str, Signature]) -> Decoded:
    """The request's inputs as arrays, zero-copy where they are raw.

    Raises:
        InvalidArgument: names the input or output, what was expected and what came.
    """
    signature_name, own_timeout_s = _own_parameters(request) if request.parameters else ("", None)
    signature = choose_signature(signatures, signature_name)
    named = {tensor.name: tensor for tensor in request.inputs}
    check_names(signature, named)
    if len(named) != len(request.inputs):
        raise InvalidArgument("an input is given twice")
    for output in request.outputs:
        if output.name not in signature.output_by_name:
            known = ", ".join(sorted(signature.output_by_name))
            raise InvalidArgument(f"unknown output {output.name!r}: signature {signature.name!r} gives {known}")
    if request.outputs:
        class_counts(request, signature)  # only to refuse what cannot be
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgument(f"raw_input_contents: {len(request.inputs)} expected, one per input, got {len(raw)}")
    inputs = {}
    for index, tensor in enumerate(request.inputs):
        spec = signature.input_by_name[tensor.name]
        shape = _shape(tensor, spec)
        if raw:
            if tensor.HasField("contents"):
                raise InvalidArgument(f"input {spec.name!r}: contents and raw_input_contents are both given")
            inputs[spec.name] = unpack_raw(raw[index], spec.dtype, shape, spec.name)
        else:
            inputs[spec.name] = _typed(tensor, spec, shape)
    return Decoded(signature, inputs, timeout_s=own_timeout_s)


def _own_parameters(request: pb.ModelInferRequest) -> tuple[str, float | None]:
    """The signature's name, and the timeout in seconds; all parameters that are known are checked."""
    parameters = plain_parameters(request.parameters)
    flag(parameters, "binary_data_output")
    return text(parameters, "signature_name"), timeout_s(parameters)


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


def _shape(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec) -> tuple[int, ...]:
    if tensor.datatype != spec.dtype.value:
        raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.dtype.value}, got {tensor.datatype!r}")
    shape = tuple(tensor.shape)
    check_sizes(shape, spec.name)
    return shape


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
    return integers_fit(np.array(values, _wide(spec)), spec).reshape(shape)


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
    if request.outputs and (counts := class_counts(request, prediction.signature)):
        prediction = classified(prediction, counts)
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
