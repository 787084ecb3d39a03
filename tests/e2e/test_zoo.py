"""Every model of ``models/``, served together by one process, answers what Keras answers and is as good as it says."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from service.tensors import DataType, data_type_of, pack_strings, unpack_raw
from tests.e2e.conftest import CLIENTS, run_python
from tests.e2e.process import MODELS, Server

Arrays = dict[str, NDArray[Any]]
Ask = Callable[[str, Arrays], Arrays]

FOLDERS = sorted(folder.parent for folder in MODELS.glob("*/train.py"))
MAX_FOLDER_BYTES = 5 << 20
PARITY_ROWS = 16
SCORE_ROWS = 256
"""Rows of one request while a metric is taken."""
_TIMEOUT_S = 60
_TYPES = {dtype.value: dtype for dtype in DataType}
_NUMBERS = {dtype.number: dtype for dtype in DataType}

each_model = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@cached
def training(folder: Path) -> Any:
    """The model's ``train.py`` as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{folder.name}", folder / "train.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cached
def held_out(folder: Path) -> tuple[Arrays, Any]:
    return training(folder).held_out()  # type: ignore[no-any-return]


def first_rows(folder: Path) -> Arrays:
    return {name: array[:PARITY_ROWS] for name, array in held_out(folder)[0].items()}


def newest(folder: Path) -> Path:
    """The version that is served."""
    return max((each for each in folder.iterdir() if each.name.isdigit()), key=lambda each: int(each.name))


@dataclass
class Asking:
    """The running server in each dialect: held-out inputs, ``(rows, …)`` by name, to outputs."""

    server: Server
    channel: grpc.Channel

    def types(self, model: str) -> dict[str, DataType]:
        """Types of the default signature's outputs, as the server declares them."""
        metadata = self.server.get(f"/v2/models/{model}")[1]
        return {output["name"]: _TYPES[output["datatype"]] for output in metadata["outputs"]}

    def rest(self, model: str, inputs: Arrays) -> Arrays:
        types = self.types(model)
        values = {name: _as_json(array) for name, array in inputs.items()}
        status, answer = self.server.predict({"inputs": values}, model)
        assert status == 200, answer
        outputs = answer["outputs"]
        if len(types) == 1:
            outputs = {next(iter(types)): outputs}
        return {name: _from_json(outputs[name], dtype) for name, dtype in types.items()}

    def open_inference(self, model: str, inputs: Arrays) -> Arrays:
        request = oip.ModelInferRequest(model_name=model)
        for name, array in inputs.items():
            request.inputs.add(name=name, datatype=data_type_of(array).value, shape=array.shape)
            request.raw_input_contents.append(pack_strings(array) if array.dtype.kind == "O" else array.tobytes())
        call = self.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = oip.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=_TIMEOUT_S))
        return {
            output.name: unpack_raw(raw, _TYPES[output.datatype], tuple(output.shape), output.name)
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }

    def tensorflow_serving(self, model: str, inputs: Arrays) -> Arrays:
        request = tfs.PredictRequest(model_spec=tfs.ModelSpec(name=model))
        for name, array in inputs.items():
            proto: Any = request.inputs[name]
            proto.dtype = data_type_of(array).number
            for size in array.shape:
                proto.tensor_shape.dim.add(size=size)
            if array.dtype.kind == "O":
                proto.string_val.extend(array.ravel())
            else:
                proto.tensor_content = array.tobytes()
        call = self.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        answer = tfs.PredictResponse.FromString(call(request.SerializeToString(), timeout=_TIMEOUT_S))
        return {name: _from_proto(proto) for name, proto in answer.outputs.items()}


def _as_json(array: NDArray[Any]) -> Any:
    if array.dtype.kind != "O":
        return array.tolist()
    return np.vectorize(lambda item: {"b64": base64.b64encode(item).decode()}, otypes=[object])(array).tolist()


def _from_json(values: Any, dtype: DataType) -> NDArray[Any]:
    if dtype is not DataType.BYTES:
        return np.array(values, dtype.numpy)
    texts = np.array(values, object)
    return np.vectorize(lambda text: text.encode(), otypes=[object])(texts)  # type: ignore[no-any-return]


def _from_proto(proto: Any) -> NDArray[Any]:
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    dtype = _NUMBERS[proto.dtype]
    if dtype is DataType.BYTES:
        return np.array(list(proto.string_val), object).reshape(shape)
    return np.frombuffer(proto.tensor_content, dtype.numpy).reshape(shape)


@pytest.fixture(scope="module")
def server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """All of ``models/`` in one process, as ``make serve`` serves them."""
    running = Server(MODELS, "--cache-dir", cache, log=tmp_path_factory.mktemp("zoo") / "log")
    try:
        running.wait_ready()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def asking(server: Server) -> Iterator[Asking]:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options) as channel:
        yield Asking(server, channel)


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Arrays]:
    """What Keras, or the SavedModel's function, gives for the first held-out rows; asked once a model."""

    @cached
    def direct(folder: Path) -> Arrays:
        path = tmp_path_factory.mktemp("direct") / "outputs.npz"
        run_python(CLIENTS / "direct.py", folder, newest(folder), path, str(PARITY_ROWS))
        with np.load(path, allow_pickle=True) as saved:
            return dict(saved)

    return direct


