"""What a version will need of memory, told before it is loaded: by an earlier load, else by its size on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from service.runtime.devices import memory_of
from service.runtime.memory import MemoryUse

_log = logging.getLogger("kiln.memory")
_MOST_ENTRIES = 1000
_BASE_BYTES = 16 * 2**20
"""Sessions, plans and buffers of a model of no size."""


@dataclass(frozen=True)
class Factors:
    """How many times its size on disk a model takes at the worst moment of its load and warm-up."""

    variables: float
    graph: float


ON_CPU = Factors(1.5, 16.0)
ON_CPU_WITH_OPENVINO = Factors(6.0, 18.0)
ON_DEVICE = Factors(2.0, 2.0)
BESIDE_DEVICE = Factors(1.5, 16.0)
"""Measured with 100 MB of dense weights, batches of up to 64 rows, and rounded up. As variables TensorFlow alone took
1.3 × them, with OpenVINO, which keeps a copy for each plan and converts through others, 5.9 ×; as constants of the
graph 15.9 × and 17.4 ×, for TensorFlow optimises copies of it. On another device, and beside it: a guess."""


@dataclass(frozen=True)
class Stored:
    """A SavedModel on disk: `key` tells its content, the rest its size."""

    key: str
    variables_bytes: int
    graph_bytes: int


class Estimator:
    """Tells what versions need, and learns from what they took; safe in several threads.

    What was measured is kept in `file`, by content, devices and plan, for the machine that the file
    is on.
    """

    def __init__(self, file: Path, *, plan: str, max_batch_rows: int) -> None:
        self._file = file
        self._plan = plan
        self._max_batch_rows = max_batch_rows
        self._lock = threading.Lock()

    def needs_bytes(self, path: Path, devices: Sequence[str]) -> dict[str, int]:
        """The most that the SavedModel at `path` takes while it is loaded and warmed up, by memory.

        With a replica on each of `devices`. Blocks: it reads the graph's file.

        Raises:
            OSError: the files cannot be read.
        """
        stored = stored_model(path)
        guess = self._guess(stored, devices)
        with self._lock:
            measured = self._read().get(self._key(stored, devices), {})
        least = stored.variables_bytes + stored.graph_bytes
        return {memory: max(measured[memory], least) if memory in measured else size for memory, size in guess.items()}

    def remember(self, path: Path, devices: Sequence[str], use: Mapping[str, MemoryUse]) -> None:
        """Keep what a load took, for the next time; of several loads the one that took most.

        A file that cannot be written is no fault: the next estimate is a guess again.
        """
        try:
            key = self._key(stored_model(path), devices)
            with self._lock:
                entries = self._read()
                before = entries.pop(key, {})
                peaks = {memory: max(u.peak_bytes, before.get(memory, 0)) for memory, u in use.items()}
                entries[key] = peaks
                self._write(dict(list(entries.items())[-_MOST_ENTRIES:]))
        except OSError as error:
            _log.warning("what %s took of memory is not remembered: %s", path.name, error)

    def _guess(self, stored: Stored, devices: Sequence[str]) -> dict[str, int]:
        needs: Counter[str] = Counter()
        for device in devices:
            memory = memory_of(device)
            if memory != "CPU":
                needs[memory] += _grown(stored, ON_DEVICE)
                needs["CPU"] += _grown(stored, BESIDE_DEVICE)
            else:
                needs[memory] += _grown(stored, ON_CPU if self._plan == "signature" else ON_CPU_WITH_OPENVINO)
        return dict(needs)

    def _key(self, stored: Stored, devices: Sequence[str]) -> str:
        where = ",".join(devices)
        return f"{stored.key} {where} plan={self._plan} rows={self._max_batch_rows} tensorflow={version('tensorflow')}"

    def _read(self) -> dict[str, dict[str, int]]:
        """What is remembered; nothing where the file is none of ours."""
        try:
            found = json.loads(self._file.read_text())
            return {
                key: {memory: int(size) for memory, size in peaks.items()}
                for key, peaks in found.items()
                if isinstance(peaks, dict)
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            _log.warning("%s is not read: %s", self._file, error)
            return {}

    def _write(self, entries: Mapping[str, Mapping[str, int]]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{self._file.name}-", dir=self._file.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(entries, file, indent=1)
            Path(name).replace(self._file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def stored_model(path: Path) -> Stored:
    """Sizes and content of the SavedModel at `path`.

    The content is that of the graph and of the index of its variables, which has a checksum of each.
    """
    graph = path / "saved_model.pb"
    content = hashlib.sha256(graph.read_bytes())
    variables_bytes = 0
    for file in sorted((path / "variables").glob("variables.*")):
        size = file.stat().st_size
        variables_bytes += size
        content.update(f"{file.name} {size}".encode())
        if file.suffix == ".index":
            content.update(file.read_bytes())
    return Stored(content.hexdigest(), variables_bytes, graph.stat().st_size)


def _grown(stored: Stored, factors: Factors) -> int:
    return int(_BASE_BYTES + factors.variables * stored.variables_bytes + factors.graph * stored.graph_bytes)
