"""What a version is said to need of memory before it is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from service.registry.estimate import (
    BESIDE_DEVICE,
    ON_CPU,
    ON_CPU_WITH_OPENVINO,
    ON_DEVICE,
    Estimator,
    Factors,
    stored_model,
)
from service.runtime.memory import MemoryUse

MIB = 2**20
BASE = 16 * MIB
CPU = ("CPU:0",)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A SavedModel with a graph of 1 MiB, and variables of 10 MiB and their index."""
    path = tmp_path / "model"
    (path / "variables").mkdir(parents=True)
    (path / "saved_model.pb").write_bytes(b"g" * MIB)
    (path / "variables" / "variables.data-00000-of-00001").write_bytes(b"v" * (10 * MIB - 5))
    (path / "variables" / "variables.index").write_bytes(b"index")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where measurements are kept; its folder is not there yet."""
    return tmp_path / "cache" / "memory.json"


def estimator(file: Path, plan: str = "signature", rows: int = 8) -> Estimator:
    return Estimator(file, plan=plan, max_batch_rows=rows)


def guess(factors: Factors) -> int:
    return int(BASE + factors.variables * 10 * MIB + factors.graph * MIB)


def used(peak_mib: int, kept_mib: int = 0) -> dict[str, MemoryUse]:
    return {"CPU": MemoryUse(kept_mib * MIB, peak_mib * MIB)}


def test_the_size_is_that_of_graph_and_variables(model: Path):
    """Constants are in the graph's file, variables in files of their own; assets do not count."""
    (model / "assets").mkdir()
    (model / "assets" / "words.txt").write_text("x" * 1000)
    stored = stored_model(model)
    assert (stored.variables_bytes, stored.graph_bytes) == (10 * MIB, MIB)


def test_a_model_without_variables_is_its_graph(model: Path):
    """A frozen graph has no folder of variables."""
    for entry in (model / "variables").iterdir():
        entry.unlink()
    (model / "variables").rmdir()
    assert stored_model(model).variables_bytes == 0


@pytest.mark.parametrize("changed", ["saved_model.pb", "variables/variables.index", "variables/variables.data-x"])
def test_other_content_is_another_model(model: Path, changed: str):
    """The key tells graphs and variables apart, the latter by the checksums in their index and by their size."""
    before = stored_model(model).key
    assert stored_model(model).key == before
    (model / changed).write_bytes(b"other")
    assert stored_model(model).key != before


@pytest.mark.parametrize(
    ("plan", "devices", "needs"),
    [
        ("signature", CPU, {"CPU": guess(ON_CPU)}),
        ("auto", CPU, {"CPU": guess(ON_CPU_WITH_OPENVINO)}),
        ("signature", ("CPU:0", "CPU:1"), {"CPU": 2 * guess(ON_CPU)}),
        ("auto", ("GPU:0",), {"GPU:0": guess(ON_DEVICE), "CPU": guess(BESIDE_DEVICE)}),
        (
            "auto",
            ("GPU:0", "GPU:1"),
            {"GPU:0": guess(ON_DEVICE), "GPU:1": guess(ON_DEVICE), "CPU": 2 * guess(BESIDE_DEVICE)},
        ),
    ],
)
def test_a_model_never_loaded_here_is_guessed_by_its_size(
    model: Path, file: Path, plan: str, devices: tuple[str, ...], needs: Mapping[str, int]
):
    """Each replica needs a multiple of what is on disk, in the memory of its device and beside it."""
    assert estimator(file, plan).needs_bytes(model, devices) == needs


def test_what_was_measured_replaces_the_guess(model: Path, file: Path):
    """After a load the peak of that load is what the next one needs, also for a later process."""
    estimator(file).remember(model, CPU, used(peak_mib=20, kept_mib=15))
    assert estimator(file).needs_bytes(model, CPU) == {"CPU": 20 * MIB}


