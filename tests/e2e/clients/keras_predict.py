"""What Keras itself says of the held-out digits: ``VERSION_FOLDER TARGET.npz``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np


def _training(folder: Path) -> Any:
    """``train.py`` of the model, as a module."""
    spec = importlib.util.spec_from_file_location("train", folder / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder: Path, target: Path) -> None:
    """Write images (rows, 8, 8, 1), labels (rows,), probabilities (rows, 10) and the accuracy."""
    train = _training(folder.parent)
    inputs, labels = train.held_out()
    images = inputs["image"]
    import keras

    model = keras.saving.load_model(folder / "model.keras", compile=False)
    probabilities = model.predict(images, batch_size=len(images), verbose=0)
    np.savez(
        target,
        images=images,
        labels=labels,
        probabilities=probabilities,
        accuracy=train.score({"output_0": probabilities}, labels),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
