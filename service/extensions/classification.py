"""Outputs as classes with their scores, pure.

Source: Triton's classification extension: BYTES of ``score:index[:label]``, the highest score first;
the score is written as C's ``%f`` does, or as a whole number where the output is of integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from service.errors import InvalidArgument
from service.extensions.parameters import whole_number
from service.predictor import Prediction
from service.tensors import Array, DataType, TensorSpec

CLASSIFICATION = "classification"
"""The parameter of an output that has the number of classes."""


def class_count(value: object, spec: TensorSpec) -> int:
    """How many classes of an output are asked for.

    Raises:
        InvalidArgument: it is no positive integer, or the output is not of numbers.
    """
    count = whole_number(value, f"output {spec.name!r}: parameter classification", 1)
    if spec.dtype in (DataType.BYTES, DataType.BOOL):
        raise InvalidArgument(f"output {spec.name!r}: classes are of numbers, and this is {spec.dtype.value}")
    return count


def classified(prediction: Prediction, counts: Mapping[str, int]) -> Prediction:
    """`prediction` with the outputs of `counts` as their best classes.

    Each becomes BYTES ``(rows, min(count, classes))``, where an output ``(rows, …)`` has as many
    classes as a row has elements; without rows ``(min(count, classes),)``.
    """
    signature = prediction.signature
    outputs = dict(prediction.outputs)
    for name, count in counts.items():
        spec = signature.output_by_name[name]
        outputs[name] = _classes(outputs[name], count, spec.labels, has_rows=spec.is_batched)
    specs = [replace(s, dtype=DataType.BYTES) if s.name in counts else s for s in signature.outputs]
    return replace(prediction, signature=replace(signature, outputs=tuple(specs)), outputs=outputs)


def _classes(array: Array, count: int, labels: tuple[str, ...], *, has_rows: bool) -> Array:
    scores = array.reshape(len(array) if has_rows else 1, -1)
    is_float = scores.dtype.kind not in "iu"  # ml_dtypes' bfloat16 is of kind V
    values = scores.astype(np.float64) if is_float else scores
    keys = (
        np.negative(values) if is_float else np.invert(values)
    )  # the complement turns the order round without an overflow
    order = np.argsort(keys, axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(values, order, axis=1)
    texts = np.empty(order.shape, object)
    for place, index in np.ndenumerate(order):
        score = f"{best[place]:f}" if is_float else f"{best[place]}"
        label = f":{labels[index]}" if labels and index < len(labels) else ""
        texts[place] = f"{score}:{index}{label}".encode()
    return texts if has_rows else texts[0]
