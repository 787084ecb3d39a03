"""gRPC's wire over HTTP/2, less HTTP/2: message prefixes, compression, timeouts and texts of statuses.

Source of all rules: ``PROTOCOL-HTTP2.md`` and ``compression.md`` of the gRPC project.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from urllib.parse import quote

from service.errors import Internal, InvalidArgument, KilnError, Unimplemented
from service.rpc.handlers import too_large

PREFIX_BYTES = 5
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_SECONDS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
ENCODINGS = b"identity,deflate,gzip"
_UNESCAPED = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def frame(message: bytes) -> bytes:
    """`message` behind its prefix: no compression, and how long it is."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def timeout_s(text: bytes | None) -> float | None:
    """Seconds from ``grpc-timeout``; None if the caller states none.

    Raises:
        InvalidArgument: it is not a number of up to eight digits and a unit.
    """
    if text is None:
        return None
    match = _TIMEOUT.fullmatch(text)
    if match is None:
        expected = "up to eight digits and one of H, M, S, m, u, n expected"
        raise InvalidArgument(f"header grpc-timeout: {expected}, got {text.decode('latin-1')!r}")
    return int(match[1]) * _SECONDS[match[2]]


def escape(text: str) -> bytes:
    """`text` as ``grpc-message`` carries it: percent-encoded UTF-8, but for printable ASCII."""
    return quote(text, safe=_UNESCAPED, errors="replace").encode("ascii")


class Deframer:
    """Cuts the bytes of a call's body into messages; feed it with what comes, in any pieces."""

    def __init__(self, encoding: bytes | None, limit_bytes: int) -> None:
        """`encoding` is the header ``grpc-encoding``; messages may have `limit_bytes`, inflated or not.

        Raises:
            Unimplemented: the encoding is unknown.
        """
        self._window_bits = _WINDOW_BITS.get(encoding or b"")
        if self._window_bits is None and encoding not in (None, b"", b"identity"):
            known = ENCODINGS.decode().replace(",", ", ")
            raise Unimplemented(f"header grpc-encoding: one of {known} expected, got {encoding.decode('latin-1')!r}")
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def messages(self) -> Iterator[bytes]:
        """Those that are complete by now.

        Raises:
            TooLarge: the next one is over the limit, known as soon as its prefix is there.
            InvalidArgument: it cannot be inflated.
            KilnError: INTERNAL, where it claims a compression that the call does not have.
        """
        while len(self._buffer) >= PREFIX_BYTES:
            size = int.from_bytes(self._buffer[1:PREFIX_BYTES], "big")
            if size > self._limit_bytes:
                raise too_large(size, self._limit_bytes)
            end = PREFIX_BYTES + size
            if len(self._buffer) < end:
                return
            flag, message = self._buffer[0], bytes(self._buffer[PREFIX_BYTES:end])
            del self._buffer[:end]
            yield self._inflate(message) if flag else message

    def finish(self) -> None:
        """The body has ended; `InvalidArgument` if it did in the midst of a message."""
        if self._buffer:
            raise InvalidArgument(f"the message is cut off: {len(self._buffer)} bytes of it came")

    def _inflate(self, message: bytes) -> bytes:
        if self._window_bits is None:
            raise _unexpected_compression()
        inflater = zlib.decompressobj(wbits=self._window_bits)
        try:
            plain = inflater.decompress(message, self._limit_bytes + 1)
        except zlib.error as error:
            raise InvalidArgument(f"the compressed message is broken: {error}") from None
        if len(plain) > self._limit_bytes:
            raise too_large(len(plain), self._limit_bytes)
        if not inflater.eof:
            raise InvalidArgument("the compressed message is cut off")
        return plain


def _unexpected_compression() -> KilnError:
    return Internal("a message is compressed, but header grpc-encoding names no compression")
