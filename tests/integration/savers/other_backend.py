"""Saves a model of another backend of Keras, and what it predicts for seeded inputs: ``FOLDER BACKEND``."""

import sys
from pathlib import Path

import keras
import numpy as np


def main(folder: Path) -> None:
    assert keras.backend.backend() == sys.argv[2]
    keras.utils.set_random_seed(5)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((6, 3), name="steps"),
            layers.Conv1D(4, 2, padding="same"),
            layers.BatchNormalization(),
            layers.GaussianNoise(0.5),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True, dropout=0.2)),
            layers.GRU(3),
            layers.Dropout(0.5),
            layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 6, 3), dtype=np.float32)
    model.fit(x, rng.random((8, 2), dtype=np.float32), verbose=0)
    model.save(folder / "steps.keras")
    np.savez(folder / "answers.npz", x=x, y=model.predict(x, verbose=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
