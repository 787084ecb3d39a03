"""The importer with a child that is a function: cache, refusals, environment, publication."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from service.errors import ModelLoadError
from service.registry import importer
from service.registry.importer import import_model
from service.registry.repository import Kind, Source


class FakeChild:
    """Answers as a child process would; a `returncode` of 0 leaves a SavedModel where it was asked for."""

    def __init__(self, returncode: int = 0, stdout: str = "", stderr: str = "") -> None:
        self.returncode, self.stdout, self.stderr = returncode, stdout, stderr
        self.error: BaseException | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        self.commands: list[list[str]] = []
        self.environment: dict[str, str] = {}
        self.timeout_s = 0.0

    def __call__(
        self, command: list[str], timeout_s: float, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.timeout_s, self.environment = timeout_s, environment
        if self.error is not None:
            raise self.error
        if self.returncode == 0:
            target = Path(command[-1])
            target.mkdir()
            (target / "saved_model.pb").write_bytes(Path(command[-2]).read_bytes())
        self.meanwhile()
        return subprocess.CompletedProcess(command, self.returncode, self.stdout, self.stderr)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kiln"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "model.keras"
    path.write_bytes(b"content")
    return Source("cat", 1, Kind.KERAS, path)


def import_with(child: FakeChild, source: Source, cache: Path) -> Path:
    return import_model(source, cache_dir=cache, timeout_s=7.0, run_child=child)


def refusal(child: FakeChild, source: Source, cache: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        import_with(child, source, cache)
    return str(caught.value)


def test_a_file_is_converted_into_the_cache(source: Source, cache: Path) -> None:
    """The child is given the file and a place to write; what it wrote is the result, with a manifest."""
    child = FakeChild()
    folder = import_with(child, source, cache)
    assert folder.parent == cache
    assert (folder / "saved_model.pb").read_bytes() == b"content"
    manifest = json.loads((folder / "kiln.json").read_text())
    assert folder.name.startswith(manifest["source_sha256"])
    assert manifest.keys() == {"source_sha256", "keras", "tensorflow"}
    (command,) = child.commands
    assert command[:5] == [sys.executable, "-P", "-m", "service.registry.importer", str(source.path)]
    assert child.timeout_s == 7.0


def test_the_same_content_is_converted_once(source: Source, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second import of the same bytes, under whichever name, is found in the cache."""
    caplog.set_level(logging.INFO, "kiln.importer")
    child = FakeChild()
    first = import_with(child, source, cache)
    copy = source.path.with_name("copy.keras")
    copy.write_bytes(b"content")
    assert import_with(child, Source("dog", 5, Kind.KERAS, copy), cache) == first
    assert len(child.commands) == 1
    assert caplog.messages[-1] == "dog v5 was imported before"


