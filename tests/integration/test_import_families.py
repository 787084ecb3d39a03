"""Each family of Keras's layers and ways to build a model: scanned, opened, exported and served as Keras answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.registry.exporting import are_parameters, export_model
from service.registry.importer import open_model
from service.registry.reference import answers_of_model
from service.runtime.savedmodel import SavedModel
from service.tensors import Tensors

pytestmark = [
    pytest.mark.timeout(300),
    # Keras saves through NumPy's old protocol
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
ROWS = 3
Built = tuple[Any, Tensors]
Build = Callable[[Any, Any], Built]


def floats(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal((ROWS, *shape), dtype=np.float32)


def chain(keras: Any, example: Any, *layers: Any, **options: Any) -> Built:
    """A Sequential model of one input ``x``, shaped and typed as `example` (rows, …)."""
    dtype = "string" if example.dtype == object else str(example.dtype)
    return keras.Sequential([keras.Input(example.shape[1:], dtype=dtype, name="x", **options), *layers]), {"x": example}


def convolution_1d(keras: Any, layers: Any) -> Built:
    return chain(keras, floats(9, 2), layers.Conv1D(3, 3), layers.MaxPooling1D(2), layers.Conv1DTranspose(2, 2))


def convolution_3d(keras: Any, layers: Any) -> Built:
    return chain(
        keras, floats(4, 6, 6, 1), layers.Conv3D(2, 3), layers.AveragePooling3D((1, 2, 2)), layers.GlobalMaxPooling3D()
    )


def video(keras: Any, layers: Any) -> Built:
    return chain(
        keras,
        floats(3, 6, 6, 1),
        layers.TimeDistributed(layers.Conv2D(2, 3)),
        layers.ConvLSTM2D(2, 3),
        layers.Flatten(),
    )


def recurrent(keras: Any, layers: Any) -> Built:
    both_ways = layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode="concat")
    return chain(keras, floats(5, 2), both_ways, layers.SimpleRNN(3, return_sequences=True), layers.GRU(2))


def attention(keras: Any, layers: Any) -> Built:
    x = keras.Input((5, 4), name="x")
    y = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 3)(x, x))
    y = layers.Attention()([y, y]) + layers.AdditiveAttention()([y, y])
    return keras.Model(x, layers.GlobalAveragePooling1D()(y)), {"x": floats(5, 4)}


def embedding(keras: Any, layers: Any) -> Built:
    words = np.array([[1, 2, 0], [3, 0, 0], [9, 9, 9]], np.int32)
    return chain(keras, words, layers.Embedding(10, 3, mask_zero=True), layers.LSTM(2))


WORDS = np.array([["ape"], ["cat"], ["dog"]], object)


def string_lookup(keras: Any, layers: Any) -> Built:
    lookup = layers.StringLookup(vocabulary=["ape", "cat"], output_mode="one_hot")
    return chain(keras, WORDS, lookup, layers.Dense(2))


def integer_lookup(keras: Any, layers: Any) -> Built:
    return chain(keras, np.array([[4], [7], [5]]), layers.IntegerLookup(vocabulary=[4, 5], output_mode="multi_hot"))


def category_encoding(keras: Any, layers: Any) -> Built:
    return chain(keras, np.array([[0, 1], [2, 2], [3, 0]], np.int32), layers.CategoryEncoding(4, "count"))


def hashing(keras: Any, layers: Any) -> Built:
    return chain(keras, WORDS, layers.Hashing(8), layers.Embedding(8, 2), layers.Flatten())


def discretization(keras: Any, layers: Any) -> Built:
    return chain(keras, floats(2), layers.Discretization([-0.5, 0.0, 0.5], output_mode="int"))


def normalization(keras: Any, layers: Any) -> Built:
    learned = layers.Normalization()
    learned.adapt(floats(3) * 4 + 2)
    return chain(keras, floats(3), learned, layers.UnitNormalization())


def text_vectorization(keras: Any, layers: Any) -> Built:
    learned = layers.TextVectorization(output_mode="tf_idf", ngrams=2)
    learned.adapt(["ape and cat", "cat and dog"])
    return chain(keras, WORDS, learned)


def augmentation(keras: Any, layers: Any) -> Built:
    """Layers that do something in training only."""
    return chain(
        keras,
        floats(8, 8, 3),
        layers.RandomFlip(seed=1),
        layers.RandomRotation(0.1, seed=1),
        layers.RandomZoom(0.2, seed=1),
        layers.RandomTranslation(0.1, 0.1, seed=1),
        layers.RandomContrast(0.2, seed=1),
        layers.GaussianNoise(0.3),
        layers.Dropout(0.5),
        layers.Resizing(4, 4),
        layers.CenterCrop(2, 2),
        layers.Rescaling(0.5),
    )


def several_outputs(keras: Any, layers: Any) -> Built:
    x = keras.Input((3,), name="x")
    return keras.Model(x, {"price": layers.Dense(1)(x), "class": layers.Dense(2)(x)}), {"x": floats(3)}


def list_of_outputs(keras: Any, layers: Any) -> Built:
    x = keras.Input((3,), name="x")
    return keras.Model(x, [layers.Dense(1)(x), layers.Dense(2)(x)]), {"x": floats(3)}


def nested(keras: Any, layers: Any) -> Built:
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.BatchNormalization()])
    middle_in = keras.Input((3,))
    middle = keras.Model(middle_in, layers.Dense(2)(inner(middle_in)))
    x = keras.Input((3,), name="x")
    return keras.Model(x, layers.Concatenate()([middle(x), middle(-x)])), {"x": floats(3)}


def shared(keras: Any, layers: Any) -> Built:
    """A layer called twice: its weights are there once."""
    dense = layers.Dense(4, activation="tanh")
    left, right = keras.Input((3,), name="left"), keras.Input((3,), name="right")
    return keras.Model([left, right], layers.Dot(1)([dense(left), dense(right)])), {
        "left": floats(3),
        "right": -floats(3),
    }


def dictionary_of_inputs(keras: Any, layers: Any) -> Built:
    a, b = keras.Input((1,), name="rooms"), keras.Input((1,), dtype="string", name="town")
    town = layers.StringLookup(vocabulary=["ape"], output_mode="one_hot")(b)
    model = keras.Model({"rooms": a, "town": b}, layers.Dense(1)(layers.Concatenate()([a, town])))
    return model, {"rooms": floats(1), "town": WORDS}


def mixed_precision(keras: Any, layers: Any) -> Built:
    return chain(keras, floats(3), layers.Dense(4, dtype="mixed_bfloat16"), layers.Dense(2, dtype="float32"))


def named(*names: str) -> Build:
    """Inputs called `names`, which each weigh differently."""

    def build(keras: Any, layers: Any) -> Built:
        inputs = [keras.Input((2,), name=name) for name in names]
        joined = layers.Concatenate()(inputs) if len(inputs) > 1 else inputs[0]
        values = {name: floats(2) * (number + 1) for number, name in enumerate(names)}
        return keras.Model(inputs if len(inputs) > 1 else inputs[0], layers.Dense(2)(joined)), values

    return build


def chained_from(keras: Any, layers: Any) -> Built:
    return keras.Sequential([keras.Input((2,), name="from"), layers.Dense(1)]), {"from": floats(2)}


def keyword_keys(keras: Any, layers: Any) -> Built:
    """Inputs in a dictionary, and outputs, called by Python's keywords."""
    inputs = {name: keras.Input((2,), name=name) for name in ("from", "in")}
    outputs = {"yield": layers.Dense(1)(inputs["from"]), "else": layers.Dense(1)(inputs["in"])}
    return keras.Model(inputs, outputs), {"from": floats(2), "in": -floats(2)}


