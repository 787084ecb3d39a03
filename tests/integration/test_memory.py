"""Memory with real TensorFlow: given back at unload, measured at load."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from service.registry.estimate import Estimator, stored_model
from service.runtime import savedmodel
from service.runtime.memory import limit_bytes, machine_bytes
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions
from service.runtime.savedmodel import SavedModel
from tests.integration.saved_models import save_cnn, save_default

ROOT = Path(__file__).parents[2]


def test_thirty_unloads_leave_what_one_left() -> None:
    """A model of 100 MB loaded and unloaded 30 times: resident memory ends within 10 % of where one round left it.

    Without oneDNN, which on some processors keeps the matrices of the last model until others take their place.
    """
    command = [sys.executable, "-m", "load_tests.memory", "--rounds", "30", "--plan", "signature"]
    env = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"}
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110, check=False)
    assert child.returncode == 0, child.stderr
    rows = [[int(n) for n in re.findall(r"\d+", line)] for line in child.stdout.splitlines()[2:]]
    assert [number for number, _, _ in rows] == list(range(1, 31))
    assert all(loaded > unloaded + 80 for _, loaded, unloaded in rows)
    assert rows[-1][2] <= 1.1 * rows[0][2], child.stdout


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "cnn"
    save_cnn(path)
    return path


@pytest.mark.parametrize("dismantled", [True, False], ids=["dismantled", "collected"])
def test_a_graph_goes_although_the_collector_was_told_to_leave_it(
    cnn: Path, monkeypatch: pytest.MonkeyPatch, dismantled: bool
) -> None:
    """A server freezes what is loaded; at unload its graph is freed all the same, with any TensorFlow."""
    from tensorflow.python.framework import ops

    if not dismantled:
        monkeypatch.delattr(ops, "dismantle_graph")
    model = SavedModel(cnn)
    graph = weakref.ref(model._session.graph)
    gc.freeze()
    try:
        model.close()
        assert graph() is None
    finally:
        gc.unfreeze()


def test_closing_twice_is_closing_once(cnn: Path) -> None:
    """A model that failed to load may be closed by more than one."""
    model = SavedModel(cnn)
    model.close()
    model.close()


def test_a_load_is_measured_and_remembered(tmp_path: Path) -> None:
    """After its warm-up a model tells what it took; the next estimate of the same content is that."""
    import tensorflow as tf

    weights = tf.random.stateless_normal((1600, 1600), (1, 2))
    path = save_default(tmp_path / "model", lambda x: {"y": x @ weights}, x=(tf.float32, (None, 1600)))
    stored = stored_model(path)
    assert stored.graph_bytes > 10_000_000
    model = LoadedModel(path, RuntimeOptions(PlanningOptions(2)))
    assert model.memory == {}
    model.warm_up()
    (memory, use), *others = model.memory.items()
    assert (memory, others) == ("CPU", [])
    assert use.peak_bytes >= use.kept_bytes >= stored.graph_bytes
    estimator = Estimator(tmp_path / "memory.json", plan="signature", max_batch_rows=2)
    assert estimator.needs_bytes(path, model.devices)["CPU"] > stored.graph_bytes
    estimator.remember(path, model.devices, model.memory)
    assert estimator.needs_bytes(path, model.devices) == {"CPU": use.peak_bytes}
    model.close()


def test_the_budget_is_less_than_the_machine() -> None:
    """The real machine's memory is known; without a setting most of it is for models."""
    assert 2**28 < limit_bytes("CPU", None) < machine_bytes()


def test_a_run_after_the_unload_is_an_error_not_a_crash(cnn: Path) -> None:
    """A plan whose model was closed refuses to run."""
    model = SavedModel(cnn)
    (name,) = set(model.signatures) & {"serving_default"}
    plan: Any = model.plan(model.signatures[name])
    plan.close()
    model.close()
    assert plan._call is savedmodel._closed
    with pytest.raises(RuntimeError, match="it is unloaded"):
        plan._call()
