"""The benches' models: version 1 of `digits` as it is, and others made here, seeded and untrained.

``python -m load_tests.bench_models FOLDER [NAME …]`` writes them as ``FOLDER/<name>/1/model.keras``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
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


def one_ms(keras: Any) -> Any:
    """Wide layers behind few inputs: a batch of 64 rows takes about a millisecond, and is small to send."""
    inputs = keras.Input((64,), name="x")
    hidden = keras.layers.Dense(1024, activation="relu")(inputs)
    hidden = keras.layers.Dense(1024, activation="relu")(hidden)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(hidden))


def cnn(keras: Any) -> Any:
    """A small convolutional net on 28×28 pixels."""
    inputs = keras.Input((28, 28, 1), name="x")
    hidden = keras.layers.Conv2D(32, 3, activation="relu")(inputs)
    hidden = keras.layers.MaxPooling2D()(hidden)
    hidden = keras.layers.Conv2D(64, 3, activation="relu")(hidden)
    hidden = keras.layers.MaxPooling2D()(hidden)
    hidden = keras.layers.Flatten()(hidden)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(hidden))


def mobilenet(keras: Any) -> Any:
    """MobileNetV2 on 96×96 pixels in colour."""
    inputs = keras.Input((96, 96, 3), name="x")
    return keras.applications.MobileNetV2(input_tensor=inputs, weights=None, name="mobilenet")


def resnet(keras: Any) -> Any:
    """ResNet50 on 224×224 pixels in colour."""
    return keras.applications.ResNet50(input_shape=(224, 224, 3), weights=None, name="resnet")


def lstm(keras: Any) -> Any:
    """Two LSTMs of 64 over 50 steps of 8 values."""
    inputs = keras.Input((50, 8), name="x")
    hidden = keras.layers.LSTM(64, return_sequences=True)(inputs)
    hidden = keras.layers.LSTM(64)(hidden)
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def gru_text(keras: Any) -> Any:
    """Strings in: words looked up, embedded, read by a GRU."""
    words = keras.layers.TextVectorization(2000, output_sequence_length=40)
    words.adapt([" ".join(f"word{i}" for i in range(start, start + 50)) for start in range(0, 1500, 50)])
    inputs = keras.Input((1,), dtype="string", name="text")
    hidden = keras.layers.Embedding(2000, 64)(words(inputs))
    hidden = keras.layers.GRU(64)(hidden)
    return keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(hidden))


def transformer(keras: Any) -> Any:
    """An encoder of two blocks of width 128 over 32 tokens."""
    tokens = keras.Input((32,), dtype="int32", name="tokens")
    hidden = keras.layers.Embedding(1000, 128)(tokens)
    for _ in range(2):
        attended = keras.layers.MultiHeadAttention(4, 32)(hidden, hidden)
        hidden = keras.layers.LayerNormalization()(hidden + attended)
        wide = keras.layers.Dense(256, activation="gelu")(hidden)
        hidden = keras.layers.LayerNormalization()(hidden + keras.layers.Dense(128)(wide))
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    return keras.Model(tokens, keras.layers.Dense(4, activation="softmax")(pooled))


def gan(keras: Any) -> Any:
    """A generator: 64 values of noise to an image of 28×28."""
    noise = keras.Input((64,), name="noise")
    hidden = keras.layers.Dense(7 * 7 * 64, activation="relu")(noise)
    hidden = keras.layers.Reshape((7, 7, 64))(hidden)
    hidden = keras.layers.Conv2DTranspose(32, 4, strides=2, padding="same")(hidden)
    hidden = keras.layers.LeakyReLU(0.2)(keras.layers.BatchNormalization()(hidden))
    return keras.Model(noise, keras.layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="tanh")(hidden))


SERVED = (dense, five_ms, one_ms)
"""What the server's bench asks, beside `digits`."""
PLANNED = (dense, cnn, mobilenet, resnet, lstm, gru_text, transformer, gan)
"""What the plans' bench runs: one of each family."""


def write(folder: Path, builders: Iterable[Callable[[Any], Any]] = SERVED, *, digits: bool = True) -> None:
    """Write models below `folder`."""
    import keras

    for build in builders:
        keras.utils.set_random_seed(1)
        target = folder / build.__name__ / "1"
        target.mkdir(parents=True)
        build(keras).save(target / "model.keras")
    if digits:
        shutil.copytree(DIGITS, folder / "digits" / "1")


if __name__ == "__main__":
    names = sys.argv[2:]
    builders = [build for build in dict.fromkeys((*SERVED, *PLANNED)) if build.__name__ in names]
    write(Path(sys.argv[1]), builders if names else SERVED, digits=not names or "digits" in names)
