"""What Keras 2 wrote, as Keras 3 reads it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import pytest

from service.errors import ModelLoadError
from service.registry.legacy import HARD_SIGMOID, check_vocabularies, modernise, translate


def layer(class_name: str, **config: Any) -> dict[str, Any]:
    return {"class_name": class_name, "config": {"name": "l", **config}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (layer("LSTM", units=2, time_major=False), layer("LSTM", units=2)),
        (layer("Dense", time_major=False), layer("Dense", time_major=False)),
        (layer("DepthwiseConv2D", groups=1, kernel_initializer="x"), layer("DepthwiseConv2D")),
        (layer("Conv2D", groups=2, kernel_initializer="x"), layer("Conv2D", groups=2, kernel_initializer="x")),
        (layer("MultiHeadAttention", query_shape=[1], softmax_robust_masking=False), layer("MultiHeadAttention")),
        (layer("BatchNormalization", axis=[3]), layer("BatchNormalization", axis=3)),
        (layer("BatchNormalization", axis=[1, 2]), layer("BatchNormalization", axis=[1, 2])),
        (layer("GRU", units=1), layer("GRU", units=1, reset_after=False)),
        (layer("GRU", units=1, reset_after=True), layer("GRU", units=1, reset_after=True)),
        (
            layer("Dense", dtype={"class_name": "Policy", "config": {"name": "mixed_float16"}}),
            layer("Dense", dtype="mixed_float16"),
        ),
        ({"class_name": 3, "config": {}}, {"class_name": 3, "config": {}}),
        (
            {**layer("Dense", batch_input_shape=[None, 2]), "module": "keras.layers"},
            {**layer("Dense"), "module": "keras.layers"},
        ),
        (
            {**layer("Functional"), "module": "tf_keras.src.engine.functional"},
            {**layer("Functional"), "module": "keras.src.models.functional"},
        ),
        ({**layer("Sequential"), "module": "keras.engine"}, {**layer("Sequential"), "module": "keras"}),
    ],
)
def test_the_same_layer_as_keras_3_has_it(old: Any, new: Any):
    """Arguments go where they say nothing; all else stays."""
    assert translate(old) == new
    assert translate({"layers": [old]}) == {"layers": [new]}


def test_hard_sigmoid_keeps_its_meaning():
    """It is named apart from Keras 3's, wherever it is an activation."""
    config = translate(layer("LSTM", recurrent_activation="hard_sigmoid", activation="tanh"))["config"]
    assert config["recurrent_activation"]["config"] == HARD_SIGMOID
    assert config["activation"] == "tanh"


def test_calls_of_a_nested_model_count_from_0():
    """In Keras 2 the first is its own making; other layers count from 0 already."""
    inner = {"class_name": "Sequential", "config": {"name": "inner"}, "name": "inner"}
    calls = [[["inner", 1, 0, {}]], [["inner", 2, 0, {"axis": [1, 2]}], ["dense", 1, 0, {}]]]
    old = {"layers": [inner, {"inbound_nodes": calls}], "output_layers": [["inner", 1, 0], ["dense", 1, 0]]}
    new = translate(old)
    assert new["layers"][1]["inbound_nodes"] == [
        [["inner", 0, 0, {}]],
        [["inner", 1, 0, {"axis": [1, 2]}], ["dense", 1, 0, {}]],
    ]
    assert new["output_layers"] == [["inner", 0, 0], ["dense", 1, 0]]


def tensor(*reference: Any) -> dict[str, Any]:
    config = {"shape": [1], "dtype": "float32", "keras_history": [*reference]}
    return {"class_name": "__keras_tensor__", "config": config}


def test_tensors_given_by_name_are_told_from_lists():
    """Keras 3 sees them in its own form of a call alone; other calls stay as they are."""
    calls = [
        [["x", 0, 0, {"value": ["y", 1, 0], "causal": True}]],
        [["x", 0, 0, {"mask": ["y", 0, 1]}], ["z", 0, 0, {}]],
        [["x", 0, 0, {"axis": [1, 2]}]],
        {"args": [], "kwargs": {}},
        ["x", 0, 0],
    ]
    assert translate({"inbound_nodes": calls})["inbound_nodes"] == [
        {"args": [tensor("x", 0, 0)], "kwargs": {"value": tensor("y", 1, 0), "causal": True}},
        {"args": [[tensor("x", 0, 0), tensor("z", 0, 0)]], "kwargs": {"mask": tensor("y", 0, 1)}},
        *calls[2:],
    ]


