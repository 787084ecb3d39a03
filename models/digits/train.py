"""Train the example model: a CNN that reads 8×8 handwritten digits.

Data: scikit-learn's digits, 1437 for training and 360 held out (see `real_digits`). Version 2, the
default, is wider than version 1 and sees shifted, turned and scaled copies of the training rows; its
settings were chosen by a validation part of the training rows. Writes `<version>/model.keras` (without
optimizer state) and `example.json` (a request with one held-out digit) beside this script.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))

import real_digits as data

if TYPE_CHECKING:
    import keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

FOLDER = Path(__file__).resolve().parent
METRIC = "accuracy"
GOAL = 0.985
BATCH_ROWS = 32
LEARNING_RATE = 2e-3
SHIFT, TURN, SCALE = 0.125, 0.04, 0.1
"""How far training rows are moved (of their size: one pixel), turned (of a circle: 14°) and scaled."""


class Recipe(NamedTuple):
    """What tells one version from another: filters of the convolutions before and after the pooling, and training."""

    filters: tuple[tuple[int, ...], tuple[int, ...]]
    dropout: float
    epochs: int
    goal: float
    augmented: bool


RECIPES = {
    1: Recipe(((16,), (16,)), 0.4, 40, 0.97, augmented=False),
    2: Recipe(((32, 32), (64, 64)), 0.5, 90, GOAL, augmented=True),
}


def held_out() -> tuple[dict[str, NDArray[np.float32]], data.Labels]:
    """Return the held-out rows, ``{"image": (360, 8, 8, 1)}``, and their digits (360,)."""
    _, test = data.load_splits()
    return {"image": test.images}, test.labels


def score(outputs: dict[str, NDArray[np.float32]], truth: data.Labels) -> float:
    """Return the accuracy of ``outputs["output_0"]``, the probabilities (rows, 10), as Keras's export calls them."""
    return data.accuracy(outputs["output_0"], truth)


def build(version: int = max(RECIPES)) -> keras.Model:
    """Return the untrained network: `image` (rows, 8, 8, 1) float32 to `probabilities` (rows, 10) float32.

    The scaling of the pixels is a layer of the model: a client sends the values as the data set has them.
    """
    import keras

    recipe = RECIPES[version]
    image = keras.Input(shape=(8, 8, 1), dtype="float32", name="image")
    x = keras.layers.Rescaling(1 / data.MAX_PIXEL, name="scale")(image)
    for block, name in zip(recipe.filters, ("strokes", "shapes"), strict=True):
        if name == "shapes":
            x = keras.layers.MaxPooling2D(2, name="pool")(x)
        for number, filters in enumerate(block, start=1):
            x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"{name}_{number}")(x)
            x = keras.layers.BatchNormalization(name=f"{name}_{number}_norm")(x)
            x = keras.layers.ReLU(name=f"{name}_{number}_relu")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dropout(recipe.dropout, name="dropout")(x)
    probabilities = keras.layers.Dense(10, activation="softmax", name="probabilities")(x)
    return keras.Model(image, probabilities, name="digits")


def train(model: keras.Model, rows: data.Split, recipe: Recipe) -> None:
    """Train `model` in place for a fixed number of epochs; the held-out rows play no part in it."""
    import keras

    learner = model
    if recipe.augmented:
        paper = {"fill_mode": "constant", "fill_value": 0.0}
        vary = [
            keras.layers.RandomTranslation(SHIFT, SHIFT, **paper),
            keras.layers.RandomRotation(TURN, **paper),
            keras.layers.RandomZoom(SCALE, SCALE, **paper),
        ]
        learner = keras.Sequential([keras.Input((8, 8, 1)), *vary, model])
    steps = recipe.epochs * -(-len(rows.labels) // BATCH_ROWS)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps) if recipe.augmented else LEARNING_RATE
    learner.compile(optimizer=keras.optimizers.Adam(rate), loss=keras.losses.SparseCategoricalCrossentropy())
    learner.fit(rows.images, rows.labels, batch_size=BATCH_ROWS, epochs=recipe.epochs, verbose=0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the digits' model.")
    parser.add_argument("--version", type=int, choices=sorted(RECIPES), default=max(RECIPES))
    parser.add_argument(
        "--validate", action="store_true", help="train on a part, show the rest's accuracy, save nothing"
    )
    return parser.parse_args()


def main() -> None:
    """Train, measure on the held-out rows, and write the model and, for the newest version, the example request.

    Raises:
        SystemExit: the accuracy is below the version's goal; the files on disk stay as they were.
    """
    import keras

    arguments = _arguments()
    recipe = RECIPES[arguments.version]
    keras.utils.set_random_seed(data.SEED)
    rows, test = data.validation_splits() if arguments.validate else data.load_splits()
    model = build(arguments.version)
    train(model, rows, recipe)
    probabilities = model.predict(test.images, verbose=0)
    data.report(METRIC, score({"output_0": probabilities}, test.labels), recipe.goal)
    if arguments.validate:
        return
    file = FOLDER / str(arguments.version) / "model.keras"
    file.parent.mkdir(exist_ok=True)
    keras.Model(model.inputs, model.outputs[0], name=model.name).save(file)  # without the optimizer's state
    row = data.example_row(probabilities, test.labels)
    print(f"example: a {test.labels[row]}, with probability {probabilities[row, test.labels[row]]:.4f}")
    if arguments.version == max(RECIPES):
        data.write_json({"instances": [test.images[row].astype(int).tolist()]}, FOLDER / "example.json")


if __name__ == "__main__":
    main()
