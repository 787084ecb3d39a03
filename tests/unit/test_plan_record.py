"""What is kept of plans from one start to the next, and for which model, machine, libraries and options."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.runtime import plan_record
from service.runtime.plan_record import PlanCache, content_digest, machine, record_key, usable_cores
from service.runtime.records import Chosen, Difference, Measured, ModelRecord, SignatureRecord
from service.tensors import DataType, Signature, TensorSpec

INF = float("inf")
SIGNATURE = Signature(
    "serving_default",
    (TensorSpec("x", DataType.BF16, (None, 3), "x:0", ("a", "b")), TensorSpec("s", DataType.BYTES, None)),
    (TensorSpec("y", DataType.INT64, (None,), "y:0"),),
    takes_other_shapes=True,
)
PLANS = SignatureRecord(
    {1: Chosen("xla", 1, 0.001, 0.002), 8: Chosen("openvino-1", 1, INF)},
    (Measured("xla", 1, 0.001, 0.002, Difference(1e-7, INF), 0.5, 100),),
    {"frozen": "refused"},
    best_rows=8,
    streams=2,
    shared="xla",
    rows_per_s=10.0,
    ranges={"x": (0, 9)},
    invariance=Difference(1e-9, 1e-8),
    note="?",
    cold={1: Chosen("openvino-1", 1, 0.01)},
)
RECORD = ModelRecord("CPU:0", {"serving_default": SIGNATURE}, {"other": "why"}, {"serving_default": PLANS})


@pytest.fixture
def plans(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


def test_a_record_is_read_as_it_was_written(plans: PlanCache) -> None:
    """Every field, numbers that are infinite too; what it holds for lies beside it."""
    assert plans.find("key") is None
    plans.keep("key", RECORD, {"cores": 2})
    assert plans.find("key") == RECORD
    assert plans.find("other") is None
    document = json.loads((plans.place("key") / "record.json").read_text())
    assert document["about"] == {"cores": 2}
    assert [file.name for file in plans.place("key").iterdir()] == ["record.json"]


def test_a_record_is_replaced_and_forgotten(plans: PlanCache) -> None:
    """The last one counts; with a record its programs go."""
    plans.keep("key", RECORD, {})
    newer = replace(RECORD, device="GPU:0")
    plans.keep("key", newer, {})
    assert plans.find("key") == newer
    (plans.place("key") / "program").write_bytes(b"x")
    plans.drop("key")
    plans.drop("key")
    assert not plans.place("key").exists()


def test_what_nobody_uses_goes_in_the_end(plans: PlanCache) -> None:
    """A record that was not asked for in three months goes when another is written; to be asked for keeps it."""
    long_ago = time.time() - 100 * 24 * 3600
    for key in ("used", "unused"):
        plans.keep(key, RECORD, {})
    for key in ("used", "unused"):
        os.utime(plans.place(key) / "record.json", (long_ago, long_ago))
    assert plans.find("used") == RECORD
    plans.keep("new", RECORD, {})
    assert sorted(place.name for place in plans.folder.iterdir()) == ["new", "used"]


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def damage(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        damaged(lambda d: d.pop("plans")),
        damaged(lambda d: d["plans"].clear()),
        damaged(lambda d: d["signatures"].clear()),
        damaged(lambda d: d["plans"]["serving_default"].update(chosen={})),
        damaged(lambda d: d["plans"]["serving_default"].update(twin="gone")),
        damaged(lambda d: d["plans"]["serving_default"].update(twin="serving_default")),
        damaged(lambda d: d["plans"]["serving_default"]["chosen"]["8"].update(piece_rows=0)),
        damaged(lambda d: d["plans"]["serving_default"]["cold"]["1"].update(piece_rows=-1)),
        damaged(lambda d: d["plans"]["serving_default"].update(best_rows="many")),
        damaged(lambda d: d["signatures"]["serving_default"]["inputs"][0].update(dtype="FP31")),
    ],
)
def test_a_record_that_is_broken_is_as_if_it_were_not_there(
    plans: PlanCache, caplog: pytest.LogCaptureFixture, damage: Callable[[str], str]
) -> None:
    """Cut off, of another form, or without plans for a signature: told, and found out again."""
    caplog.set_level(logging.WARNING, "kiln.planner")
    plans.keep("key", RECORD, {})
    file = plans.place("key") / "record.json"
    file.write_text(damage(file.read_text()))
    assert plans.find("key") is None
    (message,) = caplog.messages
    assert message.startswith(f"{file} is not read: ")
    assert "\n" not in message


def test_a_folder_in_the_place_of_a_record_is_told(plans: PlanCache, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be read does not keep the model from being served."""
    (plans.place("key") / "record.json").mkdir(parents=True)
    assert plans.find("key") is None
    assert "is not read" in caplog.text


