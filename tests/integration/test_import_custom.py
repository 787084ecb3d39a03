"""Trusted modules with Keras classes of their own, through the importer's real child process."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelLoadError
from service.registry.importer import import_model
from service.registry.repository import Kind, Source
from service.runtime.savedmodel import SavedModel

CHILDREN_AT_ONCE = 2
MODULE = """
import keras

print("a module may say what it likes")

@keras.saving.register_keras_serializable("mine")
class Scale(keras.layers.Layer):
    def __init__(self, by=2.0, **options):
        super().__init__(**options)
        self.by = by

    def call(self, x):
        return x * self.by

    def get_config(self):
        return {**super().get_config(), "by": self.by}

@keras.saving.register_keras_serializable("mine")
def clip(x):
    return keras.ops.clip(x, 0.0, 4.0)

class Shift(keras.layers.Layer):
    def call(self, x):
        return x + 1.0

class Net(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.scale = Scale(3.0)

    def call(self, x):
        return self.scale(x)
"""
SAVE = """
import sys
import keras, numpy, kiln_layers
folder = sys.argv[1]
layers = keras.layers
def chain(*inner):
    return keras.Sequential([keras.Input((2,), name="x"), *inner])
registered = chain(kiln_layers.Scale(3.0), layers.Activation(kiln_layers.clip))
registered.save(f"{folder}/registered.keras")
chain(kiln_layers.Shift(), kiln_layers.Scale(2.0)).save(f"{folder}/unregistered.h5")
chain(kiln_layers.Scale(3.0), layers.Lambda(lambda x: x, name="code")).save(f"{folder}/code.keras")
net = kiln_layers.Net(name="net")
net(numpy.zeros((1, 2), "float32"))
net.save(f"{folder}/net.keras")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module ``kiln_layers``, and models that were saved with it in another process."""
    root = tmp_path_factory.mktemp("custom")
    (root / "kiln_layers.py").write_text(MODULE)
    (root / "broken_layers.py").write_text("import there_is_no_such_module\n")
    environment = {**os.environ, "PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", SAVE, str(root)]
    subprocess.run(command, env=environment, check=True, timeout=100, capture_output=True)
    return root


def imported(root: Path, name: str, *modules: str) -> Path | ModelLoadError:
    """The folder, or the refusal, of one import by a child process of its own."""
    path = root / name
    source = Source(path.stem, 1, Kind.H5 if path.suffix == ".h5" else Kind.KERAS, path)
    try:
        return import_model(source, cache_dir=root / "cache", timeout_s=100.0, imports=modules)
    except ModelLoadError as error:
        return error


GOOD: dict[str, Any] = {"registered.keras": [[3, 4]], "unregistered.h5": [[4, 6]], "net.keras": [[3, 6]]}
BAD: dict[tuple[str, ...], str] = {
    ("registered.keras",): "layer 'scale' (Scale) is refused: mine>Scale is no class of Keras; name the module that",
    ("code.keras", "kiln_layers"): "layer 'code' (Lambda) is refused: it holds Python code; ",
    ("registered.keras", "broken_layers"): "--import broken_layers: ModuleNotFoundError: No module named 'there_is_no_",
}


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[tuple[str, ...], Path | ModelLoadError]:
    """By file and trusted modules what became of it."""
    wanted = [*((name, "kiln_layers") for name in GOOD), *BAD]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(root)
    try:
        with ThreadPoolExecutor(CHILDREN_AT_ONCE) as pool:
            return dict(zip(wanted, pool.map(lambda each: imported(root, *each), wanted), strict=True))
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.mark.parametrize("name", GOOD)
def test_classes_of_a_trusted_module_are_imported(outcomes: dict[tuple[str, ...], Any], name: str) -> None:
    """Registered layers and functions, layers that were not registered, and subclasses of Model are served."""
    path = outcomes[name, "kiln_layers"]
    assert isinstance(path, Path), path
    model = SavedModel(path)
    signature = model.signatures["serving_default"]
    outputs = model.plan(signature).run({signature.inputs[0].name: np.array([[1, 2]], np.float32)})
    assert next(iter(outputs.values())).tolist() == GOOD[name]
    model.close()


@pytest.mark.parametrize("asked", BAD)
def test_trust_goes_no_further_than_the_module(outcomes: dict[tuple[str, ...], Any], asked: tuple[str, ...]) -> None:
    """Without its module a class is refused; code within the file always is; a module that is broken is told."""
    refusal = outcomes[asked]
    assert isinstance(refusal, ModelLoadError)
    assert str(refusal).startswith(BAD[asked])
    assert "\n" not in str(refusal)
