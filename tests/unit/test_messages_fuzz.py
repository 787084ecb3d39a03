"""Messages whose structure is changed, not only their bytes: each is decoded, or refused as the caller's mistake."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import FailedPrecondition, InvalidArgument
from service.predictor import validate
from service.rest import openinference_codec as rest_v2
from service.tensors import DataType, Signature
from tests.signatures import many, only
from tests.unit.test_decoders_fuzz import DECODERS, VALID

Field = tuple[int, int, bytes]
"""Number, wire type, and the payload with its length if it has one."""
_VARINT, _FIXED64, _BYTES, _GROUP, _END_GROUP, _FIXED32 = range(6)
SIGNATURE = many(x=DataType.UINT8, y=DataType.BYTES)
MESSAGES = [(name, data) for name in ("grpc-tfs", "grpc-v2") for data in VALID[name]]


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def fields_of(data: bytes) -> list[Field] | None:
    """The fields of a message; None where the bytes are none."""
    fields, at = [], 0
    try:
        while at < len(data):
            tag, start = _read_varint(data, at)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                at = _read_varint(data, start)[1]
            elif kind == _BYTES:
                length, begin = _read_varint(data, start)
                at = begin + length
            elif kind in (_FIXED32, _FIXED64):
                at = start + (8 if kind == _FIXED64 else 4)
            else:
                return None
            if at > len(data) or not number:
                return None
            fields.append((number, kind, data[start:at]))
    except IndexError:
        return None
    return fields


def message_of(fields: list[Field]) -> bytes:
    return b"".join(_varint(number << 3 | kind) + payload for number, kind, payload in fields)


@st.composite
def restructured(draw: st.DrawFn, data: bytes) -> bytes:
    """A message with fields dropped, doubled, moved, of other numbers and wire types, cut off, at any depth."""
    fields = fields_of(data)
    if not fields:
        return data + draw(st.binary(max_size=4))
    place = draw(st.integers(0, len(fields) - 1))
    number, kind, payload = fields[place]
    change = draw(st.sampled_from(["inside", "drop", "double", "move", "number", "type", "length", "value", "cut"]))
    if change == "inside" and kind == _BYTES:
        length, begin = _read_varint(payload, 0)
        inner = draw(restructured(payload[begin : begin + length]))
        fields[place] = (number, kind, _varint(len(inner)) + inner)
    elif change == "drop":
        del fields[place]
    elif change == "double":
        fields[place:place] = [fields[place]] * draw(st.integers(1, 3))
    elif change == "move":
        fields.insert(draw(st.integers(0, len(fields) - 1)), fields.pop(place))
    elif change == "number":
        fields[place] = (draw(st.integers(1, 20) | st.just(2**29 - 1)), kind, payload)
    elif change == "type":
        fields[place] = (number, draw(st.integers(0, 7)), payload)
    elif change == "length":
        fields[place] = (number, kind, _varint(draw(st.sampled_from([0, 1, 127, 2**31, 2**63]))) + payload[1:])
    elif change == "value":
        value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]))
        fields[place] = (number, _VARINT, _varint(value))
    else:
        whole = message_of(fields)
        return whole[: draw(st.integers(0, len(whole)))]
    return message_of(fields)


def feed(name: str, data: bytes, signatures: Mapping[str, Signature]) -> None:
    """Decode; what is refused is the caller's mistake."""
    with contextlib.suppress(InvalidArgument, FailedPrecondition):
        decoded = DECODERS[name](data, signatures)
        assert all(isinstance(array, np.ndarray) for array in decoded.inputs.values())
        validate(decoded)


@pytest.mark.parametrize(("name", "message"), MESSAGES)
def test_messages_are_read_and_written_alike(name: str, message: bytes):
    """So what is changed below is what is meant to be."""
    fields = fields_of(message)
    assert fields
    assert message_of(fields) == message


@pytest.mark.parametrize(("name", "message"), MESSAGES)
@given(data=st.data())
def test_changed_structures(name: str, message: bytes, data: st.DataObject):
    """Fields that are missing, doubled, out of order, of the wrong type or of a wrong length, up to three of them."""
    for _ in range(data.draw(st.integers(1, 3))):
        message = data.draw(restructured(message))
    feed(name, message, only(SIGNATURE))


@pytest.mark.parametrize(("name", "message"), MESSAGES)
@given(data=st.data())
def test_flipped_bits(name: str, message: bytes, data: st.DataObject):
    """One to eight of them."""
    changed = bytearray(message)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(message) - 1), min_size=1, max_size=8)):
        changed[bit // 8] ^= 1 << bit % 8
    feed(name, bytes(changed), only(SIGNATURE))


SIZES = st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64, 1.5, "2", None, True, [2]])
STRINGS = st.lists(st.binary(max_size=3), max_size=4)


@given(
    header_bytes=st.none() | st.integers(-3, 3),
    sizes=st.tuples(SIZES, SIZES),
    shapes=st.tuples(st.lists(SIZES, max_size=2), st.lists(SIZES, max_size=2)),
    numbers=st.binary(max_size=4),
    strings=STRINGS,
    tail=st.binary(max_size=5),
)
def test_binary_headers(
    header_bytes: int | None, sizes: Any, shapes: Any, numbers: bytes, strings: list[bytes], tail: bytes
):
    """Header lengths that are off, sizes that do not add up, shapes that are none, strings that are cut."""
    entries = [
        {"name": name, "datatype": dtype, "shape": shape, "parameters": {"binary_data_size": size}}
        for name, dtype, shape, size in zip("xy", ("UINT8", "BYTES"), shapes, sizes, strict=True)
    ]
    text = json.dumps({"inputs": entries}).encode()
    packed = b"".join(len(item).to_bytes(4, "little") + item for item in strings)
    length = None if header_bytes is None else max(len(text) + header_bytes, 0)
    with contextlib.suppress(InvalidArgument):
        decoded, _ = rest_v2.decode_infer(text + numbers + packed + tail, length, only(SIGNATURE), 100)
        validate(decoded)


@given(numbers=st.binary(min_size=1, max_size=4), strings=STRINGS)
def test_whole_binary_requests_are_taken(numbers: bytes, strings: list[bytes]):
    """What the sizes above are when they do add up."""
    packed = b"".join(len(item).to_bytes(4, "little") + item for item in strings)
    entries = [
        {"name": name, "datatype": dtype, "shape": [count], "parameters": {"binary_data_size": size}}
        for name, dtype, count, size in (
            ("x", "UINT8", len(numbers), len(numbers)),
            ("y", "BYTES", len(strings), len(packed)),
        )
    ]
    text = json.dumps({"inputs": entries}).encode()
    decoded, _ = rest_v2.decode_infer(text + numbers + packed, len(text), only(SIGNATURE), 100)
    assert decoded.inputs["x"].tobytes() == numbers
    assert decoded.inputs["y"].tolist() == strings
