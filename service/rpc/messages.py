"""What both dialects' codecs do with protobuf messages."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from service.errors import InvalidArgument

M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes) -> M:
    """A message from its bytes; `InvalidArgument` where they are none, naming the public type."""
    try:
        return kind.FromString(data)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name.removeprefix("kiln.")
        raise InvalidArgument(f"the request cannot be parsed as {name}") from None
