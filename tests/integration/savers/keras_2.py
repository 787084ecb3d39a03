"""Saves models with Keras 2 (tf_keras), and what it predicts for seeded inputs: ``FOLDER``."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

layers: Any = keras.layers


def recurrent() -> Any:
    """Trained, so that its optimizer has state."""
    model = keras.Sequential(
        [
            layers.Embedding(20, 4, input_length=6),
            layers.LSTM(5, return_sequences=True),
            layers.GRU(4),
            layers.BatchNormalization(),
            layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    rng = np.random.default_rng(0)
    model.fit(rng.integers(0, 20, (8, 6)), rng.standard_normal((8, 1)), verbose=0)
    return model


def convolutional() -> Any:
    return keras.Sequential(
        [
            layers.Conv2D(4, 3, input_shape=(9, 9, 1)),
            layers.BatchNormalization(),
            layers.ReLU(6.0),
            layers.DepthwiseConv2D(3),
            layers.SeparableConv2D(3, 1),
            layers.Conv2DTranspose(2, 3),
            layers.LeakyReLU(alpha=0.2),
            layers.GlobalAveragePooling2D(),
        ]
    )


def nested() -> Any:
    """A model that calls another one twice, as in transfer learning and twins."""
    inner = keras.Sequential([layers.Dense(4, input_shape=(3,)), layers.ELU()])
    left, right = layers.Input((3,), name="left"), layers.Input((3,), name="right")
    return keras.Model([left, right], layers.Add()([inner(left), inner(right)]))


def attention() -> Any:
    x = layers.Input((8, 4))
    y = layers.LayerNormalization()(layers.MultiHeadAttention(2, 3)(x, x))
    return keras.Model(x, layers.GlobalMaxPooling1D()(layers.Add()([x, y])))


def hard() -> Any:
    """The function of this name is another one in Keras 3."""
    return keras.Sequential(
        [
            layers.Input((5, 3)),
            layers.Bidirectional(layers.LSTM(4, recurrent_activation="hard_sigmoid")),
            layers.Dense(2, activation="hard_sigmoid"),
        ]
    )


def half() -> Any:
    return keras.Sequential([layers.Dense(4, input_shape=(3,), dtype="mixed_float16"), layers.Dense(2)])


def operators() -> Any:
    x = layers.Input((3,))
    return keras.Model(x, tf.nn.relu(layers.Dense(4)(x)) * 2.0)


def words() -> Any:
    text = layers.TextVectorization(output_sequence_length=4)
    text.adapt(["a good day", "a bad night"])
    x = layers.Input((), dtype="string")
    return keras.Model(x, layers.Embedding(10, 3)(text(x)))


def main(folder: Path) -> None:
    rng = np.random.default_rng(1)
    answers: dict[str, Any] = {}
    for build in (recurrent, convolutional, nested, attention, hard, half, operators, words):
        keras.utils.set_random_seed(3)
        model, name = build(), build.__name__
        for suffix in ("keras",) if build is words else ("h5", "keras"):  # Keras 2 writes no vocabulary as .h5
            model.save(folder / f"{name}.{suffix}")
        if build in (recurrent, words):
            model.save(folder / name, save_format="tf")
        if build in (operators, words):
            continue
        sizes = [[2, *tensor.shape[1:]] for tensor in model.inputs]
        draws = [rng.integers(0, 20, s).astype(float) if build is recurrent else rng.standard_normal(s) for s in sizes]
        inputs = [each.astype(np.float32) for each in draws]
        answers |= {f"{name} {tensor.name}": each for tensor, each in zip(model.inputs, inputs, strict=True)}
        answers[name] = model.predict(inputs, verbose=0)
    np.savez(folder / "answers.npz", **answers)
    time_major = json.loads(recurrent().to_json())
    time_major["config"]["layers"][2]["config"]["time_major"] = True
    (folder / "time_major.json").write_text(json.dumps(time_major))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
