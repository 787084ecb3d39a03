"""The planner's inputs for each type, and when two plans' outputs agree."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from service.errors import InvalidArgument
from service.runtime.planner import choose, disagreement
from service.tensors import DataType, Signature, Tensors, TensorSpec

NAN, INF = float("nan"), float("inf")


class Recorder:
    """A plan that answers its inputs, and keeps them."""

    name = "signature"

    def __init__(self) -> None:
        self.batches: list[Tensors] = []

    def bucket_rows(self, rows: int) -> int:
        return rows

    def run(self, inputs: Tensors) -> Tensors:
        self.batches.append(inputs)
        return inputs

    def close(self) -> None:
        raise AssertionError("the baseline is not the planner's to close")


@pytest.fixture
def one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing is one run."""
    monkeypatch.setattr("service.runtime.planner._RUNS", 1)


def warmed(*specs: TensorSpec, rows: int = 2) -> Tensors:
    """The inputs that a signature of `specs` is warmed up with."""
    plan = Recorder()
    outputs = tuple(TensorSpec(spec.name, spec.dtype, (None,)) for spec in specs)
    choose(Signature("s", specs, outputs), plan, [], (rows,), 1.0)
    return plan.batches[0]


@pytest.mark.usefixtures("one_run")
@pytest.mark.parametrize("dtype", list(DataType))
def test_inputs_of_each_type_are_drawn(dtype: DataType) -> None:
    """Each type gets an array of its own, with the rows of the bucket and the declared sizes."""
    array = warmed(TensorSpec("x", dtype, (None, 3, 2)))["x"]
    assert array.dtype == dtype.numpy
    assert array.shape == (2, 3, 2)
    if dtype is DataType.BYTES:
        assert set(array.flat) == {b"a few words"}
    elif not dtype.is_float:
        assert set(array.astype(int).flat) <= {0, 1}


@pytest.mark.usefixtures("one_run")
@pytest.mark.parametrize(
    ("shape", "drawn"),
    [((), ()), ((3,), (3,)), (None, ()), ((None, None), (2, 32)), ((None,), (2,)), ((4, None), (4, 32))],
)
def test_sizes_are_drawn_as_declared(shape: tuple[int | None, ...] | None, drawn: tuple[int, ...]) -> None:
    """Dimension 0 is the bucket where it is open, other open sizes are 32, an open rank is a scalar."""
    assert warmed(TensorSpec("x", DataType.FP32, shape))["x"].shape == drawn


@pytest.mark.usefixtures("one_run")
def test_several_inputs_are_drawn_alike_each_time() -> None:
    """Inputs differ from each other, and are the same in each draw: plans are compared on equal inputs."""
    specs = [TensorSpec(name, DataType.FP32, (None, 3)) for name in "ab"]
    first, again = warmed(*specs), warmed(*specs)
    assert not np.array_equal(first["a"], first["b"])
    assert all(np.array_equal(first[name], again[name]) for name in "ab")


def floats(*values: float, dtype: Any = np.float32) -> Tensors:
    return {"y": np.array(values, dtype)}


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (floats(1.0, -2.0), floats(1.00009, -2.0)),
        (floats(0.0), floats(9e-6)),
        (floats(NAN, INF, -INF), floats(NAN, INF, -INF)),
        (floats(1.0, dtype=np.float16), floats(1.0, dtype=np.float16)),
        (floats(1.0, dtype=ml_dtypes.bfloat16), floats(1.0, dtype=ml_dtypes.bfloat16)),
        (floats(1.0, dtype=np.float64), floats(1.0 + 9e-5, dtype=np.float64)),
        ({"y": np.array([1, 2])}, {"y": np.array([1, 2])}),
        ({"y": np.array([b"a"], object)}, {"y": np.array([b"a"], object)}),
        ({"y": np.array([True])}, {"y": np.array([True])}),
        ({}, {}),
        ({"y": np.array([1])}, {"y": np.array([1]), "more": np.array([2])}),
        (floats(), floats()),
    ],
)
def test_outputs_agree_within_the_tolerance(expected: Tensors, got: Tensors) -> None:
    """Floats may differ by 1e-4 of their size and 1e-5; NaN equals NaN; all else must be the same."""
    assert disagreement(expected, got) == ""


