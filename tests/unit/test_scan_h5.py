"""The scanner on HDF5: whole-model ``.h5`` files, and the weights inside ``.keras`` archives."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from service.errors import ModelLoadError
from service.registry.scan import scan_file

CONFIG: dict[str, Any] = {"class_name": "Sequential", "config": {"name": "net", "layers": []}}


def external_link(file: Any) -> None:
    file["model_weights/far"] = h5py.ExternalLink("/elsewhere.h5", "/x")


def external_dataset(file: Any) -> None:
    file["model_weights"].create_dataset("far", (4,), "f4", external=[("/elsewhere.bin", 0, 16)])


def virtual_dataset(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/elsewhere.h5", "x", (4,))
    file["model_weights"].create_virtual_dataset("far", layout)


def write_h5(target: Any, fill: Callable[[Any], None] = lambda file: None, config: Any = CONFIG) -> Any:
    """A whole-model file with one weight and whatever `fill` adds."""
    with h5py.File(target, "w") as file:
        file.create_dataset("model_weights/dense/kernel", data=np.zeros((2, 3), np.float32))
        if config is not None:
            file.attrs["model_config"] = json.dumps(config) if isinstance(config, dict) else config
        fill(file)
    return target


def refusal(path: Path) -> str:
    """Why the file is refused."""
    with pytest.raises(ModelLoadError) as caught:
        scan_file(path)
    return str(caught.value)


@pytest.fixture(params=["model.h5", "model.keras"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Callable[[Any], None]], Path]:
    """Writes the same weights as an ``.h5`` file, or as the weights of a ``.keras`` archive."""
    path: Path = tmp_path / request.param

    def write(fill: Callable[[Any], None]) -> Path:
        if path.suffix == ".h5":
            write_h5(path, fill)
            return path
        weights = io.BytesIO()
        write_h5(weights, fill)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("config.json"), json.dumps(CONFIG))
            archive.writestr(zipfile.ZipInfo("model.weights.h5"), weights.getvalue())
        return path

    return write


def soft_link(file: Any) -> None:
    file["model_weights/near"] = h5py.SoftLink("/model_weights/dense/kernel")
    file["model_weights/nowhere"] = h5py.SoftLink("/gone")


def named_type(file: Any) -> None:
    file["model_weights/type"] = np.dtype("f4")


@pytest.mark.parametrize("fill", [lambda file: None, soft_link, named_type])
def test_weights_that_stay_in_the_file_pass(write: Any, fill: Callable[[Any], None]) -> None:
    """Groups, datasets, named types and links within the file read nothing else."""
    scan_file(write(fill))


@pytest.mark.parametrize(
    ("fill", "kind"),
    [
        (external_link, "an external link"),
        (external_dataset, "an external dataset"),
        (virtual_dataset, "a virtual dataset"),
    ],
)
def test_weights_that_read_another_file_are_refused(write: Any, fill: Callable[[Any], None], kind: str) -> None:
    """HDF5's ways to read other files are refused, with the place."""
    expected = f"the weights are refused: /model_weights/far is {kind}, which reads another file"
    assert refusal(write(fill)) == expected


def group_in_itself(file: Any) -> None:
    file["model_weights/again"] = file["model_weights"]


def test_a_group_that_holds_itself_is_refused(write: Any) -> None:
    """A cycle of hard links has no end to look for: the file counts as damaged."""
    assert "damaged" in refusal(write(group_in_itself))


def test_the_config_of_an_h5_file_is_scanned(tmp_path: Path) -> None:
    """``.h5`` files carry Lambda layers as code that Keras's safe mode did not always see."""
    bad = {"class_name": "Lambda", "config": {"name": "code", "function": ["4wEAAA==", None, None]}}
    config = {"class_name": "Sequential", "config": {"name": "net", "layers": [bad]}}
    assert refusal(write_h5(tmp_path / "model.h5", config=config)).startswith("layer 'code' (Lambda) is refused")


def test_a_hdf5_suffix_is_read_alike(tmp_path: Path) -> None:
    """``.hdf5`` is another name for ``.h5``."""
    scan_file(write_h5(tmp_path / "model.hdf5"))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "the .h5 file has weights only: save the whole model with model.save()"),
        ("no JSON", "the model's config is no JSON: "),
        (np.array([1, 2]), "the model's config is no JSON: "),
        (h5py.Empty("S1"), "the model's config is no JSON: "),
        ("[]", "the model's config is not an object"),
    ],
)
def test_an_h5_file_without_a_usable_config_is_refused(tmp_path: Path, config: Any, text: str) -> None:
    """Weights alone are no model, and a config must be JSON's text."""
    assert refusal(write_h5(tmp_path / "model.h5", config=config)).startswith(text)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89HDF\r\n\x1a\n" + b"\xff" * 100])
def test_a_damaged_h5_file_is_refused(tmp_path: Path, data: bytes) -> None:
    """A file that HDF5 cannot open is damaged."""
    (tmp_path / "model.h5").write_bytes(data)
    assert refusal(tmp_path / "model.h5").startswith("the .h5 file is damaged: ")


def test_an_h5_file_under_a_keras_name_is_refused(tmp_path: Path) -> None:
    """The name decides, as it does for Keras: what is not an archive is no ``.keras`` file."""
    path = write_h5(tmp_path / "model.keras")
    assert refusal(path) == "the .keras file is damaged: File is not a zip file"


@pytest.mark.parametrize("seed", range(10))
def test_damage_anywhere_is_never_a_crash(write: Any, seed: int) -> None:
    """Files with random bytes overwritten are accepted or refused, and raise nothing else."""
    path: Path = write(soft_link)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    rng = np.random.default_rng(seed)
    at = rng.integers(0, len(data), 40)
    data[at] = rng.integers(0, 256, 40)
    path.write_bytes(data.tobytes())
    with contextlib.suppress(ModelLoadError):
        scan_file(path)
