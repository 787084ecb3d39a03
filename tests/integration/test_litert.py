"""The LiteRT plan with real interpreters."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import Internal
from service.runtime import litert
from service.runtime.base import PlanUnavailable
from service.runtime.litert import LiteRtPlan
from service.runtime.parity import Tolerance, disagreement
from service.runtime.savedmodel import SavedModel
from service.tensors import DEFAULT_SIGNATURE, Signature, Tensors
from tests.integration.saved_models import save, save_cnn

pytestmark = pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="there is no ai-edge-litert here")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, SavedModel]]]:
    """A convolutional net, and signatures of other forms."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("models")
    save_cnn(root / "cnn")
    two = (
        lambda b, a: {"sum": a + tf.cast(b, tf.float32), "difference": a - tf.cast(b, tf.float32)},
        {"a": (tf.float32, (None, 3)), "b": (tf.int32, (None, 1))},
    )
    forms: dict[str, Any] = {
        "two": two,
        "open": (lambda x: {"y": x * 2.0}, {"x": (tf.float32, (None, None))}),
        "scalar": (lambda x: {"y": x * 2.0}, {"x": (tf.float32, ())}),
        "strings": (lambda x: {"y": tf.strings.length(x)}, {"x": (tf.string, (None,))}),
        "unknown": (lambda x: {"y": tf.linalg.expm(x)}, {"x": (tf.float32, (None, 2, 2))}),
    }
    save(root / "forms", forms)
    loaded = {name: (root / name, SavedModel(root / name)) for name in ("cnn", "forms")}
    yield loaded
    for _, model in loaded.values():
        model.close()


@pytest.fixture(scope="module")
def cnn(models: dict[str, tuple[Path, SavedModel]]) -> tuple[Path, SavedModel]:
    return models["cnn"]


def images(rows: int) -> Tensors:
    return {"image": np.random.default_rng(rows).standard_normal((rows, 8, 8, 1)).astype(np.float32)}


def signature_of(model: SavedModel, name: str = DEFAULT_SIGNATURE) -> Signature:
    return model.signatures[name]


@pytest.mark.parametrize("threads", [0, 1])
def test_it_answers_as_tensorflow_does(cnn: tuple[Path, SavedModel], threads: int) -> None:
    """On every bucket, and again on another batch of the same rows."""
    path, model = cnn
    plan = LiteRtPlan(path, signature_of(model), threads=threads)
    own = model.plan(signature_of(model))
    for rows in (1, 2, 5):
        run = plan.prepare(rows)
        for scale in (1.0, 3.0):
            inputs = {"image": images(rows)["image"] * np.float32(scale)}
            assert disagreement(own.run(inputs), run(inputs)) == ""
    plan.close()


def test_several_inputs_and_outputs_go_by_name(models: dict[str, tuple[Path, SavedModel]]) -> None:
    """Whatever order the conversion puts them in."""
    path, model = models["forms"]
    run = LiteRtPlan(path, signature_of(model, "two"), threads=1).prepare(1)
    outputs = run({"a": np.array([[1, 2, 3]], np.float32), "b": np.array([[2]], np.int32)})
    assert {name: array.tolist() for name, array in outputs.items()} == {
        "sum": [[3, 4, 5]],
        "difference": [[-1, 0, 1]],
    }


def test_answers_are_not_overwritten_by_other_threads(cnn: tuple[Path, SavedModel]) -> None:
    """Two batches at once have an interpreter each, and an answer stays what it was."""
    path, model = cnn
    run = LiteRtPlan(path, signature_of(model), threads=1).prepare(4)
    batches = [{"image": images(4)["image"] * np.float32(n)} for n in range(1, 9)]
    alone = [run(batch)["output_0"].copy() for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, batches * 4))
    for number, outputs in enumerate(together):
        np.testing.assert_array_equal(outputs["output_0"], alone[number % len(batches)])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("strings", "strings are left to TensorFlow"),
        ("open", "only rows of known sizes"),
        ("scalar", "only rows of known sizes"),
    ],
)
def test_forms_that_are_not_converted(models: dict[str, tuple[Path, SavedModel]], name: str, reason: str) -> None:
    """The reason is told before anything is tried."""
    path, model = models["forms"]
    with pytest.raises(PlanUnavailable, match=reason):
        LiteRtPlan(path, signature_of(model, name), threads=1)


def test_what_cannot_be_converted_is_told(models: dict[str, tuple[Path, SavedModel]]) -> None:
    """An operation that LiteRT does not have makes the plan unavailable."""
    path, model = models["forms"]
    with pytest.raises(PlanUnavailable, match=r"it cannot be converted: ."):
        LiteRtPlan(path, signature_of(model, "unknown"), threads=1).prepare(1)


def test_large_models_are_left_alone(cnn: tuple[Path, SavedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each interpreter would have the variables once more."""
    monkeypatch.setattr(litert, "stored_bytes", lambda path: 65 * 2**20)
    with pytest.raises(PlanUnavailable, match="65 MiB of variables"):
        LiteRtPlan(cnn[0], signature_of(cnn[1]), threads=1)


def test_it_need_not_be_installed(cnn: tuple[Path, SavedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package there is no such plan."""
    monkeypatch.setattr(litert, "find_spec", lambda name: None)
    with pytest.raises(PlanUnavailable, match="ai-edge-litert is not installed"):
        LiteRtPlan(cnn[0], signature_of(cnn[1]), threads=1)


def test_what_was_converted_is_kept(
    cnn: tuple[Path, SavedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next plan needs no TensorFlow to be made."""
    path, model = cnn
    first = LiteRtPlan(path, signature_of(model), threads=1, programs=tmp_path).prepare(2)(images(2))
    monkeypatch.setattr(litert, "load_tensorflow", lambda: pytest.fail("nothing is to be converted"))
    again = LiteRtPlan(path, signature_of(model), threads=1, programs=tmp_path).prepare(2)(images(2))
    np.testing.assert_array_equal(first["output_0"], again["output_0"])


def test_integers_of_8_bits_are_near(cnn: tuple[Path, SavedModel]) -> None:
    """Quantised weights answer within a wide tolerance, and are another plan by name."""
    path, model = cnn
    plan = LiteRtPlan(path, signature_of(model), threads=1, precision="int8")
    assert plan.name == "litert-int8-1"
    inputs = images(8)
    want = model.plan(signature_of(model)).run(inputs)
    assert disagreement(want, plan.prepare(8)(inputs), Tolerance(0.1, 0.1)) == ""


def test_a_failing_run_is_the_models_fault(cnn: tuple[Path, SavedModel]) -> None:
    """Rows that it was not prepared for never come; if they did, it would be told."""
    run = LiteRtPlan(cnn[0], signature_of(cnn[1]), threads=1).prepare(2)
    with pytest.raises(Internal, match="the model failed: ValueError"):
        run(images(3))
    assert run(images(2))["output_0"].shape == (2, 10)
