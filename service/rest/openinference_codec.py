"""Open Inference Protocol v2 REST bodies ↔ tensors: JSON tensors, binary ones, and those in shared memory.

Source: the protocol's text and Triton's binary tensor data extension: little-endian, row-major;
each element of BYTES is a 4-byte length and the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simdjson

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import InvalidArgument
from service.extensions.classification import CLASSIFICATION, class_count, classified
from service.extensions.parameters import priority, timeout_s
from service.predictor import Decoded, Prediction, choose_signature
from service.rest.json_codec import (
    ARRAY,
    LONG_BYTES,
    OBJECT,
    Document,
    check_elements,
    count_lists,
    dumps,
    flat_array,
    jsonable,
    plain,
)
from service.rest.json_elements import quote
from service.rest.json_pieces import NotPlainError, NumberText
from service.shared_memory import OFF, Extent, SharedMemory
from service.tensors import (
    MAX_DIMENSIONS,
    Array,
    DataType,
    Signature,
    TensorSpec,
    check_names,
    pack_strings,
    unpack_raw,
)

_WITHOUT_JSON = (DataType.FP16, DataType.BF16)


@dataclass
class Wanted:
    """What the request asks of its answer."""

    id: str | None = None
    signature_name: str = ""
    binary: bool = False
    outputs: dict[str, bool] = field(default_factory=dict)
    """Name of each output asked for, and whether as binary; empty asks for all."""
    extents: dict[str, Extent] = field(default_factory=dict)
    """Where in shared memory those outputs go that are wanted there, binary or not."""
    classes: dict[str, Any] = field(default_factory=dict)
    """How many classes are asked for of each output that is wanted as classes."""
    timeout_s: float | None = None
    priority: int = 0


def decode_infer(
    body: bytes,
    header_length: int | None,
    signatures: Mapping[str, Signature],
    max_depth: int,
    memory: SharedMemory = OFF,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> tuple[Decoded, Wanted]:
    """An ``infer`` body as tensors, and what it wants; see `read_infer`."""
    decoded, wanted, _ = read_infer(body, header_length, signatures, max_depth, memory, bounds)
    return decoded, wanted


def read_infer(
    body: bytes,
    header_length: int | None,
    signatures: Mapping[str, Signature],
    max_depth: int,
    memory: SharedMemory,
    bounds: Bounds,
) -> tuple[Decoded, Wanted, list[Place]]:
    """An ``infer`` body as tensors, what it wants, and where in the body inputs lie as they are.

    `header_length` is that of the JSON part, None for all of it.

    Raises:
        InvalidArgument: the body is wrong; names the input and what was expected.
        NotFound, TooLarge, FailedPrecondition: as `SharedMemory.extent` and `Extent.read`.
    """
    if header_length == 0:
        return _decode_raw(body, choose_signature(signatures), bounds), Wanted(binary=True), []
    if header_length is not None and not 0 < header_length <= len(body):
        raise InvalidArgument(
            f"header Inference-Header-Content-Length: {header_length} is not within the body of {len(body)} bytes"
        )
    text = body if header_length is None else body[:header_length]
    document = Document.in_pieces(body, max_depth) if header_length is None and len(body) > LONG_BYTES else None
    if document is not None:
        try:
            read = _read_json(document, body, signatures, memory, bounds)
            document.check_read()
        except NotPlainError:
            pass  # parsed whole, it is told more of
        else:
            return read
    document = Document(text, max_depth, is_header=header_length is not None)
    return _read_json(document, body, signatures, memory, bounds)


def _read_json(
    document: Document, body: bytes, signatures: Mapping[str, Signature], memory: SharedMemory, bounds: Bounds
) -> tuple[Decoded, Wanted, list[Place]]:
    """What `document` asks for, which `body` begins with."""
    text, max_depth = document.text, document.max_depth
    wanted = _wanted(document, memory)
    signature = choose_signature(signatures, wanted.signature_name)
    check_elements(text, signature, bounds)
    tensors = _list_of_objects(document.get("inputs"), "inputs")
    named = _by_name(tensors)
    check_names(signature, named)
    for name in wanted.outputs:
        if name not in signature.output_by_name:
            known = ", ".join(sorted(signature.output_by_name))
            raise InvalidArgument(f"unknown output {name!r}: signature {signature.name!r} gives {known}")
    for name, count in wanted.classes.items():
        class_count(count, signature.output_by_name[name])
    tail = _Tail(body, len(text), memory)
    most_lists = _most_lists(document, tensors)
    inputs = {
        name: _tensor(tensor, signature.input_by_name[name], tail, max_depth - 3, most_lists, bounds)
        for name, tensor in named.items()
    }
    tail.check_used()
    bounds.check_inputs(inputs, len(body))
    return Decoded(signature, inputs, timeout_s=wanted.timeout_s, priority=wanted.priority), wanted, tail.places


def _decode_raw(body: bytes, signature: Signature, bounds: Bounds) -> Decoded:
    """Triton's raw binary request: one input of known trailing shape, the body is the tensor."""
    if len(signature.inputs) != 1:
        raise InvalidArgument(
            f"a raw binary request needs a model of one input, this has {', '.join(sorted(signature.input_by_name))}"
        )
    spec = signature.inputs[0]
    shape = list(spec.shape or ())
    if spec.dtype is DataType.BYTES or shape.count(None) > 1 or spec.shape is None:
        raise InvalidArgument(f"a raw binary request cannot tell the shape of input {spec.name!r}: send JSON with it")
    if None in shape:
        known_bytes = math.prod(size for size in shape if size is not None) * spec.dtype.numpy.itemsize
        shape[shape.index(None)] = len(body) // max(known_bytes, 1)
    sizes = tuple(size or 0 for size in shape)
    bounds.check_shape(sizes, spec)
    return Decoded(signature, {spec.name: unpack_raw(body, spec.dtype, sizes, spec.name)})


