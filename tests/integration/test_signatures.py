"""Every kind of signature through a loaded model and its batcher, with real TensorFlow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from service.batching.batcher import Batcher
from service.batching.queue import Limits
from service.batching.runner import ThreadRunner
from service.errors import InvalidArgument, ModelLoadError
from service.runtime.devices import choose_devices
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions
from service.tensors import DataType, Tensors
from tests.fakes import FakeObserver
from tests.integration.saved_models import save, save_default

MAX_ROWS = 8
TENSORFLOW_NAMES = {
    DataType.BOOL: "bool",
    DataType.FP16: "float16",
    DataType.BF16: "bfloat16",
    DataType.FP32: "float32",
    DataType.FP64: "float64",
    DataType.BYTES: "string",
}
VALUES: dict[DataType, list[Any]] = {
    DataType.BOOL: [True, False],
    DataType.BYTES: [b"", b"caf\xc3\xa9\x00"],
    DataType.UINT64: [0, 2**64 - 1],
    DataType.INT64: [-(2**63), 2**63 - 1],
    DataType.UINT32: [0, 2**32 - 1],
    DataType.UINT16: [0, 2**16 - 1],
    DataType.FP16: [0.5, 65504.0],
    DataType.BF16: [0.5, 3.3895314e38],
}


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow

    return tensorflow


@pytest.fixture(scope="module")
def root(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models: ``many`` has a signature of each kind, ``counter`` adds to its variable and answers it."""
    root = tmp_path_factory.mktemp("signatures")
    rows_of_2 = (tf.float32, (None, 2))
    signatures: dict[str, Any] = {
        dtype.value: (
            lambda x: {"y": tf.identity(x)},
            {"x": (tf.dtypes.as_dtype(TENSORFLOW_NAMES.get(dtype, dtype.value.lower())), (None,))},
        )
        for dtype in DataType
    }
    signatures |= {
        "serving_default": (
            lambda a, b: {"sum": a + tf.cast(b, tf.float32), "first": a[:, 0], "rows": b},
            {"a": rows_of_2, "b": (tf.int32, (None, 1))},
        ),
        "scalar": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, ())}),
        "fixed": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, (2,))}),
        "any_rank": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, None)}),
        "any_width": (lambda x: {"y": x + 1.0}, {"x": (tf.float32, (None, None))}),
        "total": (lambda x: {"y": tf.reduce_sum(x)}, {"x": rows_of_2}),
        "mixed": (lambda x, scale: {"y": x * scale}, {"x": rows_of_2, "scale": (tf.float32, ())}),
        "none": (lambda: {"y": tf.range(tf.random.uniform((), 3, 4, tf.int32))}, {}),
        "complex_in": (lambda z: {"y": tf.math.real(z)}, {"z": (tf.complex64, (None,))}),
        "complex_out": (lambda x: {"z": tf.complex(x, x)}, {"x": (tf.float64, (None,))}),
    }
    save(root / "many", signatures)
    module = tf.Module()
    module.count = tf.Variable(0)

    def count(x: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_non_negative(x, message="not below zero")]):
            return {"count": module.count.assign_add(1) + tf.zeros_like(x)}

    function = tf.function(count, input_signature=[tf.TensorSpec((None,), tf.int32, "x")])
    tf.saved_model.save(module, str(root / "counter"), signatures=function)
    return root


@pytest.fixture(scope="module")
def many(root: Path) -> Iterator[LoadedModel]:
    model = LoadedModel(root / "many", RuntimeOptions(PlanningOptions(MAX_ROWS)))
    model.warm_up()
    yield model
    model.close()


