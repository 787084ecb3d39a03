"""What the bytes of a JSON text tell without parsing it, in memory that does not grow with it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_QUOTE, _COMMA, _COLON = b'",:'
_STEPS = np.array([(code in b"[{") - (code in b"]}") for code in range(256)], np.int8)
"""What each byte adds to the depth."""
_PIECE_BYTES = 2**13


def is_deeper(text: bytes, max_depth: int) -> bool:
    """Whether brackets outside of strings nest deeper than `max_depth` anywhere."""
    depth = 0
    for codes in _outside_strings(text):
        depths = depth + _STEPS[codes].cumsum(dtype=np.int64)
        if depths.max(initial=0) > max_depth:
            return True
        depth = int(depths[-1]) if depths.size else depth
    return False


def fewest_elements(text: bytes) -> int:
    """How many elements the lists in `text` have at least.

    There is a comma less than elements in a nested list, and each further comma separates the
    members of an object, which have a colon each. (Rows that are objects thus count as nothing.)
    """
    count = 0
    for codes in _outside_strings(text):
        count += int(np.count_nonzero(codes == _COMMA)) - int(np.count_nonzero(codes == _COLON))
    return count


def _outside_strings(text: bytes) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of `text` that are in no string, piece by piece."""
    in_string = False
    start = 0
    while start < len(text):
        stop = start + _PIECE_BYTES
        piece = text[start:stop]
        if b"\\" in piece:
            stop += (len(piece) - len(piece.rstrip(b"\\"))) % 2  # an escape stays whole
            piece = _ESCAPE.sub(b"", text[start:stop])
        start = stop
        codes = np.frombuffer(piece, np.uint8)
        quoted = np.logical_xor.accumulate(codes == _QUOTE) ^ in_string
        in_string = bool(quoted[-1]) if quoted.size else in_string
        yield codes[~quoted]
