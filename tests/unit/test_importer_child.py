"""The importer's child process itself, without Keras: how it is started, bounded, stopped, and what it answers."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import IO, Any

import pytest

from service.errors import ModelLoadError
from service.registry import importer


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_the_child_is_heard() -> None:
    """Exit code, stdout and stderr come back, and undecodable bytes do no harm."""
    code = "import sys, os; print('out'); os.write(2, b'err \\xff'); sys.exit(4)"
    child = importer._run_child(python(code), 30.0, dict(os.environ))
    assert (child.returncode, child.stdout, child.stderr) == (4, "out\n", "err \ufffd")


def test_the_child_has_the_environment_that_it_is_given() -> None:
    """Nothing is inherited besides what is passed."""
    child = importer._run_child(
        python("import os; print(os.environ.get('A'), os.environ.get('HOME'))"), 30.0, {"A": "b"}
    )
    assert child.stdout == "b None\n"


def test_the_child_is_stopped_with_its_children_when_time_is_up(tmp_path: Path) -> None:
    """Its whole process group is killed: a lock that a grandchild holds is free again."""
    lock = tmp_path / "lock"
    code = (
        f"import fcntl, os, time; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "os.fork(); time.sleep(60)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        importer._run_child(python(code), 0.5, dict(os.environ))
    with lock.open() as file:
        wait_until_free(file)


def wait_until_free(file: IO[str]) -> None:
    """Take the lock of `file`; it is an error if that takes ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert time.monotonic() < deadline, "still held"


def test_the_childs_stdin_stays_open_while_its_parent_lives() -> None:
    """By the pipe at its stdin a child would see its parent end; until then a read does not return."""
    code = "import select; print(select.select([0], [], [], 0.05)[0])"
    assert importer._run_child(python(code), 30.0, dict(os.environ)).stdout == "[]\n"


@pytest.mark.parametrize(("name", "remains"), [(".import-x", False), ("mine", True)])
def test_the_child_ends_with_its_parent(tmp_path: Path, name: str, remains: bool) -> None:
    """When the pipe at stdin closes the process ends at once, and takes the importer's own folder along."""
    work = tmp_path / name
    work.mkdir()
    code = (
        "import pathlib, sys, time; from service.registry.importer import _end_with_parent; "
        "_end_with_parent(pathlib.Path(sys.argv[1])); time.sleep(60)"
    )
    home = Path(importer.__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code, work], stdin=subprocess.PIPE, cwd=home) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(30) == 1
    assert work.exists() == remains


@pytest.mark.parametrize("hard", [resource.RLIM_INFINITY, 2**62, 1000])
def test_the_childs_files_are_bounded(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No core dumps, and no file over 64 GiB; a stricter limit stays."""
    limits: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    importer._limit_resources()
    assert limits == {
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_FSIZE: (1000 if hard == 1000 else 64 * 2**30, hard),
    }


class FakeKerasModel:
    """What `load_model` gives back: `built` and `inputs` as given, and an export that may fail."""

    def __init__(self, *, built: bool = True, inputs: tuple[str, ...] = ("x",)) -> None:
        self.built, self.inputs = built, [types.SimpleNamespace(name=name) for name in inputs]
        self.error: Exception | None = None

    def export(self, target: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        Path(target).mkdir()


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A stand-in for Keras whose `load_model` returns `model`, or raises it."""
    fake = types.SimpleNamespace(model=FakeKerasModel(), options={})

    def load_model(path: Path, **options: Any) -> Any:
        fake.options = options
        if isinstance(fake.model, Exception):
            raise fake.model
        return fake.model

    fake.saving = types.SimpleNamespace(load_model=load_model)
    monkeypatch.setitem(sys.modules, "keras", fake)
    monkeypatch.setattr(importer, "modernise", lambda source, work: source)
    monkeypatch.setattr(importer, "scan_file", lambda path, trusted: None)
    monkeypatch.setattr(importer, "_limit_resources", lambda: None)
    monkeypatch.setattr(importer, "_end_with_parent", lambda work: None)
    return fake


def test_the_child_converts(keras: types.SimpleNamespace, tmp_path: Path) -> None:
    """What loads is exported; Keras's safe mode is on and nothing is compiled."""
    assert importer.main(["model.keras", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").is_dir()
    assert keras.options == {"compile": False, "safe_mode": True, "custom_objects": {}}


OTHER_BACKEND = "Kiln runs layers on TensorFlow: write the layer with keras.ops, which runs on every backend"
NO_SHAPE = "the model has no input shape: call or build it once before saving it"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (ValueError("\nbad config\nmore"), "Keras cannot load it: ValueError: bad config"),
        (KeyError(), "Keras cannot load it: KeyError: "),
        (
            TypeError("Error when deserializing class 'A' using config={}.\n\nException encountered: no groups\n"),
            "Keras cannot load it: TypeError: no groups",
        ),
        (
            TypeError("<tf.Tensor> is not a valid JAX type"),
            "Keras cannot load it: TypeError: <tf.Tensor> is not a valid JAX type; " + OTHER_BACKEND,
        ),
        (
            TypeError("conv: no tensor\nat torch.nn"),
            "Keras cannot load it: TypeError: conv: no tensor (in code for torch); " + OTHER_BACKEND,
        ),
        (FakeKerasModel(built=False), NO_SHAPE),
        (FakeKerasModel(inputs=()), NO_SHAPE),
        (object(), NO_SHAPE),
    ],
)
def test_what_does_not_load_is_refused(
    keras: types.SimpleNamespace, model: Any, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child says why on stdout and leaves with the code for a refusal."""
    keras.model = model
    assert importer.main(["model.keras", "out"]) == 3
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (TypeError("no\nstack"), "Keras cannot export it: TypeError: no"),
        (OSError(), "Keras cannot export it: OSError: "),
        (
            ValueError("Exception encountered when calling A.call().\n\n\x1b[1m'a b' is no name\x1b[0m\n\nWith: 1"),
            "Keras cannot export it: ValueError: 'a b' is no name",
        ),
        (
            ValueError("Exception encountered when calling A.call()."),
            "Keras cannot export it: ValueError: Exception encountered when calling A.call().",
        ),
    ],
)
def test_what_does_not_export_is_refused(
    keras: types.SimpleNamespace, error: Exception, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export that fails is a refusal with the line that has the reason, without colours."""
    keras.model.error = error
    assert importer.main(["model.keras", "out"]) == 3
    assert capsys.readouterr().out == text


def test_what_the_scanner_refuses_is_not_loaded(
    keras: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keras never sees a file that did not pass."""

    def refuse(path: Path, trusted: Any) -> None:
        raise ModelLoadError(f"{path.name} is refused")

    monkeypatch.setattr(importer, "scan_file", refuse)
    assert importer.main(["model.keras", "out"]) == 3
    assert capsys.readouterr().out == "model.keras is refused"
    assert keras.options == {}
