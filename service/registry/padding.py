"""What a model's config says of padding by length: held against its signatures, and against its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from service.batching.queue import Lane
from service.errors import KilnError, ModelLoadError
from service.padding import CutOutput, PaddedInput, Padding, stack
from service.registry.config import InputPadding, ModelConfig, OutputPadding, PaddingConfig
from service.runtime.drawing import Drawer
from service.runtime.parity import Tolerance, difference, disagreement
from service.runtime.records import SignatureRecord
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec, trailing_shapes

_CHECKED_LENGTH = 16
"""The bucket that is checked where the config names none."""
_HIGHEST_DRAWN = (1000, 100, 10, 1)
"""Integers are drawn up to these, until the model takes them: an embedding has so many rows and no more."""
_NO_LIMIT = 2**62
Run = Callable[[Tensors], Tensors]


class Model(Protocol):
    """What is asked; see `service.registry.version.Model`."""

    signatures: dict[str, Signature]

    @property
    def plans(self) -> Mapping[str, SignatureRecord]: ...
    def run(self, lane: Lane, inputs: Tensors) -> Tensors: ...


# What the config says


def with_padding(signatures: Mapping[str, Signature], config: ModelConfig) -> dict[str, Signature]:
    """`signatures` that are padded as `config` says, where it does.

    Raises:
        ModelLoadError: it speaks of what there is not, or of what cannot be padded; names the field.
    """
    said = config.padding
    if said is None:
        return dict(signatures)
    _check_known("inputs", said.inputs, {spec.name for each in signatures.values() for spec in each.inputs})
    _check_known("outputs", said.outputs or {}, {spec.name for each in signatures.values() for spec in each.outputs})
    padded = {name: _padded(signature, said) for name, signature in signatures.items()}
    if all(signature.padding is None for signature in padded.values()):
        told = "; ".join(f"{name}: {signature.describe()}" for name, signature in signatures.items())
        raise ModelLoadError(
            f"padding: a signature that can be batched and has an input with an open dimension beside its rows "
            f"expected, got {told}"
        )
    return padded


def _check_known(field: str, said: Mapping[str, object], known: set[str]) -> None:
    for name in said:
        if name not in known:
            raise ModelLoadError(f"padding.{field}: one of {', '.join(sorted(known))} expected, got {name!r}")


def _padded(signature: Signature, said: PaddingConfig) -> Signature:
    if not signature.batched:
        return signature
    inputs = tuple(
        _input(spec, said.inputs.get(spec.name), said)
        for spec in signature.inputs
        if (spec.name in said.inputs if said.inputs else spec.row_sizes and None in spec.row_sizes)
    )
    if not inputs:
        return signature
    names = [each.name for each in inputs]
    outputs = tuple(_outputs(signature, said, inputs))
    is_said = said.outputs is not None and all(each.like is not None for each in said.outputs.values())
    padding = Padding(
        inputs,
        outputs,
        said.lengths,
        longer_exact=said.longer == "exact",
        same_length=len(names) > 1 and bool(outputs) and not is_said,
    )
    return replace(signature, padding=padding)


def _input(spec: TensorSpec, own: InputPadding | None, said: PaddingConfig) -> PaddedInput:
    own = own or InputPadding()
    shape = spec.shape or ()
    if own.axis is None:
        axes = [axis for axis in range(1, len(shape)) if shape[axis] is None]
        if len(axes) != 1:
            raise ModelLoadError(
                f"padding.inputs.{spec.name}.axis: expected, for not one dimension beside the rows is open, but "
                f"{len(axes)}: {spec.wire_shape()}"
            )
        axis = axes[0]
    else:
        axis = own.axis
        if axis >= len(shape) or shape[axis] is not None:
            raise ModelLoadError(
                f"padding.inputs.{spec.name}.axis: an open dimension of {spec.wire_shape()} expected, got {axis}"
            )
    field = "padding.value" if own.value is None else f"padding.inputs.{spec.name}.value"
    value = said.value if own.value is None else own.value
    return PaddedInput(spec.name, axis, _value(spec, value, field), own.side or said.side)


def _value(spec: TensorSpec, value: Any, field: str) -> Any:
    """What an input is filled with: `value`, else zero, false or the empty string."""
    dtype = spec.dtype
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if dtype is DataType.BYTES and (value is None or isinstance(value, str)):
        return (value or "").encode()
    if dtype is DataType.BOOL and (value is None or isinstance(value, bool)):
        return bool(value)
    if dtype.is_integer and (value is None or (is_number and float(value).is_integer())):
        limits = np.iinfo(dtype.numpy)
        if limits.min <= int(value or 0) <= limits.max:
            return int(value or 0)
    elif dtype.is_float and (value is None or is_number):
        with np.errstate(over="ignore"):
            held = np.float64(value or 0).astype(dtype.numpy)
        if bool(np.isfinite(held)) == math.isfinite(value or 0):
            return held
    raise ModelLoadError(f"{field}: a value of {dtype.value} expected for input {spec.name!r}, got {value!r}")


def _outputs(signature: Signature, said: PaddingConfig, inputs: tuple[PaddedInput, ...]) -> Iterator[CutOutput]:
    first = inputs[0]
    for spec in signature.outputs:
        own = OutputPadding(axis=(first.axis,)) if said.outputs is None else said.outputs.get(spec.name)
        if own is None:
            continue
        if own.like is not None and own.like not in [each.name for each in inputs]:
            raise ModelLoadError(
                f"padding.outputs.{spec.name}.like: one of {', '.join(each.name for each in inputs)} expected, "
                f"got {own.like!r}"
            )
        closed = [axis for axis in own.axis if not _is_open(spec, axis)]
        if closed and said.outputs is not None:
            raise ModelLoadError(
                f"padding.outputs.{spec.name}: an open dimension of {spec.wire_shape()} expected, got axis {closed[0]}"
            )
        if not closed:
            yield CutOutput(spec.name, own.axis, own.like or first.name)


def _is_open(spec: TensorSpec, axis: int) -> bool:
    return spec.shape is not None and axis < len(spec.shape) and spec.shape[axis] is None


# What the model says


def padding_problem(model: Model, config: ModelConfig) -> str:
    """How padding changes the answers of a loaded model, if it does: ``""`` where it does not, or is not asked for.

    Seeded rows are asked alone as they are, and then together, padded to the first and the last bucket.

    Raises:
        ModelLoadError: it does, or nobody can tell, and `config` asks for that to be refused.
    """
    said = config.padding
    if said is None:
        return ""
    tolerance = (
        Tolerance(config.rtol, config.atol)
        if config.precision == "f32"
        else Tolerance(config.precision_rtol, config.precision_atol)
    )
    for signature in model.signatures.values():
        if signature.padding is None:
            continue
        problem = _problem(model, signature, signature.padding, tolerance, is_said=said.outputs is not None)
        if problem and said.check:
            raise ModelLoadError(
                f"padding: {problem}. Mask what is padded in the model (mask_zero, Masking), or let it be with "
                "padding.check: false"
            )
        if problem:
            return f"padding changes answers: {problem}"
    return ""


def _problem(model: Model, signature: Signature, padding: Padding, tolerance: Tolerance, *, is_said: bool) -> str:
    def run(inputs: Tensors) -> Tensors:
        lane = Lane(signature, trailing_shapes(signature, inputs), conforms=True, fuses=True)
        return model.run(lane, inputs)

    record = model.plans.get(signature.name)
    ranges = dict(record.ranges) if record is not None else {}
    for own, bucket in _checked(padding):
        try:
            alone = _alone(signature, padding, run, own, ranges)
        except KilnError as error:
            return f"signature {signature.name!r}: it takes none of the rows that were drawn to check it ({error})"
        try:
            found = _compare(padding, run, alone, tolerance, is_said=is_said)
        except KilnError as error:
            found = str(error)
        if found:
            lengths = " and ".join(map(str, own))
            return f"signature {signature.name!r}: rows of length {lengths}, padded to {bucket}: {found}"
    return ""


def _checked(padding: Padding) -> Iterator[tuple[tuple[int, ...], int]]:
    """Lengths of rows, and the bucket that they share: the first that is not all too short, and the last."""
    lengths = padding.lengths or (_CHECKED_LENGTH,)
    for bucket in sorted({next((each for each in lengths if each > 2), lengths[-1]), lengths[-1]}):
        before = max((each for each in padding.lengths if each < bucket), default=bucket // 2)
        longest = max((before + bucket) // 2, 1)
        yield tuple(sorted({longest, max(longest // 3, 1)}, reverse=True)), bucket


def _alone(
    signature: Signature, padding: Padding, run: Run, lengths: tuple[int, ...], ranges: dict[str, tuple[int, int]]
) -> list[tuple[Tensors, Tensors]]:
    """One row of each length with what is answered to it alone.

    Raises:
        KilnError: the model takes nothing of what was drawn.
    """
    drawer = Drawer(signature)
    refusal: KilnError | None = None
    for highest in _HIGHEST_DRAWN:
        drawer.open_size = lengths[0]
        drawer.ranges = {
            spec.name: (max(ranges.get(spec.name, (0, 0))[0], 0), min(ranges.get(spec.name, (0, highest))[1], highest))
            for spec in signature.inputs
            if spec.dtype.is_integer
        }
        drawn = drawer.batch(len(lengths))
        rows = [_row(padding, drawn, place, length) for place, length in enumerate(lengths)]
        try:
            return [(row, run(row)) for row in rows]
        except KilnError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _row(padding: Padding, drawn: Tensors, place: int, length: int) -> Tensors:
    """Row `place` of `drawn`, with the first `length` of each padded input."""
    row = {name: array[place : place + 1] for name, array in drawn.items()}
    for each in padding.inputs:
        row[each.name] = np.take(row[each.name], range(length), each.axis)
    return row


def _compare(
    padding: Padding, run: Run, alone: list[tuple[Tensors, Tensors]], tolerance: Tolerance, *, is_said: bool
) -> str:
    """Where the answers to all rows together, padded, differ most from those to each alone; ``""`` if they agree.

    With `is_said` the config says which outputs are cut back, and others may be longer.
    """
    together: Tensors = {}
    lengths = {}
    for name in alone[0][0]:
        rows = [row[name][0] for row, _ in alone]
        how = padding.of(name)
        stacked = None if how is None else stack(rows, how, lambda shape: None)  # noqa: ARG005
        if stacked is None:
            together[name] = np.stack(rows)
        else:
            together[name], lengths[name] = stacked
    padded, sizes = padding.pad(together, _NO_LIMIT)
    outputs = padding.cut(run(padded), sizes)
    problems: dict[float, str] = {}
    for name, array in outputs.items():
        rows_of = padding.rows_of(name, array, lengths)
        for place, (_, wanted) in enumerate(alone):
            want = wanted[name]
            got = array[place : place + 1] if rows_of is None else rows_of[place][None]
            if is_said and got.ndim == want.ndim:  # what it says to leave as it is, is longer
                got = _trimmed(got, want.shape, padding)
            if problem := disagreement({name: want}, {name: got}, tolerance):
                is_alike = got.shape == want.shape
                problems[difference({name: want}, {name: got}).absolute if is_alike else math.inf] = problem
    return problems[max(problems)] if problems else ""


def _trimmed(array: Array, shape: tuple[int, ...], padding: Padding) -> Array:
    """The part of `array` that is no padding, of that shape."""
    is_left = padding.inputs[0].side == "left"
    return array[
        tuple(
            slice(max(of - size, 0), of) if is_left else slice(size)
            for size, of in zip(shape, array.shape, strict=True)
        )
    ]