FAMILIES: dict[str, Build] = {
    build.__name__: build
    for build in (
        *(convolution_1d, convolution_3d, video, recurrent, attention, embedding, string_lookup, integer_lookup),
        *(category_encoding, hashing, discretization, normalization, text_vectorization, augmentation),
        *(several_outputs, list_of_outputs, nested, shared, dictionary_of_inputs, mixed_precision),
        *(chained_from, keyword_keys),
    )
} | {
    " ".join(names): named(*names)
    for names in [("class", "x"), ("number of rooms",), ("a-b", "1st"), ("höhe", "y"), ("self", "y"), ("_x", "X", "x")]
}


def assert_served(keras_model: Any, folder: Path, inputs: Tensors, signature_name: str = "serving_default") -> None:
    """The SavedModel in `folder` takes `inputs` by their names, and answers as Keras does."""
    served = SavedModel(folder, "CPU:0")
    try:
        signature = served.signatures[signature_name]
        assert {spec.name for spec in signature.inputs} == set(inputs)
        (want,) = answers_of_model(keras_model, [inputs])
        got = served.plan(signature).run(inputs)
        assert got.keys() == want.keys()
        for name, array in want.items():
            tolerance = 2e-2 if "bfloat16" in str(array.dtype) else 1e-4
            np.testing.assert_allclose(got[name].astype(np.float64), array.astype(np.float64), tolerance, 1e-5)
    finally:
        served.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_imported_and_served(tmp_path: Path, name: str) -> None:
    """A ``.keras`` file of each is looked over, opened and exported; its inputs keep their names."""
    import keras

    keras.utils.set_random_seed(3)
    model, inputs = FAMILIES[name](keras, keras.layers)
    file = tmp_path / "model.keras"
    model.save(file)
    export_model(open_model([], file, tmp_path), tmp_path / "saved")
    assert_served(model, tmp_path / "saved", {key: _bytes(array) for key, array in inputs.items()})


def _bytes(array: Any) -> Any:
    return np.vectorize(str.encode, otypes=[object])(array) if array.dtype == object else array


@pytest.mark.parametrize(
    ("names", "are_safe"),
    [
        (["x", "number_of_rooms", "match"], True),
        ([], True),
        (["from"], False),
        (["None"], False),
        (["a b"], False),
        (["höhe"], False),
        (["_x"], False),
        (["self"], False),
        (["x", "X"], False),
    ],
)
def test_which_names_a_function_can_have(names: list[str], are_safe: bool) -> None:
    """Keywords, spaces, other alphabets, and names that differ by case alone are none."""
    assert are_parameters(names) is are_safe
