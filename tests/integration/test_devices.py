"""Placement and replicas with real TensorFlow, on two logical CPU devices in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelLoadError
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions
from service.runtime.savedmodel import SavedModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel with variables that were saved on the first CPU: ``y = matmul(x, w)``."""
    import tensorflow as tf

    module = tf.Module()
    with tf.device("/CPU:0"):
        module.w = tf.Variable(tf.eye(3) * 2.0)
    function = tf.function(lambda x: {"y": tf.matmul(x, module.w)})
    signature = function.get_concrete_function(x=tf.TensorSpec((None, 3), tf.float32, "x"))
    target = tmp_path_factory.mktemp("models") / "matmul"
    tf.saved_model.save(module, str(target), signatures=signature)
    return target


@pytest.fixture(scope="module")
def seen(path: Path) -> dict[str, Any]:
    """What `on_two_cpus` saw."""
    command = [sys.executable, "-m", "tests.integration.on_two_cpus", str(path)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert child.returncode == 0, child.stderr
    result: dict[str, Any] = json.loads(child.stdout)
    return result


def test_logical_devices_are_found(seen: dict[str, Any]) -> None:
    """Kiln sees the devices that TensorFlow has been told to have."""
    assert seen["available"] == ["CPU:0", "CPU:1"]


@pytest.mark.parametrize(
    ("wanted", "device"), [("auto", "CPU:0"), ("cpu", "CPU:0"), ("cpu:0", "CPU:0"), ("cpu:1", "CPU:1")]
)
def test_a_model_is_where_it_was_put(seen: dict[str, Any], wanted: str, device: str) -> None:
    """Variables live on the device of the config, and the operations run there, wherever they were saved."""
    assert seen["placed"][wanted] == {"device": device, "parallel": 1, "variables": [device], "ran": [device]}


@pytest.mark.parametrize("wanted", ["cpu:2", "gpu", "gpu:*"])
def test_a_device_that_is_not_there_is_refused(seen: dict[str, Any], wanted: str) -> None:
    """The load fails with the devices that there are."""
    assert seen["refused"][wanted] == f"device: there is no {wanted!r} here; TensorFlow has CPU:0, CPU:1"


@pytest.mark.parametrize("plan", ["signature", "frozen", "xla", "openvino"])
def test_every_device_has_a_replica_that_runs_beside_the_others(seen: dict[str, Any], plan: str) -> None:
    """With ``cpu:*`` two batches run at once, three on each device, and answer as the model does alone."""
    replicas = seen["replicas"][plan]
    assert (replicas["device"], replicas["parallel"]) == ("CPU:0, CPU:1", 2)
    assert replicas["ran"] == ["CPU:0"] * 3 + ["CPU:1"] * 3
    assert replicas["right"]
    assert replicas["values"] == [4, 4, 4]
    assert all(name.startswith(plan) for name in replicas["plans"])
    assert replicas["planned"] is (plan != "signature")
    assert replicas["memory"] == ["CPU"]
    assert replicas["drained"]


def test_a_stateful_model_has_one_replica(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that change would differ between replicas, so such a model is refused on several devices."""
    monkeypatch.setattr("service.runtime.model.devices_for", lambda wanted: ("CPU:0", "CPU:1"))
    with pytest.raises(ModelLoadError) as caught:
        LoadedModel(path, RuntimeOptions(PlanningOptions(4), device="cpu:*", stateful=True))
    assert str(caught.value) == "a stateful model has one copy, but device 'cpu:*' is CPU:0, CPU:1"


def test_a_replica_that_cannot_be_loaded_takes_the_others_with_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one of several devices fails, what was loaded already is given back and the load fails."""
    from service.runtime import model as module
    from service.runtime import replica

    loaded: list[Any] = []
    load = SavedModel

    def second_fails(*args: Any, **options: Any) -> Any:
        if loaded:
            raise ModelLoadError("out of memory")
        loaded.append(load(*args, **options))
        return loaded[0]

    monkeypatch.setattr(replica, "SavedModel", second_fails)
    monkeypatch.setattr(module, "devices_for", lambda wanted: ("CPU:0", "CPU:0"))
    with pytest.raises(ModelLoadError, match="out of memory"):
        LoadedModel(path, RuntimeOptions(PlanningOptions(4)))
    assert loaded[0]._session is None
