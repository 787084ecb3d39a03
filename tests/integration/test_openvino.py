"""The OpenVINO plan against TensorFlow: what it answers, what it is not given, and what it keeps."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import Internal
from service.runtime.base import PlanUnavailable, buckets_up_to
from service.runtime.openvino import OpenVinoPlan
from service.runtime.parity import disagreement
from service.runtime.savedmodel import SavedModel
from service.tensors import Array, Tensors
from tests.integration.saved_models import save, save_cnn, save_default

BUCKETS = buckets_up_to(6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of this module are."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("models")
    save_cnn(root / "cnn")
    rows = {"x": (tf.float32, (None, 3))}
    save(
        root / "many",
        {"serving_default": (lambda x: {"y": x * 2.0}, rows), "alias": (lambda x: {"y": x * 3.0}, rows)},
    )
    save_default(root / "open", lambda x: {"y": tf.nn.relu(x)}, x=(tf.float32, (None, None)))
    save_default(root / "text", lambda text: {"y": tf.strings.length(text)}, text=(tf.string, (None, 1)))
    save_default(root / "fixed", lambda x: {"y": x + 1.0}, x=(tf.float32, (2,)))
    save_default(root / "odd", lambda x: {"y": tf.linalg.lu(tf.einsum("bi,bj->bij", x, x) + tf.eye(3))[0]}, **rows)
    return root


@pytest.fixture(scope="module")
def cnn(root: Path) -> Iterator[SavedModel]:
    model = SavedModel(root / "cnn")
    yield model
    model.close()


def images(rows: int) -> Array:
    return np.random.default_rng(rows).standard_normal((rows, 8, 8, 1), dtype=np.float32)


def reference(model: SavedModel, inputs: Tensors) -> Tensors:
    """What TensorFlow answers."""
    return model.plan(model.signatures["serving_default"]).run(inputs)


@pytest.mark.parametrize(
    ("threads", "streams", "name"), [(0, 1, "openvino"), (1, 1, "openvino-1"), (1, 2, "openvino-2x1")]
)
def test_openvino_answers_as_tensorflow_does(
    root: Path, cnn: SavedModel, threads: int, streams: int, name: str
) -> None:
    """On every bucket the compiled model agrees with TensorFlow within the tolerance."""
    plan = OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"], threads=threads, streams=streams)
    assert plan.name == name
    for rows in BUCKETS:
        got = plan.prepare(rows)({"image": images(rows)})
        assert disagreement(reference(cnn, {"image": images(rows)}), got) == ""
    plan.close()


def test_answers_are_not_overwritten(root: Path, cnn: SavedModel) -> None:
    """An answer stays as it is while the next batch runs."""
    run = OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"], threads=1).prepare(2)
    (name,) = cnn.signatures["serving_default"].output_by_name
    first = run({"image": images(2)})[name]
    before = first.copy()
    run({"image": np.zeros((2, 8, 8, 1), np.float32)})
    np.testing.assert_array_equal(first, before)


def test_a_failing_run_is_the_models_fault(root: Path, cnn: SavedModel) -> None:
    """What OpenVINO raises is `Internal`, and the next run is as good as any."""
    run = OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"], threads=1).prepare(1)
    with pytest.raises(Internal, match=r"^the model failed: "):
        run({"image": np.zeros((1, 8, 8, 3), np.float32)})
    assert disagreement(reference(cnn, {"image": images(1)}), run({"image": images(1)})) == ""


def test_open_sizes_are_compiled_once(root: Path) -> None:
    """Whatever the rows: what is compiled takes any number of them, and any size."""
    model = SavedModel(root / "open")
    plan = OpenVinoPlan(root / "open", model.signatures["serving_default"])
    runs = {rows: plan.prepare(rows) for rows in (1, 4)}
    assert len(plan._compiled) == 1
    assert runs[1]({"x": np.full((3, 5), -1, np.float32)})["y"].tolist() == [[0] * 5] * 3
    model.close()


def unavailable(root: Path, name: str, signature: str = "serving_default") -> str:
    """Why OpenVINO does not run a signature of the model `name`."""
    model = SavedModel(root / name)
    try:
        with pytest.raises(PlanUnavailable) as caught:
            OpenVinoPlan(root / name, model.signatures[signature], threads=1).prepare(1)
        return str(caught.value)
    finally:
        model.close()


@pytest.mark.parametrize(
    ("model", "signature", "text"),
    [
        ("many", "alias", "only the signature 'serving_default' can be compiled"),
        ("fixed", "serving_default", "the signature has no batch dimension"),
        ("text", "serving_default", "strings are left to TensorFlow"),
    ],
)
def test_what_openvino_is_not_given(root: Path, model: str, signature: str, text: str) -> None:
    """Other signatures, signatures without rows and strings stay with TensorFlow."""
    assert unavailable(root, model, signature) == text


def test_an_operation_that_openvino_lacks_is_told(root: Path) -> None:
    """A model that cannot be converted is not available, for a reason of one line."""
    text = unavailable(root, "odd")
    assert text
    assert "\n" not in text


def test_openvino_need_not_be_installed(root: Path, cnn: SavedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the plan is not available."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PlanUnavailable, match=r"^openvino is not installed$"):
        OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"])


def test_a_precision_that_the_processor_lacks_is_told(root: Path, cnn: SavedModel) -> None:
    """Never emulated: it would be slower and less exact. Where it is there, answers are near."""
    import openvino as ov

    signature = cnn.signatures["serving_default"]
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        run = OpenVinoPlan(root / "cnn", signature, threads=1, precision="bf16").prepare(2)
        (name,) = signature.output_by_name
        want, have = (f({"image": images(2)})[name] for f in (lambda i: reference(cnn, i), run))
        np.testing.assert_allclose(have, want, 0.05, 0.05)
    else:
        with pytest.raises(PlanUnavailable, match=r"^this CPU has no bf16$"):
            OpenVinoPlan(root / "cnn", signature, precision="bf16")
    with pytest.raises(PlanUnavailable, match=r"^this CPU has no f8$"):
        OpenVinoPlan(root / "cnn", signature, precision="f8")


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_names_must_survive_the_conversion(root: Path, cnn: SavedModel, side: str) -> None:
    """A converted model whose tensors are called otherwise is not used."""
    real = cnn.signatures["serving_default"]
    renamed = tuple(replace(spec, name="gone") for spec in getattr(real, side))
    signature = replace(real, inputs=renamed) if side == "inputs" else replace(real, outputs=renamed)
    with pytest.raises(PlanUnavailable, match=rf"^the converted model's {side} are .*, not \['gone'\]$"):
        OpenVinoPlan(root / "cnn", signature).prepare(1)


def test_nothing_is_sent_to_anyone(root: Path, cnn: SavedModel) -> None:
    """OpenVINO's telemetry is not loaded: it would fork the server, and tell of its use."""
    OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"])
    assert not [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module]


