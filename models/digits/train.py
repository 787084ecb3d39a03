"""Train the example model: a small CNN that reads 8×8 handwritten digits.

Writes `1/model.keras` (the served version, without optimizer state) and `example.json` (a request body with
one held-out digit) next to this script.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

import keras
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 7
TEST_SHARE = 0.2
EPOCHS = 40
BATCH_ROWS = 32
LEARNING_RATE = 2e-3
DROPOUT = 0.4
MIN_TEST_ACCURACY = 0.97
MIN_EXAMPLE_PROBABILITY = 0.99
MAX_PIXEL = 16

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Probabilities = NDArray[np.float32]


class Split(NamedTuple):
    """One part of the data: `images` (rows, 8, 8, 1), raw values 0..16, and `labels` (rows,), values 0..9."""

    images: Images
    labels: Labels


def load_splits() -> tuple[Split, Split]:
    """Return the training rows and the held-out rows, with every class in the same proportion in both."""
    digits = load_digits()
    images = digits.images.astype(np.float32)[..., np.newaxis]
    labels = digits.target.astype(np.int64)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=SEED
    )
    return Split(train_images, train_labels), Split(test_images, test_labels)


def build_model() -> keras.Model:
    """Return the untrained network: `image` (rows, 8, 8, 1) float32 to `probabilities` (rows, 10) float32.

    The scaling of the pixels is a layer of the model: a client sends the values as the data set has them.
    """
    image = keras.Input(shape=(8, 8, 1), dtype="float32", name="image")
    x = keras.layers.Rescaling(1 / MAX_PIXEL, name="scale")(image)
    x = keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name="strokes")(x)
    x = keras.layers.BatchNormalization(name="strokes_norm")(x)
    x = keras.layers.ReLU(name="strokes_relu")(x)
    x = keras.layers.MaxPooling2D(2, name="pool")(x)
    x = keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name="shapes")(x)
    x = keras.layers.BatchNormalization(name="shapes_norm")(x)
    x = keras.layers.ReLU(name="shapes_relu")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dropout(DROPOUT, name="dropout")(x)
    probabilities = keras.layers.Dense(10, activation="softmax", name="probabilities")(x)
    return keras.Model(image, probabilities, name="digits")


def fit(model: keras.Model, train: Split) -> None:
    """Train `model` in place for a fixed number of epochs; the held-out rows play no part in it."""
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(),
    )
    model.fit(train.images, train.labels, batch_size=BATCH_ROWS, epochs=EPOCHS, verbose=0)


def accuracy(probabilities: Probabilities, labels: Labels) -> float:
    """Return the share of rows whose most probable class is the label.

    Args:
        probabilities: (rows, 10).
        labels: (rows,).
    """
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def pick_example(probabilities: Probabilities, labels: Labels) -> int:
    """Return the first row that is classified rightly with at least `MIN_EXAMPLE_PROBABILITY`.

    Args:
        probabilities: (rows, 10).
        labels: (rows,).

    Raises:
        ValueError: no row is classified that clearly.
    """
    of_label = probabilities[np.arange(len(labels)), labels]
    clear = np.flatnonzero(of_label >= MIN_EXAMPLE_PROBABILITY)
    if clear.size == 0:
        raise ValueError(f"no held-out digit reaches a probability of {MIN_EXAMPLE_PROBABILITY}")
    return int(clear[0])


def save_model(model: keras.Model, path: Path) -> None:
    """Save layers and weights, but not the optimizer's state, which serving never reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keras.Model(model.inputs, model.outputs[0], name=model.name).save(path)


def save_example(image: Images, path: Path) -> None:
    """Write a predict request with one digit, `image` (8, 8, 1); the raw pixels are whole numbers."""
    body = {"instances": [image.astype(int).tolist()]}
    path.write_text(json.dumps(body) + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure on the held-out rows, and write the model and the example request.

    Raises:
        SystemExit: the accuracy is below `MIN_TEST_ACCURACY`; the files on disk stay as they were.
    """
    keras.utils.set_random_seed(SEED)
    train, test = load_splits()
    model = build_model()
    fit(model, train)

    probabilities = model.predict(test.images, verbose=0)
    test_accuracy = accuracy(probabilities, test.labels)
    print(f"test accuracy: {test_accuracy:.4f}")
    if test_accuracy < MIN_TEST_ACCURACY:
        raise SystemExit(f"not saved: the test accuracy is below {MIN_TEST_ACCURACY}")

    row = pick_example(probabilities, test.labels)
    label = test.labels[row]
    print(f"example: a {label}, with probability {probabilities[row, label]:.4f}")

    folder = Path(__file__).resolve().parent
    save_model(model, folder / "1" / "model.keras")
    save_example(test.images[row], folder / "example.json")


if __name__ == "__main__":
    main()
