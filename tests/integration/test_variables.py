"""SavedModels whose variables the session's way of loading leaves empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelLoadError
from service.runtime import variables
from service.runtime.savedmodel import SavedModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Keras 3 model that `tf.saved_model.save` wrote, and the model itself."""
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="relu"), keras.layers.Dense(2)])
    path = tmp_path_factory.mktemp("saved") / "model"
    tf.saved_model.save(model, str(path))
    return path, model


def test_a_keras_3_model_that_tensorflow_saved_answers(saved: tuple[Path, Any]) -> None:
    """Each variable is there twice, and the one that is read gets its value too."""
    path, keras_model = saved
    model = SavedModel(path)
    signature = model.signatures["serving_default"]
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    answer = model.plan(signature).run({signature.inputs[0].name: x})
    np.testing.assert_allclose(answer["output_0"], keras_model(x).numpy(), rtol=1e-5)
    model.close()


def test_a_variable_without_any_value_fails_the_load(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names the variable; the version is never READY."""
    monkeypatch.setattr(variables, "_values", lambda tf, path: {})
    with pytest.raises(ModelLoadError, match=r"its variable '.*' has no value"):
        SavedModel(saved[0])


def test_what_tensorflow_2_cannot_load_either_fails_the_load(
    saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is TensorFlow's."""
    import tensorflow as tf

    def fails(path: str) -> None:
        raise ValueError("no such node\nand more")

    monkeypatch.setattr(tf.saved_model, "load", fails)
    with pytest.raises(ModelLoadError, match=r"TensorFlow 2 cannot load it: no such node$"):
        SavedModel(saved[0])
