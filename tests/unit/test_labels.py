"""Names of classes: where they are looked for, and on which outputs they come to be."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from service.errors import ModelLoadError
from service.registry.labels import labelled, read_labels
from service.registry.repository import scan
from service.tensors import DataType, Signature, TensorSpec
from tests.fakes import DOUBLE


def write(path: Path, text: str = "a\nb\nc\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_beside_the_file_of_a_version(tmp_path: Path):
    """One name per line; the model's own file is for versions without one."""
    write(tmp_path / "m/1/labels.txt")
    write(tmp_path / "m/labels.txt", "other\n")
    assert read_labels(tmp_path / "m/1/model.keras") == ("a", "b", "c")
    assert read_labels(tmp_path / "m/2/model.keras") == ("other",)


def test_in_the_folder_of_a_saved_model(tmp_path: Path):
    """A SavedModel is a folder itself."""
    write(tmp_path / "m/1/labels.txt")
    assert read_labels(tmp_path / "m/1") == ("a", "b", "c")


def test_not_beside_other_models(tmp_path: Path):
    """The folder above is the model's only if this one is a version's."""
    write(tmp_path / "labels.txt")
    (tmp_path / "model").mkdir()
    assert read_labels(tmp_path / "model/model.keras") == ()


def test_a_file_that_is_no_text(tmp_path: Path):
    """Fails the load."""
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelLoadError, match=r"labels\.txt cannot be read"):
        read_labels(tmp_path)


def test_a_version_with_labels_is_a_version(tmp_path: Path):
    """The file is in nobody's way, in either place."""
    write(tmp_path / "m/1/model.keras")
    write(tmp_path / "m/1/labels.txt")
    write(tmp_path / "m/labels.txt")
    found = scan(tmp_path)
    assert [(source.model, source.version, source.path.name) for source in found.sources] == [("m", 1, "model.keras")]
    assert found.problems == ()


def test_they_go_where_their_number_fits():
    """To each output of so many classes, and to no other."""
    specs = [
        TensorSpec("fits", DataType.FP32, (None, 3)),
        TensorSpec("fewer", DataType.FP32, (None, 2)),
        TensorSpec("scalars", DataType.FP32, (None,)),
        TensorSpec("open", DataType.FP32, (None, None)),
        TensorSpec("unknown", DataType.FP32, None),
        TensorSpec("one", DataType.FP32, (3,)),
    ]
    named = labelled({"f": Signature("f", (), tuple(specs))}, ("a", "b", "c"), "m v1")
    assert [spec.name for spec in named["f"].outputs if spec.labels] == ["fits", "one"]
    assert named["f"].outputs[0].labels == ("a", "b", "c")


def test_a_number_that_fits_nowhere_is_warned_of(caplog: pytest.LogCaptureFixture):
    """And leaves the names out."""
    with caplog.at_level(logging.WARNING, "kiln"):
        assert labelled({"f": DOUBLE}, ("a", "b"), "m v1") == {"f": DOUBLE}
    assert caplog.messages == ["m v1: the 2 lines of labels.txt fit none of its outputs: left out"]


def test_no_labels_change_nothing():
    """The signatures are the same."""
    assert labelled({"f": DOUBLE}, (), "m v1")["f"] is DOUBLE
