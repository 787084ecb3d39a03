"""Where what planning found out is kept from one start to the next.

A record holds for one content, machine, set of libraries and set of options, whose digest is the name of its folder;
what was compiled for it lies beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from service.runtime.devices import accelerators
from service.runtime.records import ModelRecord

_log = logging.getLogger("kiln.planner")
_FORMAT = 2
"""Raise it when records of before mean something else now."""
_FILE = "record.json"
_UNUSED_S = 90 * 24 * 3600.0
"""A record that no start has asked for in so long is dropped."""
_LIBRARIES = ("tensorflow", "openvino", "ai-edge-litert", "numpy")


_ADAPTER = TypeAdapter(ModelRecord)


class PlanCache:
    """Records in a folder, and the programs that were compiled for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, key: str) -> Path:
        """Where the record of `key` lies, with its programs."""
        return self.folder / key

    def find(self, key: str) -> ModelRecord | None:
        """The record of `key`; None if there is none that can be read."""
        file = self.place(key) / _FILE
        try:
            record = _ADAPTER.validate_json(file.read_bytes())
            with contextlib.suppress(OSError):  # a cache that is only read is not tidied either
                os.utime(file)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            _log.warning("%s is not read: %s", file, " ".join(str(error).split())[:300])
            return None
        if not _is_whole(record):
            _log.warning("%s is not read: it does not have plans for each signature", file)
            return None
        return record

    def keep(self, key: str, record: ModelRecord, about: Mapping[str, Any]) -> None:
        """Write a record, with what it holds for; those that nobody has used for long go."""
        self._tidy()
        place = self.place(key)
        place.mkdir(parents=True, exist_ok=True)
        document = {**asdict(record), "about": dict(about)}
        handle, name = tempfile.mkstemp(dir=place)
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1, default=lambda value: value.value)
        Path(name).replace(place / _FILE)

    def _tidy(self) -> None:
        for file in self.folder.glob(f"*/{_FILE}"):
            with contextlib.suppress(OSError):  # another process tidies too
                if not file.parent.is_symlink() and time.time() - file.stat().st_mtime > _UNUSED_S:
                    self.drop(file.parent.name)

    def drop(self, key: str) -> None:
        """Forget a record and its programs; those of a warm cache are only linked here, and stay."""
        place = self.place(key)
        if place.is_symlink():
            place.unlink(missing_ok=True)
        else:
            shutil.rmtree(place, ignore_errors=True)


def _is_whole(record: ModelRecord) -> bool:
    """Whether each signature has plans, its own or those of a twin that has."""
    own = {name for name, plans in record.plans.items() if not plans.twin}
    cells = (cell for plans in record.plans.values() for cell in (*plans.chosen.values(), *plans.cold.values()))
    return (
        record.plans.keys() == record.signatures.keys()
        and all(plans.chosen and (not plans.twin or plans.twin in own) for plans in record.plans.values())
        and all(cell.piece_rows > 0 for cell in cells)
    )


def record_key(path: Path, about: Mapping[str, Any]) -> str:
    """A digest of the SavedModel at `path` and of `about`: the machine, its libraries, the options."""
    text = json.dumps([_FORMAT, content_digest(path), about], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def content_digest(path: Path) -> str:
    """Of a SavedModel's files; of its variables by their index, which has a checksum of each."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = file.relative_to(path).as_posix()
        digest.update(f"{name} {file.stat().st_size} ".encode())
        if not name.startswith("variables/variables.data"):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What a measurement depends on: the processor, how much of it there is, other devices, libraries."""
    return {**_processor(), "cores": usable_cores(), "accelerators": accelerators(), "libraries": _libraries()}


def usable_cores() -> int:
    """Cores that this process may use, less where its control group has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


@cache
def _processor() -> dict[str, str]:
    found = {"machine": platform.machine(), "system": platform.system()}
    try:
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "flags", "Features"):
                found[name.strip()] = value.strip()
    except OSError:
        found["processor"] = platform.processor()
    return found


@cache
def _libraries() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
