"""Train a subclassed model with two outputs and two signatures: digits as points on a sphere.

Data: scikit-learn's digits, 1437 for training and 360 held out (see `real_digits`). The model gives each
image an embedding of length 1, and a logit per class: the cosine between the embedding and the direction
that the class has learned, times a fixed scale. Writes the SavedModel `1/` and `example.json`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))

import real_digits as data

if TYPE_CHECKING:
    import keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

FOLDER = Path(__file__).resolve().parent
METRIC = "accuracy"
GOAL = 0.97
SIZE = 16
SCALE = 12.0
EPOCHS = 40
BATCH_ROWS = 32


def held_out() -> tuple[dict[str, NDArray[np.float32]], data.Labels]:
    """Return the held-out rows, ``{"image": (360, 8, 8, 1)}``, and their digits (360,)."""
    _, test = data.load_splits()
    return {"image": test.images}, test.labels


def score(outputs: dict[str, NDArray[np.float32]], truth: data.Labels) -> float:
    """Return the accuracy of ``outputs["logits"]`` (rows, 10)."""
    return data.accuracy(outputs["logits"], truth)


def neighbour_accuracy(
    embedding: NDArray[np.float32], labels: data.Labels, known: NDArray[np.float32], known_labels: data.Labels
) -> float:
    """Return the share of `embedding` (rows, 16) whose nearest of the `known` ones (others, 16) has its label."""
    nearest = (embedding @ known.T).argmax(axis=1)
    return float(np.mean(known_labels[nearest] == labels))


def build() -> keras.Model:
    """Return the untrained model: images (rows, 8, 8, 1) to ``{"embedding": (rows, 16), "logits": (rows, 10)}``."""
    import keras

    class Embedder(keras.Model):
        """Convolutions, the embedding, and the cosines with a direction for each class."""

        def __init__(self) -> None:
            super().__init__(name="embedder")
            self.scale = keras.layers.Rescaling(1 / data.MAX_PIXEL)
            self.convolutions = [
                keras.layers.Conv2D(filters, 3, padding="same", activation="relu") for filters in (16, 32)
            ]
            self.pool = keras.layers.MaxPooling2D(2)
            self.flatten = keras.layers.Flatten()
            self.dropout = keras.layers.Dropout(0.3)
            self.project = keras.layers.Dense(SIZE)
            self.on_sphere = keras.layers.UnitNormalization()
            self.directions = keras.layers.Dense(10, use_bias=False, kernel_constraint=keras.constraints.UnitNorm())

        def embed(self, image: Any, *, training: bool = False) -> Any:
            """The embedding alone, (rows, 16)."""
            x = self.scale(image)
            for convolution in self.convolutions:
                x = self.pool(convolution(x))
            x = self.dropout(self.flatten(x), training=training)
            return self.on_sphere(self.project(x))

        def call(self, image: Any, training: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - Keras's form
            embedding = self.embed(image, training=training)
            return {"embedding": embedding, "logits": SCALE * self.directions(embedding)}

    return Embedder()


def train(model: keras.Model, rows: data.Split) -> None:
    """Train `model` in place, by the cross-entropy of its logits."""
    import keras

    loss = {"embedding": None, "logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    model.compile(optimizer=keras.optimizers.Adam(2e-3), loss=loss)
    model.fit(rows.images, {"logits": rows.labels}, batch_size=BATCH_ROWS, epochs=EPOCHS, verbose=0)


def export(model: keras.Model, folder: Path) -> None:
    """Write a SavedModel with the signatures ``serving_default`` and ``embed``; what is in `folder` is replaced."""
    import keras
    import tensorflow as tf

    image = [tf.TensorSpec((None, 8, 8, 1), tf.float32, "image")]
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", model, image)
    archive.add_endpoint("embed", lambda image: {"embedding": model.embed(image)}, image)
    shutil.rmtree(folder, ignore_errors=True)
    archive.write_out(str(folder), verbose=False)


def main() -> None:
    """Train, measure on the held-out rows, and write the model and the example request."""
    import keras

    keras.utils.set_random_seed(data.SEED)
    rows, test = data.load_splits()
    model = build()
    train(model, rows)
    outputs = model.predict(test.images, verbose=0)
    data.report(METRIC, score(outputs, test.labels), GOAL)
    known = model.predict(rows.images, verbose=0)["embedding"]
    nearest = neighbour_accuracy(outputs["embedding"], test.labels, known, rows.labels)
    print(f"nearest training embedding has the label: {nearest:.4f}")
    export(model, FOLDER / "1")
    data.write_json({"instances": [test.images[0].astype(int).tolist()]}, FOLDER / "example.json")
    print(f"example: a {test.labels[0]}, logit {outputs['logits'][0].max():.4f}")


if __name__ == "__main__":
    main()
