"""How much memory there is, and what is measured around a load; with TensorFlow played by a stand-in."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.runtime import memory
from service.runtime.memory import (
    MemoryUse,
    Meter,
    large_blocks_apart,
    limit_bytes,
    machine_bytes,
    release_memory,
    resident_bytes,
    stored_bytes,
    used_bytes,
)

GIB = 2**30
UNLIMITED = 2**63 - 4096


def write(root: Path, files: dict[str, str]) -> Path:
    """A system's files: 8 GiB of memory, and `files`."""
    for name, text in {"proc/meminfo": f"MemFree: 1 kB\nMemTotal: {8 * 2**20} kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": f"{3 * GIB}\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n"}, 2),
        ({"proc/self/cgroup": "0::/on/the/host\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{64 * GIB}\n"}, 8),
        ({"proc/self/cgroup": "9:cpu:/\n4:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{GIB}"}, 1),
        ({"proc/self/cgroup": "4:memory:/a\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{UNLIMITED}"}, 8),
        ({"proc/self/cgroup": "9:cpu:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}"}, 8),
    ],
)
def test_the_machine_or_its_control_group_is_the_limit(tmp_path: Path, files: dict[str, str], expected: int):
    """The smallest limit of the groups of either version that this process is in, or all there is."""
    assert machine_bytes(write(tmp_path, files)) == expected * GIB


def test_a_system_without_proc_tells_its_pages(tmp_path: Path):
    """Where there is no /proc the C library is asked, which tells as much or, in some containers, more."""
    assert machine_bytes(tmp_path) >= machine_bytes()


def test_a_budget_that_is_set_is_taken_as_it_is():
    """What is configured counts, whatever the machine has."""
    assert limit_bytes("CPU", 5) == limit_bytes("GPU:0", 5) == 5


def test_most_of_the_machine_is_for_models(monkeypatch: pytest.MonkeyPatch):
    """Without a setting models on the CPU may take 80 % of what there is."""
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1000)
    assert limit_bytes("CPU", None) == 800


class FakeTensorFlow:
    """A machine with a GPU of 1000 bytes, of which `current` are in use and `peak` were."""

    def __init__(self) -> None:
        self.current = self.peak = 0
        self.config = SimpleNamespace(experimental=self)
        self.compat = SimpleNamespace(v1=self)

    def Graph(self) -> None: ...  # noqa: N802

    def Session(self, graph: Any) -> FakeTensorFlow:  # noqa: N802
        return self

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

    def list_devices(self) -> list[Any]:
        sizes = {"CPU:0": 1, "GPU:0": 1000, "GPU:1": 2000}
        return [SimpleNamespace(name=f"/job:x/device:{n}", memory_limit_bytes=s) for n, s in sizes.items()]

    def reset_memory_stats(self, device: str) -> None:
        assert device == "GPU:0"
        self.peak = self.current

    def get_memory_info(self, device: str) -> dict[str, int]:
        assert device == "GPU:0"
        return {"current": self.current, "peak": self.peak}


@pytest.fixture
def tensorflow(monkeypatch: pytest.MonkeyPatch) -> FakeTensorFlow:
    fake = FakeTensorFlow()
    monkeypatch.setattr(memory, "load_tensorflow", lambda: fake)
    return fake


@pytest.mark.parametrize(("device", "expected"), [("GPU:0", 900), ("GPU:1", 1800), ("GPU:2", 0)])
def test_most_of_what_a_device_reports_is_for_models(tensorflow: FakeTensorFlow, device: str, expected: int):
    """Without a setting models may take 90 % of a GPU's memory."""
    assert limit_bytes(device, None) == expected


def test_a_gpu_tells_what_grew_on_it(tensorflow: FakeTensorFlow):
    """Of a device with memory of its own the growth and its peak are asked of TensorFlow, from the start anew."""
    tensorflow.current, tensorflow.peak = 100, 5000
    meter = Meter(["GPU:0", "GPU:0"])
    tensorflow.current, tensorflow.peak = 300, 700
    assert meter.read()["GPU:0"] == MemoryUse(kept_bytes=200, peak_bytes=600)