def test_the_largest_of_several_loads_counts(model: Path, file: Path):
    """A load that took freed memory again seems to have taken little: what it grew by before stays."""
    for peak in (15, 20, 12):
        estimator(file).remember(model, CPU, used(peak))
    assert estimator(file).needs_bytes(model, CPU) == {"CPU": 20 * MIB}


def test_a_model_needs_no_less_than_it_has_on_disk(model: Path, file: Path):
    """However little a process seemed to grow, graph and variables need their room."""
    estimator(file).remember(model, CPU, used(0))
    assert estimator(file).needs_bytes(model, CPU) == {"CPU": 11 * MIB}


def test_other_memories_are_still_guessed(model: Path, file: Path):
    """What was measured of one memory says nothing of another."""
    estimator(file).remember(model, ("GPU:0",), used(20))
    needs = estimator(file).needs_bytes(model, ("GPU:0",))
    assert needs == {"CPU": 20 * MIB, "GPU:0": guess(ON_DEVICE)}


@pytest.mark.parametrize(
    ("plan", "rows", "devices"), [("auto", 8, CPU), ("signature", 64, CPU), ("signature", 8, ("CPU:1",))]
)
def test_a_measurement_is_of_its_device_plan_and_rows(
    model: Path, file: Path, plan: str, rows: int, devices: tuple[str, ...]
):
    """Another device, plan or size of batches takes another amount, and is guessed."""
    estimator(file).remember(model, CPU, used(20))
    assert estimator(file, plan, rows).needs_bytes(model, devices) != {"CPU": 20 * MIB}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": {"CPU": "much"}}', "null"])
def test_a_file_that_is_none_of_ours_is_guessed_around(
    model: Path, file: Path, content: str, caplog: pytest.LogCaptureFixture
):
    """A damaged file is told of, and is written anew at the next load."""
    caplog.set_level(logging.WARNING, "kiln.memory")
    file.parent.mkdir()
    file.write_text(content)
    assert estimator(file).needs_bytes(model, CPU) == {"CPU": guess(ON_CPU)}
    assert "memory.json is not read: " in caplog.text
    estimator(file).remember(model, CPU, used(20))
    assert estimator(file).needs_bytes(model, CPU) == {"CPU": 20 * MIB}


def test_entries_that_are_not_sizes_are_passed_over(model: Path, file: Path):
    """What a later version may have added does no harm."""
    file.parent.mkdir()
    file.write_text('{"format": 2}')
    estimator(file).remember(model, CPU, used(20))
    assert estimator(file).needs_bytes(model, CPU) == {"CPU": 20 * MIB}


def test_the_file_is_bounded(model: Path, file: Path, monkeypatch: pytest.MonkeyPatch):
    """Of more entries than are kept the oldest go; one that was measured again is young."""
    monkeypatch.setattr("service.registry.estimate._MOST_ENTRIES", 2)
    for rows in (1, 2, 1, 3):
        estimator(file, rows=rows).remember(model, CPU, used(20))
    kept = [key.split("rows=")[1].split()[0] for key in json.loads(file.read_text())]
    assert kept == ["1", "3"]


@pytest.mark.parametrize("fault", ["the folder", "the replacement"])
def test_what_cannot_be_written_is_no_fault(
    model: Path, file: Path, fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A cache that cannot be written is told of, nothing is left behind, and the version is served all the same."""
    if fault == "the folder":
        file.parent.write_text("a file")
    else:
        file.mkdir(parents=True)
    estimator(file).remember(model, CPU, used(20))
    assert "what model took of memory is not remembered: " in caplog.text
    if fault == "the replacement":
        assert list(file.parent.iterdir()) == [file]


def test_a_model_that_is_gone_cannot_be_estimated(tmp_path: Path, file: Path):
    """Files that cannot be read are an error of the caller's."""
    with pytest.raises(OSError, match=r"saved_model\.pb"):
        estimator(file).needs_bytes(tmp_path / "gone", CPU)
