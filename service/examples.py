"""Classify and regress: examples, which are rows of named features, on their way to and from a signature. Pure.

Both of TensorFlow Serving's dialects mean the same by them and differ in their bytes alone. A signature
takes examples in one of two ways: as serialised ``tf.Example`` messages in its one string input, which
its graph then parses, or, as an ordinary Keras model has it, by one input for each feature.

Source: TensorFlow Serving's ``classifier.cc``, ``regressor.cc`` and ``multi_inference.cc``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Protocol

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.errors import FailedPrecondition, InvalidArgument
from service.padding import stack
from service.predictor import Decoded, Prediction, choose_signature
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec, integers_fit

Features = Mapping[str, Array]
"""Values by feature, ``(values,)`` each: FP32, INT64 or bytes; one without values is of no kind."""

_SERIALIZED, _CLASSES, _SCORES, _VALUES = "inputs", "classes", "scores", "outputs"
"""The names that TensorFlow's signatures have for their input and their outputs."""
_KINDS = {"f": "floats", "i": "integers", "O": "strings"}


class Method(Enum):
    """What is asked of a signature; the value is the method name that TensorFlow's signatures have."""

    CLASSIFY = "tensorflow/serving/classify"
    REGRESS = "tensorflow/serving/regress"


class Examples(Protocol):
    """The rows of one request, with the context, if there is one, merged into each: its own features win."""

    def __len__(self) -> int: ...

    def features(self) -> Sequence[Features]:
        """Each row's values by feature."""

    def serialized(self) -> Sequence[bytes]:
        """Each row as a ``tf.Example`` message."""


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of each row: `labels` by row and class, `scores` ``(rows, classes)`` in FP32."""

    labels: Sequence[Sequence[str]]
    scores: Array


def decode_examples(
    method: Method,
    examples: Examples,
    signatures: Mapping[str, Signature],
    name: str,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Decoded:
    """The inputs that `examples` are for the signature called `name` (for no name, the default one).

    Raises:
        InvalidArgument: no such signature, one of another method, no rows, a feature that does not fit, or more
            than `bounds` let; names the feature, what was expected and what came.
        FailedPrecondition: the signature has not the outputs that its method asks for.
    """
    try:
        signature = choose_signature(signatures, name)
    except FailedPrecondition as error:
        raise InvalidArgument(str(error)) from None
    if signature.method != method.value and signature.method in {other.value for other in Method}:
        raise InvalidArgument(f"signature {signature.name!r}: method {method.value} expected, got {signature.method}")
    _output_specs(method, signature)
    if not len(examples):
        raise InvalidArgument("Input is empty: at least one example is expected")
    if _takes_serialized(method, signature):
        bounds.check_shape((len(examples),), signature.inputs[0])
        rows = np.empty(len(examples), object)
        rows[:] = examples.serialized()
        bounds.check_strings(rows, signature.inputs[0].name)
        return Decoded(signature, {signature.inputs[0].name: rows}, strict_shapes=False)
    inputs, lengths = _from_features(examples.features(), signature, bounds)
    return Decoded(signature, inputs, lengths=lengths)


def check_context(context: Features, rows: int, bounds: Bounds) -> None:
    """Raise `InvalidArgument` where `context`, merged into each of so many examples, is more than `bounds` let."""
    values = sum(sum(map(len, each)) if each.dtype.kind == "O" else each.nbytes for each in context.values())
    bounds.check_context(len(context), sum(map(len, context)) + values, rows)


def _takes_serialized(method: Method, signature: Signature) -> bool:
    """Whether the graph parses examples itself.

    TensorFlow 2 writes every signature with the method of predict, so there the names decide, which
    are those that TensorFlow Serving looks for.
    """
    if len(signature.inputs) != 1 or signature.inputs[0].dtype is not DataType.BYTES:
        return False
    if signature.method == method.value:
        return True
    outputs = {_CLASSES, _SCORES} if method is Method.CLASSIFY else {_VALUES}
    return signature.inputs[0].name == _SERIALIZED and signature.output_by_name.keys() <= outputs


# Features as inputs


def _from_features(
    rows: Sequence[Features], signature: Signature, bounds: Bounds
) -> tuple[Tensors, dict[str, list[int]] | None]:
    """Arrays by input, and the lengths of rows that were padded."""
    names = {spec.name: spec.name for spec in signature.inputs}
    given = dict.fromkeys(name for row in rows for name in row)
    if len(names) == len(given) == 1:  # the only feature can only mean the only input
        names = dict.fromkeys(names, next(iter(given)))
    expected = ", ".join(sorted(names.values()))
    for name in given:
        if name not in names.values():
            raise InvalidArgument(
                f"unknown feature {name!r}: signature {signature.name!r} takes {expected}; "
                f"received {', '.join(sorted(given))}"
            )
    for index, row in enumerate(rows):
        for name in names.values():
            if name not in row:
                received = ", ".join(sorted(row)) or "none"
                raise InvalidArgument(
                    f"feature {name!r} is missing in example {index}: signature {signature.name!r} takes {expected}; "
                    f"received {received}"
                )
    inputs: Tensors = {}
    lengths: dict[str, list[int]] = {}
    for spec in signature.inputs:
        columns = [row[names[spec.name]] for row in rows]
        bounds.check_shape((len(columns), max(map(len, columns))), spec)
        if spec.dtype is DataType.BYTES:
            bounds.check_strings((item for values in columns for item in values if isinstance(item, bytes)), spec.name)
        how = None if signature.padding is None else signature.padding.of(spec.name)
        if how is not None and len(set(map(len, columns))) > 1:
            arrays = [_column(spec, names[spec.name], [values], index)[0] for index, values in enumerate(columns)]
            padded = stack(arrays, how, partial(bounds.check_shape, spec=spec))
            assert padded is not None  # one size of a row is open at most
            inputs[spec.name], lengths[spec.name] = padded
        else:
            inputs[spec.name] = _column(spec, names[spec.name], columns)
    return inputs, lengths or None


def _column(spec: TensorSpec, feature: str, rows: list[Array], first: int = 0) -> Array:
    """One feature's values of all rows, as ``(rows, …)`` of the type and shape that `spec` asks for.

    `first` is which example the first of them is.
    """
    shape = _row_shape(spec, feature)
    count = len(rows[0])
    for index, values in enumerate(rows, first):
        where = f"feature {feature!r} of example {index}"
        if len(values) != count:
            raise InvalidArgument(f"{where}: {count} values expected, as in example 0, got {len(values)}")
        _check_kind(spec, values, where)
    _check_count(shape, count, f"feature {feature!r}")
    flat = np.concatenate(
        [_cast(spec, values, f"feature {feature!r} of example {i}") for i, values in enumerate(rows, first)]
    )
    sizes = [size for size in shape if size is not None]
    open_size = count // math.prod(sizes) if None in shape else 0
    return flat.reshape(len(rows), *(open_size if size is None else size for size in shape))


def _row_shape(spec: TensorSpec, feature: str) -> tuple[int | None, ...]:
    """The shape of one row, of which at most one size may be open."""
    if spec.shape is None:
        return (None,)
    if not spec.shape:
        raise InvalidArgument(f"feature {feature!r}: input {spec.name!r} takes one value and no rows: use predict")
    if spec.shape[1:].count(None) > 1:
        raise InvalidArgument(
            f"feature {feature!r}: a row of input {spec.name!r} is {spec.wire_shape()[1:]}, which a list of values "
            "does not tell: use predict"
        )
    return spec.shape[1:]


def _check_count(shape: tuple[int | None, ...], count: int, where: str) -> None:
    size = math.prod(size for size in shape if size is not None)
    if None in shape:
        fits, expected = size > 0 and count % size == 0, f"a multiple of {size}"
    else:
        fits, expected = count == size, str(size)
    if not fits:
        shown = [-1 if size is None else size for size in shape]
        raise InvalidArgument(f"{where}: {expected} values expected for a row of shape {shown}, got {count}")


def _check_kind(spec: TensorSpec, values: Array, where: str) -> None:
    """Integers are taken for floats and as 0 or 1 for booleans, and nothing else for anything else."""
    kinds = "O" if spec.dtype is DataType.BYTES else "if" if spec.dtype.is_float else "i"
    if len(values) and values.dtype.kind not in kinds:
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise InvalidArgument(f"{where}: {expected} expected for {spec.dtype.value}, got {_KINDS[values.dtype.kind]}")


def _cast(spec: TensorSpec, values: Array, where: str) -> Array:
    if not len(values) or values.dtype == spec.dtype.numpy:
        return values.astype(spec.dtype.numpy, copy=False)
    try:
        if spec.dtype.is_integer:
            return integers_fit(values, spec)
        if spec.dtype is DataType.BOOL and not np.isin(values, (0, 1)).all():
            raise InvalidArgument("0 or 1 expected for BOOL")
        with np.errstate(over="raise"):
            return values.astype(spec.dtype.numpy)
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {str(error).removeprefix(f'input {spec.name!r}: ')}") from None
    except FloatingPointError:
        raise InvalidArgument(f"{where}: a number does not fit {spec.dtype.value}") from None


# Outputs as results


def _output_specs(method: Method, signature: Signature) -> dict[str, TensorSpec]:
    """The outputs that hold the answer, by what they are: ``classes`` and ``scores``, or ``outputs``.

    Raises as `decode_examples` does, so that nothing is run in vain.
    """
    wanted = (_CLASSES, _SCORES) if method is Method.CLASSIFY else (_VALUES,)
    found = {name: signature.output_by_name[name] for name in wanted if name in signature.output_by_name}
    if not found and signature.method == method.value:
        raise FailedPrecondition(
            f"signature {signature.name!r}: an output called {' or '.join(wanted)} expected, "
            f"got {', '.join(signature.output_by_name)}"
        )
    if wanted[-1] not in found and len(found) < len(signature.outputs) and signature.method != method.value:
        found[wanted[-1]] = _only_output(method, signature)
    for name, spec in found.items():
        _check_type(name, spec, signature)
        if spec.shape is not None and not _is_shape(name, spec.wire_shape()):
            raise _wrong_shape(name, spec, spec.wire_shape())
    return found


def _only_output(method: Method, signature: Signature) -> TensorSpec:
    """The one output of a signature that was not made for `method`."""
    fits = [spec for spec in signature.outputs if spec.name != _CLASSES and _is_number(spec, method)]
    if len(fits) != 1:
        kind = "floats" if method is Method.CLASSIFY else "numbers"
        wanted = _SCORES if method is Method.CLASSIFY else _VALUES
        got = ", ".join(f"{spec.name} ({spec.dtype.value})" for spec in signature.outputs) or "none"
        raise InvalidArgument(
            f"signature {signature.name!r}: one output of {kind} expected, or one called {wanted}; got {got}"
        )
    return fits[0]


def _is_number(spec: TensorSpec, method: Method) -> bool:
    return spec.dtype.is_float or (method is Method.REGRESS and spec.dtype.is_integer)


def _check_type(name: str, spec: TensorSpec, signature: Signature) -> None:
    if name == _CLASSES:
        fits, expected = spec.dtype is DataType.BYTES or spec.dtype.is_integer, "strings or integers"
    else:
        fits = _is_number(spec, Method.REGRESS if name == _VALUES else Method.CLASSIFY)
        expected = "numbers" if name == _VALUES else "floats"
    if not fits:
        raise InvalidArgument(
            f"signature {signature.name!r}: output {spec.name!r}: {expected} expected, got {spec.dtype.value}"
        )


def _is_shape(name: str, shape: Sequence[int]) -> bool:
    """Whether classes and scores are ``(rows, classes)``, values ``(rows,)`` or ``(rows, 1)``; -1 is open."""
    if name == _VALUES:
        return len(shape) == 1 or (len(shape) == 2 and shape[1] in (1, -1))
    return len(shape) == 2


def _wrong_shape(name: str, spec: TensorSpec, shape: Sequence[int]) -> InvalidArgument:
    expected = "[rows] or [rows, 1]" if name == _VALUES else "[rows, classes]"
    return InvalidArgument(f"output {spec.name!r}: shape {expected} expected, got {list(shape)}")


def _outputs(method: Method, prediction: Prediction, rows: int) -> dict[str, Array]:
    """The arrays that hold the answer, of `rows` rows each."""
    arrays = {}
    for name, spec in _output_specs(method, prediction.signature).items():
        array = arrays[name] = prediction.outputs[spec.name]
        if not _is_shape(name, array.shape):
            raise _wrong_shape(name, spec, array.shape)
        if len(array) != rows:
            raise InvalidArgument(f"output {spec.name!r}: {rows} rows expected, as many as examples, got {len(array)}")
    return arrays


def classes_of(prediction: Prediction, rows: int) -> Classes:
    """Labels and scores of each of `rows` examples.

    Without labels the classes are called ``0``, ``1``, …, and without scores each has 0.

    Raises:
        InvalidArgument: the outputs have other shapes than their signature lets expect.
        FailedPrecondition: a label is no text.
    """
    arrays = _outputs(Method.CLASSIFY, prediction, rows)
    labels, scores = arrays.get(_CLASSES), arrays.get(_SCORES)
    if scores is None:
        assert labels is not None  # `_output_specs` finds one of them at least
        scores = np.zeros(labels.shape, np.float32)
    if labels is not None and labels.shape != scores.shape:
        raise InvalidArgument(
            f"classes and scores of one shape expected, got {list(labels.shape)} and {list(scores.shape)}"
        )
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32, copy=False)
    if labels is None:
        return Classes([[str(index) for index in range(scores.shape[1])]] * len(scores), scores)
    return Classes([[_label(item) for item in row] for row in labels.tolist()], scores)


def _label(item: Any) -> str:
    try:
        return item.decode() if isinstance(item, bytes) else str(item)
    except UnicodeDecodeError:
        raise FailedPrecondition(f"output {_CLASSES!r}: a label of text expected, got {item!r}") from None


def values_of(prediction: Prediction, rows: int) -> Array:
    """The value of each of `rows` examples, ``(rows,)`` in FP32; raises as `classes_of` does."""
    values = _outputs(Method.REGRESS, prediction, rows)[_VALUES]
    with np.errstate(over="ignore"):
        return values.reshape(rows).astype(np.float32, copy=False)
