"""The scan of a SavedModel's folder, and its tables: no TensorFlow is needed for these."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.errors import ModelLoadError
from service.runtime.graph_scan import HARMLESS, REFUSED, REFUSED_PREFIXES, check_files, reason


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A SavedModel's folder with variables and an asset."""
    path = tmp_path / "model"
    for name in ("variables/variables.index", "assets/words.txt", "assets/deep/er.txt"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("data")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        check_files(path)
    return str(caught.value)


def test_files_and_folders_pass(model: Path) -> None:
    """Plain files pass, and so do links that stay within, such as a mounted volume has them."""
    check_files(model)
    (model / "..data").mkdir()
    (model / "..data" / "extra").write_text("data")
    (model / "assets.extra").symlink_to("..data", target_is_directory=True)
    (model / "assets" / "again").symlink_to(".", target_is_directory=True)
    (model / "assets" / "words2.txt").symlink_to("words.txt")
    (model / "assets" / "gone").symlink_to("gone.txt")
    check_files(model)


def test_the_folder_itself_may_be_a_link(model: Path, tmp_path: Path) -> None:
    """What a version's folder is called does not matter, only what leads out of where it is."""
    link = tmp_path / "link"
    link.symlink_to(model, target_is_directory=True)
    check_files(link)


@pytest.mark.parametrize("name", ["variables/more", "assets/words2.txt", "assets/deep/x", "assets.extra", "debug"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_a_link_out_is_refused(model: Path, tmp_path: Path, name: str, target: str) -> None:
    """A link to a file, to a folder or to what does not exist yet is refused alike, however deep."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (model / name).symlink_to(tmp_path / target)
    assert refusal(model) == f"{name} is a link out of the SavedModel's folder"


def test_a_link_out_within_what_is_linked_is_refused(model: Path, tmp_path: Path) -> None:
    """A folder that is reached through a link is looked into."""
    (model / "hidden").mkdir()
    (model / "hidden" / "out").symlink_to(tmp_path)
    (model / "assets.extra").symlink_to("hidden")
    assert refusal(model) == "assets.extra/out is a link out of the SavedModel's folder"


def test_what_is_no_file_is_refused(model: Path) -> None:
    """Reading a pipe would wait for ever."""
    os.mkfifo(model / "assets" / "pipe")
    assert refusal(model) == "assets/pipe is neither a file nor a folder"


def test_a_link_to_itself_is_refused(model: Path) -> None:
    """What cannot be followed is no file either."""
    (model / "assets" / "loop").symlink_to("loop")
    assert refusal(model).startswith("assets/loop cannot be read: ")


@pytest.mark.parametrize(
    ("operation", "why"),
    [
        ("ReadFile", "reads files"),
        ("WriteFile", "writes files"),
        ("WriteScalarSummary", "writes files"),
        ("ExperimentalCSVDataset", "reads files"),
        ("TFRecordReaderV2", "reads files"),
        ("PyFuncOfTomorrow", "runs Python code"),
        ("DebugIdentityV4", "dumps tensors into files or to other processes"),
        ("CollectiveReduceV9", "talks to other processes"),
        ("_NcclReduceSend", "talks to other processes"),
        ("XlaCallModule", "holds a program that no scan can look into"),
        ("ShutdownDistributedTPU", "takes over the machine's devices"),
        ("DebugGradientIdentity", ""),
        ("Assert", ""),
        ("SaveV2", ""),
        ("", ""),
    ],
)
def test_an_operation_is_judged_by_name(operation: str, why: str) -> None:
    """By its own name, by its family's, or without ``Experimental``; what loaders need is judged elsewhere."""
    assert reason(operation) == why


def test_the_tables_say_everything_once() -> None:
    """No operation is listed that its family covers already, and only members of a family are excepted."""
    families = tuple(REFUSED_PREFIXES)
    assert [name for name in REFUSED if name.startswith(families)] == []
    assert all(name.startswith(families) for name in HARMLESS)
