"""Every model of ``models/``, served together by one process, answers what Keras answers and is as good as it says."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache as cached
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml

from service.tensors import DataType
from tests.e2e.asking import Arrays, Ask, Asking, Meant, assert_told, records_of
from tests.e2e.conftest import CLIENTS, run_python
from tests.e2e.process import MODELS, ROOT, Server
from tests.e2e.test_readme import blocks, run

FOLDERS = sorted(folder.parent for folder in MODELS.glob("*/train.py"))
MAX_FOLDER_BYTES = 5 << 20
PARITY_ROWS = 16
SCORE_ROWS = 256
"""Rows of one request while a metric is taken."""
DIALECTS = ("rest", "tensorflow_serving", "open_inference", "open_inference_rest")
"""The methods of `Asking` for TensorFlow Serving's REST and gRPC, and the Open Inference Protocol's gRPC and REST."""
VERSIONS = [(folder, int(each.name)) for folder in FOLDERS for each in folder.iterdir() if each.name.isdigit()]
GALLERY = re.compile(r"^\| \[`([\w-]+)`\]\(models/[\w-]+\) \| .+? \| `(curl .+?)` \| `(.+?)`[^|]* \|$", re.MULTILINE)
"""A row of the README's gallery: model, command, answer."""

Direct = dict[tuple[Path, int], Arrays]
each_version = pytest.mark.parametrize(
    ("folder", "number"), VERSIONS, ids=[f"{folder.name}-{number}" for folder, number in VERSIONS]
)
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
    """Inputs by name, strings as the bytes that travel, and the truth."""
    inputs, truth = training(folder).held_out()
    return {name: _encoded(array) if array.dtype.kind == "O" else array for name, array in inputs.items()}, truth


def _encoded(texts: Any) -> Any:
    return np.vectorize(lambda text: text.encode() if isinstance(text, str) else text, otypes=[object])(texts)


def meaning(folder: Path) -> Any:
    return yaml.safe_load((folder / "model.yaml").read_text())


def first_rows(folder: Path) -> Arrays:
    return {name: array[:PARITY_ROWS] for name, array in held_out(folder)[0].items()}