def test_there_are_models():
    """The tests below are about something."""
    assert FOLDERS


@each_model
def test_the_folder_has_its_parts(folder: Path):
    """Scripts, card, example, versions and meaning, in under 5 MiB; the card tells data, licence, metric and call."""
    assert sum(file.stat().st_size for file in folder.rglob("*") if "__pycache__" not in file.parts) < MAX_FOLDER_BYTES
    assert {"train.py", "README.md", "example.json", "model.yaml"} <= {file.name for file in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert f"v1/models/{folder.name}:predict" in card
    assert "curl" in card
    for part in ("# ", "Signature", "licen", "Limits"):
        assert part.lower() in card.lower(), f"{folder.name}: the card does not say: {part}"
    named = {*first_rows(folder), *yaml.safe_load((folder / "model.yaml").read_text()).get("outputs", {})}
    assert not [name for name in named if f"`{name}`" not in card]


@each_model
def test_the_example_is_answered(asking: Asking, folder: Path):
    """TensorFlow Serving's REST takes ``example.json`` as it lies there."""
    status, body = asking.server.request(
        "POST", f"/v1/models/{folder.name}:predict", (folder / "example.json").read_bytes()
    )
    assert status == 200, body
    assert json.loads(body).get("predictions") or json.loads(body).get("outputs")


@each_model
@pytest.mark.parametrize("dialect", ["rest", "open_inference", "tensorflow_serving"])
def test_answers_are_those_of_keras(asking: Asking, direct: Callable[[Path], Arrays], folder: Path, dialect: str):
    """Held-out rows give what the model gives without a server: to the bit where the model is called exact."""
    ask: Ask = getattr(asking, dialect)
    got, expected = ask(folder.name, first_rows(folder)), direct(folder)
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        if want.dtype.kind != "f" or training(folder).METRIC == "exact":
            np.testing.assert_array_equal(got[name], want, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


@each_model
def test_the_goal_is_reached(asking: Asking, folder: Path):
    """The metric of the card, taken from what the server answers to everything held out."""
    inputs, truth = held_out(folder)
    rows = len(next(iter(inputs.values())))
    parts = [
        asking.open_inference(folder.name, {name: array[at : at + SCORE_ROWS] for name, array in inputs.items()})
        for at in range(0, rows, SCORE_ROWS)
    ]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    module = training(folder)
    value = module.score(outputs, truth)
    is_reached = value <= module.GOAL if getattr(module, "LOWER_IS_BETTER", False) else value >= module.GOAL
    assert is_reached, f"{module.METRIC}: {value}, and the goal is {module.GOAL}"


@each_model
def test_the_friendly_door_takes_the_example(asking: Asking, folder: Path):
    """``POST /predict/{model}`` takes the record of ``model.yaml``; its answer names each output described there."""
    meaning = yaml.safe_load((folder / "model.yaml").read_text())
    body = json.dumps(meaning["example"]).encode()
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    status, answer = asking.server.request("POST", f"/predict/{folder.name}", body, headers)
    assert status == 200, answer
    assert set(meaning.get("outputs", {})) <= set(_keys(json.loads(answer)))


def _keys(value: Any) -> Iterator[str]:
    """Every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        yield from value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(part)


def test_melody_beats_the_bigram_model():
    """The goal of ``melody`` is below what a smoothed bigram model of the same notes reaches, computed anew."""
    module = training(MODELS / "melody")
    assert module.bigram_perplexity() > module.GOAL


def test_melody_is_generated_from_its_inputs_alone(asking: Asking):
    """The same numbers give the same notes, whoever else is in the batch; at temperature 0 those are the likeliest."""
    rows = slice(8, 12)
    held = {name: array[rows] for name, array in held_out(MODELS / "melody")[0].items()}
    uniform = np.random.default_rng(1).random((4, 12), np.float32)
    asked = held | {"uniform": uniform, "temperature": np.array([1.0, 1.0, 0.0, 0.5], np.float32)}

    def generate(inputs: Arrays) -> Any:
        body = {"signature_name": "generate", "inputs": {name: array.tolist() for name, array in inputs.items()}}
        status, answer = asking.server.predict(body, "melody")
        assert status == 200, answer
        return answer["outputs"]

    together = generate(asked)
    assert np.shape(together["pitch"]) == np.shape(together["duration"]) == (4, 12)
    assert generate(asked) == together
    for row in range(4):
        alone = generate({name: array[row : row + 1] for name, array in asked.items()})
        assert alone == {name: [values[row]] for name, values in together.items()}
    likeliest = asking.open_inference("melody", held)["next_note"][2].argmax()
    assert (together["pitch"][2][0], together["duration"][2][0]) == training(MODELS / "melody").note_of(likeliest)


def test_the_gallery_is_drawn_by_the_server(asking: Asking, tmp_path: Path):
    """``models/gallery.py`` draws a picture of each model that it knows with what the running server answers."""
    known = [name for name in ("digit-gan", "sunspots", "melody") if (MODELS / name).is_dir()]
    url = f"http://127.0.0.1:{asking.server.rest_port}"
    run_python(MODELS / "gallery.py", url, *known, "--folder", tmp_path)
    pictures = {picture.stem: picture for picture in tmp_path.iterdir()}
    assert sorted(pictures) == sorted(known)
    assert all(picture.stat().st_size < 150_000 for picture in pictures.values())
