"""What both dialects' codecs do with protobuf messages."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from service.errors import InvalidArgument
from service.rpc.wire import has_more_fields

_LONG_BYTES = 2**18
_MOST_FIELDS = 2**13
M = TypeVar("M", bound=Message)


def parse_tensors(kind: type[M], data: bytes) -> M:
    """As `parse`; a message with more fields than any request for tensors has is refused before it takes memory.

    Two bytes on the wire can be a tensor of eighty in memory. Short messages may have what they like.
    """
    if len(data) > _LONG_BYTES and has_more_fields(data, _MOST_FIELDS):
        raise InvalidArgument(
            f"the request has too many tensors: at most {_MOST_FIELDS} inputs, outputs and contents expected"
        )
    return parse(kind, data)


def parse(kind: type[M], data: bytes) -> M:
    """A message from its bytes; `InvalidArgument` where they are none, naming the public type."""
    try:
        return kind.FromString(data)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name.removeprefix("kiln.")
        raise InvalidArgument(f"the request cannot be parsed as {name}") from None
