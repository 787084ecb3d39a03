"""How much one request may ask for, whatever its dialect: checked before the memory is spent.

What a body pays for with its own bytes is bounded by ``max_message_bytes`` already. Two things are
not: a shape, which can claim any number of elements, and small elements, each of which becomes an
object of 40 bytes or more while the body spends two on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.errors import InvalidArgument
from service.tensors import MAX_DIMENSIONS, DataType, Signature, Tensors, TensorSpec

STRING_COUNTS_AS = 16
"""Elements: a short string takes over 100 bytes while it is decoded, a number about 8."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of one tensor in one request: see the settings of the same names."""

    max_tensor_elements: int = 2**24
    max_string_bytes: int = 32 * 2**20
    max_filled_elements: int = 2**20
    """Elements that a shorter list of TensorFlow's may stand for: some bytes must not become a hundred megabytes."""

    def most_elements(self, dtype: DataType) -> int:
        """Of one tensor of that type."""
        return self.max_tensor_elements // STRING_COUNTS_AS if dtype is DataType.BYTES else self.max_tensor_elements

    def check_shape(self, shape: Sequence[int], spec: TensorSpec) -> None:
        """Raise `InvalidArgument` unless `shape` can be that of an array that may be made.

        A size of 0 counts as 1, so that no size that NumPy cannot hold hides behind it.
        """
        if len(shape) > MAX_DIMENSIONS:
            raise InvalidArgument(
                f"input {spec.name!r}: a shape has at most {MAX_DIMENSIONS} dimensions, got {len(shape)}"
            )
        if any(size < 0 for size in shape):
            raise InvalidArgument(f"input {spec.name!r}: a shape has no negative sizes, got {list(shape)}")
        count = math.prod(max(size, 1) for size in shape)
        if count * STRING_COUNTS_AS > self.max_tensor_elements and count > self.most_elements(spec.dtype):
            raise too_many(spec.name, self.most_elements(spec.dtype), f"shape {list(shape)}")

    def check_filled(self, given: int, count: int, name: str) -> None:
        """Raise `InvalidArgument` where `given` values stand for too many elements, `count`."""
        if count > self.max_filled_elements:
            raise InvalidArgument(
                f"input {name!r}: {given} values cannot stand for {count} elements, "
                f"only for up to {self.max_filled_elements}"
            )

    def may_exceed(self, json_bytes: int) -> bool:
        """Whether JSON of so many bytes is long enough for too many elements: each takes a digit and a comma."""
        return json_bytes * STRING_COUNTS_AS // 2 > self.max_tensor_elements

    def most_of(self, signature: Signature) -> int:
        """Elements of all inputs of that signature together."""
        return sum(self.most_elements(spec.dtype) for spec in signature.inputs)

    def check_inputs(self, inputs: Tensors, body_bytes: int) -> None:
        """The same for arrays that JSON was read into, whose body was long enough to hold too much.

        Raises:
            InvalidArgument: an input has too many elements, or too long a string.
        """
        if body_bytes <= self.max_string_bytes and not self.may_exceed(body_bytes):
            return
        for name, array in inputs.items():
            is_text = array.dtype.kind == "O"
            most = self.most_elements(DataType.BYTES) if is_text else self.max_tensor_elements
            if array.size > most:
                raise too_many(name, most, str(array.size))
            if is_text:
                self.check_strings(array.flat, name)

    def check_strings(self, strings: Iterable[bytes], name: str) -> None:
        """Raise `InvalidArgument` for an element that is over ``max_string_bytes``."""
        longest = max(map(len, strings), default=0)
        if longest > self.max_string_bytes:
            raise InvalidArgument(
                f"input {name!r}: strings of at most {self.max_string_bytes} bytes expected (max_string_bytes), "
                f"got one of {longest}"
            )

    def check_context(self, features: int, size_bytes: int, rows: int) -> None:
        """Raise `InvalidArgument` where merging a context into each of so many examples would take too much.

        It is sent once and held for each example: 8 of its bytes count as an element, and each feature as a string.
        """
        cost = features * STRING_COUNTS_AS + size_bytes // 8
        if cost * rows > self.max_tensor_elements:
            raise InvalidArgument(
                f"'context': {features} features of {size_bytes} bytes in each of {rows} examples are too many "
                "(max_tensor_elements)"
            )


def too_many(name: str, most: int, got: str) -> InvalidArgument:
    """The refusal of an input that has more than `most` elements."""
    return InvalidArgument(f"input {name!r}: at most {most} elements expected (max_tensor_elements), got {got}")


DEFAULT_BOUNDS = Bounds()
