"""What Keras itself says of the held-out digits: ``MODEL_FOLDER TARGET.npz``."""

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
    train = _training(folder)
    _, held_out = train.load_splits()
    import keras

    model = keras.saving.load_model(folder / "1" / "model.keras", compile=False)
    probabilities = model.predict(held_out.images, batch_size=len(held_out.images), verbose=0)
    np.savez(
        target,
        images=held_out.images,
        labels=held_out.labels,
        probabilities=probabilities,
        accuracy=train.accuracy(probabilities, held_out.labels),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
