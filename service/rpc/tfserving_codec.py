"""TensorFlow Serving's messages ↔ tensors, pure.

Source: TensorFlow's ``tensor.proto`` and ``Tensor::FromProto``: a tensor comes as
``tensor_content``, or as a typed list whose last value stands for all that are missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import InvalidArgument
from service.predictor import Decoded, ModelInfo, ModelRef, Prediction, choose_signature
from service.registry.config import ModelConfig
from service.registry.lifecycle import State, VersionStatus
from service.registry.policy import All, Latest, Specific, VersionPolicy
from service.rpc._generated.kiln.tensorflow import tensor_pb2
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.tensors import (
    BY_TENSORFLOW_NUMBER,
    Array,
    DataType,
    Signature,
    TensorSpec,
    check_names,
    integers_fit,
    unpack_raw,
)

VALUES = {
    DataType.BOOL: "bool_val",
    DataType.UINT8: "int_val",
    DataType.UINT16: "int_val",
    DataType.UINT32: "uint32_val",
    DataType.UINT64: "uint64_val",
    DataType.INT8: "int_val",
    DataType.INT16: "int_val",
    DataType.INT32: "int_val",
    DataType.INT64: "int64_val",
    DataType.FP16: "half_val",
    DataType.BF16: "half_val",
    DataType.FP32: "float_val",
    DataType.FP64: "double_val",
    DataType.BYTES: "string_val",
}
"""The list that has the values of a tensor of that type."""
_LIST_TYPES = {"int_val": np.int64, "int64_val": np.int64, "uint32_val": np.uint64, "uint64_val": np.uint64}
"""What holds any value of a list of integers, of which an unsigned input may have been given a negative one."""
_STATES = {
    State.NEW: pb.ModelVersionStatus.START,
    State.LOADING: pb.ModelVersionStatus.LOADING,
    State.WARMING: pb.ModelVersionStatus.LOADING,
    State.READY: pb.ModelVersionStatus.AVAILABLE,
    State.DRAINING: pb.ModelVersionStatus.UNLOADING,
    State.UNLOADED: pb.ModelVersionStatus.END,
    State.FAILED: pb.ModelVersionStatus.END,
}
_FAILED_PRECONDITION = 9
_SIGNATURES_FIELD = "signature_def"
_MAP_TYPE_URL = "type.googleapis.com/tensorflow.serving.SignatureDefMap"


def model_ref(spec: pb.ModelSpec) -> ModelRef:
    """Which model a ``ModelSpec`` means: by version, by label, or by default."""
    choice = spec.WhichOneof("version_choice")
    return ModelRef(
        spec.name,
        spec.version.value if choice == "version" else None,
        spec.version_label if choice == "version_label" else None,
    )


def decode_predict(
    request: pb.PredictRequest, signatures: Mapping[str, Signature], bounds: Bounds = DEFAULT_BOUNDS
) -> Decoded:
    """The request's inputs as arrays; shapes are left to the graph, as TensorFlow Serving does.

    Raises:
        InvalidArgument: names the input or output, what was expected and what came.
        FailedPrecondition: no such signature.
    """
    signature = choose_signature(signatures, request.model_spec.signature_name)
    check_names(signature, request.inputs)
    for name in request.output_filter:
        if name not in signature.output_by_name:
            known = ", ".join(sorted(signature.output_by_name))
            raise InvalidArgument(
                f"unknown output {name!r} in output_filter: signature {signature.name!r} gives {known}"
            )
    inputs = {spec.name: decode_tensor(request.inputs[spec.name], spec, bounds) for spec in signature.inputs}
    return Decoded(signature, inputs, strict_shapes=False)


def decode_tensor(proto: tensor_pb2.TensorProto, spec: TensorSpec, bounds: Bounds) -> Array:
    """The array of `proto`, of the type that `spec` has.

    Raises:
        InvalidArgument: names the input, what was expected and what came.
    """
    dtype = BY_TENSORFLOW_NUMBER.get(proto.dtype)
    if dtype is not spec.dtype:
        received = dtype.tensorflow if dtype else f"DataType {proto.dtype}"
        raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.dtype.tensorflow}, got {received}")
    if proto.tensor_shape.unknown_rank:
        raise InvalidArgument(f"input {spec.name!r}: a shape is expected, got one of unknown rank")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    bounds.check_shape(shape, spec)
    if proto.tensor_content:
        if dtype is DataType.BYTES:
            raise InvalidArgument(f"input {spec.name!r}: strings are expected in string_val, not in tensor_content")
        return unpack_raw(proto.tensor_content, dtype, shape, spec.name)
    if dtype is DataType.BYTES:
        bounds.check_strings(proto.string_val, spec.name)
    return _from_list(getattr(proto, VALUES[dtype]), spec, shape, bounds)


def _from_list(values: Any, spec: TensorSpec, shape: tuple[int, ...], bounds: Bounds) -> Array:
    count = math.prod(shape)
    if len(values) > count:
        raise InvalidArgument(
            f"input {spec.name!r}: {VALUES[spec.dtype]} with up to {count} values expected for shape {list(shape)}, "
            f"got {len(values)}"
        )
    if spec.dtype is DataType.BYTES:
        given = np.empty(len(values), object)
        given[:] = values
    elif spec.dtype in (DataType.FP16, DataType.BF16):
        given = np.fromiter(values, np.int64, len(values)).astype(np.uint16).view(spec.dtype.numpy)  # bit patterns
    else:
        wide = _LIST_TYPES.get(VALUES[spec.dtype], spec.dtype.numpy)
        given = integers_fit(np.fromiter(values, wide, len(values)), spec)  # without a list of objects between
    if len(given) == count:
        return given.reshape(shape)
    bounds.check_filled(len(values), count, spec.name)
    if not len(given):  # TensorFlow fills with its default: zero, False or ""
        return np.full(shape, b"", object) if spec.dtype is DataType.BYTES else np.zeros(shape, spec.dtype.numpy)
    filled = np.full(count, given[-1], given.dtype)  # the last value repeats
    filled[: len(given)] = given
    return filled.reshape(shape)


def encode_predict(request: pb.PredictRequest, prediction: Prediction) -> bytes:
    """The answer's bytes; outputs as ``tensor_content``, which clients decode fastest."""
    response = pb.PredictResponse()
    spec = response.model_spec
    spec.name = prediction.model
    spec.version.value = prediction.version
    spec.signature_name = prediction.signature.name
    for name in request.output_filter or prediction.outputs:
        encode_tensor(prediction.outputs[name], prediction.signature.output_by_name[name].dtype, response.outputs[name])
    return response.SerializeToString()


