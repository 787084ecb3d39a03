"""``kiln import`` and `service.export` with a model that is a function: what is written, and what is refused."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import service
from service import logs
from service.cli import main
from service.errors import Internal, InvalidArgument, KilnError, ModelLoadError
from service.registry import imports, reference, training
from service.registry.imports import ImportOptions, import_trained
from service.registry.repository import scan
from service.tensors import DataType, Signature, Tensors, TensorSpec

SIGNATURE = Signature(
    "serving_default", (TensorSpec("x", DataType.FP32, (None, 2)),), (TensorSpec("y", DataType.FP32, (None, 3)),)
)


class FakeServed:
    """What a SavedModel would be: gives the sum of each row three times."""

    signatures: ClassVar = {"serving_default": SIGNATURE}
    error: KilnError | None = None
    closed = 0

    def __init__(self, path: Path, device: str) -> None:
        assert device == "CPU:0"

    def plan(self, signature: Signature) -> FakeServed:
        return self

    def run(self, inputs: Tensors) -> Tensors:
        if FakeServed.error is not None:
            raise FakeServed.error
        (array,) = inputs.values()
        return {self.signatures["serving_default"].outputs[0].name: row_sums(array)}

    def close(self) -> None:
        FakeServed.closed += 1


def row_sums(array: Any) -> Any:
    return np.repeat(array.reshape(len(array), -1).sum(1, keepdims=True), 3, axis=1).astype(np.float32)


def keras_says(batches: Sequence[Tensors]) -> list[Tensors]:
    return [{"output_0": row_sums(next(iter(batch.values())))} for batch in batches]


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> type[FakeServed]:
    monkeypatch.setattr(imports, "import_model", lambda source, **options: source.path)
    monkeypatch.setattr(imports, "SavedModel", FakeServed)
    monkeypatch.setattr(imports, "answers_of_file", lambda path, batches, **options: keras_says(batches))
    monkeypatch.setattr(FakeServed, "error", None)
    monkeypatch.setattr(FakeServed, "closed", 0)
    monkeypatch.setattr(logs, "configure", lambda level, form, **_: None)
    for name in ("KILN_MODELS", "KILN_IMPORTS", "KILN_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return FakeServed


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    path = tmp_path / "cat.keras"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


OPTIONS = ImportOptions(Path("cache"))


def test_a_version_is_written_as_the_repository_has_it(trained: Path, models: Path):
    """The file itself, under the name that versions have; a second one is the next version."""
    first = import_trained(trained, models, OPTIONS)
    second = import_trained(trained, models, OPTIONS)
    assert [(source.model, source.version) for source in scan(models).sources] == [("cat", 1), ("cat", 2)]
    assert (models / "cat/2/model.keras").read_bytes() == b"weights"
    assert sorted(path.name for path in models.rglob("*")) == ["1", "2", "cat", "model.keras", "model.keras"]
    assert (first.version, second.version, Path(second)) == (1, 2, models / "cat" / "2")
    assert FakeServed.closed == 2
    assert (models / "cat/1").stat().st_mode & 0o777 == (models / "cat").stat().st_mode & 0o777


def test_the_report(trained: Path, models: Path):
    """It has the place, the signature, the difference and a command that is whole."""
    text = str(import_trained(trained, models, OPTIONS)).splitlines()
    assert text[0] == f"cat version 1: {models}/cat/1"
    assert text[1] == "signature: serving_default: x FP32 [-1, 2] → y FP32 [-1, 3]"
    assert text[2] == "parity: the largest difference from Keras is 0, over batches of 1, 3, 8 rows"
    assert text[3] == f"ask it, once 'kiln serve {models}' is ready:"
    start, body = text[4].split(" -d ")
    assert start == "curl -s localhost:8501/v1/models/cat:predict"
    assert np.shape(json.loads(body.strip("'"))["instances"]) == (1, 2)


def test_versions_go_on_after_the_highest(trained: Path, models: Path):
    """Gaps stay, and so do folders that hold nothing."""
    (models / "cat" / "7").mkdir(parents=True)
    (models / "cat" / "notes").mkdir()
    assert import_trained(trained, models, OPTIONS).version == 8


def test_imports_at_once_get_numbers_of_their_own(trained: Path, models: Path):
    """Whoever comes second takes the next number, and nobody's version is half there."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: import_trained(trained, models, OPTIONS).version, range(16)))
    assert sorted(found) == list(range(1, 17))
    assert all((models / "cat" / str(number) / "model.keras").is_file() for number in found)
    assert not list(models.rglob(".import-*"))


