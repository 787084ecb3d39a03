"""TensorFlow Serving's classify, regress and multi-inference messages ↔ examples and results, pure.

Source: TensorFlow Serving's ``input.proto``, ``classification.proto``, ``regression.proto`` and
``inference.proto``; the rules for tasks are those of its ``multi_inference.cc``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import InvalidArgument, Unimplemented
from service.examples import Classes, Features, Method, check_context, classes_of, values_of
from service.predictor import Prediction
from service.rpc._generated.kiln.tensorflow import example_pb2
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.tensors import DEFAULT_SIGNATURE, Array

_NO_VALUES = np.empty(0, np.float32)


class ProtoExamples:
    """The examples of an ``Input``, in either of its forms; `InvalidArgument` where `bounds` let no such context."""

    def __init__(self, source: pb.Input, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self._bounds = bounds
        self._context: example_pb2.Example | None = None
        self._examples: Sequence[example_pb2.Example] = source.example_list.examples
        if source.WhichOneof("kind") == "example_list_with_context":
            self._context = source.example_list_with_context.context
            self._examples = source.example_list_with_context.examples

    def __len__(self) -> int:
        return len(self._examples)

    def features(self) -> Sequence[Features]:
        context = self._checked_context()
        return [{**context, **_features(example)} for example in self._examples]

    def serialized(self) -> Sequence[bytes]:
        """Two messages one after the other are one in which the second wins: so are maps merged on the wire."""
        self._checked_context()
        context = b"" if self._context is None else self._context.SerializeToString()
        return [context + example.SerializeToString() for example in self._examples]

    def _checked_context(self) -> Features:
        context = {} if self._context is None else _features(self._context)
        check_context(context, len(self), self._bounds)
        return context


def _features(example: example_pb2.Example) -> Features:
    return {name: _values(feature) for name, feature in example.features.feature.items()}


def _values(feature: example_pb2.Feature) -> Array:
    kind = feature.WhichOneof("kind")
    if kind == "float_list":
        return np.array(feature.float_list.value, np.float32)
    if kind == "int64_list":
        return np.array(feature.int64_list.value, np.int64)
    if kind == "bytes_list":
        values = np.empty(len(feature.bytes_list.value), object)
        values[:] = feature.bytes_list.value
        return values
    return _NO_VALUES


def encode_classification(prediction: Prediction, rows: int) -> bytes:
    """`ClassificationResponse` for `rows` examples; raises as `classes_of` does."""
    response = pb.ClassificationResponse()
    _fill_classes(response.result, classes_of(prediction, rows))
    _fill_spec(response.model_spec, prediction)
    return response.SerializeToString()


def encode_regression(prediction: Prediction, rows: int) -> bytes:
    """`RegressionResponse` for `rows` examples; raises as `values_of` does."""
    response = pb.RegressionResponse()
    _fill_values(response.result, values_of(prediction, rows))
    _fill_spec(response.model_spec, prediction)
    return response.SerializeToString()


def tasks_of(request: pb.MultiInferenceRequest) -> list[tuple[Method, str]]:
    """What each task asks for, and of which signature (by its name, or ``""``).

    Raises:
        InvalidArgument: no tasks, tasks of several models or versions, or one signature twice.
        Unimplemented: a task is neither to classify nor to regress.
    """
    if not request.tasks:
        raise InvalidArgument("tasks: at least one expected, got none")
    names: set[str] = set()
    tasks = []
    model = request.tasks[0].model_spec
    for index, task in enumerate(request.tasks):
        spec = task.model_spec
        if not spec.name:
            raise InvalidArgument(f"task {index}: found ModelSpec with an empty model name")
        if spec.name != model.name:
            raise InvalidArgument(
                "all ModelSpecs in a MultiInferenceRequest must access the same model name: "
                f"task 0 has {model.name!r}, task {index} has {spec.name!r}"
            )
        if spec.WhichOneof("version_choice") and _choice(spec) != _choice(model):
            raise InvalidArgument(f"task {index}: the version of task 0 expected, got another: all run on one version")
        name = spec.signature_name or DEFAULT_SIGNATURE
        if name in names:
            raise InvalidArgument(f"task {index}: duplicate evaluation of signature {name!r}")
        names.add(name)
        tasks.append((_method(index, task.method_name), spec.signature_name))
    return tasks


def _choice(spec: pb.ModelSpec) -> tuple[str | None, int, str]:
    return spec.WhichOneof("version_choice"), spec.version.value, spec.version_label


def _method(index: int, name: str) -> Method:
    try:
        return Method(name)
    except ValueError:
        expected = " or ".join(method.value for method in Method)
        raise Unimplemented(f"task {index}: method_name {expected} expected, got {name!r}") from None


def encode_results(predictions: Sequence[Prediction], methods: Sequence[Method], rows: int) -> bytes:
    """`MultiInferenceResponse` with a result for each task, in their order."""
    response = pb.MultiInferenceResponse()
    for prediction, method in zip(predictions, methods, strict=True):
        result = response.results.add()
        _fill_spec(result.model_spec, prediction)
        if method is Method.CLASSIFY:
            _fill_classes(result.classification_result, classes_of(prediction, rows))
        else:
            _fill_values(result.regression_result, values_of(prediction, rows))
    return response.SerializeToString()


def _fill_classes(result: pb.ClassificationResult, classes: Classes) -> None:
    for labels, scores in zip(classes.labels, classes.scores.tolist(), strict=True):
        row = result.classifications.add().classes
        for label, score in zip(labels, scores, strict=True):
            row.add(label=label, score=score)


def _fill_values(result: pb.RegressionResult, values: Array) -> None:
    for value in values.tolist():
        result.regressions.add(value=value)


def _fill_spec(spec: pb.ModelSpec, prediction: Prediction) -> None:
    spec.name = prediction.model
    spec.version.value = prediction.version
    spec.signature_name = prediction.signature.name
