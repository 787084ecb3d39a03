"""The bench's models: version 1 of `digits` as it is, and two made here, seeded and untrained.

``python -m load_tests.bench_models FOLDER`` writes them as ``FOLDER/<name>/1/model.keras``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

DIGITS = Path(__file__).parents[1] / "models" / "digits" / "1"
_FIVE_MS_LAYERS = 8
"""Layers of `five_ms`: about 5 ms a row on one core of the machine in README.md's table."""


def dense(keras: Any) -> Any:
    """784-128-10: what the front end costs, for the model itself costs next to nothing."""
    inputs = keras.Input((784,), name="x")
    hidden = keras.layers.Dense(128, activation="relu")(inputs)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(hidden))


def five_ms(keras: Any) -> Any:
    """Convolutions whose cost grows with the rows: batching saves nothing but overhead."""
    inputs = keras.Input((28, 28, 1), name="x")
    hidden = inputs
    for _ in range(_FIVE_MS_LAYERS):
        hidden = keras.layers.Conv2D(128, 3, padding="same", activation="relu")(hidden)
    pooled = keras.layers.GlobalAveragePooling2D()(hidden)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(pooled))


def write(folder: Path) -> None:
    """Write all of the bench's models below `folder`."""
    import keras

    for build in (dense, five_ms):
        keras.utils.set_random_seed(1)
        target = folder / build.__name__ / "1"
        target.mkdir(parents=True)
        build(keras).save(target / "model.keras")
    shutil.copytree(DIGITS, folder / "digits" / "1")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
