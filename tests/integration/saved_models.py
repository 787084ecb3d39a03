"""Writes small SavedModels with TensorFlow, which is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Shape = tuple[int | None, ...] | None


def save(
    path: Path,
    signatures: Mapping[str, tuple[Callable[..., Any], Mapping[str, tuple[Any, Shape]]]],
    tracked: Sequence[Any] = (),
) -> Path:
    """Write a module whose `signatures` are functions with their inputs: name → (type, shape).

    `tracked` are tables and the like that the functions use. Each function takes its inputs by name
    and returns outputs by name.
    """
    import tensorflow as tf

    module = tf.Module()
    module.tracked = list(tracked)
    concrete = {}
    for name, (function, inputs) in signatures.items():
        specs = {key: tf.TensorSpec(shape, dtype, key) for key, (dtype, shape) in inputs.items()}
        concrete[name] = tf.function(function).get_concrete_function(**specs)
    tf.saved_model.save(module, str(path), signatures=concrete)
    return path


def save_default(path: Path, function: Callable[..., Any], **inputs: tuple[Any, Shape]) -> Path:
    """Write a module with one signature, ``serving_default``."""
    return save(path, {"serving_default": (function, inputs)})


def save_cnn(path: Path) -> Any:
    """Export a small convolutional Keras model (8×8×1 → 10); returns the model."""
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.export(str(path), format="tf_saved_model", verbose=False)
    return model
