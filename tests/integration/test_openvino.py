"""The OpenVINO plan against TensorFlow, and the loaded model that chooses between them."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.batching.queue import Lane
from service.errors import Internal, InvalidArgument
from service.runtime.base import PlanUnavailable, buckets_up_to
from service.runtime.model import LoadedModel, PlanName, RuntimeOptions
from service.runtime.openvino import OpenVinoPlan
from service.runtime.planner import Cost, disagreement
from service.tensors import Array, Signature, Tensors
from tests.integration.saved_models import save, save_cnn, save_default

BUCKETS = buckets_up_to(6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of this module are: ``cnn``, ``many`` (several signatures) and ``open`` (open sizes)."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("models")
    save_cnn(root / "cnn")
    rows = {"x": (tf.float32, (None, 3))}
    text = {"text": (tf.string, (None, 1))}
    save(
        root / "many",
        {
            "serving_default": (lambda x: {"y": x * 2.0}, rows),
            "alias": (lambda x: {"y": x * 3.0}, rows),
            "length": (lambda text: {"y": tf.strings.length(text)}, text),
            "fixed": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, (2,))}),
        },
    )
    save_default(root / "open", lambda x: {"y": tf.nn.relu(x)}, x=(tf.float32, (None, None)))
    save_default(root / "text", lambda text: {"y": tf.strings.length(text)}, **text)
    save_default(root / "fixed", lambda x: {"y": x + 1.0}, x=(tf.float32, (2,)))
    save_default(root / "odd", lambda x: {"y": tf.linalg.lu(tf.einsum("bi,bj->bij", x, x) + tf.eye(3))[0]}, **rows)
    return root


@pytest.fixture(scope="module")
def cnn(root: Path) -> Iterator[LoadedModel]:
    """The convolutional model, not warmed up: TensorFlow alone answers."""
    model = LoadedModel(root / "cnn", RuntimeOptions(6))
    yield model
    model.close()


def images(rows: int) -> Array:
    return np.random.default_rng(rows).standard_normal((rows, 8, 8, 1), dtype=np.float32)


def lane(signature: Signature, *shapes: tuple[int, ...], conforms: bool = True) -> Lane:
    return Lane(signature, shapes, conforms, signature.batched)


def reference(model: LoadedModel, inputs: Tensors) -> Tensors:
    """What TensorFlow answers."""
    return model._replicas[0].baselines["serving_default"].run(inputs)


@pytest.mark.parametrize("threads", [0, 1])
def test_openvino_answers_as_tensorflow_does(root: Path, cnn: LoadedModel, threads: int) -> None:
    """On every bucket the compiled model agrees with TensorFlow within the tolerance."""
    signature = cnn.signatures["serving_default"]
    plan = OpenVinoPlan(root / "cnn", signature, BUCKETS, threads)
    assert plan.name == ("openvino-1" if threads else "openvino")
    for rows in BUCKETS:
        got = plan.run({"image": images(rows)})
        assert disagreement(reference(cnn, {"image": images(rows)}), got) == ""
    plan.close()


def test_openvino_wants_whole_buckets(root: Path, cnn: LoadedModel) -> None:
    """Rows are padded to the next bucket, so that a kernel is built once for each."""
    plan = OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"], BUCKETS, 1)
    assert [plan.bucket_rows(rows) for rows in range(1, 8)] == [1, 2, 4, 4, 6, 6, 7]
    plan.close()


def test_answers_are_not_overwritten(root: Path, cnn: LoadedModel) -> None:
    """An answer stays as it is while the next batch runs."""
    plan = OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"], BUCKETS, 1)
    (name,) = cnn.signatures["serving_default"].output_by_name
    first = plan.run({"image": images(2)})[name]
    before = first.copy()
    plan.run({"image": np.zeros((2, 8, 8, 1), np.float32)})
    np.testing.assert_array_equal(first, before)
    plan.close()


def test_a_failing_run_is_the_models_fault(root: Path, cnn: LoadedModel) -> None:
    """What OpenVINO raises is `Internal`."""
    plan = OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"], BUCKETS, 1)
    with pytest.raises(Internal, match=r"^the model failed: "):
        plan.run({"image": np.zeros((1, 8, 8, 3), np.float32)})
    plan.close()


def unavailable(root: Path, name: str, signature: str = "serving_default") -> str:
    """Why OpenVINO does not run a signature of the model `name`."""
    model = LoadedModel(root / name, RuntimeOptions(6))
    try:
        with pytest.raises(PlanUnavailable) as caught:
            OpenVinoPlan(root / name, model.signatures[signature], BUCKETS, 1)
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


def test_openvino_need_not_be_installed(root: Path, cnn: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the plan is not available."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(PlanUnavailable, match=r"^openvino is not installed$"):
        OpenVinoPlan(root / "cnn", cnn.signatures["serving_default"], BUCKETS, 1)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_names_must_survive_the_conversion(root: Path, cnn: LoadedModel, side: str) -> None:
    """A converted model whose tensors are called otherwise is not used."""
    real = cnn.signatures["serving_default"]
    renamed = tuple(replace(spec, name="gone") for spec in getattr(real, side))
    signature = replace(real, inputs=renamed) if side == "inputs" else replace(real, outputs=renamed)
    with pytest.raises(PlanUnavailable, match=rf"^the converted model's {side} are .*, not \['gone'\]$"):
        OpenVinoPlan(root / "cnn", signature, BUCKETS, 1)


@pytest.fixture(scope="module", params=["auto", "signature", "openvino"])
def warm(request: pytest.FixtureRequest, root: Path) -> Iterator[tuple[PlanName, LoadedModel]]:
    """The convolutional model, warmed up under each setting of ``--plan``."""
    model = LoadedModel(root / "cnn", RuntimeOptions(6, request.param))
    model.warm_up()
    yield request.param, model
    model.close()


def test_the_setting_decides_on_the_plans(warm: tuple[PlanName, LoadedModel]) -> None:
    """``signature`` uses TensorFlow only, ``openvino`` wherever it agrees, ``auto`` what is fastest."""
    plan, model = warm
    names = model._replicas[0].choices["serving_default"].names
    allowed = {
        "signature": {"signature"},
        "openvino": {"openvino-1", "openvino"},
        "auto": {"signature", "signature-pool", "openvino-1", "openvino"},
    }
    assert set(names) == set(BUCKETS)
    assert set(names.values()) <= allowed[plan]


def test_a_loaded_model_answers_on_every_number_of_rows(warm: tuple[PlanName, LoadedModel], cnn: LoadedModel) -> None:
    """Padded to the plan's bucket, each batch is answered as TensorFlow answers it alone."""
    _, model = warm
    signature = model.signatures["serving_default"]
    cnn_lane = lane(signature, (8, 8, 1))
    for rows in range(1, 8):
        given = model.bucket_rows(cnn_lane, rows)
        assert given >= rows
        padded = np.concatenate([images(rows), np.zeros((given - rows, 8, 8, 1), np.float32)])
        got = {name: array[:rows] for name, array in model.run(cnn_lane, {"image": padded}).items()}
        assert disagreement(reference(cnn, {"image": images(rows)}), got) == ""