class Served:
    """A model before a batcher, as the registry puts it."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.observer = FakeObserver()
        runner = ThreadRunner("test", asyncio.get_running_loop())
        limits = Limits(MAX_ROWS, 1000, 1 << 20)
        self.batcher = Batcher(model, limits, runner=runner, observer=self.observer)

    async def ask(self, name: str, **inputs: Any) -> Tensors:
        signature = self.model.signatures[name]
        given = {key: np.array(value, signature.input_by_name[key].dtype.numpy) for key, value in inputs.items()}
        return await self.batcher.submit(signature, given, None)


@pytest_asyncio.fixture
async def served(many: LoadedModel) -> AsyncIterator[Served]:
    served = Served(many)
    yield served
    assert await served.batcher.stop(10.0)


@pytest_asyncio.fixture
async def counter(root: Path) -> AsyncIterator[Served]:
    """The counter, loaded as a stateful model with every plan allowed."""
    model = LoadedModel(
        root / "counter", RuntimeOptions(PlanningOptions(MAX_ROWS), stateful=True, plan_dir=root / "plans")
    )
    choices = model.warm_up()
    assert {name: choice.names for name, choice in choices.items()} == {"serving_default": {1: "signature"}}
    served = Served(model)
    yield served
    assert await served.batcher.stop(10.0)
    model.close()


@pytest.mark.parametrize("dtype", list(DataType), ids=lambda dtype: dtype.value)
async def test_each_type_is_fused_and_cut(served: Served, dtype: DataType) -> None:
    """Requests of every type share a batch, and each gets its own rows back, bit by bit."""
    values = VALUES.get(dtype, [1, 2])
    parts = [values, values[1:], values[:1]]
    answers = await asyncio.gather(*(served.ask(dtype.value, x=part) for part in parts))
    assert [answer["y"].tolist() for answer in answers] == [np.array(p, dtype.numpy).tolist() for p in parts]
    assert all(answer["y"].dtype == dtype.numpy for answer in answers)
    assert served.observer.runs == [4]


async def test_several_inputs_and_outputs_are_fused_together(served: Served) -> None:
    """Rows stay together over all inputs and outputs, whatever their shapes and types."""
    one = served.ask("serving_default", a=[[1, 2]], b=[[10]])
    two = served.ask("serving_default", a=[[3, 4], [5, 6]], b=[[20], [30]])
    first, second = await asyncio.gather(one, two)
    assert {name: array.tolist() for name, array in first.items()} == {
        "sum": [[11, 12]], "first": [1], "rows": [[10]],
    }  # fmt: skip
    assert {name: array.tolist() for name, array in second.items()} == {
        "sum": [[23, 24], [35, 36]], "first": [3, 5], "rows": [[20], [30]],
    }  # fmt: skip
    assert served.observer.runs == [3]


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("scalar", {"x": 1.5}, 2.5),
        ("fixed", {"x": [1, 2]}, [2, 3]),
        ("any_rank", {"x": 1}, 2),
        ("any_rank", {"x": [[1], [2]]}, [[2], [3]]),
        ("total", {"x": [[1, 2], [3, 4]]}, 10),
        ("mixed", {"x": [[1, 2]], "scale": 3}, [[3, 6]]),
        ("none", {}, [0, 1, 2]),
    ],
)
async def test_signatures_without_rows_run_one_at_a_time(
    served: Served, name: str, inputs: dict[str, Any], expected: Any
) -> None:
    """Nothing is fused where an input or output has no rows; every caller gets an answer of its own."""
    answers = await asyncio.gather(*(served.ask(name, **inputs) for _ in range(3)))
    assert [answer["y"].tolist() for answer in answers] == [expected] * 3
    assert served.observer.runs == [1, 1, 1]


async def test_open_sizes_are_fused_by_size(served: Served) -> None:
    """Rows of the same width share a batch; others get one of their own."""
    answers = await asyncio.gather(*(served.ask("any_width", x=[[0] * width]) for width in (2, 3, 2)))
    assert [answer["y"].tolist() for answer in answers] == [[[1] * width] for width in (2, 3, 2)]
    assert sorted(served.observer.runs) == [1, 2]


def test_complex_signatures_are_left_out_with_the_reason(many: LoadedModel) -> None:
    """What no protocol carries is not served, be it an input or an output, and the reason can be read."""
    assert not {"complex_in", "complex_out"} & many.signatures.keys()
    assert many.left_out == {
        "complex_in": "signature 'complex_in': tensor 'z' has a type that no protocol carries (DT_COMPLEX64)",
        "complex_out": "signature 'complex_out': tensor 'z' has a type that no protocol carries (DT_COMPLEX128)",
    }


async def test_a_counter_counts_without_gaps(counter: Served) -> None:
    """Twenty callers at once get 1 to 20, each a number of its own: no warm-up, no fusing, no second run."""
    assert not counter.model.signatures["serving_default"].batched
    answers = await asyncio.gather(*(counter.ask("serving_default", x=[0, 0]) for _ in range(20)))
    assert [answer["count"].tolist() for answer in answers] == [[n, n] for n in range(1, 21)]
    assert counter.observer.runs == [1] * 20


async def test_a_stateful_model_is_not_run_again_after_a_failure(counter: Served) -> None:
    """A request that the model refuses fails alone and once; those beside it are run as if it were not."""
    asked = [counter.ask("serving_default", x=[x]) for x in (0, -1, 0)]
    first, refused, third = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(refused, InvalidArgument)
    assert "not below zero" in str(refused)
    assert isinstance(first, dict)
    assert isinstance(third, dict)
    assert [first["count"].tolist(), third["count"].tolist()] == [[1], [2]]
    assert counter.observer.failures == 1
    assert counter.observer.runs == [1, 1]


async def test_more_rows_than_a_batch_are_not_split(counter: Served) -> None:
    """A request of a stateful model is one run, however many rows it has."""
    answer = await counter.ask("serving_default", x=[0] * 20)
    assert answer["count"].tolist() == [1] * 20


def test_a_stateful_model_has_one_copy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas would each count for themselves."""
    devices = ("CPU:0", "CPU:1")
    monkeypatch.setattr("service.runtime.model.devices_for", lambda wanted: choose_devices(wanted, devices))
    with pytest.raises(ModelLoadError) as caught:
        LoadedModel(root / "counter", RuntimeOptions(PlanningOptions(MAX_ROWS), device="cpu:*", stateful=True))
    assert str(caught.value) == "a stateful model has one copy, but device 'cpu:*' is CPU:0, CPU:1"


def test_a_signature_of_what_the_graph_does_not_have_is_left_out(
    tf: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tensor that is nowhere, or is several tensors, is told; the other signatures are served."""
    from tensorflow.core.protobuf import saved_model_pb2

    caplog.set_level(logging.WARNING, "kiln.runtime")
    path = save_default(tmp_path / "model", lambda x: {"y": x + 1.0}, x=(tf.float32, (None,)))
    file = path / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    definitions = saved.meta_graphs[0].signature_def
    for name in ("nowhere", "sparse", "unknown"):
        definitions[name].CopyFrom(definitions["serving_default"])
    definitions["nowhere"].outputs["y"].name = "nowhere:0"
    definitions["sparse"].outputs["y"].coo_sparse.values_tensor_name = "y:0"
    definitions["unknown"].outputs["y"].dtype = 999
    file.write_bytes(saved.SerializeToString())
    model = LoadedModel(path, RuntimeOptions(PlanningOptions(2)))
    model.close()
    assert list(model.signatures) == ["serving_default"]
    assert list(model.left_out.values()) == [
        "signature 'nowhere': tensor 'y' is 'nowhere:0', which the graph does not have",
        "signature 'sparse': tensor 'y' is sparse or composite, which no protocol carries",
        "signature 'unknown': tensor 'y' has a type that no protocol carries (DataType 999)",
    ]
    assert caplog.messages == list(model.left_out.values())
