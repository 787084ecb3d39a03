"""What planning found out about a model, and where that is kept from one start to the next.

A record holds for one content, machine, set of libraries and set of options, whose digest is the name of its folder;
what was compiled for it lies beside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from service.runtime.devices import accelerators
from service.runtime.parity import Difference
from service.tensors import Signature

_log = logging.getLogger("kiln.planner")
_FORMAT = 1
"""Raise it when records of before mean something else now."""
_FILE = "record.json"
_LIBRARIES = ("tensorflow", "openvino", "numpy")
SIGNATURE_PLAN = "signature"


@dataclass(frozen=True)
class Measured:
    """One plan at one number of rows; `compile_s` and `memory_bytes` are what preparing it took."""

    plan: str
    rows: int
    seconds: float
    cpu_s: float
    difference: Difference
    compile_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Chosen:
    """How batches of a bucket are run: by `plan`, `piece_rows` at a time; `seconds` is what that takes."""

    plan: str
    piece_rows: int
    seconds: float
    cpu_s: float = 0.0


@dataclass(frozen=True)
class SignatureRecord:
    """All that is known about one signature's plans.

    `chosen` is by bucket. `best_rows` is the bucket with the most rows a second; with `streams` over 1 so many
    batches run at once, by the plan `shared` where others run already, which gives `rows_per_s`. `ranges` are the
    integers ``[lowest, highest]`` of an input on which all plans were seen to agree; others are left to the
    signature plan. `left_out` has a reason for each plan that is not used at all or from some bucket on.
    `invariance` is the largest difference between rows alone and the same rows in any bucket. A signature that is the
    same function as another runs by the plans of that, its `twin`. `cold` is, by bucket, the fastest way that needs no
    TensorFlow, with which a process can start while that is still being imported; empty if there is none.
    """

    chosen: dict[int, Chosen]
    measured: tuple[Measured, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    best_rows: int = 0
    streams: int = 1
    shared: str = ""
    rows_per_s: float = 0.0
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    invariance: Difference = field(default_factory=Difference)
    note: str = ""
    twin: str = ""
    cold: dict[int, Chosen] = field(default_factory=dict)

    @property
    def names(self) -> dict[int, str]:
        """The plan of each bucket, ``openvino-1`` or, in pieces, ``openvino-1 (8 × 1)``."""
        return {rows: _name(rows, cell) for rows, cell in self.chosen.items()}

    @property
    def needed(self) -> set[tuple[str, int]]:
        """Plans and the numbers of rows that they are prepared for."""
        cells = {(cell.plan, cell.piece_rows) for cell in self.chosen.values()}
        return cells | ({(self.shared, rows) for rows in self.chosen} if self.streams > 1 else set())


@dataclass(frozen=True)
class ModelRecord:
    """What is known about a version: where it ran, its signatures, and the plans of each."""

    device: str
    signatures: dict[str, Signature]
    left_out: dict[str, str]
    plans: dict[str, SignatureRecord]


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
            return _ADAPTER.validate_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            _log.warning("%s is not read: %s", file, " ".join(str(error).split())[:300])
            return None

    def keep(self, key: str, record: ModelRecord, about: Mapping[str, Any]) -> None:
        """Write a record, with what it holds for; programs that it does not need go."""
        place = self.place(key)
        place.mkdir(parents=True, exist_ok=True)
        document = {**asdict(record), "about": dict(about)}
        handle, name = tempfile.mkstemp(dir=place)
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1, default=lambda value: value.value)
        Path(name).replace(place / _FILE)

    def drop(self, key: str) -> None:
        """Forget a record and its programs; those of a warm cache are only linked here, and stay."""
        place = self.place(key)
        if place.is_symlink():
            place.unlink(missing_ok=True)
        else:
            shutil.rmtree(place, ignore_errors=True)


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


def _name(rows: int, cell: Chosen) -> str:
    return cell.plan if cell.piece_rows == rows else f"{cell.plan} ({-(-rows // cell.piece_rows)} × {cell.piece_rows})"
