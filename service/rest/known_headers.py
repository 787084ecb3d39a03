"""Binary ``infer`` requests whose JSON came before: a client sends the same header with each tensor.

It is read and checked once: that took three times as long as all else that decoding such a request has to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.predictor import Decoded
from service.rest.openinference_codec import Place, Wanted, read_infer
from service.shared_memory import OFF, SharedMemory
from service.tensors import Signature, Tensors

_LONGEST_KNOWN_BYTES = 2**12
_MOST_KNOWN = 256
"""Headers that are remembered, and the longest of them."""


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


class KnownHeaders:
    """Decodes the ``infer`` bodies of one app, under its bounds."""

    def __init__(self, max_depth: int, memory: SharedMemory = OFF, bounds: Bounds = DEFAULT_BOUNDS) -> None:
        self._max_depth = max_depth
        self._memory = memory
        self._bounds = bounds
        self._by_text: dict[bytes, _Header] = {}

    def __len__(self) -> int:
        return len(self._by_text)

    def decode(
        self, body: bytes, header_length: int | None, signatures: Mapping[str, Signature]
    ) -> tuple[Decoded, Wanted]:
        """An ``infer`` body as tensors, and what it wants; raises as `read_infer`."""
        is_short = header_length is not None and 0 < header_length <= min(len(body), _LONGEST_KNOWN_BYTES)
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

    def _remember(self, text: bytes, header: _Header) -> None:
        """Keep a header if nothing in it is the request's own: an id, a place in shared memory, strings, data."""
        wanted = header.wanted
        if wanted.id is not None or wanted.extents or len(header.places) != len(header.signature.inputs):
            return
        if len(self._by_text) >= _MOST_KNOWN:
            self._by_text.clear()
        self._by_text[text] = header
