"""Saves models in every way that TensorFlow and Keras have: ``FOLDER``, where ``answers.npz`` has what they answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

INPUT = np.random.default_rng(5).standard_normal((4, 3), dtype=np.float32)


class Subclassed(keras.Model):  # type: ignore[misc]
    """A model whose call is its own code."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(2, activation="tanh")

    def call(self, x: Any) -> Any:
        return self.dense(x) + 1.0


class Holder(tf.Module):  # type: ignore[misc]
    """No Keras model, but something that holds a Keras layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = keras.layers.Dense(2)
        self.layer.build((None, 3))

    @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, name="x")])  # type: ignore[untyped-decorator]
    def __call__(self, x: Any) -> Any:
        return {"y": self.layer(x)}


def sequential(library: Any = keras) -> Any:
    layers = library.layers
    first = layers.InputLayer((3,)) if library is tf_keras else keras.Input((3,))
    return library.Sequential([first, layers.Dense(4, activation="relu"), layers.BatchNormalization(), layers.Dense(2)])


def functional() -> Any:
    x = keras.Input((3,), name="x")
    y = keras.layers.Dense(2)(x)
    return keras.Model(x, keras.layers.LayerNormalization()(y) + y)


def augmented() -> Any:
    """With a layer that changes its input in training only."""
    image = keras.layers.Reshape((1, 1, 3))
    return keras.Sequential([keras.Input((3,)), image, keras.layers.RandomContrast(0.5), keras.layers.Flatten()])


def subclassed() -> Any:
    model = Subclassed()
    model(INPUT)
    return model


def trained(model: Any) -> Any:
    """With state in its optimizer."""
    model.compile("adam", "mse")
    model.fit(INPUT, np.zeros((4, 2), np.float32), epochs=2, verbose=0)
    return model


def save_saved_model(model: Any, path: Path) -> None:
    """As people write it, and with a signature, where the call has none of its own."""
    if isinstance(model, Subclassed):
        call = tf.function(lambda x: {"y": model(x)}, input_signature=[tf.TensorSpec((None, 3), tf.float32, name="x")])
        tf.saved_model.save(model, str(path), signatures=call)
    else:
        tf.saved_model.save(model, str(path))


def save_file(suffix: str) -> Any:
    def save(model: Any, path: Path) -> None:
        path.mkdir(parents=True)
        model.save(path / f"model{suffix}")

    return save


def save_export(model: Any, path: Path) -> None:
    model.export(str(path), verbose=False)


def save_keras_2(model: Any, path: Path) -> None:
    model.save(str(path), save_format="tf")


FORMS: dict[str, tuple[Any, Any]] = {
    "saved-sequential": (lambda: trained(sequential()), save_saved_model),
    "saved-functional": (lambda: trained(functional()), save_saved_model),
    "saved-subclassed": (lambda: trained(subclassed()), save_saved_model),
    "saved-module": (Holder, save_saved_model),
    "export-sequential": (lambda: trained(sequential()), save_export),
    "export-subclassed": (subclassed, save_export),
    "keras-functional": (lambda: trained(functional()), save_file(".keras")),
    "keras-augmented": (augmented, save_file(".keras")),
    "h5-sequential": (lambda: trained(sequential()), save_file(".h5")),
    "keras2-slots": (lambda: trained(sequential(tf_keras)), save_keras_2),
    "keras2-saved": (lambda: trained(sequential(tf_keras)), save_saved_model),
}


def main(folder: Path) -> None:
    """Write ``FOLDER/<form>/1`` for each form, and the answers to `INPUT`, which is there as ``x``."""
    answers: dict[str, Any] = {}
    for name, (build, save) in FORMS.items():
        model = build()
        save(model, folder / name / "1")
        output = model(INPUT) if isinstance(model, tf.Module) else model.predict(INPUT, verbose=0)
        answers[name] = np.asarray(output["y"] if isinstance(output, dict) else output)
    np.savez(folder / "answers.npz", x=INPUT, **answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
