"""Real Keras files through the importer's real child process: what it converts, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ModelLoadError
from service.registry.importer import import_model
from service.registry.repository import Kind, Source
from service.registry.scan import scan_file
from service.runtime.savedmodel import SavedModel
from service.tensors import Tensors

pytestmark = [
    # Keras saves through NumPy's old protocol
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving a model that has not yet been built:UserWarning"),
]

CHILDREN_AT_ONCE = 2


def sequential(keras: Any) -> Any:
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((6, 6, 1), name="image"),
            layers.Conv2D(2, 3, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(3, activation="softmax"),
        ]
    )


def functional(keras: Any) -> Any:
    left, right = keras.Input((3,), name="left"), keras.Input((3,), name="right", dtype="int32")
    both = keras.layers.Concatenate()([left, keras.ops.cast(right, "float32") * 2.0])
    outputs = {
        "sum": keras.layers.Dense(1, name="sum")(both),
        "norm": keras.layers.LayerNormalization(name="norm")(both),
    }
    return keras.Model([left, right], outputs)


def lstm(keras: Any) -> Any:
    layers = keras.layers
    recurrent = layers.Bidirectional(layers.LSTM(3, return_sequences=True))
    return keras.Sequential([layers.Input((None, 2), name="steps"), recurrent, layers.GRU(2)])


def text(keras: Any) -> Any:
    words = keras.layers.TextVectorization(output_mode="int", output_sequence_length=4)
    words.adapt(["a good day", "a bad night"])
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((1,), dtype="string", name="text"), words, layers.Embedding(10, 3, mask_zero=True), layers.LSTM(2)]
    )


def compiled(keras: Any) -> Any:
    model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)])

    def my_loss(want: Any, got: Any) -> Any:
        return keras.ops.mean(want - got)

    model.compile("adam", loss=my_loss, metrics=["mae"])
    return model


def with_lambda(keras: Any) -> Any:
    return keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x * 2, name="twice")])


def custom(keras: Any) -> Any:
    class Mine(keras.Model):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.dense = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    model = Mine(name="net")
    model(np.zeros((1, 3), np.float32))
    return model


def unbuilt(keras: Any) -> Any:
    return keras.Sequential([keras.layers.Dense(2)])


def floats(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


GOOD: dict[str, tuple[Callable[[Any], Any], Tensors]] = {
    "sequential.keras": (sequential, {"image": floats(3, 6, 6, 1)}),
    "functional.keras": (functional, {"left": floats(3, 3), "right": np.arange(9, dtype=np.int32).reshape(3, 3)}),
    "lstm.keras": (lstm, {"steps": floats(3, 5, 2)}),
    "text.keras": (text, {"text": np.array([[b"a good night"], [b"unknown"], [b""]], object)}),
    "compiled.keras": (compiled, {"x": floats(2, 3)}),
    "sequential.h5": (sequential, {"image": floats(2, 6, 6, 1)}),
}
BAD: dict[str, Callable[[Any], Any]] = {
    "lambda.keras": with_lambda,
    "lambda.h5": with_lambda,
    "custom.keras": custom,
    "unbuilt.keras": unbuilt,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keras")


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, Any]:
    """Every model, by the name of the file that it was saved to."""
    import keras

    keras.utils.set_random_seed(7)
    models = {name: build(keras) for name, (build, _) in GOOD.items()} | {n: build(keras) for n, build in BAD.items()}
    for name, model in models.items():
        model.save(root / name)
    return models


def source(path: Path) -> Source:
    return Source(path.stem, 1, Kind.H5 if path.suffix == ".h5" else Kind.KERAS, path)


@pytest.fixture(scope="module")
def imported(root: Path, models: dict[str, Any]) -> dict[str, Path | ModelLoadError]:
    """For each file the folder that it was imported to, or the refusal; one child process each."""
    outside = root / "elsewhere" / "service"  # a package of the same name in the working folder must not matter
    outside.mkdir(parents=True)
    (outside / "__init__.py").write_text("raise RuntimeError('not this one')")

    def attempt(name: str) -> Path | ModelLoadError:
        try:
            return import_model(source(root / name), cache_dir=root / "cache", timeout_s=100.0)
        except ModelLoadError as error:
            return error

    before = Path.cwd()
    os.chdir(outside.parent)
    try:
        with ThreadPoolExecutor(CHILDREN_AT_ONCE) as pool:
            return dict(zip(models, pool.map(attempt, models), strict=True))
    finally:
        os.chdir(before)


@pytest.fixture
def loaded(request: pytest.FixtureRequest, imported: dict[str, Path | ModelLoadError]) -> Iterator[SavedModel]:
    path = imported[request.param]
    assert isinstance(path, Path), path
    model = SavedModel(path)
    yield model
    model.close()


def predict(model: Any, inputs: Tensors) -> list[Any]:
    """What Keras itself answers, as a list of outputs by name, or of its only one."""
    import tensorflow as tf

    tensors = {name: tf.constant(array.tolist(), tf.string) if array.dtype == object else tf.constant(array)
               for name, array in inputs.items()}  # fmt: skip
    answer = model(list(tensors.values()) if len(tensors) > 1 else next(iter(tensors.values())), training=False)
    answers = answer if isinstance(answer, dict) else {"": answer}
    return [answers[name].numpy() for name in sorted(answers)]


@pytest.mark.parametrize(("loaded", "name"), [(name, name) for name in GOOD], indirect=["loaded"])
def test_an_imported_model_answers_as_keras_does(loaded: SavedModel, models: dict[str, Any], name: str) -> None:
    """Each kind of model answers, after its import, what the model in memory answers."""
    inputs = GOOD[name][1]
    signature = loaded.signatures["serving_default"]
    assert {spec.name: spec.dtype.numpy for spec in signature.inputs} == {n: a.dtype for n, a in inputs.items()}
    assert signature.batched
    outputs = loaded.plan(signature).run(inputs)
    expected = predict(models[name], inputs)
    assert len(outputs) == len(expected)
    for output, want in zip((outputs[key] for key in sorted(outputs)), expected, strict=True):
        np.testing.assert_allclose(output, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loaded", ["functional.keras"], indirect=True)
def test_outputs_keep_their_names(loaded: SavedModel) -> None:
    """A model that answers with names is served under those names."""
    assert sorted(loaded.signatures["serving_default"].output_by_name) == ["norm", "sum"]


@pytest.mark.parametrize("loaded", ["lstm.keras"], indirect=True)
def test_open_sizes_stay_open(loaded: SavedModel) -> None:
    """A sequence of any length is declared as one."""
    assert loaded.signatures["serving_default"].inputs[0].shape == (None, None, 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lambda.keras", "layer 'twice' (Lambda) is refused: it holds Python code; "),
        ("lambda.h5", "layer 'twice' (Lambda) is refused: it holds Python code; "),
        ("custom.keras", "the model is refused: Mine "),
        ("unbuilt.keras", "the model has no input shape: call or build it once before saving it"),
    ],
)
def test_what_cannot_be_imported_is_refused(imported: dict[str, Path | ModelLoadError], name: str, text: str) -> None:
    """Code in layers, foreign classes and models without an input shape are refused by name and reason."""
    refusal = imported[name]
    assert isinstance(refusal, ModelLoadError)
    assert text in str(refusal)
    assert "\n" not in str(refusal)


def test_a_second_import_is_found_in_the_cache(
    root: Path, models: dict[str, Any], imported: dict[str, Path | ModelLoadError]
) -> None:
    """The same content under another name starts no child."""
    copy = shutil.copy(root / "sequential.keras", root / "copy.keras")

    def run_child(*arguments: Any) -> Any:
        raise AssertionError("a child was started")

    found = import_model(source(Path(copy)), cache_dir=root / "cache", timeout_s=1.0, run_child=run_child)
    assert found == imported["sequential.keras"]


def test_the_cache_has_whole_imports_only(root: Path, imported: dict[str, Path | ModelLoadError]) -> None:
    """One folder for each converted file, with its manifest; nothing is left of the refused ones."""
    folders = {path for path in imported.values() if isinstance(path, Path)}
    assert set((root / "cache").iterdir()) == folders
    assert len(folders) == len(GOOD)
    assert all(json.loads((folder / "kiln.json").read_text())["keras"] != "none" for folder in folders)


@pytest.mark.parametrize("name", [*GOOD, "unbuilt.keras"])
def test_the_scanner_passes_what_keras_writes(root: Path, models: dict[str, Any], name: str) -> None:
    """Models of Keras's own layers are let through, with custom losses and assets."""
    scan_file(root / name)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_the_scanner_passes_a_model_of_many_layers(tmp_path: Path, suffix: str) -> None:
    """Wrappers, attention, operators, preprocessing, initializers, constraints and policies are Keras's own."""
    import keras

    layers = keras.layers
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Rescaling(1 / 255)(image)
    x = layers.RandomFlip()(layers.Normalization(mean=[0.0] * 3, variance=[1.0] * 3)(x))
    x = layers.SeparableConv2D(4, 3, depthwise_constraint="max_norm", pointwise_initializer="he_normal")(x)
    x = layers.GroupNormalization(2)(layers.PReLU()(x))
    x = keras.ops.concatenate([x * 2.0 + 1.0, keras.ops.transpose(x, (0, 2, 1, 3))[:, ::1, ..., :2]], axis=-1)
    x = layers.Reshape((-1, 6))(layers.LeakyReLU(0.1)(x))
    x = layers.MultiHeadAttention(2, 3)(x, x)
    x = layers.TimeDistributed(layers.Dense(4, activation=keras.activations.gelu, dtype="mixed_float16"))(x)
    x = layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])(x)
    inner = keras.Sequential([keras.Input((2,)), layers.Dense(2, kernel_regularizer=keras.regularizers.L1L2(0.1, 0.2))])
    word = keras.Input((1,), dtype="string", name="word")
    one_hot = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")(word)
    model = keras.Model([image, word], [inner(x), one_hot, layers.Discretization([0.0, 1.0])(x)])
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)), loss="mse")
    path = tmp_path / f"model{suffix}"
    model.save(path)
    scan_file(path)


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(root: Path, models: dict[str, Any], tmp_path: Path, keep: float) -> None:
    """A download that did not finish is damage, in either form."""
    for name in ("sequential.keras", "sequential.h5"):
        data = (root / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(ModelLoadError, match="damaged"):
            scan_file(tmp_path / name)


def test_what_is_no_model_is_refused_by_the_child(root: Path, models: dict[str, Any], tmp_path: Path) -> None:
    """A file whose config describes something else than a model is refused in words."""
    path = tmp_path / "zeros.keras"
    with zipfile.ZipFile(root / "compiled.keras") as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            zeros: dict[str, Any] = {
                "module": "keras.initializers",
                "class_name": "Zeros",
                "config": {},
                "registered_name": None,
            }
            new.writestr(member, json.dumps(zeros) if member == "config.json" else old.read(member))
    with pytest.raises(ModelLoadError, match=r"^(Keras cannot load it|the model has no input shape)"):
        import_model(source(path), cache_dir=tmp_path / "cache", timeout_s=100.0)