def test_what_is_in_use_is_told_by_memory(tensorflow: FakeTensorFlow, monkeypatch: pytest.MonkeyPatch):
    """The process's for all CPUs together, and each GPU's own."""
    monkeypatch.setattr("service.runtime.memory.resident_bytes", lambda: (70, 90))
    tensorflow.current = 300
    assert used_bytes(["CPU:0", "CPU:1", "GPU:0"]) == {"CPU": 70, "GPU:0": 300}


@pytest.mark.parametrize(
    ("before", "after", "use"),
    [
        ((100, 100), (150, 180), MemoryUse(50, 80)),
        ((100, 500), (150, 500), MemoryUse(50, 50)),
        ((100, 500), (150, 600), MemoryUse(50, 500)),
        ((100, 100), (80, 100), MemoryUse(0, 0)),
        ((0, 0), (0, 0), MemoryUse(0, 0)),
    ],
    ids=["peak", "an older peak that could not be reset", "a higher peak", "freed", "unknown"],
)
def test_the_process_tells_what_grew(
    monkeypatch: pytest.MonkeyPatch, before: tuple[int, int], after: tuple[int, int], use: MemoryUse
):
    """The machine's memory is told by resident memory and its peak; an older peak is not taken for this one's."""
    readings = iter((before, after))
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(readings))
    assert Meter(["CPU:0", "CPU:1"]).read() == {"CPU": use}


@pytest.mark.parametrize(
    ("devices", "use"),
    [
        (["CPU:0"], MemoryUse(30, 50)),
        (["CPU:0", "CPU:1"], MemoryUse(60, 60)),
        (["GPU:0"], MemoryUse(10, 50)),
    ],
)
def test_a_replica_counts_its_size_on_disk_at_least(
    monkeypatch: pytest.MonkeyPatch, tensorflow: FakeTensorFlow, devices: list[str], use: MemoryUse
):
    """A process that takes freed memory again seems to grow by little; on another device that says nothing."""
    readings = iter(((100, 100), (110, 150)))
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(readings))
    assert Meter(devices, least_bytes=30).read()["CPU"] == use


def test_the_size_on_disk_is_that_of_graph_and_variables(tmp_path: Path):
    """Assets do not count, and a model may have no variables."""
    (tmp_path / "saved_model.pb").write_bytes(b"1" * 10)
    assert stored_bytes(tmp_path) == 10
    write(tmp_path, {"variables/variables.index": "22", "assets/words.txt": "333"})
    assert stored_bytes(tmp_path) == 12


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no leave to reset the peak here")
def test_a_block_that_is_taken_and_given_back_shows_as_peak():
    """The real readings: memory that is gone again is in the peak alone, though the process had a higher one before."""
    size = 64 * 2**20
    bytearray(4 * size)
    meter = Meter(["CPU:0"])
    block = bytearray(size)
    del block
    (use,) = meter.read().values()
    assert use.peak_bytes - use.kept_bytes > 0.8 * size
    assert use.kept_bytes < 0.2 * size


def test_a_system_that_does_not_tell_is_read_as_zero(monkeypatch: pytest.MonkeyPatch):
    """Without /proc nothing is measured, and nothing fails."""

    def refuse(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    assert resident_bytes()[1] >= resident_bytes()[0] > 2**20
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert resident_bytes() == (0, 0)
    assert Meter(["CPU:0"]).read() == {"CPU": MemoryUse(0, 0)}


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """Where the C library has no such functions, nothing is done."""
    assert memory._c_function("no_such_function")(1, 2) == 0
    calls: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr(memory, "_c_function", lambda name: lambda *args: calls.append((name, args)))
    with large_blocks_apart():
        calls.append(("load", ()))
    release_memory()
    mib = 2**20
    assert calls == [
        ("mallopt", (-1, 64 * mib)),
        ("mallopt", (-3, mib)),
        ("load", ()),
        ("mallopt", (-3, 32 * mib)),
        ("malloc_trim", (0,)),
    ]