def test_what_a_batch_costs_is_known(warm: tuple[PlanName, LoadedModel]) -> None:
    """The seconds measured for the bucket; unknown for more rows, and for shapes that were not measured."""
    _, model = warm
    signature = model.signatures["serving_default"]
    cnn_lane = lane(signature, (8, 8, 1))
    costs = model._replicas[0].choices["serving_default"].costs
    assert [model.expected_s(cnn_lane, rows) for rows in (1, 3, 6)] == [costs[b].seconds for b in (1, 4, 6)]
    assert 0 < costs[6].seconds < math.inf
    assert model.expected_s(cnn_lane, 7) == math.inf
    assert model.expected_s(lane(signature, (9, 9, 1), conforms=False), 1) == math.inf


def test_other_shapes_go_to_the_signature_plan(root: Path) -> None:
    """A lane that does not conform never reaches a compiled plan: TensorFlow answers or refuses."""
    model = LoadedModel(root / "many", RuntimeOptions(2, "openvino"))
    model.warm_up()
    signature = model.signatures["serving_default"]
    assert set(model._replicas[0].choices["serving_default"].names.values()) <= {"openvino-1", "openvino"}
    other = lane(signature, (5,), conforms=False)
    assert model.bucket_rows(other, 3) == 3
    assert model.run(other, {"x": np.ones((1, 5), np.float32)})["y"].tolist() == [[2, 2, 2, 2, 2]]
    with pytest.raises(InvalidArgument):
        model.run(other, {"x": np.array([["a"]], object)})
    model.close()


