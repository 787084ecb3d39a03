"""SavedModels with real TensorFlow: signatures, types, refusals, and how the graph is run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import Internal, InvalidArgument, ModelLoadError
from service.runtime import savedmodel
from service.runtime.graph import Graph
from service.runtime.savedmodel import SavedModel
from service.tensors import DataType, Tensors
from tests.integration.saved_models import save, save_cnn, save_default

TENSORFLOW_NAMES = {
    DataType.BOOL: "bool",
    DataType.FP16: "float16",
    DataType.BF16: "bfloat16",
    DataType.FP32: "float32",
    DataType.FP64: "float64",
    DataType.BYTES: "string",
}


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow

    return tensorflow


@pytest.fixture(scope="module")
def models(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SavedModel]]:
    """Loaded models by name, written once."""
    root = tmp_path_factory.mktemp("models")

    def dense(x: Any) -> Any:
        return {"y": tf.nn.relu(tf.matmul(x, tf.ones((3, 2))) + 1.0)}

    def two(b: Any, a: Any) -> Any:
        return {"sum": a + tf.cast(b, tf.float32), "difference": a - tf.cast(b, tf.float32)}

    def reject(x: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_less(x, 10.0, message="under ten, please")]):
            return {"y": x * 2.0}

    types = {dtype: tf.dtypes.as_dtype(TENSORFLOW_NAMES.get(dtype, dtype.value.lower())) for dtype in DataType}
    batch_of_3 = (tf.float32, (None, 3))
    paths = {
        "types": save(
            root / "types",
            {t.value: (lambda x: {"y": tf.identity(x)}, {"x": (types[t], (None, 2))}) for t in DataType},
        ),
        "dense": save_default(root / "dense", dense, x=batch_of_3),
        "two": save(
            root / "two",
            {
                "serving_default": (two, {"a": batch_of_3, "b": (tf.int32, (None, 1))}),
                "negative": (lambda x: {"y": -x}, {"x": batch_of_3}),
            },
        ),
        "shapes": save(
            root / "shapes",
            {
                "scalar": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, ())}),
                "word": (lambda x: {"y": x}, {"x": (tf.string, ())}),
                "word_of_any_rank": (lambda x: {"y": x}, {"x": (tf.string, None)}),
                "fixed": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, (4,))}),
                "any_rank": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, None)}),
                "no_rows_out": (lambda x: {"y": tf.reduce_sum(x)}, {"x": batch_of_3}),
                "no_inputs": (lambda: {"y": tf.range(tf.random.uniform((), 3, 4, tf.int32))}, {}),
            },
        ),
        "reject": save_default(root / "reject", reject, x=batch_of_3),
    }
    save_cnn(root / "cnn")
    loaded = {name: SavedModel(path) for name, path in (paths | {"cnn": root / "cnn"}).items()}
    yield loaded
    for model in loaded.values():
        model.close()


def run(model: SavedModel, inputs: Tensors, signature: str = "serving_default", *, pooled: bool = False) -> Tensors:
    return model.plan(model.signatures[signature], pooled=pooled).run(inputs)


VALUES: dict[DataType, list[list[Any]]] = {
    DataType.BOOL: [[True, False]],
    DataType.BYTES: [[b"", b"caf\xc3\xa9\x00"]],
    DataType.UINT64: [[0, 2**64 - 1]],
    DataType.INT64: [[-(2**63), 2**63 - 1]],
}


@pytest.mark.parametrize("dtype", list(DataType), ids=lambda dtype: dtype.value)
def test_each_type_goes_in_and_comes_out(models: dict[str, SavedModel], dtype: DataType) -> None:
    """Every type that a wire carries is read from the signature and passes through the graph unchanged."""
    signature = models["types"].signatures[dtype.value]
    assert [(s.name, s.dtype, s.shape) for s in signature.inputs] == [("x", dtype, (None, 2))]
    x = np.array(VALUES.get(dtype, [[1, 2], [3, 4]]), dtype.numpy)
    y = run(models["types"], {"x": x}, dtype.value)["y"]
    assert y.dtype == dtype.numpy
    assert y.tolist() == x.tolist()


def test_inputs_and_outputs_are_named(models: dict[str, SavedModel]) -> None:
    """Several inputs and outputs go by their names, whatever their order."""
    signature = models["two"].signatures["serving_default"]
    assert signature.describe() == "a FP32 [-1, 3], b INT32 [-1, 1] → difference FP32 [-1, 3], sum FP32 [-1, 3]"
    outputs = run(models["two"], {"b": np.array([[2]], np.int32), "a": np.array([[1, 2, 3]], np.float32)})
    assert {name: array.tolist() for name, array in outputs.items()} == {
        "sum": [[3, 4, 5]],
        "difference": [[-1, 0, 1]],
    }


def test_each_signature_is_a_function_of_its_own(models: dict[str, SavedModel]) -> None:
    """A model may have several signatures; TensorFlow's own are not shown."""
    assert sorted(models["two"].signatures) == ["negative", "serving_default"]
    assert run(models["two"], {"x": np.ones((1, 3), np.float32)}, "negative")["y"].tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    ("name", "batched", "shape", "given"),
    [
        ("scalar", False, (), 1.0),
        ("fixed", False, (4,), [1.0, 2.0, 3.0, 4.0]),
        ("any_rank", False, None, [[1.0], [2.0]]),
        ("any_rank", False, None, 5.0),
    ],
)
def test_signatures_without_rows_are_run_as_they_are(
    models: dict[str, SavedModel], name: str, batched: bool, shape: tuple[int, ...] | None, given: Any
) -> None:
    """A scalar, a fixed size or an open rank is read as declared, and cannot be batched."""
    signature = models["shapes"].signatures[name]
    assert (signature.batched, signature.inputs[0].shape) == (batched, shape)
    x = np.array(given, np.float32)
    np.testing.assert_array_equal(run(models["shapes"], {"x": x}, name)["y"], x + 1)