@pytest.fixture(scope="module")
def server(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """All of ``models/`` in one process, as ``make serve`` serves them, and the older versions too."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": {"digits": {"versions": "all"}}}))
    running = Server(*(MODELS, "--models-config", folder / "models.yaml", "--cache-dir", cache), log=folder / "log")
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
def direct(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Path, int], Arrays]:
    """What Keras, or the SavedModel's function, gives for the first held-out rows, by folder and version."""
    target = tmp_path_factory.mktemp("direct")
    run_python(CLIENTS / "direct.py", target, str(PARITY_ROWS), *(folder / str(number) for folder, number in VERSIONS))
    answers = {}
    for folder, number in VERSIONS:
        with np.load(target / f"{folder.name}-{number}.npz", allow_pickle=True) as saved:
            answers[folder, number] = dict(saved)
    return answers


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
def test_the_card_s_commands_are_answered(asking: Asking, folder: Path):
    """What is pasted from "Try it" gives an answer for each command."""
    for script in blocks(folder / "README.md", "Try it"):
        text, answers = run(script, asking.server).strip(), []
        while text:
            answer, end = json.JSONDecoder().raw_decode(text)
            answers.append(answer)
            text = text[end:].strip()
        assert len(answers) == script.count("curl")
        assert not [answer for answer in answers if "error" in answer]


@pytest.mark.parametrize("dialect", DIALECTS)
@each_version
def test_answers_are_those_of_keras(asking: Asking, direct: Direct, folder: Path, number: int, dialect: str):
    """Held-out rows give what the model gives without a server: to the bit where the model is called exact."""
    ask: Ask = getattr(asking, dialect)
    got, expected = ask(Meant(folder.name, number), first_rows(folder)), direct[folder, number]
    assert got.keys() == expected.keys()
    for name, want in expected.items():
        if want.dtype.kind != "f" or training(folder).METRIC == "exact":
            np.testing.assert_array_equal(got[name], want, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5, err_msg=name)


@each_version
def test_the_friendly_door_tells_what_keras_answers(asking: Asking, direct: Direct, folder: Path, number: int):
    """Each held-out row as a record by field name, and the answer in the words of ``model.yaml``."""
    answers, expected = asking.door(Meant(folder.name, number), records_of(first_rows(folder))), direct[folder, number]
    told = meaning(folder).get("outputs", {})
    for row, answer in enumerate(answers):
        assert answer.keys() == expected.keys()
        for name, want in expected.items():
            assert_told(answer[name], want[row], told.get(name, {}))
    assert len(answers) == PARITY_ROWS


@each_model
def test_the_goal_is_reached(asking: Asking, folder: Path):
    """The metric of the card, taken from what the server answers to everything held out."""
    inputs, truth = held_out(folder)
    rows = len(next(iter(inputs.values())))
    parts = [
        asking.open_inference(Meant(folder.name), {name: array[at : at + SCORE_ROWS] for name, array in inputs.items()})
        for at in range(0, rows, SCORE_ROWS)
    ]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    module = training(folder)
    value = module.score(outputs, truth)
    is_reached = value <= module.GOAL if getattr(module, "LOWER_IS_BETTER", False) else value >= module.GOAL
    assert is_reached, f"{module.METRIC}: {value}, and the goal is {module.GOAL}"


@each_model
def test_the_friendly_door_takes_the_example(asking: Asking, folder: Path):
    """``POST /predict/{model}`` takes the record of ``model.yaml``; its answer names each output."""
    (answer,) = asking.door(Meant(folder.name), [meaning(folder)["example"]])
    assert answer.keys() == asking.types(Meant(folder.name)).keys()


def echoes(rows: int) -> dict[str, tuple[Arrays, Arrays]]:
    """Inputs and outputs of each signature of `shapes` that gives back a type, with rows and without."""
    made = {}
    for name in training(MODELS / "shapes").ECHOES:
        dtype = DataType.BYTES if name == "string" else next(each for each in DataType if str(each.numpy) == name)
        values = [b"no", "h\u00e9".encode()] if name == "string" else [0, 1]
        x = np.array([values] * rows, dtype.numpy)
        made[f"echo_{name}"] = ({"x": x}, {"y": x})
        made[f"echo_scalar_{name}"] = ({"x": x[0, 1:].reshape(())}, {"y": x[0, 1:].reshape(())})
    return made


def forms() -> dict[str, tuple[Arrays, Arrays]]:
    """Inputs and outputs, told by hand, of the other signatures of `shapes`."""
    x = np.arange(48, dtype=np.float32)
    a, b = x[:6].reshape(2, 3), x[:6].reshape(3, 2)
    words = np.array([b"ja", b"nein"], object)
    return {
        "serving_default": ({"x": a}, {"y": 2 * a + 1}),
        "scalar": ({"x": np.array(20.5, np.float32)}, {"y": np.array(42, np.float32)}),
        "vector": ({"x": x[:4]}, {"reversed": x[3::-1], "sum": np.array(6, np.float32)}),
        "matrix": ({"x": a}, {"transposed": a.T}),
        "product": ({"a": a, "b": b}, {"product": a @ b}),
        "tensor4": ({"x": x.reshape(2, 3, 4, 2)}, {"channels_first": x.reshape(2, 3, 4, 2).transpose(0, 3, 1, 2)}),
        "rows4": ({"x": x.reshape(4, 2, 3, 2)}, {"mirrored": x.reshape(4, 2, 3, 2)[:, :, ::-1]}),
        "open": ({"x": x[None]}, {"largest": np.array(47, np.float32)}),
        "several": (
            {"number": np.array([3, -4]), "flag": np.array([True, False]), "word": words},
            {"half": np.array([1.5, -2.0]), "said": np.array([b"ja!", b"nein"], object)},
        ),
    }


WITH_ROWS = ("serving_default", "rows4", "several")


@pytest.mark.parametrize("dialect", [*DIALECTS, "door"])
def test_every_signature_of_shapes(asking: Asking, dialect: str):
    """Scalars to four dimensions, with rows and without, and each type: exact in each dialect."""
    cases = forms() | echoes(3)
    assert cases.keys() == asking.signatures(Meant("shapes")).keys()
    for name, (inputs, expected) in cases.items():
        meant = Meant("shapes", signature=name)
        if dialect != "door":
            got = getattr(asking, dialect)(meant, inputs)
            assert got.keys() == expected.keys(), name
            for output, want in expected.items():
                np.testing.assert_array_equal(got[output], want, err_msg=f"{name}: {output}")
            continue
        batched = name in WITH_ROWS or (name.startswith("echo_") and "scalar" not in name)
        records = records_of(inputs, batched=batched)
        assert asking.door(meant, records) == records_of(expected, batched=batched), name


def test_embedder_has_two_signatures(asking: Asking):
    """``embed`` gives the embedding of the default signature alone."""
    rows = first_rows(MODELS / "embedder")
    both = asking.open_inference(Meant("embedder"), rows)
    for dialect in DIALECTS:
        alone = getattr(asking, dialect)(Meant("embedder", signature="embed"), rows)
        assert list(alone) == ["embedding"]
        np.testing.assert_allclose(alone["embedding"], both["embedding"], rtol=1e-4, atol=1e-5)
    for row, told in enumerate(asking.door(Meant("embedder", signature="embed"), records_of(rows))):
        np.testing.assert_allclose(told["embedding"], both["embedding"][row], rtol=1e-4, atol=1e-5)


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
        told = asking.door(Meant("melody", signature="generate"), records_of(inputs))
        for name, values in answer["outputs"].items():
            assert [each[name]["values"] for each in told] == values
        return answer["outputs"]

    together = generate(asked)
    assert np.shape(together["pitch"]) == np.shape(together["duration"]) == (4, 12)
    assert generate(asked) == together
    for row in range(4):
        alone = generate({name: array[row : row + 1] for name, array in asked.items()})
        assert alone == {name: [values[row]] for name, values in together.items()}
    likeliest = asking.open_inference(Meant("melody"), held)["next_note"][2].argmax()
    assert (together["pitch"][2][0], together["duration"][2][0]) == training(MODELS / "melody").note_of(likeliest)


def gallery() -> list[tuple[str, str, str]]:
    return GALLERY.findall((ROOT / "README.md").read_text())


def test_the_gallery_has_each_model():
    """One row for each folder, and no other."""
    assert sorted(name for name, _, _ in gallery()) == [folder.name for folder in FOLDERS]


@pytest.mark.parametrize(("command", "answer"), [pytest.param(*row[1:], id=row[0]) for row in gallery()])
def test_the_gallery_as_it_stands(asking: Asking, command: str, answer: str):
    """What is pasted from the README gives the answer beside it; ``…`` stands for what is left out."""
    parts = [re.escape(part) for part in answer.split("…")]
    assert re.fullmatch(".*".join(parts), run(command, asking.server).strip())


def test_the_gallery_is_drawn_by_the_server(asking: Asking, tmp_path: Path):
    """``models/gallery.py`` draws with what the running server answers; the README shows each picture."""
    run_python(MODELS / "gallery.py", f"http://127.0.0.1:{asking.server.rest_port}", "--folder", tmp_path)
    drawn = {picture.name: picture.stat().st_size for picture in tmp_path.iterdir()}
    shown = re.findall(r"\]\(docs/gallery/(.+?)\)", (ROOT / "README.md").read_text())
    assert sorted(drawn) == sorted(shown) == sorted(path.name for path in (ROOT / "docs" / "gallery").iterdir())
    assert max(drawn.values()) < 150_000
