"""Tensors in shared memory objects of this machine: Triton's system shared memory extension, without its wire.

Source: Triton's ``extension_shared_memory``. All of it is called from the event loop's thread alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    KilnError,
    NotFound,
    TooLarge,
    Unimplemented,
)

DIRECTORY = Path("/dev/shm")  # noqa: S108 - where Linux has its POSIX shared memory objects
MAX_REGIONS = 256
"""Each holds a file descriptor, of which a process commonly has 1024."""
_LONGEST_NAME = 255
_KEY = re.compile(r"/?([^/\0]+)")
_REGION, _BYTE_SIZE, _OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
_PARAMETERS = frozenset((_REGION, _BYTE_SIZE, _OFFSET))


class Region:
    """A part of a shared memory object under a name; the object is let go with the last reference to this.

    It is read and written as a file and never mapped: its owner may cut it short at any time, and then
    touching a mapping would end this process with SIGBUS, where reading a file gives fewer bytes.
    """

    def __init__(self, name: str, key: str, offset: int, byte_size: int, descriptor: int) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def object_bytes(self) -> int:
        """How long the object is now."""
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, byte_size: int) -> bytes:
        """A copy of `byte_size` bytes at `offset` of the region.

        Raises:
            FailedPrecondition: the object has become too short, or cannot be read.
        """
        self._check_size(offset + byte_size)  # before memory is set aside for bytes that are not there
        parts, at, left = [], self.offset + offset, byte_size
        while left:  # one read gives at most 2 GiB
            part = self._try(os.pread, self._descriptor, left, at)
            if not part:
                raise self._cut_short()
            parts.append(part)
            at += len(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Put `data` at `offset` of the region.

        An object cut short between the check and the write grows again by what is written: its owner
        finds it longer than it left it, and nothing else is touched.

        Raises:
            FailedPrecondition: the object has become too short, or cannot be written.
        """
        self._check_size(offset + len(data))
        view, at = memoryview(data), self.offset + offset
        while view:
            written = self._try(os.pwrite, self._descriptor, view, at)
            view = view[written:]
            at += written

    def _check_size(self, end: int) -> None:
        if self.object_bytes < self.offset + end:
            raise self._cut_short()

    def _cut_short(self) -> FailedPrecondition:
        return FailedPrecondition(
            f"shared memory region {self.name!r} ends at byte {self.offset + self.byte_size} of {self.key!r}, "
            f"which has been cut to {self.object_bytes} bytes since it was registered"
        )

    def _try(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            raise FailedPrecondition(
                f"shared memory region {self.name!r}: {self.key!r} cannot be used: {error.strerror}"
            ) from None


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one tensor lies in a region; `tensor` is how texts call it.

    It holds the region, so that a request that has begun ends well if the region is unregistered meanwhile.
    """

    tensor: str
    region: Region
    offset: int
    byte_size: int

    def read(self) -> bytes:
        """A copy of the tensor's bytes.

        A view would cost less, but the client may write to the region while the batch runs: what
        was validated must be what is run, and a batch of several callers must not change under way.
        """
        return self.region.read(self.offset, self.byte_size)

    def write(self, data: bytes) -> dict[str, str | int]:
        """Put an output's bytes there; returns the parameters by which the answer tells where they are.

        Raises:
            InvalidArgument: `data` is larger than the request said.
            FailedPrecondition: as `Region.write`.
        """
        if len(data) > self.byte_size:
            raise InvalidArgument(
                f"{self.tensor}: {_BYTE_SIZE} of at least {len(data)} expected, which the result has, "
                f"got {self.byte_size}"
            )
        self.region.write(self.offset, data)
        return {_REGION: self.region.name, _BYTE_SIZE: len(data), _OFFSET: self.offset}


class SharedMemory:
    """The regions that clients have registered; refuses everything unless `enabled`.

    `max_tensor_bytes` bounds what one input makes the server copy: a sparse object can be said to be
    larger than the machine's memory.
    """

    def __init__(self, *, enabled: bool, max_tensor_bytes: int = 0, directory: Path = DIRECTORY) -> None:
        if enabled and not directory.is_dir():
            raise FailedPrecondition(f"setting shared_memory: this machine has no {directory}")
        self._enabled = enabled
        self._max_tensor_bytes = max_tensor_bytes
        self._directory = directory
        self._regions: dict[str, Region] = {}

    @property
    def extensions(self) -> tuple[str, ...]:
        """What the server's metadata has for this."""
        return ("system_shared_memory",) if self._enabled else ()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Give bytes `offset` to `offset + byte_size` of the object `key` the name `name`.

        Raises:
            InvalidArgument: a name, key or size is wrong, or there is no such object.
            AlreadyExists: the name is taken.
            FailedPrecondition: shared memory is off, or there are `MAX_REGIONS` regions.
        """
        self._check_enabled()
        if not 0 < len(name) <= _LONGEST_NAME:
            raise InvalidArgument(f"a region's name has 1 to {_LONGEST_NAME} characters, got {len(name)}")
        if name in self._regions:
            raise AlreadyExists(f"shared memory region {name!r} is registered already")
        if len(self._regions) >= MAX_REGIONS:
            raise FailedPrecondition(f"there are {MAX_REGIONS} shared memory regions already: unregister some")
        if offset < 0 or byte_size < 1:
            raise InvalidArgument(
                f"region {name!r}: offset from 0 and byte_size from 1 expected, got {offset} and {byte_size}"
            )
        descriptor, object_bytes = _open(self._directory, key)
        if offset + byte_size > object_bytes:
            os.close(descriptor)
            raise InvalidArgument(
                f"region {name!r}: offset and byte_size of at most {object_bytes} bytes in all expected, "
                f"which {key!r} has, got {offset} and {byte_size}"
            )
        self._regions[name] = Region(name, key, offset, byte_size, descriptor)

    def unregister(self, name: str = "") -> None:
        """Let the region `name` go, or all for no name; one that is not there is no error (as with Triton)."""
        self._check_enabled()
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str = "") -> list[Region]:
        """All regions, or the one asked for; `NotFound` if there is none of that name."""
        self._check_enabled()
        return [self._region(name)] if name else list(self._regions.values())

    def extent(self, parameters: Mapping[str, Any], tensor: str) -> Extent | None:
        """Where `parameters` say that a tensor lies; None if they say nothing of shared memory.

        Raises:
            InvalidArgument: a parameter is wrong or missing, or goes past the region's end.
            NotFound: no such region.
            TooLarge: over `max_tensor_bytes`.
            FailedPrecondition: shared memory is off.
        """
        if _PARAMETERS.isdisjoint(parameters):
            return None
        self._check_enabled()
        name = parameters.get(_REGION)
        if not isinstance(name, str):
            raise InvalidArgument(f"{tensor}: parameter {_REGION}: the name of a region expected, got {name!r}")
        byte_size = _whole(parameters.get(_BYTE_SIZE), f"{tensor}: parameter {_BYTE_SIZE}")
        offset = _whole(parameters.get(_OFFSET, 0), f"{tensor}: parameter {_OFFSET}")
        region = self._region(name)
        if offset + byte_size > region.byte_size:
            raise InvalidArgument(
                f"{tensor}: {byte_size} bytes at {offset} go past the end of shared memory region {name!r} "
                f"of {region.byte_size} bytes"
            )
        if byte_size > self._max_tensor_bytes:
            raise TooLarge(
                f"{tensor}: parameter {_BYTE_SIZE}: {byte_size} is over the limit of {self._max_tensor_bytes}"
            )
        return Extent(tensor, region, offset, byte_size)

    def _region(self, name: str) -> Region:
        try:
            return self._regions[name]
        except KeyError:
            raise NotFound(f"there is no shared memory region {name!r}; {_known(self._regions)}") from None

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise FailedPrecondition(
                "shared memory is off: whoever asks could read and write this machine's shared memory "
                "objects; the setting shared_memory turns it on"
            )


OFF = SharedMemory(enabled=False)
"""For front ends that are given none."""


def cuda_unsupported() -> KilnError:
    """What registering CUDA shared memory is answered with."""
    return Unimplemented("CUDA shared memory: memory of a GPU cannot be shared with Kiln; system shared memory can")


def cuda_unknown(name: str) -> KilnError:
    """What the status of one CUDA region is answered with: there never is any."""
    return NotFound(f"there is no CUDA shared memory region {name!r}")


def _open(directory: Path, key: str) -> tuple[int, int]:
    """A descriptor of the object that POSIX calls `key`, to read and write, and its size; never a new one.

    Raises:
        InvalidArgument: `key` is no plain name, or there is no such object that this process may use.
    """
    match = _KEY.fullmatch(key)
    if match is None or match[1] in (".", "..") or len(os.fsencode(match[1])) > _LONGEST_NAME:
        raise InvalidArgument(
            f"key: a name of up to {_LONGEST_NAME} bytes after one slash expected, such as '/input', got {key[:300]!r}"
        )
    # O_NOFOLLOW: a link could lead out of the directory; O_NONBLOCK: a pipe must not hold up the server
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(directory / match[1], flags)
    except OSError as error:
        raise InvalidArgument(f"key {key!r}: the shared memory object cannot be opened: {error.strerror}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise InvalidArgument(f"key {key!r} is no shared memory object")
    return descriptor, found.st_size


def _whole(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidArgument(f"{what}: a number of bytes expected, got {value!r}")
    return value


def _known(names: Iterable[str]) -> str:
    return "there are " + (", ".join(sorted(names)) or "none")
