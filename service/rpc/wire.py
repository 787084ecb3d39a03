"""What the bytes of a protobuf message tell without parsing it.

Source: protobuf's encoding: a field is a varint of its number and kind, and then its value.
"""

from __future__ import annotations

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


def has_more_fields(data: bytes, most: int) -> bool:
    """Whether `data` has more than `most` fields, those within fields not counted; False where it is no message."""
    at = count = 0
    while at < len(data):
        if count >= most:
            return True
        count += 1
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
            at += size
        elif kind in (_FIXED_64, _FIXED_32):
            at += 8 if kind == _FIXED_64 else 4
        else:
            return False
    return False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next byte is; past the end there are zeros."""
    value = shift = 0
    while at < len(data) and data[at] > 0x7F and shift < 63:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
    last = data[at] if at < len(data) else 0
    return value | last << shift, at + 1
