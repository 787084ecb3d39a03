"""Counting the fields of a message by its bytes, and refusing those with too many."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidArgument
from service.rpc import messages
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc._generated.kiln.tensorflow import example_pb2
from service.rpc.messages import parse_tensors
from service.rpc.wire import has_more_fields


def test_fields_within_fields_do_not_count():
    """Only those of the message itself do, of whatever length."""
    request = pb.ModelInferRequest(model_name="m" * 1000, id="1", raw_input_contents=[bytes(300), b""])
    request.inputs.add(name="x", datatype="FP32", shape=range(1000))
    data = request.SerializeToString()
    assert has_more_fields(data, 4)
    assert not has_more_fields(data, 5)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (b"\x08\x96\x01\x09" + bytes(8) + b"\x0d" + bytes(4) + b"\x12\x00", 4),
        (b"\xfa\x3f\x01a\x08\x00", 2),
        (b"\x0b\x0b\x0b", 1),
        (b"\x08\x00\x0a", 2),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 1),
        (b"", 0),
    ],
)
def test_each_kind_of_field_is_passed_over(data: bytes, count: int):
    """Varints, 8 bytes, 4 bytes, lengths; groups, which proto3 has not, end it, as the end of the data does."""
    assert not has_more_fields(data, count)
    assert not count or has_more_fields(data, count - 1)


@given(data=st.binary(max_size=200), most=st.integers(0, 20))
def test_any_bytes_have_an_answer(data: bytes, most: int):
    """Whether they are a message or not; no more fields than bytes."""
    assert not (has_more_fields(data, most) and len(data) <= most)


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_counts_as_protobuf_does(items: list[bytes]):
    """A list of bytes has a field for each."""
    data = example_pb2.BytesList(value=items).SerializeToString()
    assert not has_more_fields(data, len(items))
    assert not items or has_more_fields(data, len(items) - 1)


@pytest.mark.parametrize("field", ["inputs", "outputs", "raw_input_contents"])
def test_a_message_of_empty_tensors_is_refused(field: str):
    """Before there is an object for each; a short one is left to the decoder."""
    item: Any = b"" if field == "raw_input_contents" else {}
    fields: dict[str, Any] = {field: [item] * (messages._LONG_BYTES // 2 + 1)}
    data = pb.ModelInferRequest(**fields).SerializeToString()
    with pytest.raises(InvalidArgument, match="too many tensors"):
        parse_tensors(pb.ModelInferRequest, data)
    assert len(getattr(parse_tensors(pb.ModelInferRequest, data[:20_000]), field)) == 10_000
