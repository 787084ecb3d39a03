"""Files of records, each of one version of a model, bounded in size one by one and together."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

_MOST_RECORDS = 1000
"""Of one file: as many as a warm-up file may have."""
_MOST_OPEN = 16
_OF_PART = re.compile(r"requests-[^-]+-frontend(\d+)-")


class RecordFile(Protocol):
    """A file that records are appended to; each method raises `OSError`."""

    def write(self, record: bytes) -> int:
        """Append it, so that whoever reads the file sees it; returns by how many bytes the file has grown."""

    def close(self) -> None: ...


class LineFile:
    """A file of one record a line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)

    def write(self, record: bytes) -> int:
        line = memoryview(record + b"\n")
        left = line
        while left:  # a disk that is nearly full takes a part
            left = left[self._file.write(left) or 0 :]
        return len(line)

    def close(self) -> None:
        self._file.close()


@dataclass(slots=True)
class _Open:
    """A file being written."""

    path: Path
    file: RecordFile
    records: int = 0


@dataclass(frozen=True)
class FolderBounds:
    """`file_bytes` bounds one file, `total_bytes` all of the folder, where the oldest files make room."""

    file_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Part:
    """Which of `count` processes this is that share a folder, from 1 on; or the only one there is.

    Each writes, counts and deletes files of its own, and the first one also those of processes that are no more.
    """

    number: int = 0
    count: int = 0

    def has(self, name: str) -> bool:
        """Whether the file of that name is its own."""
        match = _OF_PART.match(name)
        writer = int(match[1]) if match else 0
        return (writer if 1 <= writer <= self.count else min(1, self.count)) == self.number


WHOLE = Part()


class RecordFolder:
    """``FOLDER/MODEL/VERSION/requests-TIME-NUMBER.SUFFIX``; for one thread."""

    def __init__(
        self,
        folder: Path,
        suffix: str,
        bounds: FolderBounds,
        open_file: Callable[[Path], RecordFile] = LineFile,
        part: Part = WHOLE,
    ) -> None:
        """What is in the folder from before counts, and makes room, too; `bounds` are those of the `part`.

        Raises:
            OSError: the folder cannot be made, or nothing can be written there.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} cannot be written to")
        self._folder = folder
        self._suffix = suffix
        self._bounds = bounds
        self._open_file = open_file
        self._numbers = count(1)
        self._open: dict[tuple[str, int], _Open] = {}
        self._writer = f"frontend{part.number}-{os.getpid()}" if part.number else str(os.getpid())
        self._sizes = _sizes(folder, part)

    def write(self, model: str, version: int, record: bytes) -> None:
        """Append a record to the file of that version, or begin another.

        Raises:
            OSError: it could not be written; the file is left as it was before. Or it is larger than a file may be.
        """
        if len(record) + 16 > self._bounds.file_bytes:  # what frames it takes so much at most
            raise OSError(f"a record of {len(record)} bytes is over the limit of a file, {self._bounds.file_bytes}")
        self._make_room(len(record) + 16)
        key = (model, version)
        now = self._open.get(key)
        if now is not None and (
            now.records >= _MOST_RECORDS or self._sizes[now.path] + len(record) + 16 > self._bounds.file_bytes
        ):
            self._close(key)
            now = None
        if now is None:
            now = self._begin(key)
        try:
            self._sizes[now.path] += now.file.write(record)
        except OSError:
            self._mend(key)
            raise
        now.records += 1

    def close(self) -> None:
        """Close all files."""
        for key in list(self._open):
            self._close(key)

    def _begin(self, key: tuple[str, int]) -> _Open:
        if len(self._open) >= _MOST_OPEN:
            self._close(next(iter(self._open)))
        model, version = key
        folder = self._folder / (quote(model, safe="") if model.strip(".") else f"_{model}") / str(version)
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = folder / f"requests-{stamp}-{self._writer}-{next(self._numbers)}.{self._suffix}"
        self._open[key] = begun = _Open(path, self._open_file(path))
        self._sizes[path] = 0
        return begun

    def _close(self, key: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            self._open.pop(key).file.close()

    def _mend(self, key: tuple[str, int]) -> None:
        """Close a file that failed, and cut off what was written of the record."""
        path = self._open[key].path
        self._close(key)
        size = self._sizes[path]
        with contextlib.suppress(OSError):
            if size:
                os.truncate(path, size)
            else:
                del self._sizes[path]
                path.unlink()

    def _make_room(self, size: int) -> None:
        """Delete the oldest files until a record of `size` bytes keeps to the bound of all."""
        total = sum(self._sizes.values())
        while self._sizes and total + size > self._bounds.total_bytes:
            path = next(iter(self._sizes))
            for key in [key for key, now in self._open.items() if now.path == path]:
                self._close(key)
            total -= self._sizes.pop(path)
            path.unlink(missing_ok=True)


def _sizes(folder: Path, part: Part) -> dict[Path, int]:
    """Sizes of the request files in `folder` that are of `part`, the oldest first."""
    found = []
    for path in filter(lambda path: part.has(path.name), folder.glob("*/*/requests-*")):
        with contextlib.suppress(OSError):  # it went meanwhile
            stat = path.stat()
            found.append((stat.st_mtime_ns, path, stat.st_size))
    return {path: size for _, path, size in sorted(found)}
