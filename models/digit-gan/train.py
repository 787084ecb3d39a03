"""Train a conditional GAN that draws handwritten digits: noise and the wanted class in, an image out.

Data: the 1437 training digits of scikit-learn's set (see `real_digits`). Generator and critic are trained
against each other, and both are told the class (Mirza and Osindero, 2014); that two noises give two images
is part of the generator's loss (mode seeking: Mao et al., 2019). Whether a drawn digit shows the wanted
class is judged by the newest version of the example model `digits`, which takes no part in the training.
Writes `1/model.keras` (the generator) and `example.json` beside this script.
"""

from __future__ import annotations

import os
import sys
import zipfile
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
GOAL = 0.8
NOISE = 32
CLASSES = 10
STEPS = 5000
BATCH_ROWS = 64
RATE = 4e-4
SEEK = 0.03
"""Weight of the loss for images that are alike where their noise is not."""
REAL = 0.9
"""What the critic is told of real images: a little less than certainty keeps it from running away."""
DRAWN_ROWS = 500


def held_out() -> tuple[dict[str, NDArray[Any]], NDArray[np.int32]]:
    """Return ``{"noise": (500, 32), "label": (500,)}``, noise that was not trained with, and the wanted classes."""
    rng = np.random.default_rng(data.SEED)
    labels = np.arange(DRAWN_ROWS, dtype=np.int32) % CLASSES
    return {"noise": rng.standard_normal((DRAWN_ROWS, NOISE), dtype=np.float32), "label": labels}, labels


def score(outputs: dict[str, NDArray[np.float32]], truth: NDArray[np.int32]) -> float:
    """Return the share of ``outputs["image"]`` (rows, 8, 8, 1) that the model `digits` takes for the wanted class."""
    return data.accuracy(Judge().logits(outputs["image"]), truth.astype(np.int64))


