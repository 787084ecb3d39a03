"""OpenAPI of ``/predict``: a route for any model, and one for each that is loaded, in its own terms."""

from __future__ import annotations

import contextlib
from typing import Any

from PIL import Image

from service.errors import KilnError
from service.meaning import is_one_value
from service.predictor import Engine, ModelRef
from service.rest.door_answer_codec import PNG_TYPE, Told, answer_types, outputs_of
from service.rest.door_body_codec import CSV_TYPE, JSON_TYPE, MULTIPART, TEXT_TYPE, TYPES, URLENCODED
from service.rest.door_fields import FieldSpec, asked_signature, body_types, fields_of, shown
from service.rest.door_images import data_uri
from service.rest.openapi import error_responses, parameter
from service.tensors import DataType, Signature

_TAG = "In a model's own terms"
_ERRORS = error_responses(400, 404, 406, 413, 415, 429, 503, 504)
_MOST_EXAMPLE_VALUES = 4096
_BINARY = {"type": "string", "format": "binary"}
_RECORD = {"type": "object", "additionalProperties": {}}
_TIMEOUT = parameter("Kiln-Timeout-Ms", "header", 1000, "deadline of this request in milliseconds")
_SIGNATURE = parameter(
    "signature", "query", "serving_default", "signature to ask; else that of model.yaml, or serving_default"
)
_MODEL = parameter("model", "path", "digits", "name of the model")


def door_paths(engine: Engine) -> dict[str, Any]:
    """The paths of ``/predict``, with those of the models that are loaded now."""
    paths: dict[str, Any] = {}
    for suffix, more in (
        ("", []),
        ("/versions/{version}", [parameter("version", "path", 1, "version of the model")]),
        ("/labels/{label}", [parameter("label", "path", "stable", "label of a version")]),
    ):
        paths[f"/predict/{{model}}{suffix}"] = {"post": _any_model([_MODEL, *more, _TIMEOUT, _SIGNATURE])}
    for name in engine.model_names():
        with contextlib.suppress(KilnError):  # it is not loaded, or has no signature to choose
            signature = asked_signature(engine.describe(ModelRef(name)).signatures)
            paths[f"/predict/{name}"] = {"post": _one_model(name, signature)}
    return paths


def _any_model(parameters: list[dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {name: {"schema": _BINARY} for name in TYPES}
    content[JSON_TYPE] = {"schema": _one_or_many(_RECORD), "example": {"image": _blank()}}
    content[CSV_TYPE] = content[TEXT_TYPE] = {"schema": {"type": "string"}}
    content[MULTIPART] = content[URLENCODED] = {"schema": _RECORD}
    answers = {
        JSON_TYPE: {
            "schema": _one_or_many(_RECORD),
            "example": {"output_0": [{"label": "4", "id": 4, "probability": 0.99}]},
        },
        PNG_TYPE: {"schema": _BINARY},
        CSV_TYPE: {"schema": {"type": "string"}},
        TEXT_TYPE: {"schema": {"type": "string"}},
    }
    return {
        "tags": [_TAG],
        "summary": "Predict from records by field name, a CSV, a text, an image or a form",
        "parameters": parameters,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "the outputs, as Accept asks", "content": answers}, **_ERRORS},
    }


def _one_model(name: str, signature: Signature) -> dict[str, Any]:
    fields, outputs, meaning = fields_of(signature), outputs_of(signature), signature.meaning
    example = meaning.example if meaning is not None and meaning.example is not None else _example(fields)
    record = _record_schema(fields)
    form = {**record, "properties": {field.name: _form_schema(field) for field in fields}}
    schemas: dict[str, Any] = {
        JSON_TYPE: {"schema": _one_or_many(record), "example": example},
        CSV_TYPE: {"schema": {"type": "string"}},
        TEXT_TYPE: {"schema": {"type": "string"}},
        MULTIPART: {"schema": form},
        URLENCODED: {"schema": form},
    }
    told = {"type": "object", "properties": {output.spec.name: _output_schema(output) for output in outputs}}
    answers: dict[str, Any] = {
        JSON_TYPE: {
            "schema": _one_or_many(told),
            "example": {output.spec.name: _output_example(output) for output in outputs},
        },
        PNG_TYPE: {"schema": _BINARY},
    }
    return {
        "tags": [_TAG],
        "summary": f"{name}: {meaning.description}" if meaning is not None and meaning.description else name,
        "parameters": [_TIMEOUT, _SIGNATURE],
        "requestBody": {
            "required": True,
            "content": {each: schemas.get(each, {"schema": _BINARY}) for each in body_types(signature)},
        },
        "responses": {
            "200": {
                "description": "one answer, or a list for a list",
                "content": {
                    each: answers.get(each, {"schema": {"type": "string"}}) for each in answer_types(signature)
                },
            },
            **_ERRORS,
        },
    }


