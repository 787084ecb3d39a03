"""Sequences of different lengths in one batch: padded to a bucket of lengths, and cut back; pure.

It knows tensors by name alone, for signatures carry it: see `service.tensors.Signature.padding`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from service.errors import Internal, InvalidArgument

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Lengths = Mapping[str, Sequence[int]]
"""The length of each row, by input, where the rows of a request differ."""
Side = Literal["right", "left"]


@dataclass(frozen=True)
class PaddedInput:
    """An input whose size along `axis` (1 or more) is a length: `value` is put on its `side`."""

    name: str
    axis: int
    value: Any
    side: Side = "right"


@dataclass(frozen=True)
class CutOutput:
    """An output whose sizes along `axes` are the length of input `like`."""

    name: str
    axes: tuple[int, ...]
    like: str


@dataclass(frozen=True)
class Padding:
    """How a signature's inputs are padded, and which of its outputs are cut back.

    A length goes to the next of `lengths`, in ascending order, or of the powers of two where there are none. One
    that is over the last is refused, or with `longer_exact` left as it is. With `same_length` all padded inputs of a
    request have to have the same length, for nobody said which of them an output follows.
    """

    inputs: tuple[PaddedInput, ...]
    outputs: tuple[CutOutput, ...] = ()
    lengths: tuple[int, ...] = ()
    longer_exact: bool = False
    same_length: bool = False

    def of(self, name: str) -> PaddedInput | None:
        """How an input is padded; None if it is not."""
        return next((each for each in self.inputs if each.name == name), None)

    def bucket(self, length: int) -> int:
        """What a sequence of `length` is padded to; `length` itself where it is over the last."""
        if not self.lengths:
            return 1 << max(length - 1, 0).bit_length()
        place = bisect_left(self.lengths, length)
        return self.lengths[place] if place < len(self.lengths) else length

    def check(self, inputs: Tensors, rows: Lengths | None = None) -> None:
        """Raise `InvalidArgument` for a sequence that is empty or too long, or unlike another that it has to be like.

        `inputs` have the ranks of their signature; `rows` is as `stack` gives it.
        """
        found = {each.name: inputs[each.name].shape[each.axis] for each in self.inputs}
        for each in self.inputs:
            length = found[each.name]
            shortest = min(rows[each.name]) if rows and each.name in rows else length
            if not shortest:
                raise InvalidArgument(f"input {each.name!r}: a length of 1 or more expected on axis {each.axis}, got 0")
            if self.lengths and length > self.lengths[-1] and not self.longer_exact:
                raise InvalidArgument(
                    f"input {each.name!r}: a length of at most {self.lengths[-1]} expected on axis {each.axis} "
                    f"(padding.lengths), got {length}"
                )
        if self.same_length:
            self._check_same(inputs, found, rows)

    def _check_same(self, inputs: Tensors, found: Mapping[str, int], rows: Lengths | None) -> None:
        first, *others = self.inputs
        for other in others:
            lengths = [
                list(rows[name]) if rows and name in rows else [found[name]] * len(inputs[name])
                for name in (first.name, other.name)
            ]
            if lengths[0] != lengths[1]:
                raise InvalidArgument(
                    f"inputs differ in length: {first.name!r} has {_shown(lengths[0])}, {other.name!r} has "
                    f"{_shown(lengths[1])}, and padding.outputs does not say which of them an output follows ('like')"
                )

    def pad(self, inputs: Tensors, most_bytes: int) -> tuple[Tensors, dict[str, tuple[int, int]]]:
        """Inputs of buckets' lengths, and for each padded input its length and what it was padded to.

        Raises:
            InvalidArgument: an input would take more than `most_bytes`.
        """
        padded, sizes = dict(inputs), {}
        for each in self.inputs:
            array = inputs[each.name]
            length = array.shape[each.axis]
            to = self.bucket(length)
            sizes[each.name] = (length, to)
            if to == length:
                continue
            takes = array.nbytes // max(length, 1) * to
            if takes > most_bytes:
                raise InvalidArgument(
                    f"input {each.name!r}: at most {most_bytes} bytes expected, but {list(array.shape)} padded "
                    f"to {to} takes {takes}"
                )
            padded[each.name] = _padded(array, each, to)
        return padded, sizes

    def cut(self, outputs: Tensors, sizes: Mapping[str, tuple[int, int]]) -> Tensors:
        """Outputs as they are without padding; `sizes` is what `pad` gave.

        Raises:
            Internal: an output has not the length that its input was padded to.
        """
        cut = dict(outputs)
        for each in self.outputs:
            length, to = sizes[each.like]
            array = outputs[each.name]
            for axis in each.axes:
                if axis >= array.ndim or array.shape[axis] != to:
                    raise Internal(
                        f"output {each.name!r}: {to} expected on axis {axis}, the padded length of {each.like!r}, "
                        f"got shape {list(array.shape)}: padding.outputs says which outputs follow a length"
                    )
            if length != to:
                cut[each.name] = np.ascontiguousarray(array[self._part(each, array.ndim, length, to)])
        return cut

    def rows_of(self, name: str, array: Array, rows: Lengths) -> list[Array] | None:
        """Each row of an output ``(rows, …)`` cut to its own length, of `rows`; None where it follows none of them."""
        cut = next((each for each in self.outputs if each.name == name and each.like in rows), None)
        if cut is None:
            return None
        longest = array.shape[cut.axes[0]]
        return [
            np.ascontiguousarray(row[self._part(cut, array.ndim, length, longest)[1:]])
            for row, length in zip(array, rows[cut.like], strict=True)
        ]

    def _part(self, cut: CutOutput, dimensions: int, length: int, of: int) -> tuple[slice, ...]:
        """Where the first or, padded on the left, the last `length` of `of` are."""
        like = self.of(cut.like)
        is_left = like is not None and like.side == "left"
        kept = slice(of - length, of) if is_left else slice(length)
        return tuple(kept if axis in cut.axes else slice(None) for axis in range(dimensions))


def stack(
    rows: Sequence[Array], how: PaddedInput, check: Callable[[tuple[int, ...]], None]
) -> tuple[Array, list[int]] | None:
    """Rows of different lengths as one array ``(rows, …)``, each padded to the longest, and their lengths.

    None where they differ in more than that: in rank, or along another axis. `check` is called with the shape
    before memory is spent on it, and may raise.
    """
    axis = how.axis - 1
    if any(row.ndim <= axis for row in rows) or len({row.shape[:axis] + row.shape[axis + 1 :] for row in rows}) > 1:
        return None
    lengths = [row.shape[axis] for row in rows]
    longest = max(lengths)
    shape = (len(rows), *rows[0].shape[:axis], longest, *rows[0].shape[axis + 1 :])
    check(shape)
    array = np.full(shape, how.value, rows[0].dtype)
    for place, row, length in zip(array, rows, lengths, strict=True):
        place[(slice(None),) * axis + (_kept(how, length, longest),)] = row
    return array, lengths


def _padded(array: Array, how: PaddedInput, to: int) -> Array:
    shape = (*array.shape[: how.axis], to, *array.shape[how.axis + 1 :])
    padded = np.full(shape, how.value, array.dtype)
    padded[(slice(None),) * how.axis + (_kept(how, array.shape[how.axis], to),)] = array
    return padded


def _kept(how: PaddedInput, length: int, of: int) -> slice:
    return slice(of - length, of) if how.side == "left" else slice(length)


def _shown(lengths: Sequence[int]) -> str:
    """One length, or each row's."""
    return str(lengths[0]) if len(set(lengths)) == 1 else str(list(lengths[:16]))