@pytest.mark.parametrize(
    ("expected", "got", "text"),
    [
        (floats(1.0, 2.0), floats(1.0, 2.5), "output 'y' differs by up to 0.5"),
        (floats(0.0, 1.0), floats(2e-5, 1.0), "output 'y' differs by up to 2e-05"),
        (floats(1.0, dtype=np.float64), floats(1.001, dtype=np.float64), "output 'y' differs by up to 0.001"),
        (floats(1.0, dtype=np.float16), floats(1.5, dtype=np.float16), "output 'y' differs by up to 0.5"),
        (
            floats(1.0, dtype=ml_dtypes.bfloat16),
            floats(2.0, dtype=ml_dtypes.bfloat16),
            "output 'y' differs by up to 1",
        ),
        (floats(NAN, 1.0), floats(0.0, 1.0), "output 'y' differs by up to inf"),
        (floats(NAN, 1.0), floats(NAN, 2.0), "output 'y' differs by up to 1"),
        (floats(INF, INF), floats(INF, -INF), "output 'y' differs by up to inf"),
        (floats(INF, 1.0), floats(INF, 3.0), "output 'y' differs by up to 2"),
        ({"y": np.array([1, 2])}, {"y": np.array([1, 3])}, "output 'y' differs"),
        ({"y": np.array([1], np.uint8)}, {"y": np.array([2], np.uint8)}, "output 'y' differs"),
        ({"y": np.array([True])}, {"y": np.array([False])}, "output 'y' differs"),
        ({"y": np.array([b"a"], object)}, {"y": np.array([b"b"], object)}, "output 'y' differs"),
        (floats(1.0), {"z": np.array([1.0])}, "output 'y' is None None, not float32 (1,)"),
        (floats(1.0), floats(1.0, 1.0), "output 'y' is float32 (2,), not float32 (1,)"),
        (floats(1.0), floats(1.0, dtype=np.float64), "output 'y' is float64 (1,), not float32 (1,)"),
    ],
)
def test_a_disagreement_is_told(expected: Tensors, got: Tensors, text: str) -> None:
    """The first output that differs is named, with the largest difference where that is a number."""
    assert disagreement(expected, got) == text


@pytest.mark.usefixtures("one_run")
@pytest.mark.parametrize(
    ("shape", "sample", "drawn"),
    [
        ((None,), [5, 6, 7], [[5], [5, 6], [5, 6, 7, 5, 6]]),
        ((2,), [5, 6], [[5, 6]] * 3),
    ],
)
def test_a_sample_takes_the_place_of_what_is_drawn(shape: tuple[int | None], sample: list[int], drawn: Any) -> None:
    """Its rows are cut or repeated to each bucket; without rows it is taken as it is."""
    plan = Recorder()
    spec = TensorSpec("x", DataType.INT32, shape)
    choose(Signature("s", (spec,), (spec,)), plan, [], (1, 2, 5), 1.0, sample={"x": np.array(sample, np.int32)})
    assert [batch["x"].tolist() for batch in plan.batches[:3]] == drawn


@pytest.mark.usefixtures("one_run")
def test_a_sample_that_is_refused_is_done_without() -> None:
    """A model that does not take the sample's rows as often as a bucket needs is given random ones."""

    class Picky(Recorder):
        def run(self, inputs: Tensors) -> Tensors:
            if inputs["x"].max() > 1:
                raise InvalidArgument("too large")
            return super().run(inputs)

    plan = Picky()
    spec = TensorSpec("x", DataType.INT32, (None,))
    choice = choose(Signature("s", (spec,), (spec,)), plan, [], (2,), 1.0, sample={"x": np.array([9], np.int32)})
    assert choice.costs[2].seconds < 60
    assert plan.batches[0]["x"].shape == (2,)
