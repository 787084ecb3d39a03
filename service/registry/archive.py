"""Archives of models, ``.zip`` and ``.tar.gz``: unpacked whole, or refused with the member that is at fault."""

from __future__ import annotations

import gzip
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from service.errors import ModelLoadError

SUFFIXES = (".zip", ".tar.gz", ".tgz")
_CHUNK_BYTES = 2**20
_MAX_HEADER_BYTES = 2**20
"""A tar header may state its own length; it is read into memory whole."""
_HEADER_BYTES_PER_MEMBER = 4096


@dataclass(frozen=True)
class UnpackLimits:
    """What an archive may come to: bytes of all its files together, and number of its members."""

    max_bytes: int = 64 * 2**30
    max_members: int = 100_000


class _Member(NamedTuple):
    """`content` is None for a folder; `fault` says what a member is that may not be."""

    name: str
    content: IO[bytes] | None
    fault: str = ""


def archive_stem(name: str) -> str | None:
    """The file's name without its ending, ``cat`` of ``cat.tar.gz``; None if it is no archive's."""
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    return None if suffix is None else name[: -len(suffix)]


def unpack(archive: Path, target: Path, limits: UnpackLimits) -> None:
    """Unpack into the new folder `target`; what is left of it after an error is of no use.

    Only plain files and folders come out, all with the rights of new files.

    Raises:
        ModelLoadError: the archive is damaged, over a limit, or has a member that is a link or
            device, or that leads out of it; the text names the member.
    """
    members = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    target.mkdir()
    room_bytes = limits.max_bytes
    try:
        for number, member in enumerate(members(archive, limits), start=1):
            if number > limits.max_members:
                raise _refusal(f"it has more than {limits.max_members} members")
            place = target.joinpath(*_parts(member.name))
            if member.fault:
                raise _refusal(f"its member {member.name!r} is {member.fault}")
            if member.content is None:
                place.mkdir(parents=True, exist_ok=True)
                continue
            room_bytes -= _write(place, member.content, room_bytes)
            if room_bytes < 0:
                raise _refusal(f"with its member {member.name!r} it unpacks to more than {limits.max_bytes} bytes")
    except ModelLoadError:
        raise
    except Exception as error:  # whatever a file that is made to do harm provokes
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelLoadError(f"the archive cannot be unpacked: {type(error).__name__}: {text}") from error


def _refusal(why: str) -> ModelLoadError:
    return ModelLoadError(f"the archive is refused: {why}")


def _parts(name: str) -> list[str]:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or "\\" in name or ".." in parts:
        raise _refusal(f"its member {name!r} leads out of it")
    return parts


def _write(place: Path, content: IO[bytes], max_bytes: int) -> int:
    """Write a new file, but little more than `max_bytes`; returns the bytes written."""
    place.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with place.open("xb") as file:
        while written <= max_bytes and (chunk := content.read(_CHUNK_BYTES)):
            written += file.write(chunk)
    return written


def _zip_members(path: Path, limits: UnpackLimits) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        stated_bytes = sum(member.file_size for member in archive.infolist())
        if stated_bytes > limits.max_bytes:
            raise _refusal(f"it unpacks to {stated_bytes} bytes, at most {limits.max_bytes} expected")
        for member in archive.infolist():
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                yield _Member(member.filename, None, "a link" if stat.S_ISLNK(mode) else "a device")
            elif member.is_dir():
                yield _Member(member.filename, None)
            else:
                with archive.open(member) as content:
                    yield _Member(member.filename, content)


def _tar_members(path: Path, limits: UnpackLimits) -> Iterator[_Member]:
    with gzip.open(path) as stream:
        bounded: Any = _Bounded(
            cast(IO[bytes], stream), limits.max_bytes + limits.max_members * _HEADER_BYTES_PER_MEMBER
        )
        with tarfile.open(fileobj=bounded, mode="r:") as archive:
            for member in archive:
                if member.isdir():
                    yield _Member(member.name, None)
                elif member.isreg() and not member.issparse():
                    yield _Member(member.name, archive.extractfile(member))
                else:
                    kind = "a link" if member.issym() or member.islnk() else "a device"
                    yield _Member(member.name, None, "a sparse file" if member.issparse() else kind)
        while bounded.read(_CHUNK_BYTES):  # the checksum is at the very end
            pass


class _Bounded:
    """What `tarfile` reads: no further than `max_bytes`, and never much at once, whatever a header says."""

    def __init__(self, stream: IO[bytes], max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER_BYTES:
            raise _refusal(f"it has a header of {size} bytes")
        self._check(self._stream.tell() + size)
        return self._stream.read(size)

    def seek(self, position: int) -> int:
        self._check(position)
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()

    def _check(self, position: int) -> None:
        if position > self._max_bytes + _CHUNK_BYTES:
            raise _refusal(f"it unpacks to more than {self._max_bytes} bytes")