@pytest.mark.parametrize(
    ("old", "text"),
    [
        (layer("LSTM", time_major=True), "layer 'l' (LSTM) is refused: Keras 3 has no time_major=True; export it with"),
        (layer("TFOpLambda", function="math.add"), "layer 'l' (TFOpLambda) is refused: it calls tf.math.add, which"),
        (layer("InstanceMethod"), "layer 'l' (InstanceMethod) is refused: it calls an operation, which Keras 3"),
        ({"class_name": "ThresholdedReLU", "config": {}}, "a layer (ThresholdedReLU) is refused: Keras 3 has no such"),
    ],
)
def test_what_means_something_else_is_refused(old: Any, text: str):
    """With the layer, the reason and a way out."""
    with pytest.raises(ModelLoadError) as refusal:
        translate(old)
    assert str(refusal.value).startswith(text)
    assert str(refusal.value).endswith("as a SavedModel and import that")


def test_a_config_without_end_is_refused():
    """Nesting is bounded here as in the scan."""
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    with pytest.raises(ModelLoadError, match="nested deeper than 200 levels"):
        translate(deep)


def test_a_lost_vocabulary_is_told():
    """A list is data; none means that ``adapt()`` had learned it, or that there never was one."""
    check_vocabularies(layer("StringLookup", vocabulary=["a"]))
    check_vocabularies(layer("Dense", vocabulary=None))
    with pytest.raises(
        ModelLoadError, match=r"layer 'l' \(StringLookup\) has no vocabulary: .* save the model as \.keras"
    ):
        check_vocabularies([layer("StringLookup", vocabulary=None)])


def archive(path: Path, **members: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.mkdir("assets")
        for name, text in members.items():
            file.writestr(name.replace("_", "."), text)
    return path


def test_a_keras_file_is_copied_only_if_keras_2_wrote_it(tmp_path: Path):
    """Its config is translated, its other members are as they were."""
    old, new = json.dumps(layer("LSTM", time_major=False)), json.dumps({"keras_version": "3.10.0"})
    ours = archive(tmp_path / "new.keras", config_json=old, metadata_json=new)
    assert modernise(ours, tmp_path) == ours
    assert modernise(archive(tmp_path / "bare.keras", config_json=old), tmp_path) == tmp_path / "bare.keras"
    odd = archive(tmp_path / "odd.keras", config_json=old, metadata_json="[]")
    assert modernise(odd, tmp_path) == odd
    version = json.dumps({"keras_version": "2.15.0"})
    theirs = archive(tmp_path / "old.keras", config_json=old, metadata_json=version, model_weights_h5="weights")
    with zipfile.ZipFile(modernise(theirs, tmp_path)) as file:
        assert json.loads(file.read("config.json")) == layer("LSTM")
        assert file.read("model.weights.h5") == b"weights"


@pytest.mark.parametrize(("version", "copied"), [("2.4.0", True), (b"2.3.1", True), ("3.1.0", False), (None, False)])
def test_an_h5_file_is_copied_only_if_keras_2_wrote_it(tmp_path: Path, version: Any, copied: bool):
    """The original stays as it is."""
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(layer("GRU", time_major=False))
        if version is not None:
            file.attrs["keras_version"] = version
    before = path.read_bytes()
    opened = modernise(path, tmp_path)
    assert (opened != path) == copied
    assert path.read_bytes() == before
    if copied:
        with h5py.File(opened) as file:
            assert json.loads(file.attrs["model_config"]) == layer("GRU")


def test_damaged_files_are_told(tmp_path: Path):
    """As the scan tells it; an ``.h5`` file of weights is left to the scan."""
    for name in ("a.keras", "a.h5"):
        (tmp_path / name).write_bytes(b"no model")
        with pytest.raises(ModelLoadError, match=rf"the \.{name[2:]} file is damaged"):
            modernise(tmp_path / name, tmp_path)
    with h5py.File(tmp_path / "w.h5", "w"):
        pass
    assert modernise(tmp_path / "w.h5", tmp_path) == tmp_path / "w.h5"