def test_before_its_warm_up_a_model_runs_on_tensorflow(cnn: LoadedModel) -> None:
    """Nothing is measured yet, and batches are run as they come."""
    cnn_lane = lane(cnn.signatures["serving_default"], (8, 8, 1))
    assert cnn.bucket_rows(cnn_lane, 5) == 5
    assert cnn.expected_s(cnn_lane, 5) == math.inf
    assert len(next(iter(cnn.run(cnn_lane, {"image": images(5)}).values()))) == 5


def test_every_signature_is_warmed_up(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each has its plans; one that looks like the default one is run by TensorFlow alone."""
    caplog.set_level(logging.INFO, "kiln.planner")
    model = LoadedModel(root / "many", RuntimeOptions(2))
    choices = model.warm_up()
    assert {name: tuple(choice.names) for name, choice in choices.items()} == {
        "serving_default": (1, 2),
        "alias": (1, 2),
        "length": (1, 2),
        "fixed": (1,),
    }
    assert set(choices["alias"].names.values()) == {"signature"}
    assert "openvino: not available: the signature has no batch dimension" not in caplog.text
    assert "openvino: not available: only the signature 'serving_default' can be compiled" in caplog.text
    fixed = lane(model.signatures["fixed"], (2,))
    assert model.bucket_rows(fixed, 1) == 1
    assert model.run(fixed, {"x": np.zeros(2, np.float32)})["y"].tolist() == [1, 1]
    assert model.expected_s(fixed, 1) == math.inf
    model.close()


def test_open_sizes_have_no_known_cost(root: Path) -> None:
    """What was measured with one size says nothing of others."""
    model = LoadedModel(root / "open", RuntimeOptions(2, "signature"))
    assert isinstance(model.warm_up()["serving_default"].costs[1], Cost)
    assert model.expected_s(lane(model.signatures["serving_default"], (32,)), 1) == math.inf
    model.close()


def test_a_device_of_its_own_has_no_rival_on_the_cpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TensorFlow found another device, OpenVINO's CPU plans are not tried, unless they are forced."""
    for plan, names in (("auto", ["signature-pool"]), ("openvino", ["openvino-1", "openvino"]), ("signature", [])):
        model = LoadedModel(root / "open", RuntimeOptions(2, plan))  # type: ignore[arg-type]
        (replica,) = model._replicas
        monkeypatch.setattr(replica.saved_model, "device", "GPU:0")
        assert [c.name for c in model._candidates(model.signatures["serving_default"], replica)] == names
        model.close()


def test_closing_gives_every_plan_back(root: Path) -> None:
    """Plans that serve several buckets are closed once, then the session; nothing runs any more."""
    model = LoadedModel(root / "cnn", RuntimeOptions(6, "openvino"))
    choices = model.warm_up()
    plans: list[Any] = list(choices["serving_default"].plans.values())
    assert all(hasattr(plan, "_request") for plan in plans)
    model.close()
    assert not any(hasattr(plan, "_request") for plan in plans)
    with pytest.raises(Internal):
        reference(model, {"image": images(1)})