class Judge:
    """The newest version of `digits`, computed in NumPy: its convolutions, normalisations, one pooling, one product."""

    def __init__(self) -> None:
        import h5py

        versions = [int(each.name) for each in (FOLDER.parent / "digits").iterdir() if each.name.isdigit()]
        path = FOLDER.parent / "digits" / str(max(versions)) / "model.keras"
        with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as file, h5py.File(file) as weights:
            layers = weights["layers"]
            self._arrays = {
                (kind, number): [group["vars"][str(n)][()] for n in range(len(group["vars"]))]
                for kind in ("conv2d", "batch_normalization", "dense")
                for number, group in enumerate(_numbered(layers, kind))
            }

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (rows, 10) for images (rows, 8, 8, 1) of values 0 to 16: softmax of it is what `digits` answers."""
        x = images / data.MAX_PIXEL
        convolutions = sum(kind == "conv2d" for kind, _ in self._arrays)
        for number in range(convolutions):
            if number == convolutions // 2:
                x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).max(axis=(2, 4))
            (kernel,) = self._arrays["conv2d", number]
            gamma, beta, mean, variance = self._arrays["batch_normalization", number]
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
            x = np.einsum("bhwcij,ijcf->bhwf", windows, kernel, optimize=True)
            x = np.maximum((x - mean) * (gamma / np.sqrt(variance + 1e-3)) + beta, 0)
        weights, bias = self._arrays["dense", 0]
        logits: NDArray[np.float32] = x.reshape(len(x), -1) @ weights + bias
        return logits


def _numbered(layers: Any, kind: str) -> list[Any]:
    """The groups of the layers of a `kind`, in order, as Keras numbers them (``conv2d_1``)."""
    names = [kind, *(f"{kind}_{number}" for number in range(1, 100))]
    return [layers[name] for name in names if name in layers]


def build() -> keras.Model:
    """Return the untrained generator: `noise` (rows, 32) and `label` (rows,) int32 to `image` (rows, 8, 8, 1).

    The image has the values of the data set, 0 (paper) to 16 (ink).
    """
    import keras

    noise = keras.Input(shape=(NOISE,), dtype="float32", name="noise")
    label = keras.Input(shape=(), dtype="int32", name="label")
    wanted = keras.layers.Embedding(CLASSES, NOISE, name="class")(label)
    x = keras.layers.Concatenate(name="both")([noise, wanted])
    x = keras.layers.Dense(2 * 2 * 64, use_bias=False, name="start")(x)
    x = keras.layers.Reshape((2, 2, 64), name="start_image")(x)
    for number, filters in enumerate((48, 32), start=1):
        x = keras.layers.BatchNormalization(name=f"norm_{number}")(x)
        x = keras.layers.ReLU(name=f"relu_{number}")(x)
        x = keras.layers.Conv2DTranspose(filters, 4, 2, padding="same", use_bias=False, name=f"grow_{number}")(x)
    x = keras.layers.BatchNormalization(name="norm_3")(x)
    x = keras.layers.ReLU(name="relu_3")(x)
    x = keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid", name="ink")(x)
    image = keras.layers.Rescaling(data.MAX_PIXEL, name="image")(x)
    return keras.Model([noise, label], image, name="digit_gan")


def build_critic() -> keras.Model:
    """Return the untrained critic: images (rows, 8, 8, 1) and classes (rows,) to logits of being real, (rows, 1)."""
    import keras

    image = keras.Input(shape=(8, 8, 1), dtype="float32", name="image")
    label = keras.Input(shape=(), dtype="int32", name="label")
    wanted = keras.layers.Reshape((8, 8, 1))(keras.layers.Embedding(CLASSES, 8 * 8)(label))
    x = keras.layers.GaussianNoise(0.05)(keras.layers.Rescaling(1 / data.MAX_PIXEL)(image))
    x = keras.layers.Concatenate()([x, wanted])
    for filters, strides in ((32, 1), (48, 2), (64, 2)):
        x = keras.layers.Conv2D(filters, 3, strides=strides, padding="same")(x)
        x = keras.layers.LeakyReLU(0.2)(x)
        x = keras.layers.Dropout(0.3)(x)
    is_real = keras.layers.Dense(1)(keras.layers.Flatten()(x))
    return keras.Model([image, label], is_real, name="critic")


def train(generator: keras.Model, rows: data.Split) -> None:
    """Train `generator` in place against a critic of its own, for a fixed number of steps."""
    import keras
    import tensorflow as tf

    critic = build_critic()
    wrong = keras.losses.BinaryCrossentropy(from_logits=True)
    rates = [keras.optimizers.schedules.CosineDecay(RATE, STEPS) for _ in range(2)]
    draws, judges = (keras.optimizers.Adam(rate, beta_1=0.5) for rate in rates)

    @tf.function
    def step(images: Any, labels: Any) -> None:
        noise = tf.random.normal((BATCH_ROWS, NOISE))
        wanted = tf.tile(tf.random.uniform((BATCH_ROWS // 2,), 0, CLASSES, tf.int32), [2])  # two images of each
        with tf.GradientTape() as drawing, tf.GradientTape() as judging:
            drawn = generator([noise, wanted], training=True)
            of_real = critic([images, labels], training=True)
            of_drawn = critic([drawn, wanted], training=True)
            judged = wrong(REAL * tf.ones_like(of_real), of_real) + wrong(tf.zeros_like(of_drawn), of_drawn)
            fooled = wrong(tf.ones_like(of_drawn), of_drawn) + SEEK * _likeness(drawn, noise)
        for tape, loss, model, optimizer in ((judging, judged, critic, judges), (drawing, fooled, generator, draws)):
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    batches = tf.data.Dataset.from_tensor_slices((rows.images, rows.labels.astype(np.int32)))
    for images, labels in batches.shuffle(2000, seed=data.SEED).repeat().batch(BATCH_ROWS).take(STEPS):
        step(images, labels)


def _likeness(images: Any, noise: Any) -> Any:
    """How much more the noise of the two halves of a batch differs than their images, which are of the same classes."""
    import tensorflow as tf

    def difference(rows: Any) -> Any:
        first, second = tf.split(rows, 2)
        return tf.reduce_mean(tf.abs(first - second))

    return difference(noise) / (difference(images / data.MAX_PIXEL) + 1e-5)


def spread(images: NDArray[np.float32], labels: NDArray[np.integer]) -> float:
    """Return the mean standard deviation of a pixel among images (rows, 8, 8, 1) of one class: 0 if all are alike."""
    return float(np.mean([images[labels == label].std(axis=0).mean() for label in range(CLASSES)]))


def main() -> None:
    """Train, have `digits` judge what is drawn from noise, and write the generator and the example request."""
    import keras

    keras.utils.set_random_seed(data.SEED)
    rows, _ = data.load_splits()
    generator = build()
    train(generator, rows)
    inputs, truth = held_out()
    images = generator.predict(inputs, batch_size=DRAWN_ROWS, verbose=0)
    data.report(METRIC, score({"image": images}, truth), GOAL)
    print(f"spread within a class: {spread(images, truth):.2f} (real digits {spread(rows.images, rows.labels):.2f})")
    (FOLDER / "1").mkdir(exist_ok=True)
    named = keras.Model(generator.inputs, {"image": generator.outputs[0]}, name=generator.name)
    named.save(FOLDER / "1" / "model.keras")
    noise = np.round(inputs["noise"][3].astype(np.float64), 3).tolist()
    data.write_json({"instances": [{"noise": noise, "label": 3}]}, FOLDER / "example.json")


if __name__ == "__main__":
    main()