@pytest.mark.parametrize("change", ["content", "suffix", "keras", "format"])
def test_what_could_change_the_result_changes_the_place(
    source: Source, cache: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bytes, another form of file, another Keras or importer are converted again."""
    child = FakeChild()
    first = import_with(child, source, cache)
    if change == "content":
        source.path.write_bytes(b"other")
    elif change == "suffix":
        source = Source("cat", 1, Kind.H5, source.path.rename(source.path.with_suffix(".h5")))
    elif change == "keras":
        monkeypatch.setattr(importer, "version", lambda package: "99")
    else:
        monkeypatch.setattr(importer, "_FORMAT", 99)
    assert import_with(child, source, cache) != first
    assert len(child.commands) == 2


def test_a_missing_converter_is_part_of_the_key(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Keras's metadata the manifest says so, and the child decides what that means."""

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(importer, "version", missing)
    manifest = json.loads((import_with(FakeChild(), source, cache) / "kiln.json").read_text())
    assert (manifest["keras"], manifest["tensorflow"]) == ("none", "none")


def test_a_saved_model_is_served_where_it_lies(tmp_path: Path, cache: Path) -> None:
    """A SavedModel needs no import: nothing is copied, no child is run."""
    child = FakeChild()
    assert import_with(child, Source("cat", 1, Kind.SAVED_MODEL, tmp_path), cache) == tmp_path
    assert not child.commands
    assert not cache.exists()


@pytest.mark.parametrize(
    ("child", "text"),
    [
        (FakeChild(3, stdout="layer 'l' (Lambda) is refused\n"), "layer 'l' (Lambda) is refused"),
        (FakeChild(-11), "the import process was killed by signal 11: it said nothing"),
        (FakeChild(-9, stderr="Killed\n"), "the import process was killed by signal 9: Killed"),
        (FakeChild(1, stderr="Traceback:\n  a\nValueError: x\n\n"), "the import process failed (1): ValueError: x"),
        (
            FakeChild(1, stderr="MemoryError\n  I0000 00:00 cpu\nW0000 x\nE0000 y\nWARNING: All log messages before\n"),
            "the import process failed (1): MemoryError",
        ),
        (FakeChild(2, stderr="I0000 00:00 cpu\n\n"), "the import process failed (2): it said nothing"),
    ],
)
def test_a_child_that_fails_is_told(source: Source, cache: Path, child: FakeChild, text: str) -> None:
    """A refusal is passed on; a crash is told with its last words, less TensorFlow's chatter."""
    assert refusal(child, source, cache) == text
    assert list(cache.iterdir()) == []


def test_a_child_that_takes_too_long_is_told(source: Source, cache: Path) -> None:
    """When time is up the reason names the limit."""
    child = FakeChild()
    child.error = subprocess.TimeoutExpired("python", 7.0)
    assert refusal(child, source, cache) == "the import took longer than 7 s and was stopped"
    assert list(cache.iterdir()) == []


def test_a_failure_is_not_remembered(source: Source, cache: Path) -> None:
    """What failed is tried again, for memory or time may have been short."""
    refusal(FakeChild(-9), source, cache)
    assert import_with(FakeChild(), source, cache).is_dir()


@pytest.mark.parametrize("obstacle", ["file", "cache", "work", "output"])
def test_a_disk_that_refuses_is_told(
    source: Source, cache: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is gone, a cache that cannot be made or written to: each is that version's failure."""
    child = FakeChild()
    if obstacle == "file":
        source.path.unlink()
    elif obstacle == "cache":
        cache.parent.write_bytes(b"")
    elif obstacle == "work":
        monkeypatch.setattr(tempfile, "TemporaryDirectory", _read_only)
    else:
        child.meanwhile = lambda: _remove(Path(child.commands[0][-1]))
    assert refusal(child, source, cache).startswith("cannot be imported: ")


def _read_only(**options: object) -> None:
    raise OSError(30, "Read-only file system")


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_publication_is_whole_or_not_at_all(source: Source, cache: Path) -> None:
    """While the child works the cache shows no result, and afterwards nothing but the result."""
    child = FakeChild()
    seen: list[str] = []
    child.meanwhile = lambda: seen.extend(path.name for path in cache.iterdir())
    folder = import_with(child, source, cache)
    assert [name for name in seen if not name.startswith(".import-")] == []
    assert list(cache.iterdir()) == [folder]


def test_another_process_may_be_first(source: Source, cache: Path) -> None:
    """Two servers that import the same file at once agree on what was published first."""
    child, rival = FakeChild(), FakeChild()
    rivals: list[Path] = []

    def race() -> None:
        rivals.append(import_with(rival, source, cache))
        (rivals[0] / "first").touch()

    child.meanwhile = race
    folder = import_with(child, source, cache)
    assert folder == rivals[0]
    assert (folder / "first").exists()
    assert list(cache.iterdir()) == [folder]


def test_a_place_taken_by_something_else_is_told(source: Source, cache: Path) -> None:
    """A folder in the way that is no import of ours is not taken for one."""
    child = FakeChild()
    folder = import_with(child, source, cache)
    (folder / "kiln.json").unlink()
    assert refusal(child, source, cache).startswith("cannot be imported: ")
    assert (folder / "saved_model.pb").exists()


def test_the_childs_environment_is_ours_less_what_steers_keras(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No setting of ours, of Keras's or of TensorFlow's reaches the child, nor do its homes and GPUs."""
    for name in ("KERAS_BACKEND", "KERAS_HOME", "TF_FORCE_GPU_ALLOW_GROWTH", "TF_CPP_MIN_LOG_LEVEL", "KILN_MODELS"):
        monkeypatch.setenv(name, "ours")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("LANG", "C.UTF-8")
    child = FakeChild()
    import_with(child, source, cache)
    environment = child.environment
    assert "ours" not in environment.values()
    assert {"KILN_MODELS", "TF_FORCE_GPU_ALLOW_GROWTH"}.isdisjoint(environment)
    assert environment["LANG"] == "C.UTF-8"
    assert environment["KERAS_BACKEND"] == "tensorflow"
    assert environment["CUDA_VISIBLE_DEVICES"] == "-1"
    package_parent = str(Path(importer.__file__).parents[2])
    assert environment["PYTHONPATH"].split(":") == [package_parent, "elsewhere"]
    assert environment["HOME"] == environment["KERAS_HOME"] == str(Path(child.commands[0][-1]).parent)
