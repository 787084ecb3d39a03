"""TensorFlow Serving's REST bodies ↔ tensors, pure.

Source of the forms: TensorFlow Serving's RESTful API and ``json_tensor.cc``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import InvalidArgument
from service.predictor import Decoded, Prediction, choose_signature
from service.rest.json_codec import (
    ARRAY,
    LONG_BYTES,
    OBJECT,
    Document,
    check_elements,
    dumps,
    jsonable,
    plain,
    ragged_rows,
    rows_of,
    to_array,
)
from service.rest.json_elements import RaggedError, is_base64, quote
from service.rest.json_pieces import NotPlainError, NumberText
from service.tensors import DEFAULT_SIGNATURE, MAX_DIMENSIONS, Array, Signature, Tensors, TensorSpec, check_names

_OPENING = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*"(instances|inputs)"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_BLANKS = b" \t\r\n"


def decode_predict(
    body: bytes, signatures: Mapping[str, Signature], max_depth: int, bounds: Bounds = DEFAULT_BOUNDS
) -> tuple[Decoded, str]:
    """A ``:predict`` body as tensors, and its form (``instances`` or ``inputs``).

    Raises:
        InvalidArgument: the body is wrong; names the input and what was expected.
        FailedPrecondition: no such signature.
    """
    common = _decode_common(body, signatures, max_depth, bounds)
    if common is not None:
        return common
    document = Document.in_pieces(body, max_depth) if len(body) > LONG_BYTES else None
    if document is not None:
        try:
            decoded = _decode(document, signatures, bounds)
            document.check_read()
        except NotPlainError:
            pass  # parsed whole, it is told more of
        else:
            return decoded
    return _decode(Document(body, max_depth), signatures, bounds)


def _decode_common(
    body: bytes, signatures: Mapping[str, Signature], max_depth: int, bounds: Bounds
) -> tuple[Decoded, str] | None:
    """A body that is nothing but rows of numbers of the only input of the default signature; None for any other."""
    opening = _OPENING.match(body)
    if opening is None or bounds.may_exceed(len(body)):
        return None
    signature = signatures.get(DEFAULT_SIGNATURE)
    if signature is None or len(signature.inputs) != 1 or signature.padding is not None:
        return None
    (spec,) = signature.inputs
    stop = body.rfind(b"]") + 1
    if body[stop:].strip(_BLANKS) != b"}" or spec.shape is None or len(spec.shape) >= max_depth:
        return None
    array = rows_of(body[opening.end() : stop], spec)
    if array is None:
        return None
    return Decoded(signature, {spec.name: array}, strict_shapes=False), opening[1].decode()


def _decode(document: Document, signatures: Mapping[str, Signature], bounds: Bounds) -> tuple[Decoded, str]:
    name = document.get("signature_name")
    if name is not None and not isinstance(name, str):
        raise InvalidArgument(f"'signature_name' must be a string, got {quote(name)}")
    signature = choose_signature(signatures, name or "")
    check_elements(document.text, signature, bounds)
    form = _form(document)
    value = document.get(form)
    reader = _Reader(signature, document, bounds)
    inputs = reader.from_instances(value) if form == "instances" else reader.from_inputs(value)
    bounds.check_inputs(inputs, len(document.text))
    return Decoded(signature, inputs, strict_shapes=False, lengths=reader.lengths), form


def _form(document: Document) -> str:
    is_rows, is_columns = "instances" in document.keys, "inputs" in document.keys
    if is_rows and is_columns:
        raise InvalidArgument("one of 'instances' and 'inputs' is expected, got both")
    if not (is_rows or is_columns):
        raise InvalidArgument("Missing 'inputs' or 'instances' key")
    return "instances" if is_rows else "inputs"


class _Reader:
    """Reads the inputs of one request; `lengths` has those of the rows of inputs that came ragged."""

    __slots__ = ("_bounds", "_document", "_signature", "lengths")

    def __init__(self, signature: Signature, document: Document, bounds: Bounds) -> None:
        self.lengths: dict[str, list[int]] | None = None
        self._signature = signature
        self._document = document
        self._bounds = bounds

    def from_inputs(self, value: Any) -> Tensors:
        """Columnar: one tensor, or an object of one tensor per input."""
        signature, document = self._signature, self._document
        if isinstance(value, OBJECT) and not is_base64(value):
            check_names(signature, dict.fromkeys(value.keys()))
            text = document.text if len(signature.inputs) == 1 else b""
            max_depth = document.max_depth - 2
            return {spec.name: self._array(value[spec.name], spec, text, max_depth) for spec in signature.inputs}
        if len(signature.inputs) != 1:
            raise InvalidArgument(
                f"'inputs' must be an object with the inputs {', '.join(sorted(signature.input_by_name))}"
            )
        spec = signature.inputs[0]
        return {spec.name: self._array(value, spec, document.text, document.max_depth - 1)}

    def from_instances(self, value: Any) -> Tensors:
        """Row by row: a list of values of the only input, or of objects with one value per input."""
        signature, document = self._signature, self._document
        if not isinstance(value, NumberText):
            if not isinstance(value, ARRAY):
                raise InvalidArgument("'instances' must be a list of rows")
            if not len(value):
                raise InvalidArgument("'instances' has no rows: at least one is expected, got an empty batch")
            first = value[0]
            if isinstance(first, OBJECT) and not is_base64(first):
                return self._from_named_rows(plain(value, document.max_depth - 1))
        if len(signature.inputs) != 1:
            raise InvalidArgument(
                "each row of 'instances' must be an object with the inputs "
                f"{', '.join(sorted(signature.input_by_name))}"
            )
        spec = signature.inputs[0]
        return {spec.name: self._array(value, spec, document.text, document.max_depth - 1)}

    def _from_named_rows(self, rows: list[Any]) -> Tensors:
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise InvalidArgument(f"element {index} of 'instances' must be an object, as the first is")
            try:
                check_names(self._signature, row)
            except InvalidArgument as error:
                raise InvalidArgument(f"element {index} of 'instances': {error}") from None
        return {
            spec.name: self._array([row[spec.name] for row in rows], spec, b"", MAX_DIMENSIONS)
            for spec in self._signature.inputs
        }

    def _array(self, value: Any, spec: TensorSpec, text: bytes, max_depth: int) -> Array:
        """The input as an array; rows of an input that is padded may differ in length."""
        padding = self._signature.padding
        if padding is None or (how := padding.of(spec.name)) is None:
            return to_array(value, spec, text, max_depth, exact=True)
        try:
            return to_array(value, spec, text, max_depth, exact=True)
        except RaggedError:
            padded = ragged_rows(value, spec, how, max_depth, self._bounds)
            if padded is None:
                raise
        array, lengths = padded
        self.lengths = {**(self.lengths or {}), spec.name: lengths}
        return array


def encode_predict(prediction: Prediction, form: str) -> bytes:
    """``{"predictions": …}`` for rows, ``{"outputs": …}`` for columns.

    One output comes bare, several by name. Outputs whose name ends in ``_bytes`` come as base64. Where the rows of the
    request differed in length, so do those of outputs that follow it.
    """
    outputs = prediction.outputs
    if len(outputs) == 1 and form == "instances":
        ((name, array),) = outputs.items()
        if array.ndim:
            return dumps({"predictions": _jsonable(prediction, name)})
    values = {name: _jsonable(prediction, name) for name in outputs}
    if form == "inputs":
        return dumps({"outputs": next(iter(values.values())) if len(values) == 1 else values})
    return dumps({"predictions": _rows(values, outputs)})


def _jsonable(prediction: Prediction, name: str) -> Any:
    as_base64 = name.endswith("_bytes")
    rows = None if prediction.lengths is None else prediction.rows_of(name)
    if rows is not None:
        return [jsonable(row, as_base64=as_base64) for row in rows]
    return jsonable(prediction.outputs[name], as_base64=as_base64)


def _rows(values: dict[str, Any], outputs: Tensors) -> Any:
    sizes = {name: array.shape[0] if array.ndim else None for name, array in outputs.items()}
    if None in sizes.values() or len(set(sizes.values())) != 1:
        raise InvalidArgument(
            "the outputs do not share a batch dimension, so they cannot be answered row by row: "
            f"ask with 'inputs' instead of 'instances' (sizes: {sizes})"
        )
    if len(values) == 1:
        return next(iter(values.values()))
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def signature_def(signature: Signature) -> dict[str, Any]:
    """A signature as proto3 JSON of ``SignatureDef``; int64 sizes are strings there."""

    def side(specs: tuple[Any, ...]) -> dict[str, Any]:
        return {
            spec.name: {
                "dtype": spec.dtype.tensorflow,
                "tensor_shape": {
                    "dim": [{"size": str(size), "name": ""} for size in spec.wire_shape()]
                    if spec.shape is not None
                    else [],
                    "unknown_rank": spec.shape is None,
                },
                "name": spec.graph_name,
            }
            for spec in specs
        }

    return {"inputs": side(signature.inputs), "outputs": side(signature.outputs), "method_name": signature.method}
