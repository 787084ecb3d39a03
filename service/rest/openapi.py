"""OpenAPI of the paths that go past FastAPI's router, with examples that work on the model `digits`."""

from __future__ import annotations

from typing import Any

from service import __version__
from service.predictor import EXTENSIONS

_DIGIT = [
    [0, 0, 0, 1, 11, 0, 0, 0],
    [0, 0, 0, 7, 8, 0, 0, 0],
    [0, 0, 1, 13, 6, 2, 2, 0],
    [0, 0, 7, 15, 0, 9, 8, 0],
    [0, 5, 16, 10, 0, 16, 6, 0],
    [0, 4, 15, 16, 13, 16, 1, 0],
    [0, 0, 0, 3, 15, 10, 0, 0],
    [0, 0, 0, 2, 16, 4, 0, 0],
]
"""A handwritten four."""
_ROW = [[[value] for value in line] for line in _DIGIT]
_PROBABILITIES = [0.0, 0.0, 0.0, 0.0, 0.99, 0.0, 0.0, 0.0, 0.01, 0.0]
_FLAT = [value for line in _DIGIT for value in line]

_TFSERVING = "TensorFlow Serving"
_OIP = "Open Inference Protocol v2"


SERVER = {"name": "kiln", "version": __version__, "extensions": list(EXTENSIONS)}
MODELS = {"models": ["digits"]}
ALIVE = {"status": "alive"}
"""What KServe's client of the first protocol expects of ``GET /``."""
HEALTH = {"live": True, "ready": True}
INDEX = [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
STATUS = [
    {
        "model": "digits",
        "version": 1,
        "state": "READY",
        "reason": "",
        "since": "2026-01-31T12:00:00Z",
        "device": "CPU:0",
        "plans": "openvino-1",
        "memory_bytes": 52428800,
        "rows": 1000000,
        "left_out": "",
    }
]
REGION = {"key": "/input", "offset": 0, "byte_size": 256}
REGIONS = [{"name": "input", **REGION}]
MODEL_READY = {"name": "digits", "ready": True}
MODEL = {
    "name": "digits",
    "versions": ["1"],
    "platform": "keras",
    "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 8, 8, 1]}],
    "outputs": [{"name": "output_0", "datatype": "FP32", "shape": [-1, 10]}],
}


def parameter(name: str, where: str, example: Any, text: str) -> dict[str, Any]:
    """One parameter of an operation, in its ``path``, ``query`` or ``header``."""
    kind = "integer" if isinstance(example, int) else "string"
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "description": text,
        "schema": {"type": kind},
        "example": example,
    }


_MODEL = parameter("model", "path", "digits", "name of the model")
_VERSION = parameter("version", "path", 1, "version of the model")
_LABEL = parameter("label", "path", "stable", "label of a version")
_TIMEOUT = parameter("Kiln-Timeout-Ms", "header", 1000, "deadline of this request in milliseconds")
_LENGTH = parameter(
    "Inference-Header-Content-Length", "header", 180, "bytes of JSON before the binary tensors; without it all is JSON"
)


