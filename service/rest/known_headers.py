"""``infer`` requests whose JSON came before, but for the numbers: a client sends the same with each tensor.

It is read and checked once: that took three times as long as all else that decoding such a request has to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.predictor import Decoded
from service.rest.json_codec import LONG_BYTES, flat_numbers
from service.rest.openinference_codec import Place, Wanted, read_infer
from service.shared_memory import OFF, SharedMemory
from service.tensors import Array, Signature, Tensors

_LONGEST_KNOWN_BYTES = 2**12
_MOST_KNOWN = 256
"""Headers that are remembered, and the longest of them."""
_DATA = b'"data"'
_BEFORE_NUMBERS = re.compile(rb'.*"data"[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _Header:
    """What the JSON of a binary request came to."""

    signature: Signature
    wanted: Wanted
    places: list[Place]
    body_bytes: int

    def fits(self, signatures: Mapping[str, Signature], body_bytes: int) -> bool:
        """Whether it would come to the same again, for a body of that size and such a model."""
        return signatures.get(self.signature.name) is self.signature and self.body_bytes == body_bytes

    def read(self, body: bytes) -> Tensors:
        """The inputs, without a copy."""
        return {
            place.name: np.frombuffer(body, place.dtype, place.count, place.start).reshape(place.shape)
            for place in self.places
        }


class _Frame(NamedTuple):
    """A JSON request without the numbers in it: what stands before and after the flat list of its only ``data``."""

    before: bytes
    after: bytes

    @classmethod
    def of(cls, body: bytes) -> tuple[_Frame, bytes] | None:
        """The frame, and the list; None where there is no such list, or what is around it is long."""
        at = body.find(_DATA)
        start = body.find(b"[", at) if at >= 0 else -1
        stop = body.find(b"]", start) + 1
        if start < 0 or not stop or start + len(body) - stop > _LONGEST_KNOWN_BYTES:
            return None
        return cls(body[:start], body[stop:]), body[start:stop]

    @property
    def is_plain(self) -> bool:
        """Whether the list can be nothing but the data of a tensor, if just one tensor has its data here."""
        return _BEFORE_NUMBERS.fullmatch(self.before) is not None and not (
            _DATA in self.after or b"\\" in self.before or b"\\" in self.after
        )


@dataclass(frozen=True, slots=True)
class _Framed:
    """What the frame of a JSON request came to: `shape` is that of the signature's only input."""

    signature: Signature
    wanted: Wanted
    shape: tuple[int, ...]

    def fits(self, signatures: Mapping[str, Signature]) -> bool:
        """Whether it would come to the same again, for such a model."""
        return signatures.get(self.signature.name) is self.signature

    def read(self, numbers: bytes) -> Array | None:
        """The input of a request in that frame; None where the list is not as its was."""
        return flat_numbers(numbers, self.signature.inputs[0], self.shape)


class KnownHeaders:
    """Decodes the ``infer`` bodies of one app, under its bounds."""

    def __init__(self, max_depth: int, memory: SharedMemory = OFF, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self._max_depth = max_depth
        self._memory = memory
        self._bounds = bounds
        self._by_text: dict[bytes, _Header] = {}
        self._by_frame: dict[_Frame, _Framed] = {}

    def __len__(self) -> int:
        return len(self._by_text) + len(self._by_frame)

    def decode(
        self, body: bytes, header_length: int | None, signatures: Mapping[str, Signature]
    ) -> tuple[Decoded, Wanted]:
        """An ``infer`` body as tensors, and what it wants; raises as `read_infer`."""
        if header_length is None:
            return self._decode_json(body, signatures)
        is_short = 0 < header_length <= min(len(body), _LONGEST_KNOWN_BYTES)
        text = body[:header_length] if is_short else b""
        header = self._by_text.get(text) if is_short else None
        if header is not None and header.fits(signatures, len(body)):
            wanted = header.wanted
            inputs = header.read(body)
            return Decoded(header.signature, inputs, timeout_s=wanted.timeout_s, priority=wanted.priority), wanted
        decoded, wanted, places = read_infer(
            body, header_length, signatures, self._max_depth, self._memory, self._bounds
        )
        if is_short:
            self._remember(text, _Header(decoded.signature, wanted, places, len(body)))
        return decoded, wanted

    def _decode_json(self, body: bytes, signatures: Mapping[str, Signature]) -> tuple[Decoded, Wanted]:
        is_short = len(body) <= LONG_BYTES and not self._bounds.may_exceed(len(body))
        frame, numbers = (_Frame.of(body) if is_short else None) or (None, b"")
        framed = self._by_frame.get(frame) if frame is not None else None
        if framed is not None and framed.fits(signatures) and (array := framed.read(numbers)) is not None:
            signature, wanted = framed.signature, framed.wanted
            inputs = {signature.inputs[0].name: array}
            return Decoded(signature, inputs, timeout_s=wanted.timeout_s, priority=wanted.priority), wanted
        decoded, wanted, _ = read_infer(body, None, signatures, self._max_depth, self._memory, self._bounds)
        if frame is not None and len(decoded.inputs) == 1 and not _has_own(wanted) and frame.is_plain:
            self._remember_frame(frame, numbers, decoded, wanted)
        return decoded, wanted

    def _remember_frame(self, frame: _Frame, numbers: bytes, decoded: Decoded, wanted: Wanted) -> None:
        """Keep a frame if its numbers alone come to what the whole request did."""
        (array,) = decoded.inputs.values()
        framed = _Framed(decoded.signature, wanted, array.shape)
        again = framed.read(numbers)
        if again is not None and np.array_equal(again, array, equal_nan=True):
            _keep(self._by_frame, frame, framed)

    def _remember(self, text: bytes, header: _Header) -> None:
        """Keep a header if nothing in it is the request's own: an id, a place in shared memory, strings, data."""
        if not _has_own(header.wanted) and len(header.places) == len(header.signature.inputs):
            _keep(self._by_text, text, header)


def _has_own(wanted: Wanted) -> bool:
    """Whether what a request wants is its own: an id, or a place in shared memory."""
    return wanted.id is not None or bool(wanted.extents)


def _keep(known: dict[K, V], key: K, value: V) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[key] = value
