"""A loaded model by each of its plans: what was chosen, what is kept, and what answers where a plan may not."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.batching.batcher import Batcher
from service.batching.queue import Limits
from service.batching.runner import ThreadRunner
from service.errors import Internal, InvalidArgument
from service.runtime import model as runtime_model
from service.runtime.base import PlanName
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.parity import disagreement
from service.runtime.plan_record import PlanCache, machine
from service.runtime.planning import PlanningOptions
from service.runtime.records import Chosen, SignatureRecord
from service.tensors import Tensors
from tests.fakes import FakeObserver
from tests.integration.planning_here import ask, lane_of, loaded, planning_here
from tests.integration.saved_models import save, save_cnn, save_default

__all__ = ["planning_here"]
ROOT = Path(__file__).parents[2]
BUCKETS = (1, 2, 4, 6)
FORCED: tuple[PlanName, ...] = ("frozen", "xla", "openvino")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of this module are."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("models")
    save_cnn(root / "cnn")
    table = tf.random.stateless_normal((100, 8), (1, 2))
    weights = tf.random.stateless_normal((8, 3), (3, 4))
    ids = {"ids": (tf.int32, (None, 4))}
    save_default(root / "embedding", lambda ids: {"y": tf.reduce_mean(tf.gather(table, ids), 1) @ weights}, **ids)
    rows = {"x": (tf.float32, (None, 3))}
    save_default(root / "random", lambda x: {"y": x + tf.random.normal(tf.shape(x))}, **rows)
    signatures: dict[str, Any] = {
        "serving_default": (lambda x: {"y": tf.nn.relu(x @ tf.ones((3, 3)))}, rows),
        "other": (lambda x: {"y": tf.nn.relu(x @ tf.ones((3, 3)) * 2.0)}, rows),
        "same": (lambda x: {"y": tf.nn.relu(x @ tf.ones((3, 3)))}, rows),
        "length": (lambda text: {"y": tf.strings.length(text)}, {"text": (tf.string, (None,))}),
        "scalar": (lambda x: {"y": x * 2.0}, {"x": (tf.float32, ())}),
    }
    save(root / "many", signatures)
    module = tf.Module()
    module.count = tf.Variable(0)
    count = tf.function(
        lambda x: {"count": module.count.assign_add(1) + tf.zeros_like(x)},
        input_signature=[tf.TensorSpec((None,), tf.int32, "x")],
    )
    tf.saved_model.save(module, str(root / "counter"), signatures=count)
    return root


def images(rows: int, seed: int = 0) -> Tensors:
    return {"image": np.random.default_rng(rows + seed).standard_normal((rows, 8, 8, 1), dtype=np.float32)}


def reference(model: LoadedModel, inputs: Tensors, name: str = "serving_default") -> Tensors:
    """What the signature plan answers."""
    return model._replicas[0].own_run(name)(inputs)


def test_before_it_is_planned_a_model_runs_on_tensorflow(root: Path, tmp_path: Path) -> None:
    """Batches are run as they come; what they take is estimated, and nothing bounds them."""
    with loaded(root / "cnn", tmp_path, PlanningOptions(6)) as model:
        assert (model.is_planned, model.needs_planning) == (False, True)
        record = model.plans["serving_default"]
        assert record.names == dict.fromkeys(BUCKETS, "signature")
        lane = lane_of(model.signatures["serving_default"], images(5))
        assert [model.bucket_rows(lane, rows) for rows in (1, 3, 5, 9)] == [1, 3, 5, 9]
        assert [model.expected_s(lane, rows) for rows in (1, 3, 6)] == [record.chosen[n].seconds for n in (1, 4, 6)]
        assert model.expected_s(lane, 7) == math.inf
        assert model.most_rows("serving_default") == 6
        assert len(ask(model, images(5))["output_0"]) == 5


@pytest.mark.usefixtures("planning_here")
def test_what_plans_take_is_added_to_the_models_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the process takes more once they are in use; never less than the model alone."""
    used = iter([1000, 1700, 1700, 900])
    with loaded(root / "cnn", tmp_path, PlanningOptions(6, "frozen")) as model:
        before = model.memory["CPU"].kept_bytes
        monkeypatch.setattr("service.runtime.model.used_bytes", lambda devices: {"CPU": next(used)})
        assert model.plan()
        assert model.memory["CPU"].kept_bytes == before + 700
        assert model.memory["CPU"].peak_bytes >= before + 700
        assert not model.plan()
        assert model.memory["CPU"].kept_bytes == before + 700


