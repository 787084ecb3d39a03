"""Models of Keras 2 and of other backends: they answer as they did, or it is said exactly why not."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from service.errors import ModelLoadError
from service.registry.importer import import_model, open_model
from service.registry.reference import answers_of_model
from service.registry.repository import Kind, Source
from service.runtime.savedmodel import SavedModel

pytestmark = [
    pytest.mark.timeout(600),  # several processes that import TensorFlow
    pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Argument `input_length` is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Argument `alpha` is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]
SAVERS = Path(__file__).parent / "savers"
ROOT = Path(__file__).parents[2]
SAME = ("recurrent", "convolutional", "nested", "attention", "hard", "half")


def save(saver: str, *arguments: str | Path, **environment: str) -> None:
    command = [sys.executable, str(SAVERS / saver), *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, check=False, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def keras_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what Keras 2 saved."""
    folder = tmp_path_factory.mktemp("keras_2")
    save("keras_2.py", folder)
    return folder


@pytest.fixture(scope="module")
def answers(keras_2: Path) -> dict[str, Any]:
    with np.load(keras_2 / "answers.npz") as file:
        return dict(file)


def inputs_of(answers: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.partition(" ")[2]: value for key, value in answers.items() if key.startswith(f"{name} ")}


@pytest.mark.parametrize("suffix", ["h5", "keras"])
@pytest.mark.parametrize("name", SAME)
def test_files_of_keras_2_answer_as_they_did(
    keras_2: Path, answers: dict[str, Any], tmp_path: Path, name: str, suffix: str
):
    """What Keras 2 wrote is opened by Keras 3 with the same answers, hard_sigmoid and calls of models included."""
    model = open_model([], keras_2 / f"{name}.{suffix}", tmp_path)
    (outputs,) = answers_of_model(model, [inputs_of(answers, name)])
    tolerance = 1e-3 if name == "half" else 1e-5
    np.testing.assert_allclose(outputs["output_0"], answers[name], tolerance, tolerance)


OPERATOR = r"layer 'tf\.nn\.relu' \(TFOpLambda\) is refused: it calls tf\.nn\.relu, which Keras 3 cannot; export"
LOST = r"layer 'text_vectorization\w*' \(TextVectorization\) has no vocabulary: \.h5 files do not keep what adapt\(\)"


@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_what_keras_3_cannot_is_said(keras_2: Path, tmp_path: Path, suffix: str):
    """TensorFlow's operations as layers are refused with layer, reason and a way out."""
    with pytest.raises(ModelLoadError, match=OPERATOR):
        open_model([], keras_2 / f"operators.{suffix}", tmp_path)


def test_a_lost_vocabulary_is_said(tmp_path: Path):
    """Keras 3 writes such a file, and opens it, without a word."""
    import keras

    words = keras.layers.TextVectorization(output_sequence_length=4)
    words.adapt(["a good day"])
    keras.Sequential([keras.Input((1,), dtype="string"), words]).save(tmp_path / "words.h5")
    with pytest.raises(ModelLoadError, match=LOST):
        open_model([], tmp_path / "words.h5", tmp_path)


def test_an_argument_that_means_something_is_not_dropped(keras_2: Path, tmp_path: Path):
    """Time first is another computation, not another spelling."""
    path = tmp_path / "model.h5"
    shutil.copyfile(keras_2 / "recurrent.h5", path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = (keras_2 / "time_major.json").read_text()
    with pytest.raises(ModelLoadError, match=r"layer 'lstm.*' \(LSTM\) is refused: Keras 3 has no time_major=True"):
        open_model([], path, tmp_path)


def test_a_saved_model_of_keras_2_is_served(keras_2: Path, answers: dict[str, Any]):
    """With the state of its optimizer, LSTM, GRU and batch normalisation: the graph alone is loaded."""
    served = SavedModel(keras_2 / "recurrent")
    signature = served.signatures["serving_default"]
    (given,) = inputs_of(answers, "recurrent").values()
    (output,) = served.plan(signature).run({signature.inputs[0].name: given}).values()
    served.close()
    np.testing.assert_allclose(output, answers["recurrent"], 1e-5, 1e-5)


def test_a_saved_model_of_keras_2_keeps_its_vocabulary(keras_2: Path):
    """Known words differ from unknown ones."""
    served = SavedModel(keras_2 / "words")
    signature = served.signatures["serving_default"]
    (output,) = served.plan(signature).run({signature.inputs[0].name: np.array([b"good day", b"x y"], object)}).values()
    served.close()
    assert output.shape == (2, 4, 3)
    assert not np.allclose(output[0, 0], output[1, 0])


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_file_of_another_backend_is_served(tmp_path: Path, backend: str):
    """Layers and weights know no backend: the served answers are those of the backend that trained."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    save("other_backend.py", tmp_path, backend, KERAS_BACKEND=backend)
    source = Source("steps", 1, Kind.KERAS, tmp_path / "steps.keras")
    served = SavedModel(import_model(source, cache_dir=tmp_path / "cache", timeout_s=300.0))
    with np.load(tmp_path / "answers.npz") as file:
        outputs = served.plan(served.signatures["serving_default"]).run({"steps": file["x"]})
        np.testing.assert_allclose(outputs["output_0"], file["y"], 1e-4, 1e-5)
    served.close()


def test_the_network_of_basic_pitch_is_served(tmp_path: Path):
    """A real audio network with a Keras 2 optimizer, on which TensorFlow's own loader fails."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "basic-pitch==0.4.0"]
    done = subprocess.run(download, check=False, capture_output=True, text=True, timeout=200)
    wheel = next(tmp_path.glob("*.whl"), None)
    if wheel is None:
        pytest.skip(f"basic-pitch cannot be had: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [n for n in archive.namelist() if "/icassp_2022/nmp/" in n])
    served = SavedModel(tmp_path / "basic_pitch/saved_models/icassp_2022/nmp")
    signature = served.signatures["serving_default"]
    (sound,) = signature.inputs
    assert sound.wire_shape() == [-1, 43844, 1]
    plan = served.plan(signature)
    tone = np.sin(np.arange(43844) * (2 * np.pi * 440 / 22050)).astype(np.float32).reshape(1, -1, 1)
    first, second = plan.run({sound.name: tone}), plan.run({sound.name: tone})
    served.close()
    assert sorted(array.shape for array in first.values()) == [(1, 172, 88), (1, 172, 88), (1, 172, 264)]
    for name, array in first.items():
        assert np.array_equal(array, second[name])
        assert 0 <= array.min() < array.max() <= 1


def test_a_layer_of_one_backend_is_refused_by_name(tmp_path: Path):
    """What only JAX can run is told as that."""
    layer = {"module": "keras.layers", "class_name": "JaxLayer", "config": {"name": "net"}, "registered_name": None}
    config = {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": [layer]}}
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.10.0"}))
    with pytest.raises(
        ModelLoadError, match=r"layer 'net' \(JaxLayer\) is refused: .* runs under the JAX backend only"
    ):
        open_model([], tmp_path / "model.keras", tmp_path)
