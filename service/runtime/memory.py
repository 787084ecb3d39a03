"""How much memory there is and what models take of it: measured around a load, given back after."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from service.runtime.devices import load_tensorflow, memory_of

_CPU_SHARE = 0.8
_DEVICE_SHARE = 0.9
"""Of what there is, how much models may take where no setting says it."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_SMALL_BYTES = 2**20
_LARGE_BYTES = 32 * 2**20
"""glibc's own upper bound of its threshold."""


@dataclass(frozen=True)
class MemoryUse:
    """What a version takes of one memory: now that it is ready, and at the worst moment on the way there."""

    kept_bytes: int
    peak_bytes: int


class Meter:
    """What memory grows by from here on: the machine's, and that of each other device in `devices`.

    The machine's is told by this process as a whole, so that whatever else it begins meanwhile
    counts too, and what it had freed before but not given back, and takes again, does not: each
    replica on the CPU counts `least_bytes` at least.
    """

    def __init__(self, devices: Sequence[str], least_bytes: int = 0) -> None:
        release_memory()
        self._least_bytes = least_bytes * [memory_of(device) for device in devices].count("CPU")
        self._devices = sorted({memory_of(device) for device in devices} - {"CPU"})
        self._before = {device: _begin_on(device) for device in self._devices}
        with contextlib.suppress(OSError):  # without leave to do so, a peak before counts too
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS: man 5 proc
        self._resident, self._peak = resident_bytes()

    def read(self) -> dict[str, MemoryUse]:
        """Growth since then, by memory: ``CPU``, ``GPU:0``; what was needed for a while only is given back."""
        release_memory()
        resident, peak = resident_bytes()
        grown = _growth(self._resident, resident, peak if peak > self._peak else resident)
        least = self._least_bytes
        use = {"CPU": MemoryUse(max(grown.kept_bytes, least), max(grown.peak_bytes, least))}
        for device in self._devices:
            now = _memory_info(device)
            use[device] = _growth(self._before[device], now["current"], now["peak"])
        return use


def used_bytes(devices: Sequence[str]) -> dict[str, int]:
    """What is in use now, by memory: ``CPU`` (this process), ``GPU:0``; it costs requests nothing to ask."""
    others = {memory_of(device) for device in devices} - {"CPU"}
    return {"CPU": resident_bytes()[0], **{device: _memory_info(device)["current"] for device in sorted(others)}}


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process, and its peak; zeros on a system that does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
    resident, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return resident, peak


def stored_bytes(path: Path) -> int:
    """Size on disk of a SavedModel's graph, with its constants, and variables."""
    files = (path / "saved_model.pb", *(path / "variables").glob("variables.*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def limit_bytes(memory: str, configured: int | None) -> int:
    """What models may take of a memory: as configured, else most of what there is.

    ``CPU``: 80 % of the machine's memory, or of the container's where that is less; another
    device: 90 % of what it reports, for which TensorFlow is imported.
    """
    if configured is not None:
        return configured
    if memory == "CPU":
        return int(_CPU_SHARE * machine_bytes())
    session = load_tensorflow().compat.v1.Session(graph=load_tensorflow().Graph())
    with session:
        reported = {device.name: device.memory_limit_bytes for device in session.list_devices()}
    return int(_DEVICE_SHARE * next((size for name, size in reported.items() if name.endswith(memory)), 0))


def machine_bytes(root: Path = Path("/")) -> int:
    """Memory of the machine, or the limit of this process's control group where that is less."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    except OSError:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *_group_limits(root)])


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of the control groups, of both versions, that this process is in."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for group in (inner, *inner.parents):  # in a container the path may be that on its host
            with contextlib.suppress(OSError, ValueError):  # none here, or "max"
                yield int((base / group / name).read_text())


def release_memory() -> None:
    """Give freed memory back to the system, which glibc keeps otherwise."""
    _c_function("malloc_trim")(0)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Within, each block of a mebibyte or more is a mapping of its own, which goes when it is freed.

    Variables that live in glibc's arenas leave 25 to 75 MB of a model of 100 MB behind, at the top
    of an arena of some thread, where `release_memory` does not reach. For the short-lived tensors
    of a run a mapping each is slow.
    """
    set_option = _c_function("mallopt")
    set_option(_M_TRIM_THRESHOLD, 2 * _LARGE_BYTES)
    set_option(_M_MMAP_THRESHOLD, _SMALL_BYTES)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _LARGE_BYTES)


@cache
def _c_function(name: str) -> Any:
    """A function of the C library; one that does nothing where there is none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return lambda *_: 0


def _begin_on(device: str) -> int:
    """Bytes in use on `device`, from where its peak is counted."""
    load_tensorflow().config.experimental.reset_memory_stats(device)
    return _memory_info(device)["current"]


def _memory_info(device: str) -> dict[str, int]:
    info: dict[str, int] = load_tensorflow().config.experimental.get_memory_info(device)
    return info


def _growth(before: int, now: int, peak: int) -> MemoryUse:
    return MemoryUse(max(now - before, 0), max(peak - before, now - before, 0))