@pytest.mark.usefixtures("planning_here")
@pytest.mark.parametrize("plan", [*FORCED, "auto"])
def test_the_setting_decides_on_the_plans(root: Path, tmp_path: Path, plan: PlanName) -> None:
    """What is forced is used wherever it agrees; on every number of rows answers are those of the signature plan."""
    with loaded(root / "cnn", tmp_path, PlanningOptions(6, plan, budget_s=300)) as model:
        assert model.plan()
        assert (model.is_planned, model.needs_planning) == (True, False)
        record = model.plans["serving_default"]
        assert set(record.chosen) == set(BUCKETS)
        if plan != "auto":
            assert {cell.plan.split("-")[0] for cell in record.chosen.values()} == {plan}
        for rows in range(1, 9):
            assert disagreement(reference(model, images(rows)), ask(model, images(rows))) == ""
        assert model.plans["serve"].twin == "serving_default"
        assert disagreement(reference(model, images(3)), ask(model, images(3), "serve")) == ""
        lane = lane_of(model.signatures["serving_default"], images(1))
        assert model.expected_s(lane, 3) == record.chosen[4].seconds
        assert not model.plan()


@pytest.mark.parametrize("plan_dir", [None, "plans"])
def test_without_leave_nothing_is_planned(root: Path, tmp_path: Path, plan_dir: str | None) -> None:
    """With `plan: signature`, or without a place to keep plans in, there is no other plan."""
    planning = PlanningOptions(6, "signature" if plan_dir else "auto")
    with loaded(root / "cnn", tmp_path / plan_dir if plan_dir else None, planning) as model:
        assert not model.needs_planning
        assert not model.plan()
        assert set(model.plans["serving_default"].names.values()) == {"signature"}
    assert not (tmp_path / "plans").exists()


class Counted:
    """Plannings that were begun, in place of the child; each is done here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tests.integration.planning_here import Here

        self.begun = 0

        def planning(*arguments: Any) -> Here:
            self.begun += 1
            return Here(*arguments)

        monkeypatch.setattr(runtime_model, "Planning", planning)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def is_known(path: Path, plans: Path, planning: PlanningOptions, **options: Any) -> bool:
    """Whether a start finds the plans of such a model; its answers are right either way."""
    with loaded(path, plans, planning, **options) as model:
        right = disagreement(reference(model, images(3)), ask(model, images(3))) == ""
        assert right
        return model.is_planned


OPENVINO = PlanningOptions(2, "openvino", budget_s=300)


@pytest.fixture(scope="module")
def planned(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the convolutional model, and the folder with its plans by OpenVINO."""
    import shutil

    from tests.integration.planning_here import Here

    folder = tmp_path_factory.mktemp("planned")
    shutil.copytree(root / "cnn", folder / "cnn")
    with pytest.MonkeyPatch.context() as patch, loaded(folder / "cnn", folder / "plans", OPENVINO) as model:
        patch.setattr(runtime_model, "Planning", Here)
        assert model.plan()
    return folder / "cnn", folder / "plans"