@pytest.mark.parametrize("name", ["scalar", "word", "word_of_any_rank"])
def test_a_scalar_comes_out_as_an_array(models: dict[str, SavedModel], name: str) -> None:
    """Of no dimensions, with its type: left to itself the session gives a number or bare bytes."""
    signature = models["shapes"].signatures[name]
    given: Any = b"caf\xc3\xa9" if name != "scalar" else 1.0
    y = run(models["shapes"], {"x": np.array(given, signature.inputs[0].dtype.numpy)}, name)["y"]
    assert isinstance(y, np.ndarray)
    assert (y.shape, y.dtype, y.item()) == ((), signature.outputs[0].dtype.numpy, given if name != "scalar" else 2.0)


def test_rows_must_come_out_too(models: dict[str, SavedModel]) -> None:
    """A signature whose output has no rows, or that has no input, cannot be batched."""
    signatures = models["shapes"].signatures
    assert not signatures["no_rows_out"].batched
    assert not signatures["no_inputs"].batched
    assert run(models["shapes"], {}, "no_inputs")["y"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("model", "signature", "tolerant"),
    [("dense", "serving_default", True), ("cnn", "serving_default", False), ("types", "FP32", True)],
)
def test_only_graphs_of_safe_operations_are_let_try_shapes(
    models: dict[str, SavedModel], model: str, signature: str, tolerant: bool
) -> None:
    """A convolution ends the process on an unforeseen rank, so that its graph may never see one."""
    assert models[model].signatures[signature].takes_other_shapes is tolerant