def _one_or_many(schema: dict[str, Any]) -> dict[str, Any]:
    return {"oneOf": [schema, {"type": "array", "items": schema}]}


def _record_schema(fields: list[FieldSpec]) -> dict[str, Any]:
    """A record; the elements of a vector whose columns have names are fields of their own."""
    properties: dict[str, Any] = {}
    for field in fields:
        if field.meaning.columns:
            properties |= {column: {"type": "number"} for column in field.meaning.columns}
        else:
            properties[field.name] = _field_schema(field)
    return {
        "type": "object",
        "required": list(properties),
        "properties": properties,
        "additionalProperties": any(field.meaning.columns for field in fields),
    }


def _field_schema(field: FieldSpec) -> dict[str, Any]:
    """What a value of a field is in JSON."""
    schema: dict[str, Any] = {}
    if field.kind != "image":
        schema = _element_schema(field)
        sizes = field.spec.row_sizes
        if not is_one_value(sizes):
            schema = {"type": "array", "items": {}} if sizes is None or len(sizes) > 1 else _vector(schema)
    text = [field.meaning.description, f"in {field.meaning.unit}" if field.meaning.unit else ""]
    if field.kind == "image":
        text.append("an image: base64 of a PNG or JPEG file, or a data URI")
    elif not is_one_value(field.spec.row_sizes) and field.spec.row_sizes is not None:
        text.append(f"shape {shown(field.spec.row_sizes)}")
    description = "; ".join(filter(None, text))
    return {**schema, "description": description} if description else schema


def _vector(element: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": element}


def _element_schema(field: FieldSpec) -> dict[str, Any]:
    dtype, meaning = field.spec.dtype, field.meaning
    types = {DataType.BYTES: "string", DataType.BOOL: "boolean"}
    schema: dict[str, Any] = {"type": types.get(dtype, "integer" if dtype.is_integer else "number")}
    if meaning.values:
        schema["enum"] = list(meaning.values)
    if meaning.min is not None:
        schema["minimum"] = meaning.min
    if meaning.max is not None:
        schema["maximum"] = meaning.max
    return schema


def _form_schema(field: FieldSpec) -> dict[str, Any]:
    """The same in a form, which `/docs` shows a file chooser for."""
    return _BINARY if field.kind == "image" else {"type": "string", "description": field.wanted}


def _example(fields: list[FieldSpec]) -> dict[str, Any]:
    """A record that the signature takes, if not one that means much."""
    return {field.name: _field_example(field) for field in fields}


def _field_example(field: FieldSpec) -> Any:
    if field.kind == "image":
        return _blank()
    meaning = field.meaning
    element: Any = {DataType.BYTES: "text", DataType.BOOL: True}.get(field.spec.dtype, 0)
    if meaning.values:
        element = meaning.values[0]
    elif meaning.min is not None:
        element = meaning.min
    elif meaning.max is not None:
        element = min(meaning.max, 0)
    return element if is_one_value(field.spec.row_sizes) else _nested(element, field.spec.row_sizes)


def _nested(element: Any, sizes: tuple[int | None, ...] | None) -> Any:
    """Lists of that shape; one element where a size is open, and a list cut short where there would be very many."""
    left = _MOST_EXAMPLE_VALUES
    value = element
    for size in reversed(sizes or (None,)):
        count = min(size or 1, left)
        left = max(left // max(count, 1), 1)
        value = [value] * count
    return value


def _output_schema(output: Told) -> dict[str, Any]:
    """What an output is in JSON."""
    schema: dict[str, Any] = {}
    if output.kind == "image":
        schema = {"type": "string", "format": "uri"}
    elif output.kind == "labels":
        label = {"type": "string", "enum": list(output.labels)} if output.labels else {"type": "string"}
        schema = {"items": {"properties": {"label": label, "id": {"type": "integer"}}}}
    elif output.meaning.unit:
        schema = {"type": "object", "properties": {"unit": {"type": "string", "const": output.meaning.unit}}}
    return {**schema, "description": output.meaning.description} if output.meaning.description else schema


def _output_example(output: Told) -> Any:
    """The form of an output, with zeros for its numbers."""
    if output.kind == "image":
        return _blank()
    if output.kind == "labels":
        return [{"label": output.labels[0] if output.labels else "0", "id": 0, "probability": 1.0}]
    is_text = output.spec.dtype is DataType.BYTES
    value: Any = "text" if is_text else 0
    if not (output.kind in ("number", "text") or is_one_value(output.spec.row_sizes)):
        value = _nested(value, output.spec.row_sizes)
    if not output.meaning.unit:
        return value
    return {"values" if output.kind in ("series", "tensor") else "value": value, "unit": output.meaning.unit}


def _blank() -> str:
    """A white picture of one pixel."""
    return data_uri(Image.new("L", (1, 1), 255))
