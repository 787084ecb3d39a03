"""What models answer without a server: ``TARGET ROWS VERSION_FOLDER …``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np


def _held_out(folder: Path, rows: int) -> dict[str, Any]:
    """The first held-out inputs of the model's ``train.py``."""
    spec = importlib.util.spec_from_file_location("train", folder / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: array[:rows] for name, array in module.held_out()[0].items()}


def _answer(version: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name, those that Keras gives none as ``output_0``, ``output_1`` and so on."""
    import tensorflow as tf

    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    if (version / "saved_model.pb").is_file():
        outputs: Any = tf.saved_model.load(str(version)).signatures["serving_default"](**tensors)
    else:
        import keras

        (file,) = version.glob("*.keras")
        model = keras.saving.load_model(file, compile=False)
        outputs = model(tensors if len(tensors) > 1 else next(iter(tensors.values())), training=False)
    if not isinstance(outputs, dict):
        several = outputs if isinstance(outputs, list | tuple) else [outputs]
        outputs = {f"output_{number}": output for number, output in enumerate(several)}
    return {name: output.numpy() for name, output in outputs.items()}


def main(target: Path, rows: int, versions: list[Path]) -> None:
    """Write ``<model>-<version>.npz`` for each: the outputs of the first held-out rows under their names."""
    for version in versions:
        file = target / f"{version.parent.name}-{version.name}.npz"
        np.savez(file, **_answer(version, _held_out(version.parent, rows)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