def test_a_graph_that_is_let_try_answers_or_refuses(models: dict[str, SavedModel]) -> None:
    """Undeclared shapes reach the graph, whose refusal is the caller's error, in one line."""
    assert run(models["dense"], {"x": np.ones((5, 3), np.float32)})["y"].tolist() == [[4, 4]] * 5
    for shape in ((2, 4), (3,), (), (2, 2, 2, 4)):
        with pytest.raises(InvalidArgument, match=r"^the model refused the input: [^\n]+$"):
            run(models["dense"], {"x": np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("model", "inputs", "text"),
    [
        ("reject", {"x": np.full((1, 3), 11.0, np.float32)}, "under ten, please"),
        ("dense", {"x": np.array([[b"a", b"b", b"c"]], object)}, ""),
    ],
)
def test_what_the_graph_refuses_is_the_callers_fault(
    models: dict[str, SavedModel], model: str, inputs: Tensors, text: str
) -> None:
    """A failed assertion or conversion in the graph is `InvalidArgument` with TensorFlow's reason."""
    with pytest.raises(InvalidArgument, match=r"^the model refused the input: ") as caught:
        run(models[model], inputs)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unforeseen_error_is_the_models_fault(models: dict[str, SavedModel], tf: Any) -> None:
    """What is no refusal is `Internal`, with the error's kind."""

    def call(*arrays: Any) -> Any:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating\n\t [[{{node a}}]]")

    plan = savedmodel.SessionPlan("signature", models["dense"].signatures["serving_default"], call)
    with pytest.raises(Internal, match=r"^the model failed: ResourceExhaustedError: OOM when allocating$"):
        plan.run({"x": np.ones((1, 3), np.float32)})


def test_a_reason_without_words_is_the_errors_kind() -> None:
    """An error that says nothing, or only where it happened, is told somehow."""
    assert savedmodel._first_line(MemoryError()) == "MemoryError"
    assert savedmodel._first_line(ValueError("[[node a]]\n")) == "[[node a]]"


def test_plans_have_names_and_take_rows_as_they_come(models: dict[str, SavedModel]) -> None:
    """Both ways to run the graph answer the same, on any number of rows; closing one leaves the model."""
    model = models["dense"]
    signature = model.signatures["serving_default"]
    plain, pooled = model.plan(signature), model.plan(signature, pooled=True)
    assert (plain.name, pooled.name, plain.pads) == ("signature", "signature-pool", False)
    x = {"x": np.arange(21, dtype=np.float32).reshape(7, 3)}
    np.testing.assert_array_equal(plain.run(x)["y"], pooled.run(x)["y"])
    pooled.close()
    assert len(plain.run(x)["y"]) == 7
    assert model.device == "CPU:0"


def test_the_public_way_to_call_serves_where_the_direct_one_is_missing() -> None:
    """A TensorFlow without the callable that is used here is called through `make_callable`."""

    class Session:
        def make_callable(self, fetches: list[Any], feed_list: list[str]) -> Any:
            return lambda *arrays: [[*fetches[0], feed_list, *arrays], fetches[1]]

    call = savedmodel._callable(Session(), ("x:0",), ("y:0",), pooled=False)
    assert call(1) == ["y:0", ["x:0"], 1]


def test_a_signature_that_no_wire_carries_is_left_out(tf: Any, tmp_path: Path, caplog: Any) -> None:
    """Of a model with a complex signature the others are served, and the log says why it is missing."""
    caplog.set_level(logging.WARNING, "kiln.runtime")
    signatures = {
        "complex": (lambda z: {"y": tf.math.real(z)}, {"z": (tf.complex64, (None,))}),
        "real": (lambda x: {"y": x}, {"x": (tf.float32, (None,))}),
    }
    model = SavedModel(save(tmp_path / "model", signatures))
    model.close()
    assert list(model.signatures) == ["real"]
    reason = "signature 'complex': tensor 'z' has a type that no protocol carries (DT_COMPLEX64)"
    assert caplog.messages == [reason]
    assert model.left_out == {"complex": reason}


def test_a_model_without_a_servable_signature_is_refused(tf: Any, tmp_path: Path) -> None:
    """The reason has every signature that was left out."""
    path = save_default(tmp_path / "model", lambda z: {"y": tf.math.real(z)}, z=(tf.complex64, (None,)))
    with pytest.raises(ModelLoadError) as caught:
        SavedModel(path)
    assert str(caught.value) == (
        "no signature can be served: signature 'serving_default': tensor 'z' has a type that no protocol carries "
        "(DT_COMPLEX64)"
    )


def test_a_model_saved_without_signatures_is_refused(tmp_path: Path) -> None:
    """A module saved bare can be loaded but not asked."""
    with pytest.raises(ModelLoadError) as caught:
        SavedModel(save(tmp_path / "model", {}))
    assert str(caught.value) == ("no signature can be served: it was saved without one (model.export() writes one)")


@pytest.fixture(scope="module")
def saved(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel with a variable, to be damaged."""
    variable = tf.Variable([1.0, 2.0])
    module = tf.Module()
    module.variable = variable
    path = tmp_path_factory.mktemp("saved") / "model"
    function = tf.function(lambda x: {"y": x * variable}, input_signature=[tf.TensorSpec((None, 2), tf.float32, "x")])
    tf.saved_model.save(module, str(path), signatures=function)
    return path


@pytest.mark.parametrize("damage", ["graph", "no graph", "no variables", "variables"])
def test_a_damaged_model_is_refused(saved: Path, tmp_path: Path, damage: str) -> None:
    """A graph or variables that are missing or corrupt are refused in one line."""
    path = Path(shutil.copytree(saved, tmp_path / "model"))
    if damage == "graph":
        (path / "saved_model.pb").write_bytes(b"\xff" * 100)
    elif damage == "no graph":
        (path / "saved_model.pb").unlink()
    elif damage == "no variables":
        shutil.rmtree(path / "variables")
    else:
        (path / "variables" / "variables.index").write_bytes(b"junk")
    told = "saved_model.pb (is damaged|cannot be read)" if "graph" in damage else "TensorFlow cannot load it"
    with pytest.raises(ModelLoadError, match=rf"^{told}: [^\n]+$"):
        SavedModel(path)


def test_variables_belong_to_their_model(saved: Path) -> None:
    """Two loads of one model share nothing: closing one leaves the other."""
    first, second = SavedModel(saved), SavedModel(saved)
    first.close()
    assert run(second, {"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[1, 2]]
    second.close()


def test_operations_are_found_wherever_they_are(tf: Any) -> None:
    """Those that an output depends on count, through control edges, branches and functions; no others do."""
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, (), "x")
        tf.sqrt(x)
        with tf.control_dependencies([tf.sin(x)]):
            y = tf.cond(
                x > 0, tf.function(lambda: tf.exp(x)), lambda: tf.switch_case(tf.constant(0), [lambda: tf.cos(x)])
            )
    walked = Graph(graph.as_graph_def())
    found = walked.operations(walked.reached([y.name]))
    assert {"Placeholder", "Exp", "Cos", "Sin"} <= found
    assert "Sqrt" not in found