class Kept:
    """A plan that keeps its programs in a folder; counts what it compiles."""

    def __init__(self, path: Path, model: SavedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.model, self.folder = path, model, folder
        self.compiled = 0
        real = OpenVinoPlan._compile

        def compile_(plan: OpenVinoPlan, rows: int) -> Any:
            self.compiled += 1
            return real(plan, rows)

        monkeypatch.setattr(OpenVinoPlan, "_compile", compile_)

    def answers(self) -> bool:
        """Whether a new plan answers as TensorFlow does."""
        plan = OpenVinoPlan(self.path, self.model.signatures["serving_default"], threads=1, programs=self.folder)
        got = plan.prepare(2)({"image": images(2)})
        plan.close()
        return disagreement(reference(self.model, {"image": images(2)}), got) == ""


@pytest.fixture
def kept(root: Path, cnn: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    kept = Kept(root / "cnn", cnn, tmp_path / "programs", monkeypatch)
    assert kept.answers()
    return kept


def test_what_was_compiled_is_kept(kept: Kept) -> None:
    """The second time nothing is compiled, and the answers are the same."""
    assert [file.name for file in kept.folder.iterdir()] == ["openvino-1-2.program"]
    assert kept.answers()
    assert kept.compiled == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "junk"])
def test_a_program_that_cannot_be_read_is_compiled_anew(kept: Kept, damage: str) -> None:
    """Whatever is in its place: the file is then whole again."""
    (file,) = kept.folder.iterdir()
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "junk": b"\xff" * 5000}[damage])
    assert kept.answers()
    assert kept.compiled == 2
    assert len(file.read_bytes()) > 5000 or len(data) <= 5000
    assert kept.answers()
    assert kept.compiled == 2