@dataclass(frozen=True, slots=True)
class Place:
    """Where an input of fixed-size elements lies in the body."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    count: int
    start: int


class _Tail:
    """What inputs have outside the JSON: the binary part of the body, in their order, and shared memory."""

    def __init__(self, body: bytes, start: int, memory: SharedMemory) -> None:
        self.memory = memory
        self.places: list[Place] = []
        self._view = memoryview(body)
        self._at = start

    def next(self, size_bytes: object, name: str) -> memoryview:
        left = len(self._view) - self._at
        if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or not 0 <= size_bytes <= left:
            raise InvalidArgument(
                f"input {name!r}: parameter binary_data_size: at most the {left} bytes that follow expected, "
                f"got {size_bytes!r}"
            )
        self._at += size_bytes
        return self._view[self._at - size_bytes : self._at]

    def tensor(self, size_bytes: object, spec: TensorSpec, shape: tuple[int, ...]) -> Array:
        """The next `size_bytes` as an input."""
        start = self._at
        array = unpack_raw(self.next(size_bytes, spec.name), spec.dtype, shape, spec.name)
        if spec.dtype not in (DataType.BYTES, DataType.BOOL):  # which are more than their bytes seen as an array
            self.places.append(Place(spec.name, spec.dtype.numpy, shape, array.size, start))
        return array

    def check_used(self) -> None:
        left = len(self._view) - self._at
        if left:
            raise InvalidArgument(f"{left} bytes follow the last binary input: the sizes do not add up to the body")


def _most_lists(document: Document, tensors: list[Any]) -> int | None:
    """How many lists one tensor's data can consist of: those of the body less those that are known.

    Known are the inputs, their shapes, the outputs, and one list of data for each other tensor. None for a
    text whose long lists are read in pieces, which count their own.
    """
    if document.number_texts:
        return None
    others = sum(tensor.get("data") is not None for tensor in tensors) - 1
    return count_lists(document.text) - 1 - len(tensors) - (document.get("outputs") is not None) - others


def _tensor(
    tensor: Any, spec: TensorSpec, tail: _Tail, max_depth: int, most_lists: int | None, bounds: Bounds
) -> Array:
    received = tensor.get("datatype")
    if received != spec.dtype.value:
        raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.dtype.value}, got {quote(received)}")
    shape = _shape(tensor.get("shape"), spec, bounds)
    parameters = _parameters(tensor.get("parameters"), f"input {spec.name!r}: parameters")
    data = tensor.get("data")
    extent = tail.memory.extent(parameters, f"input {spec.name!r}") if parameters else None
    if extent is not None:
        if data is not None or "binary_data_size" in parameters:
            raise InvalidArgument(f"input {spec.name!r}: data beside shared_memory_region: one of them expected")
        return unpack_raw(extent.read(), spec.dtype, shape, spec.name)
    if "binary_data_size" in parameters:
        if data is not None:
            raise InvalidArgument(f"input {spec.name!r}: either data or binary_data_size expected, got both")
        return tail.tensor(parameters["binary_data_size"], spec, shape)
    if not isinstance(data, (*ARRAY, NumberText)):
        raise InvalidArgument(f"input {spec.name!r}: data must be a list, got {quote(data)}")
    return flat_array(data, spec, shape, max_depth, most_lists)


def _shape(value: Any, spec: TensorSpec, bounds: Bounds) -> tuple[int, ...]:
    if isinstance(value, simdjson.Array) and len(value) > MAX_DIMENSIONS:
        bounds.check_shape(range(len(value)), spec)
    sizes = plain(value)
    if not isinstance(sizes, list) or any(type(size) is not int for size in sizes):
        raise InvalidArgument(f"input {spec.name!r}: shape must be a list of sizes, got {quote(value)}")
    bounds.check_shape(sizes, spec)
    return tuple(sizes)


def _list_of_objects(value: Any, name: str) -> list[Any]:
    if not isinstance(value, ARRAY):
        raise InvalidArgument(f"{name!r} must be a list of tensors, got {quote(value)}")
    items = list(value)
    for index, item in enumerate(items):
        if not isinstance(item, OBJECT) or not isinstance(item.get("name"), str):
            raise InvalidArgument(f"element {index} of {name!r} must be an object with a 'name'")
    return items


def _by_name(tensors: list[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for tensor in tensors:
        name = tensor["name"]
        if name in named:
            raise InvalidArgument(f"input {name!r} is given twice")
        named[name] = tensor
    return named


def _parameters(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    parameters = plain(value)
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"{where} must be an object, got {quote(value)}")
    return parameters


def _wanted(document: Document, memory: SharedMemory) -> Wanted:
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidArgument(f"'id' must be a string, got {quote(request_id)}")
    if request_id is not None and not _is_text(request_id):
        raise InvalidArgument("'id' must be text, got a lone surrogate")
    parameters = _parameters(document.get("parameters"), "parameters")
    signature_name = parameters.get("signature_name", "")
    if not isinstance(signature_name, str):
        raise InvalidArgument(f"parameter signature_name: a string expected, got {quote(signature_name)}")
    wanted = Wanted(request_id, signature_name, _flag(parameters, "binary_data_output", default=False))
    if parameters:
        wanted.timeout_s = timeout_s(parameters)
        wanted.priority = priority(parameters)
    outputs = document.get("outputs")
    if outputs is not None:
        for output in _list_of_objects(outputs, "outputs"):
            own = _parameters(output.get("parameters"), f"output {output['name']!r}: parameters")
            wanted.outputs[output["name"]] = _flag(own, "binary_data", default=wanted.binary)
            extent = memory.extent(own, f"output {output['name']!r}") if own else None
            if extent is not None:
                wanted.extents[output["name"]] = extent
            if CLASSIFICATION in own:
                wanted.classes[output["name"]] = own[CLASSIFICATION]
    return wanted


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _flag(parameters: dict[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidArgument(f"parameter {name}: true or false expected, got {value!r}")
    return value


def encode_infer(prediction: Prediction, wanted: Wanted) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON part where binary tensors follow.

    Outputs that are wanted in shared memory are there afterwards.

    Raises:
        InvalidArgument: an output cannot be written as JSON and was not asked for as binary, or is
            larger than its place in shared memory.
        FailedPrecondition: as `Extent.write`.
    """
    if wanted.classes:
        prediction = classified(prediction, wanted.classes)
    asked = wanted.outputs or dict.fromkeys(prediction.outputs, wanted.binary)
    outputs, blobs = [], []
    for name, binary in asked.items():
        array = prediction.outputs[name]
        dtype = prediction.signature.output_by_name[name].dtype
        entry: dict[str, Any] = {"name": name, "datatype": dtype.value, "shape": list(array.shape)}
        if name in wanted.extents:
            # no parameters: Triton has none here, and its C++ client takes any for those of a binary tensor
            wanted.extents[name].write(_packed(array, dtype))
        elif binary:
            blob = _packed(array, dtype)
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = _json_data(name, array, dtype)
        outputs.append(entry)
    answer: dict[str, Any] = {"model_name": prediction.model, "model_version": str(prediction.version)}
    if wanted.id is not None:
        answer["id"] = wanted.id
    answer["outputs"] = outputs
    text = dumps(answer)
    if not blobs:
        return text, None
    return b"".join((text, *blobs)), len(text)


def _packed(array: Array, dtype: DataType) -> bytes:
    return pack_strings(array) if dtype is DataType.BYTES else np.ascontiguousarray(array).tobytes()


def _json_data(name: str, array: Array, dtype: DataType) -> Any:
    if dtype in _WITHOUT_JSON:
        raise InvalidArgument(
            f"output {name!r} is {dtype.value}, which JSON cannot carry: "
            "ask for it as binary (parameters.binary_data: true)"
        )
    return jsonable(array.reshape(-1))


def model_metadata(info: Any) -> dict[str, Any]:
    """A model's metadata; -1 stands for a dimension of any size."""
    signature = choose_signature(info.signatures)
    return {
        "name": info.name,
        "versions": [str(version) for version in info.versions],
        "platform": info.platform,
        "inputs": [_spec(spec) for spec in signature.inputs],
        "outputs": [_spec(spec) for spec in signature.outputs],
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.dtype.value, "shape": spec.wire_shape()}