def test_a_twins_plans_are_those_of_the_other(plans: PlanCache) -> None:
    """A signature that is the same function as another one has its record, and says so."""
    twin = replace(
        RECORD, signatures={"a": SIGNATURE, "b": SIGNATURE}, plans={"a": PLANS, "b": replace(PLANS, twin="a")}
    )
    plans.keep("key", twin, {})
    assert plans.find("key") == twin


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files as a SavedModel has them."""
    path = tmp_path / "model"
    (path / "variables").mkdir(parents=True)
    (path / "saved_model.pb").write_bytes(b"graph")
    (path / "variables" / "variables.index").write_bytes(b"index")
    (path / "variables" / "variables.data-00000-of-00001").write_bytes(b"data")
    return path


@pytest.mark.parametrize("file", ["saved_model.pb", "variables/variables.index", "assets.extra/warm_up"])
def test_other_content_has_other_plans(model: Path, file: str) -> None:
    """Graph, variables' checksums, and whatever else lies there: one byte is enough. Nothing else is."""
    before = record_key(model, {"a": 1})
    assert record_key(model, {"a": 1}) == before
    target = model / file
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(b"other")
    assert record_key(model, {"a": 1}) != before


def test_variables_are_known_by_their_index(model: Path) -> None:
    """Which has a checksum of each; of the data only the size is looked at."""
    data = model / "variables" / "variables.data-00000-of-00001"
    before = content_digest(model)
    data.write_bytes(b"atad")
    assert content_digest(model) == before
    data.write_bytes(b"longer")
    assert content_digest(model) != before


@pytest.mark.parametrize(
    "about", [{"cores": 4}, {"libraries": {"openvino": "2"}}, {"options": {"rtol": 1e-3}}, {"device": "GPU:0"}]
)
def test_another_machine_library_or_option_has_other_plans(model: Path, about: dict[str, Any]) -> None:
    """A measurement holds for the machine, libraries and options that it was made with."""
    base = {"cores": 2, "libraries": {"openvino": "1"}, "options": {"rtol": 1e-4}, "device": "CPU:0"}
    assert record_key(model, base) == record_key(model, dict(reversed(base.items())))
    assert record_key(model, {**base, **about}) != record_key(model, base)


def test_a_record_of_another_form_is_not_found(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a newer Kiln writes in another way has another key."""
    before = record_key(model, {})
    monkeypatch.setattr(plan_record, "_FORMAT", -1)
    assert record_key(model, {}) != before


def test_the_machine_is_its_processor_cores_and_libraries() -> None:
    """All that a measurement depends on, in a form that JSON has."""
    told = json.loads(json.dumps(machine()))
    assert told["cores"] == usable_cores() >= 1
    assert set(told["libraries"]) == {"python", "tensorflow", "openvino", "ai-edge-litert", "numpy"}
    assert told["machine"]


def test_a_library_that_is_not_installed_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is installed, plans are found out again."""
    before = plan_record._libraries()
    plan_record._libraries.cache_clear()
    monkeypatch.setattr(plan_record, "_LIBRARIES", ("numpy", "kiln-does-not-exist"))
    try:
        assert plan_record._libraries() == {
            "python": before["python"], "numpy": before["numpy"], "kiln-does-not-exist": "none",
        }  # fmt: skip
    finally:
        plan_record._libraries.cache_clear()


class Files:
    """`Path` with the text of some files."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts

    def __call__(self, name: str) -> Files:
        return Files({"": self.texts[name]} if name in self.texts else {})

    def read_text(self) -> str:
        if not self.texts:
            raise FileNotFoundError
        return self.texts[""]


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), (None, 8)]
)
def test_a_containers_quota_counts_as_cores(monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: int) -> None:
    """Of eight cores as many may be used as the control group allows, one at least."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(plan_record, "Path", Files({"/sys/fs/cgroup/cpu.max": quota} if quota else {}))
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor : 0\nmodel name : A 1\nflags : x y\n\nprocessor : 1\nmodel name : B",
            {"model name": "A 1", "flags": "x y"},
        ),
        (None, {"processor": "arm"}),
    ],
)
def test_the_processor_is_known_by_its_name_and_flags(
    monkeypatch: pytest.MonkeyPatch, text: str | None, expected: dict[str, str]
) -> None:
    """As Linux tells them; elsewhere as Python does."""
    monkeypatch.setattr(plan_record, "Path", Files({"/proc/cpuinfo": text} if text else {}))
    monkeypatch.setattr("platform.processor", lambda: "arm")
    plan_record._processor.cache_clear()
    try:
        found = plan_record._processor()
    finally:
        plan_record._processor.cache_clear()
    assert {name: value for name, value in found.items() if name not in ("machine", "system")} == expected