def encode_tensor(array: Array, dtype: DataType, proto: tensor_pb2.TensorProto) -> None:
    """Fill in `proto` with `array` as ``tensor_content``, or ``string_val`` for strings."""
    proto.dtype = dtype.number  # type: ignore[assignment]
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if not array.shape:
        proto.tensor_shape.SetInParent()
    if dtype is DataType.BYTES:
        proto.string_val.extend(item.encode() if isinstance(item, str) else item for item in array.ravel().tolist())
    else:
        proto.tensor_content = array.tobytes()


def encode_metadata(request: pb.GetModelMetadataRequest, info: ModelInfo) -> bytes:
    """`GetModelMetadataResponse` with all signatures.

    Raises:
        InvalidArgument: a field other than ``signature_def`` is asked for.
    """
    if list(request.metadata_field) != [_SIGNATURES_FIELD]:
        fields = ", ".join(request.metadata_field) or "none"
        raise InvalidArgument(f"metadata_field: {_SIGNATURES_FIELD!r} expected, got {fields}")
    definitions = pb.SignatureDefMap()
    for name, signature in info.signatures.items():
        definition = definitions.signature_def[name]
        definition.method_name = signature.method
        for specs, side in ((signature.inputs, definition.inputs), (signature.outputs, definition.outputs)):
            for spec in specs:
                _encode_spec(spec, side[spec.name])
    response = pb.GetModelMetadataResponse()
    response.model_spec.name = info.name
    response.model_spec.version.value = info.version
    packed = response.metadata[_SIGNATURES_FIELD]
    packed.type_url = _MAP_TYPE_URL
    packed.value = definitions.SerializeToString()
    return response.SerializeToString()


def _encode_spec(spec: TensorSpec, info: tensor_pb2.TensorInfo) -> None:
    info.name = spec.graph_name
    info.dtype = spec.dtype.number  # type: ignore[assignment]
    info.tensor_shape.unknown_rank = spec.shape is None
    for size in spec.shape or ():
        info.tensor_shape.dim.add(size=-1 if size is None else size)


def encode_statuses(statuses: list[VersionStatus]) -> bytes:
    """`GetModelStatusResponse`; a version that failed has ended, with its reason."""
    response = pb.GetModelStatusResponse()
    for status in statuses:
        entry = response.model_version_status.add(version=status.version, state=_STATES[status.state])
        entry.status.error_message = status.reason
        entry.status.error_code = _FAILED_PRECONDITION if status.state is State.FAILED else 0
    return response.SerializeToString()


def decode_reload(request: pb.ReloadConfigRequest) -> dict[str, ModelConfig]:
    """The models that a ``ReloadConfigRequest`` wants, by name; they replace all others.

    Raises:
        InvalidArgument: there is no list, or an entry has no name or comes twice.
    """
    if request.config.WhichOneof("config") != "model_config_list":
        raise InvalidArgument("config: a model_config_list expected")
    configs: dict[str, ModelConfig] = {}
    for index, entry in enumerate(request.config.model_config_list.config):
        if not entry.name or entry.name in configs:
            raise InvalidArgument(f"config {index}: a name of its own expected, got {entry.name!r}")
        configs[entry.name] = ModelConfig(
            path=entry.base_path or None,
            versions=_version_policy(entry.model_version_policy),
            labels=dict(entry.version_labels),
        )
    return configs


def _version_policy(policy: pb.FileSystemStoragePathSourceConfig.ServableVersionPolicy) -> VersionPolicy:
    """As TensorFlow Serving has it: without a choice, the latest one."""
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return All()
    if choice == "specific":
        return Specific(frozenset(policy.specific.versions))
    return Latest(max(policy.latest.num_versions, 1))
