"""Requests that differ from an earlier one in the bytes of their tensor only, of both dialects.

A client that sends one raw tensor with each request writes the same bytes up to it every time: names,
types, shape. They are parsed and checked once. Reading the next such message takes a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from service.predictor import Decoded, ModelRef, Prediction
from service.tensors import DataType, Signature

_MOST_SIZES = 256
_MOST_OF_A_SIZE = 4
_LONGEST_PREFIX_BYTES = 2**12
_MOST_ANSWERS = 16
Encode = Callable[[Prediction], bytes]
"""Writes the whole answer."""


class KnownRequest:
    """A message up to its tensor, and what it came to."""

    __slots__ = ("_answers", "_count", "_dtype", "_encode", "_name", "_shape", "_signature", "_strict", "prefix", "ref")

    def __init__(self, prefix: bytes, ref: ModelRef, decoded: Decoded, encode: Encode) -> None:
        self.prefix = prefix
        self.ref = ref
        self._encode = encode
        self._signature = decoded.signature
        self._strict = decoded.strict_shapes
        ((self._name, array),) = decoded.inputs.items()
        self._dtype: np.dtype[Any] = array.dtype
        self._count = array.size
        self._shape = array.shape
        self._answers: dict[tuple[int, tuple[int, ...]], tuple[bytes, bytes]] = {}

    def decode(self, data: bytes, signatures: Mapping[str, Signature]) -> Decoded | None:
        """The message `data`, which begins with `prefix`; None if the model has changed."""
        if signatures.get(self._signature.name) is not self._signature:
            return None
        array = np.frombuffer(data, self._dtype, self._count, len(self.prefix)).reshape(self._shape)
        return Decoded(self._signature, {self._name: array}, self._strict)

    def encode(self, prediction: Prediction) -> bytes:
        """The answer's bytes: of one raw output all that is around it is known as well."""
        if len(prediction.outputs) != 1 or prediction.signature is not self._signature:
            return self._encode(prediction)
        ((name, array),) = prediction.outputs.items()
        key = (prediction.version, array.shape)
        around = self._answers.get(key)
        if around is not None:
            return around[0] + array.tobytes() + around[1]
        answer = self._encode(prediction)
        if array.dtype.kind != "O" and array.size and len(self._answers) < _MOST_ANSWERS:
            raw = array.tobytes()
            before, found, after = answer.rpartition(raw)
            other = ~np.frombuffer(raw, np.uint8)  # written with this in its place, all around must be the same
            outputs = {name: other.view(array.dtype).reshape(array.shape)}
            if found and self._encode(replace(prediction, outputs=outputs)) == before + other.tobytes() + after:
                self._answers[key] = (before, after)
        return answer


class KnownRequests:
    """Those that came lately, by the size of the whole message."""

    def __init__(self) -> None:
        self._by_size: dict[int, list[KnownRequest]] = {}

    def find(self, data: bytes) -> KnownRequest | None:
        """The one that `data` differs from in its tensor only."""
        for known in self._by_size.get(len(data), ()):
            if data.startswith(known.prefix):
                return known
        return None

    def add(self, data: bytes, raw: bytes, ref: ModelRef, decoded: Decoded, encode: Encode) -> None:
        """Keep what `data` was decoded to if all but `raw` at its end may come again; `encode` must not need `raw`.

        Its only tensor is `raw`: the elements as they are in the array.
        """
        prefix = data[: len(data) - len(raw)]
        if decoded.signature.inputs[0].dtype in (DataType.BYTES, DataType.BOOL):
            return
        if not raw or len(prefix) > _LONGEST_PREFIX_BYTES or not data.endswith(raw):
            return
        if len(self._by_size) >= _MOST_SIZES:
            self._by_size.clear()
        same_size = self._by_size.setdefault(len(data), [])
        del same_size[: len(same_size) - _MOST_OF_A_SIZE + 1]
        same_size.append(KnownRequest(prefix, ref, decoded, encode))