@pytest.fixture
def copy(planned: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same to be changed: model and plans."""
    import shutil

    return Path(shutil.copytree(planned[0], tmp_path / "cnn")), Path(shutil.copytree(planned[1], tmp_path / "plans"))


def test_the_second_start_plans_nothing(planned: tuple[Path, Path], counted: Counted) -> None:
    """Plans and what was compiled for them are found again, and in use before the first request."""
    path, plans = planned
    for _ in range(2):
        with loaded(path, plans, OPENVINO) as model:
            assert model.is_planned
            names = {name for name, _ in model.plans["serving_default"].needed}
            assert all(name.startswith("openvino") for name in names)
            assert disagreement(reference(model, images(2)), ask(model, images(2))) == ""
    assert counted.begun == 0


def _machine(**changed: Any) -> Callable[[], dict[str, Any]]:
    real = machine()
    return lambda: {**real, **changed}


@pytest.mark.parametrize(
    "change",
    [
        "content",
        "machine",
        "library",
        pytest.param(replace(OPENVINO, tolerance=replace(OPENVINO.tolerance, relative=1e-3)), id="tolerance"),
        pytest.param(replace(OPENVINO, buckets=(1,)), id="buckets"),
        pytest.param(replace(OPENVINO, plan="auto"), id="plan"),
        pytest.param(replace(OPENVINO, max_batch_rows=3), id="rows"),
        pytest.param(replace(OPENVINO, deterministic=True), id="deterministic"),
    ],
)
def test_other_circumstances_have_other_plans(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, change: str | PlanningOptions
) -> None:
    """Another content, machine, library or option: what was measured does not hold any more."""
    path, plans = copy
    assert is_known(path, plans, OPENVINO)
    options = change if isinstance(change, PlanningOptions) else OPENVINO
    if change == "content":
        (path / "assets.extra").mkdir()
        (path / "assets.extra" / "notes.txt").write_text("another model")
    elif change == "machine":
        monkeypatch.setattr(runtime_model, "machine", _machine(cores=99))
    elif change == "library":
        libraries = {**machine()["libraries"], "openvino": "0.1"}
        monkeypatch.setattr(runtime_model, "machine", _machine(libraries=libraries))
    assert not is_known(path, plans, options)


def records(plans: Path) -> Path:
    (file,) = plans.glob("*/record.json")
    return file


def test_a_broken_record_is_found_out_again(copy: tuple[Path, Path], counted: Counted) -> None:
    """It costs a planning, and no request."""
    path, plans = copy
    records(plans).write_text('{"device": "CPU:0"')
    with loaded(path, plans, OPENVINO) as model:
        assert not model.is_planned
        assert model.plan()
        assert model.is_planned
    assert counted.begun == 1
    assert is_known(path, plans, OPENVINO)


def test_a_program_that_cannot_be_read_is_made_again(copy: tuple[Path, Path]) -> None:
    """The record holds; what was compiled is compiled once more."""
    path, plans = copy
    programs = list(plans.glob("*/serving_default/*"))
    assert programs
    for file in programs:
        file.write_bytes(b"junk")
    assert is_known(path, plans, OPENVINO)
    assert any(file.read_bytes() != b"junk" for file in plans.glob("*/serving_default/*"))


def edit(plans: Path, **changes: Any) -> None:
    """Change the record of the default signature."""
    file = records(plans)
    document = json.loads(file.read_text())
    for name in ("serving_default", "serve"):
        document["plans"][name].update(changes)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("plan", ["gone", "wrong", "failing"])
def test_a_plan_that_will_not_do_any_more_is_dropped_with_its_record(
    copy: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plan: str
) -> None:
    """One that is not there, or whose answers differ now, or fail: told, forgotten, and the signature plan serves."""
    from service.runtime.openvino import OpenVinoPlan

    path, plans = copy
    if plan == "gone":
        edit(plans, chosen={"2": {"plan": "of-old", "piece_rows": 2, "seconds": 0.1, "cpu_s": 0.1}})
    else:
        prepare = OpenVinoPlan.prepare

        def spoiled(self: OpenVinoPlan, rows: int) -> Any:
            run = prepare(self, rows)

            def wrong(inputs: Tensors) -> Tensors:
                if plan == "failing":
                    raise Internal("the model failed: no memory")
                return {name: array + 1 for name, array in run(inputs).items()}

            return wrong

        monkeypatch.setattr(OpenVinoPlan, "prepare", spoiled)
    caplog.set_level(logging.WARNING, "kiln.runtime")
    # loaded with TensorFlow, for a record that cannot start without it
    edit(plans, cold={})
    with loaded(path, plans, OPENVINO) as model:
        assert not model.is_planned
        assert model.needs_planning
        assert set(model.plans["serving_default"].names.values()) == {"signature"}
        assert disagreement(reference(model, images(2)), ask(model, images(2))) == ""
    reason = {"gone": "there is no plan 'of-old'", "wrong": "differs by up to 1", "failing": "no memory"}[plan]
    assert reason in caplog.text
    assert not list(plans.glob("*/record.json"))


@pytest.mark.usefixtures("planning_here")
@pytest.mark.parametrize("plan", FORCED)
def test_an_integer_out_of_range_is_refused_in_the_signatures_words(root: Path, tmp_path: Path, plan: PlanName) -> None:
    """A compiled plan would answer with some other row: such a batch is left to the plan that knows better."""
    with loaded(root / "embedding", tmp_path, PlanningOptions(2, plan, budget_s=300)) as model:
        assert model.plan()
        record = model.plans["serving_default"]
        assert {cell.plan.split("-")[0] for cell in record.chosen.values()} == {plan}, record.left_out
        assert record.ranges == {"ids": (0, 99)}
        for ids in ([[0, 1, 2, 99]], [[99, 99, 0, 0], [5, 6, 7, 8]]):
            inputs: Tensors = {"ids": np.array(ids, np.int32)}
            assert disagreement(reference(model, inputs), ask(model, inputs)) == ""
        for number in (100, -1, 2**31 - 1):
            wrong: Tensors = {"ids": np.array([[0, number, 2, 3]], np.int32)}
            with pytest.raises(InvalidArgument) as own:
                reference(model, wrong)
            with pytest.raises(InvalidArgument) as caught:
                ask(model, wrong)
            assert str(caught.value) == str(own.value)
            assert f"{number} is not in [0, 100)" in str(caught.value)


@pytest.mark.usefixtures("planning_here")
@pytest.mark.parametrize("plan", ["signature", "xla", "openvino", "auto"])
def test_deterministic_answers_are_bit_equal_in_any_company(root: Path, tmp_path: Path, plan: PlanName) -> None:
    """Alone, among others, at any place, and in a request larger than the bucket."""
    options = PlanningOptions(16, plan, buckets=(4,), budget_s=300, deterministic=True)
    with loaded(root / "cnn", tmp_path, options) as model:
        assert plan == "signature" or model.plan()
        assert set(model.plans["serving_default"].chosen) == {4}
        row = images(1)
        alone = ask(model, row)["output_0"]
        for rows in (2, 3, 4, 5, 9, 16):
            for place in {0, rows // 2, rows - 1}:
                company = images(rows, seed=place)
                company["image"][place] = row["image"][0]
                assert ask(model, company)["output_0"][place].tobytes() == alone[0].tobytes(), (rows, place)


def known(path: Path, plans: Path, planning: PlanningOptions, name: str, record: SignatureRecord) -> None:
    """Keep a made-up record of the signature `name` as if it had been measured; all others stay unplanned."""
    from service.runtime.records import ModelRecord

    model = LoadedModel(path, RuntimeOptions(planning, plan_dir=plans))
    signatures = model.signatures
    own = SignatureRecord({planning.max_batch_rows: Chosen("signature", planning.max_batch_rows, 0.1)})
    found = {each: record if each == name else own for each in signatures}
    PlanCache(plans).keep(model._key, ModelRecord("CPU:0", dict(signatures), {}, found), {})
    model.close()


@pytest.mark.parametrize("plan", ["openvino-1", "xla", "frozen"])
def test_large_requests_are_cut_into_the_pieces_that_are_fastest(root: Path, tmp_path: Path, plan: str) -> None:
    """A net that is fastest one row at a time: nothing is fused, and rows come back joined, in order."""
    options = PlanningOptions(6)
    chosen = {rows: Chosen(plan, 1, 0.001 * rows) for rows in (1, 6)}
    known(root / "cnn", tmp_path, options, "serving_default", SignatureRecord(chosen, best_rows=1))
    with loaded(root / "cnn", tmp_path, options) as model:
        assert model.is_planned
        assert model.plans["serving_default"].names == {1: plan, 6: f"{plan} (6 × 1)"}
        assert model.most_rows("serving_default") == 1
        for rows in (1, 2, 5, 6, 8):
            assert disagreement(reference(model, images(rows)), ask(model, images(rows))) == ""


@pytest.mark.parametrize(
    ("alone", "shared"), [("openvino", "openvino-2x1"), ("xla", "signature"), ("openvino-1", "xla")]
)
async def test_two_batches_run_at_once_where_that_is_best(root: Path, tmp_path: Path, alone: str, shared: str) -> None:
    """The first by the plan for one, the second by the one for several; answers are right whichever runs them."""
    options = PlanningOptions(4)
    record = SignatureRecord({4: Chosen(alone, 4, 0.01)}, best_rows=4, streams=2, shared=shared)
    known(root / "cnn", tmp_path, options, "serving_default", record)
    with loaded(root / "cnn", tmp_path, options) as model:
        if not model.is_planned:
            assert model.plan()
        assert model.parallel == 2
        ran: list[bool] = []
        table = model._replicas[0].tables["serving_default"]
        cell = table.cell

        def watched(rows: int, *, beside_others: bool) -> Any:
            ran.append(beside_others)
            return cell(rows, beside_others=beside_others)

        runner = ThreadRunner("test", asyncio.get_running_loop(), model.parallel)
        batcher = Batcher(model, Limits(4, 1000, 1 << 22), runner=runner, observer=FakeObserver())
        table.cell = watched  # type: ignore[method-assign]
        signature = model.signatures["serving_default"]
        asked = [images(rows, seed) for seed in range(40) for rows in (1, 3, 4)]
        answers = await asyncio.gather(*(batcher.submit(signature, inputs, None) for inputs in asked))
        for inputs, answer in zip(asked, answers, strict=True):
            assert disagreement(reference(model, inputs), answer) == ""
        assert await batcher.stop(30.0)
        assert True in ran


@pytest.mark.usefixtures("planning_here")
def test_every_signature_is_planned(root: Path, tmp_path: Path) -> None:
    """Each by itself, unless it is the same function as the default one; strings and scalars have fewer plans."""
    with loaded(root / "many", tmp_path, PlanningOptions(2, "xla", budget_s=300)) as model:
        assert model.plan()
        plans = model.plans
        assert {name: record.twin for name, record in plans.items() if record.twin} == {"same": "serving_default"}
        assert {name: {c.plan for c in plans[name].chosen.values()} for name in ("serving_default", "other")} == {
            "serving_default": {"xla"}, "other": {"xla"},
        }  # fmt: skip
        assert plans["length"].names == {1: "signature", 2: "signature"}
        assert plans["length"].left_out["xla"].startswith("not available: ")
        x: Tensors = {"x": np.array([[1, 2, 3]], np.float32)}
        assert ask(model, x, "other")["y"].tolist() == [[12, 12, 12]]
        assert ask(model, x, "same")["y"].tolist() == [[6, 6, 6]]
        assert ask(model, {"text": np.array([b"four"], object)}, "length")["y"].tolist() == [4]
        scalar = ask(model, {"x": np.array(3.0, np.float32)}, "scalar")["y"]
        assert isinstance(scalar, np.ndarray)
        assert (scalar.shape, scalar.tolist()) == ((), 6.0)
        assert plans["scalar"].names == {1: "xla"}


@pytest.mark.usefixtures("planning_here")
def test_other_shapes_go_to_the_signature_plan(root: Path, tmp_path: Path) -> None:
    """A lane that does not conform never reaches a compiled plan: TensorFlow answers or refuses."""
    with loaded(root / "many", tmp_path, PlanningOptions(2, "xla", budget_s=300)) as model:
        assert model.plan()
        wrong: Tensors = {"x": np.ones((1, 5), np.float32)}
        lane = lane_of(model.signatures["serving_default"], wrong)
        assert not lane.conforms
        assert (model.bucket_rows(lane, 3), model.expected_s(lane, 1)) == (3, math.inf)
        with pytest.raises(InvalidArgument):
            model.run(lane, wrong)


@pytest.mark.usefixtures("planning_here")
def test_a_model_with_random_operations_has_the_signature_plan_only(root: Path, tmp_path: Path) -> None:
    """Whatever is forced: no two answers are alike, so none can be compared."""
    with loaded(root / "random", tmp_path, PlanningOptions(2, "xla", budget_s=300)) as model:
        assert model.plan()
        record = model.plans["serving_default"]
        assert record.names == {1: "signature", 2: "signature"}
        assert record.note == "random or stateful operations"
        zeros: Tensors = {"x": np.zeros((1, 3), np.float32)}
        assert ask(model, zeros)["y"].tolist() != ask(model, zeros)["y"].tolist()


def test_a_stateful_model_is_never_run_but_for_its_callers(root: Path, tmp_path: Path) -> None:
    """Neither warmed up nor planned: its first caller gets the first count."""
    with loaded(root / "counter", tmp_path / "plans", PlanningOptions(2), stateful=True) as model:
        assert not model.needs_planning
        assert not model.plan()
        record = model.plans["serving_default"]
        assert (record.names, record.note) == ({1: "signature"}, "stateful")
        x: Tensors = {"x": np.zeros(2, np.int32)}
        assert [ask(model, x)["count"].tolist() for _ in range(2)] == [[1, 1], [2, 2]]
    assert not (tmp_path / "plans").exists()


@pytest.mark.usefixtures("planning_here")
def test_a_model_with_state_that_is_not_declared_keeps_its_own_plan(root: Path, tmp_path: Path) -> None:
    """What changes its variables is seen in the graph; planning runs a copy, not what serves."""
    with loaded(root / "counter", tmp_path, PlanningOptions(2, budget_s=300)) as model:
        x: Tensors = {"x": np.zeros(2, np.int32)}
        before = ask(model, x)["count"][0]
        assert model.plan()
        assert model.plans["serving_default"].note == "random or stateful operations"
        assert ask(model, x)["count"][0] == before + 1


async def test_nothing_fails_while_plans_are_swapped(root: Path, tmp_path: Path, counted: Counted) -> None:
    """Requests of all sizes through a real batcher while the model is planned, in use of each plan after the other."""
    with loaded(root / "cnn", tmp_path, PlanningOptions(6, budget_s=20)) as model:
        signature = model.signatures["serving_default"]
        runner = ThreadRunner("test", asyncio.get_running_loop(), model.parallel)
        batcher = Batcher(model, Limits(6, 1000, 1 << 22), runner=runner, observer=FakeObserver())
        asked = [images(rows) for rows in (1, 2, 3, 5, 6, 7)]
        right = [reference(model, inputs) for inputs in asked]
        is_over = asyncio.Event()
        count = 0

        async def ask_on(number: int) -> None:
            nonlocal count
            while not is_over.is_set():
                answer = await batcher.submit(signature, asked[number], None)
                assert disagreement(right[number], answer) == ""
                count += 1
                await asyncio.sleep(0)

        async def swap() -> None:
            try:
                assert await asyncio.to_thread(model.plan)
                batcher.refresh(model.parallel)
                planned = dict(model._replicas[0].tables)
                own = _own_tables(model)
                for _ in range(200):
                    for tables in (own, planned):
                        model._replicas[0].swap(tables)
                        batcher.refresh(model.parallel)
                        await asyncio.sleep(0)
            finally:
                is_over.set()

        await asyncio.gather(swap(), *(ask_on(number) for number in range(len(asked))))
        assert await batcher.stop(30.0)
        assert counted.begun == 1
        assert count > 200


def _own_tables(model: LoadedModel) -> dict[str, Any]:
    """Tables of plans that want other rows than those of the planner."""
    from service.runtime.candidates import Workshop
    from service.runtime.table import build_table

    replica = model._replicas[0]
    workshop = Workshop(model._path, replica.loaded, None)
    tables = {}
    for name, signature in model.signatures.items():
        record = SignatureRecord({rows: Chosen("xla", rows, 0.01) for rows in (2, 6)})
        build = partial(workshop.build, signature=signature)
        tables[name] = build_table(record, replica.own_run(name), build, "signature")
    return tables


def test_samples_of_the_warm_up_reach_the_planning(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are compared and measured on the rows that were seen."""
    given: list[Any] = []

    class Watched:
        def __init__(self, request: Any, samples: Any) -> None:
            given.append(samples)

        def run(self, tell: Any) -> None:
            return None

        def cancel(self) -> None: ...

    monkeypatch.setattr(runtime_model, "Planning", Watched)
    with loaded(root / "many", tmp_path, PlanningOptions(2)) as model:
        model._samples = {"length": {"text": np.array([b"\xff"], object)}}
        assert not model.plan()
    assert [{n: {k: a.tolist() for k, a in t.items()} for n, t in s.items()} for s in given] == [
        {"length": {"text": [b"\xff"]}}
    ]


def test_planning_that_was_cancelled_before_it_began_does_not_begin(root: Path, tmp_path: Path) -> None:
    """A version that goes just then has no child."""
    with loaded(root / "cnn", tmp_path, PlanningOptions(2)) as model:
        model.cancel_planning()
        assert not model.plan()
    assert not list(tmp_path.glob("*/record.json"))


def test_closing_gives_every_plan_back(root: Path, tmp_path: Path) -> None:
    """Nothing runs any more, by whatever plan; a program is not compiled for a model that is gone."""
    options = PlanningOptions(2)
    record = SignatureRecord({1: Chosen("xla", 1, 0.1), 2: Chosen("frozen", 2, 0.1)})
    known(root / "cnn", tmp_path, options, "serving_default", record)
    with loaded(root / "cnn", tmp_path, options) as model:
        cells = dict(model._replicas[0].tables["serving_default"].cells)
    for rows, cell in cells.items():
        with pytest.raises(Internal):
            cell.run(images(rows), rows)


COLD = """
import json, sys, time
from pathlib import Path
import numpy as np
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions
from tests.integration.planning_here import ask

path, plans, mode = sys.argv[1:]
options = PlanningOptions(2, mode, budget_s=300)
model = LoadedModel(Path(path), RuntimeOptions(options, plan_dir=Path(plans)))
model.warm_up()
x = np.random.default_rng(2).standard_normal((2, 8, 8, 1), dtype=np.float32)
answer = ask(model, {"image": x})["output_0"].tolist()
cold = "tensorflow" not in sys.modules
planned, needs = model.is_planned, model.needs_planning
changed = model.plan()
after = ask(model, {"image": x})["output_0"].tolist()
odd = "tensorflow" in sys.modules
print(json.dumps({"cold": cold, "planned": planned, "needs": needs, "changed": changed, "answer": answer,
    "after": after, "tensorflow": odd, "names": sorted({n for n, _ in model.plans["serving_default"].needed})}))
model.close()
"""


def started(path: Path, plans: Path, mode: str) -> dict[str, Any]:
    """What a process of its own sees that opens the model."""
    command = [sys.executable, "-c", COLD, str(path), str(plans), mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def test_a_planned_model_starts_without_tensorflow(root: Path, planned: tuple[Path, Path]) -> None:
    """Where all its plans can do without, it is not imported at all, and answers are right from the first."""
    seen = started(*planned, "openvino")
    assert (seen["cold"], seen["planned"], seen["needs"], seen["changed"]) == (True, True, False, False)
    assert not seen["tensorflow"]
    with loaded(root / "cnn", None, PlanningOptions(2)) as model:
        want = reference(model, images(2))["output_0"]
    np.testing.assert_allclose(seen["answer"], want, 1e-4, 1e-5)


def test_a_model_may_start_by_other_plans_than_it_runs_by(root: Path, tmp_path: Path) -> None:
    """TensorFlow's plans follow once that is loaded, behind; the first answers come from what needs none of it."""
    options = PlanningOptions(2, "auto", budget_s=300)
    cells = {rows: Chosen("xla", rows, 0.001) for rows in (1, 2)}
    cold = {rows: Chosen("openvino-1", rows, 0.01) for rows in (1, 2)}
    known(root / "cnn", tmp_path, options, "serving_default", SignatureRecord(cells, cold=cold, best_rows=2))
    file = records(tmp_path)
    document = json.loads(file.read_text())
    document["plans"]["serve"] = {**document["plans"]["serving_default"], "twin": "serving_default"}
    file.write_text(json.dumps(document))
    seen = started(root / "cnn", tmp_path, "auto")
    assert (seen["cold"], seen["planned"], seen["needs"], seen["changed"]) == (True, False, True, True)
    assert (seen["tensorflow"], seen["names"]) == (True, ["xla"])
    np.testing.assert_allclose(seen["answer"], seen["after"], 1e-4, 1e-5)