def _json(examples: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    named = {name: {"value": value} for name, value in examples.items()}
    return {"application/json": {"schema": schema, "examples": named}}


def error_responses(*statuses: int) -> dict[int | str, Any]:
    """The error shape of both dialects, for each status."""
    texts = {
        400: "the request is wrong: the text names the field, what was expected and what came",
        404: "no such model, version or shared memory region",
        406: "the answer cannot be made in what Accept has",
        409: "the name is taken",
        413: "the body is over the limit",
        415: "the model takes no body of that type",
        429: "the queue is full; see Retry-After",
        501: "not answered by Kiln",
        503: "not ready, or stopping",
        504: "the deadline passed",
    }
    schema = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    return {
        str(status): {"description": texts[status], "content": _json({"error": {"error": texts[status]}}, schema)}
        for status in statuses
    }


_PREDICT = {
    "tags": [_TFSERVING],
    "summary": "Predict, row by row (instances) or by columns (inputs)",
    "requestBody": {
        "required": True,
        "content": _json(
            {
                "instances": {"instances": [_ROW]},
                "named rows": {"instances": [{"image": _ROW}]},
                "inputs": {"signature_name": "serving_default", "inputs": {"image": [_ROW]}},
            },
            {
                "type": "object",
                "properties": {
                    "signature_name": {"type": "string"},
                    "instances": {"type": "array", "items": {}},
                    "inputs": {},
                },
            },
        ),
    },
    "responses": {
        "200": {
            "description": "predictions for instances, outputs for inputs",
            "content": _json(
                {"predictions": {"predictions": [_PROBABILITIES]}, "outputs": {"outputs": [_PROBABILITIES]}},
                {"type": "object", "properties": {"predictions": {"type": "array", "items": {}}, "outputs": {}}},
            ),
        },
        **error_responses(400, 404, 413, 429, 503, 504),
    },
}


def _of_examples(summary: str, examples: dict[str, Any], text: str, results: list[Any]) -> dict[str, Any]:
    """A route that takes examples, which are rows of named features."""
    features = {"type": "object", "additionalProperties": {}}
    return {
        "tags": [_TFSERVING],
        "summary": summary,
        "requestBody": {
            "required": True,
            "content": _json(
                examples,
                {
                    "type": "object",
                    "required": ["examples"],
                    "properties": {
                        "signature_name": {"type": "string"},
                        "context": features,
                        "examples": {"type": "array", "items": features},
                    },
                },
            ),
        },
        "responses": {
            "200": {
                "description": text,
                "content": _json(
                    {"results": {"results": results}},
                    {"type": "object", "properties": {"results": {"type": "array", "items": {}}}},
                ),
            },
            **error_responses(400, 404, 413, 429, 503, 504),
        },
    }


_CLASSIFY = _of_examples(
    "Classify examples; features are scalars or flat lists",
    {"one digit": {"examples": [{"image": _FLAT}]}},
    "label and score of each class, for each example",
    [[[str(label), score] for label, score in enumerate(_PROBABILITIES)]],
)
_REGRESS = _of_examples(
    "Regress examples; features are scalars or flat lists",
    {
        "with context": {
            "context": {"city": "Bern"},
            "examples": [{"rooms": 3, "area": 71.5}, {"rooms": 4, "area": 90.0}],
        }
    },
    "one value for each example",
    [412.5, 540.0],
)
_STATUS = {
    "tags": [_TFSERVING],
    "summary": "State of the model's versions",
    "responses": {
        "200": {
            "description": "one entry per version",
            "content": _json(
                {
                    "available": {
                        "model_version_status": [
                            {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
                        ]
                    }
                },
                {"type": "object"},
            ),
        },
        **error_responses(400, 404),
    },
}


def _tensor_info(name: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    dim = [{"size": str(size), "name": ""} for size in sizes]
    return {"dtype": "DT_FLOAT", "tensor_shape": {"dim": dim, "unknown_rank": False}, "name": name}


_SIGNATURES = {
    "digits": {
        "model_spec": {"name": "digits", "signature_name": "", "version": "1"},
        "metadata": {
            "signature_def": {
                "signature_def": {
                    "serving_default": {
                        "inputs": {"image": _tensor_info("serving_default_image:0", (-1, 8, 8, 1))},
                        "outputs": {"output_0": _tensor_info("StatefulPartitionedCall_1:0", (-1, 10))},
                        "method_name": "tensorflow/serving/predict",
                    }
                }
            }
        },
    }
}
_METADATA = {
    "tags": [_TFSERVING],
    "summary": "Signatures of the model",
    "responses": {
        "200": {"description": "the SignatureDefMap as JSON", "content": _json(_SIGNATURES, {"type": "object"})},
        **error_responses(400, 404, 503),
    },
}
_LIST = {
    "tags": [_TFSERVING],
    "summary": "Names of all models",
    "responses": {
        "200": {"description": "names", "content": _json({"models": {"models": ["digits"]}}, {"type": "object"})}
    },
}
_TENSOR_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}},
    },
}
_INFER = {
    "tags": [_OIP],
    "summary": "Infer; tensors as JSON or, after the JSON, as raw binary",
    "requestBody": {
        "required": True,
        "content": {
            **_json(
                {
                    "one digit": {
                        "id": "42",
                        "inputs": [{"name": "image", "shape": [1, 8, 8, 1], "datatype": "FP32", "data": _FLAT}],
                    },
                    "the three best classes, within 0.1 s": {
                        "parameters": {"timeout": 100000},
                        "inputs": [{"name": "image", "shape": [1, 8, 8, 1], "datatype": "FP32", "data": _FLAT}],
                        "outputs": [{"name": "output_0", "parameters": {"classification": 3}}],
                    },
                },
                {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": {"type": "object"},
                        "inputs": {"type": "array", "items": _TENSOR_SCHEMA},
                        "outputs": {"type": "array", "items": {"type": "object"}},
                    },
                },
            ),
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "responses": {
        "200": {
            "description": "the outputs; binary tensors follow the JSON where asked for",
            "content": _json(
                {
                    "one digit": {
                        "model_name": "digits",
                        "model_version": "1",
                        "id": "42",
                        "outputs": [{"name": "output_0", "datatype": "FP32", "shape": [1, 10], "data": _PROBABILITIES}],
                    },
                    "the three best classes": {
                        "model_name": "digits",
                        "model_version": "1",
                        "outputs": [
                            {
                                "name": "output_0",
                                "datatype": "BYTES",
                                "shape": [1, 3],
                                "data": ["0.990000:4", "0.010000:8", "0.000000:0"],
                            }
                        ],
                    },
                },
                {"type": "object"},
            ),
        },
        **error_responses(400, 404, 413, 429, 503, 504),
    },
}


def _paths() -> dict[str, Any]:
    paths: dict[str, Any] = {"/v1/models": {"get": _LIST}}
    paths |= {
        "/v1/models/{model}/labels/{label}": {"get": {**_STATUS, "parameters": [_MODEL, _LABEL]}},
        "/v1/models/{model}/labels/{label}/metadata": {"get": {**_METADATA, "parameters": [_MODEL, _LABEL]}},
    }
    verbs = {"predict": _PREDICT, "classify": _CLASSIFY, "regress": _REGRESS}
    for verb, operation in verbs.items():
        paths[f"/v1/models/{{model}}/labels/{{label}}:{verb}"] = {
            "post": {**operation, "parameters": [_MODEL, _LABEL, _TIMEOUT]}
        }
    for suffix, parameters in (("", [_MODEL]), ("/versions/{version}", [_MODEL, _VERSION])):
        tfserving, oip = f"/v1/models/{{model}}{suffix}", f"/v2/models/{{model}}{suffix}"
        paths[tfserving] = {"get": {**_STATUS, "parameters": parameters}}
        paths[f"{tfserving}/metadata"] = {"get": {**_METADATA, "parameters": parameters}}
        for verb, operation in verbs.items():
            paths[f"{tfserving}:{verb}"] = {"post": {**operation, "parameters": [*parameters, _TIMEOUT]}}
        paths[f"{oip}/infer"] = {"post": {**_INFER, "parameters": [*parameters, _TIMEOUT, _LENGTH]}}
    return paths


HOT_PATHS = _paths()