def test_a_number_that_a_rival_takes_is_left_to_it(trained: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    """A version that appears at the last moment stays, and ours is the next one."""
    rename = Path.rename

    def overtaken(self: Path, target: Path) -> Path:
        if target.name == "1":
            target.mkdir()
            (target / "model.keras").write_bytes(b"rival")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    assert import_trained(trained, models, OPTIONS).version == 2
    assert (models / "cat/1/model.keras").read_bytes() == b"rival"


@pytest.mark.parametrize("off", [2e-5, 1.0, np.nan])
def test_a_model_that_answers_otherwise_is_refused(trained: Path, models: Path, off: float):
    """Beyond the tolerance nothing is written, and the difference is told."""

    def differently(batches: Sequence[Tensors]) -> list[Tensors]:
        return [{"output_0": np.where(np.abs(b["y"]) < 1, b["y"] + off * 10, b["y"])} for b in ys(batches)]

    with pytest.raises(ModelLoadError, match=r"differs from Keras by up to .* \(rtol 0.0001, atol 1e-05 allowed\)"):
        import_trained(trained, models, OPTIONS, answers=differently)
    assert not list(models.iterdir())


def ys(batches: Sequence[Tensors]) -> list[Tensors]:
    return [{"y": each["output_0"]} for each in keras_says(batches)]


def test_what_cannot_be_compared_is_said(trained: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    """A model that is random, or that takes no made-up input, is imported with a word about it."""
    rng = np.random.default_rng(0)
    random = import_trained(
        trained, models, OPTIONS, answers=lambda batches: [{"y": rng.random((len(b["x"]), 3))} for b in batches]
    )
    assert random.difference is None
    assert random.parity == "not compared: Keras gives different answers to the same inputs"
    monkeypatch.setattr(FakeServed, "error", InvalidArgument("no JPEG"))
    picky = import_trained(trained, models, OPTIONS)
    assert picky.parity == "not compared: it takes none of the made-up inputs (no JPEG)"
    assert picky.curl.endswith("-d @request.json  # with inputs of your own")


def test_a_model_that_fails_is_refused(trained: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    """A fault of the model itself is no question of inputs."""
    monkeypatch.setattr(FakeServed, "error", Internal("the model failed: x"))
    with pytest.raises(ModelLoadError, match="the model failed: x"):
        import_trained(trained, models, OPTIONS)


def test_a_saved_model_is_taken_whole(tmp_path: Path, models: Path):
    """With its variables and labels; there is nothing else to compare it with."""
    folder = tmp_path / "net"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").touch()
    (folder / "labels.txt").write_text("a\nb\nc\n")
    done = import_trained(folder, models, OPTIONS, name="other")
    assert done.parity == "a SavedModel is served as it is; it answers made-up inputs"
    assert (models / "other/1/variables").is_dir()
    assert done.signatures["serving_default"].outputs[0].labels == ("a", "b", "c")


def test_what_lies_beside_the_file_comes_along(trained: Path, models: Path, tmp_path: Path):
    """Warm-up requests, and the labels that are given: where the registry reads them."""
    (tmp_path / "assets.extra").mkdir()
    (tmp_path / "assets.extra/tf_serving_warmup_requests").write_bytes(b"w")
    (tmp_path / "names").write_text("ä\nb\nc\n\n", "utf-8")
    import_trained(trained, models, OPTIONS, labels=tmp_path / "names")
    assert (models / "cat/1/labels.txt").read_text("utf-8") == "ä\nb\nc\n"
    assert (models / "cat/1/assets.extra/tf_serving_warmup_requests").read_bytes() == b"w"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a\nb\n", "--labels: 2 names, which fit none of serving_default: x FP32"),
        (b"a\n\nb\n", "--labels: a name on every line expected, got 3 lines with empty ones"),
        (b"\n", "--labels: a name on every line expected, got 0 lines"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        (None, "cannot be read: [Errno 2]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    trained: Path, models: Path, tmp_path: Path, content: bytes | None, text: str
):
    """Their number is that of an output's classes, or nothing is written."""
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    with pytest.raises(InvalidArgument) as refusal:
        import_trained(trained, models, OPTIONS, labels=tmp_path / "names")
    assert text in str(refusal.value)
    assert not list(models.iterdir())


def test_a_long_request_is_kept_in_a_file(trained: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    """What is too long to paste lies in the version's folder, and the command names it."""
    monkeypatch.setattr(imports, "_PASTED_CHARACTERS", 5)
    done = import_trained(trained, models, OPTIONS)
    assert done.curl.endswith(f" -d @{models}/cat/1/example.json")
    assert "instances" in json.loads((models / "cat/1/example.json").read_text())


def test_wrong_places_are_refused(trained: Path, models: Path, tmp_path: Path):
    """A URL, a model's own folder, several models: each is told, before anything is done."""
    with pytest.raises(InvalidArgument, match="a folder on this machine expected"):
        import_trained(trained, Path("s3://bucket"), OPTIONS)
    import_trained(trained, models, OPTIONS)
    import_trained(trained, models, OPTIONS, name="dog")
    with pytest.raises(InvalidArgument, match="holds versions of one"):
        import_trained(trained, models / "cat", OPTIONS)
    with pytest.raises(InvalidArgument, match=r"one \.keras or \.h5 file or SavedModel folder expected: found 2"):
        import_trained(models, tmp_path / "more", OPTIONS)
    (tmp_path / "void" / "1").mkdir(parents=True)
    with pytest.raises(InvalidArgument, match=r"model\.keras, model\.h5 or a SavedModel .* expected, found nothing"):
        import_trained(tmp_path / "void", models, OPTIONS)


def test_a_disk_that_refuses_leaves_nothing(trained: Path, models: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the last step fails for another reason than a rival, it is told."""

    def rename(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        import_trained(trained, models, OPTIONS)
    assert not list(models.rglob("*/*"))


def test_the_command(trained: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path):
    """``kiln import`` prints the report, with exit code 0; a refusal is one line on stderr, with 1; a wrong flag 2."""
    monkeypatch.setenv("KILN_REST_PORT", "9000")
    assert main(["import", str(trained), "--models", str(models), "--name", "dog"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dog version 1: {models}/dog/1\n")
    assert "localhost:9000/" in out
    assert main(["import", "no-such.keras", "--models", str(models), "--labels", "x"]) == 1
    assert capsys.readouterr().err == "kiln import: there is no file or folder 'no-such.keras'\n"
    assert main(["import", str(trained), "--import", "no module"]) == 2
    assert capsys.readouterr().err.startswith("kiln import: imports: ")
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(trained)]) == 0
    assert "cat version 1: models/cat/1" in capsys.readouterr().out
    monkeypatch.setenv("KILN_MODELS", str(tmp_path / "elsewhere"))
    assert main(["import", str(trained)]) == 0
    assert (tmp_path / "elsewhere/cat/1").is_dir()


class FakeKerasModel:
    """Saves itself as `content`; exports a SavedModel; answers as `FakeServed` does."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.export_error: Exception | None = None
        self.weights = 0
        self.asked: list[int] = []

    def save(self, path: Path) -> None:
        if self.error:
            raise self.error
        path.write_bytes(b"keras")

    def export(self, path: str, **options: Any) -> None:
        if self.export_error:
            raise self.export_error
        Path(path).mkdir()
        (Path(path) / "saved_model.pb").touch()

    def predict_on_batch(self, inputs: Any) -> Any:
        self.asked.append(self.weights)
        return row_sums(inputs)

    def get_weights(self) -> Any:
        return self.weights

    def set_weights(self, weights: Any) -> None:
        self.weights = weights


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "scan_file", lambda path: None)


def test_export_from_python(models: Path, plain: None):
    """The model in memory is written and compared with its own answers; labels may be a list."""
    done = service.export(FakeKerasModel(), models / "net", labels=["a", "b", "c"])
    assert done.difference == 0
    assert (models / "net/1/model.keras").read_bytes() == b"keras"
    assert (models / "net/1/labels.txt").read_text() == "a\nb\nc\n"
    assert service.export(FakeKerasModel(), str(models / "net"), labels=models / "net/1/labels.txt").version == 2


def test_export_of_what_is_the_models_own(models: Path):
    """Classes that no scan lets pass, and what cannot be saved, make a SavedModel; named modules a .keras file."""
    done = service.export(FakeKerasModel(), models / "net")  # b"keras" is no archive
    assert (done.path / "saved_model.pb").is_file()
    assert done.difference == 0
    done = service.export(FakeKerasModel(NotImplementedError("get_config")), models / "net")
    assert (done.path / "saved_model.pb").is_file()
    done = service.export(FakeKerasModel(), models / "net", imports=["mine"])
    assert (done.path / "model.keras").is_file()
    broken = FakeKerasModel(ValueError("no"))
    broken.export_error = TypeError("nor this")
    with pytest.raises(ModelLoadError, match=r"neither as .keras \(ValueError: no\) nor as SavedModel \(nor this\)"):
        service.export(broken, models / "net")


@pytest.mark.parametrize("path", ["models/net/3", ".", "/"])
def test_export_wants_a_models_folder(path: str):
    """The number is not the caller's."""
    with pytest.raises(InvalidArgument, match="path: models/<name> expected"):
        service.export(FakeKerasModel(), path)


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch, plain: None) -> Any:
    """`service.ExportCallback`, where Keras is a stand-in."""
    fake = types.SimpleNamespace(callbacks=types.SimpleNamespace(Callback=object))
    monkeypatch.setitem(sys.modules, "keras", fake)
    training.callback_class.cache_clear()
    yield service.ExportCallback
    training.callback_class.cache_clear()


def train(callback: Any, model: FakeKerasModel, *logs: dict[str, float]) -> None:
    callback.model = model
    callback.on_train_begin()
    for epoch, each in enumerate(logs):
        model.weights = epoch
        callback.on_epoch_end(epoch, each)
    callback.on_train_end()


def test_the_callback_writes_at_the_end(callbacks: Any, models: Path):
    """One version, of the last weights."""
    callback, model = callbacks(models / "net", labels=["a", "b", "c"]), FakeKerasModel()
    train(callback, model, {"loss": 1.0}, {"loss": 2.0})
    assert (callback.exported.version, set(model.asked)) == (1, {1})


@pytest.mark.parametrize(
    ("options", "best"),
    [({}, 1), ({"monitor": "val_accuracy"}, 0), ({"monitor": "val_accuracy", "mode": "min"}, 2), ({"mode": "max"}, 0)],
)
def test_the_callback_writes_the_best_epoch(callbacks: Any, models: Path, options: dict[str, str], best: int):
    """The weights of the best epoch are written; the model goes on with its last."""
    callback, model = callbacks(models / "net", save_best_only=True, **options), FakeKerasModel()
    for _ in range(2):  # nothing is left over from an earlier training
        model.asked.clear()
        train(
            callback,
            model,
            {"val_loss": 3.0, "val_accuracy": 0.9},
            {"val_loss": 1.0, "val_accuracy": 0.8},
            {"val_loss": float("nan"), "val_accuracy": 0.1},
        )
        assert set(model.asked) == {best}
        assert model.weights == 2


def test_the_callback_is_wrongly_made(callbacks: Any, models: Path):
    """A metric that is not there is told after the first epoch, not after the last."""
    with pytest.raises(InvalidArgument, match="mode: auto, min or max expected, got 'best'"):
        callbacks(models / "net", save_best_only=True, mode="best")
    with pytest.raises(InvalidArgument, match="monitor: one of accuracy, loss expected, got 'val_loss'"):
        train(callbacks(models / "net", save_best_only=True), FakeKerasModel(), {"loss": 1.0, "accuracy": 1.0})


def test_nothing_else_is_exported():
    """A name that is not there is told as always."""
    with pytest.raises(AttributeError, match="module 'service' has no attribute 'import_model'"):
        service.import_model  # noqa: B018


class Structured:
    """Answers with `outputs`; its inputs have the structure `input`."""

    def __init__(self, structure: Any, outputs: Any) -> None:
        self.input, self.outputs, self.asked = structure, outputs, None

    def predict_on_batch(self, inputs: Any) -> Any:
        self.asked = inputs
        if isinstance(self.outputs, Exception):
            raise self.outputs
        return self.outputs


def tensor(name: str) -> Any:
    return types.SimpleNamespace(name=name)


@pytest.mark.parametrize(
    ("structure", "asked"),
    [([tensor("a"), tensor("b")], [1, 2]), ({"p": tensor("b"), "q": (tensor("a"),)}, {"p": 2, "q": [1]})],
)
def test_inputs_are_given_as_the_model_has_them(structure: Any, asked: Any):
    """By the names of its inputs, in its own structure; outputs get the names of an export."""
    model = Structured(structure, [np.array([1]), np.array([b"s"])])
    (answer,) = reference.answers_of_model(model, [{"a": np.array(1), "b": np.array(2)}])
    assert model.asked == asked
    assert {name: array.tolist() for name, array in answer.items()} == {"output_0": [1], "output_1": [b"s"]}
    assert answer["output_1"].dtype == object
    model.outputs = {"y": np.array([3])}
    assert reference.answers_of_model(model, [{"a": np.array(1), "b": np.array(2)}])[0].keys() == {"y"}


def test_what_keras_cannot_run_is_told():
    """With the first line of its reason."""
    with pytest.raises(ModelLoadError, match=r"^Keras cannot run it: ValueError: no$"):
        reference.answers_of_model(Structured(None, ValueError("no\nstack")), [{"a": np.array(1)}])
