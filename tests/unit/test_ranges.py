"""The integers that a model takes, found by asking, and what lies beyond."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from service.errors import InvalidArgument
from service.runtime import ranges
from service.runtime.ranges import outside, proved_ranges
from service.tensors import Array, DataType, Signature, Tensors, TensorSpec
from tests.unit.plan_fakes import Machine

INFO = np.iinfo(np.int32)


def model(takes: Callable[[Array], bool]) -> Callable[[Tensors], Tensors]:
    def run(inputs: Tensors) -> Tensors:
        if not takes(inputs["x"]):
            raise InvalidArgument("no")
        return inputs

    return run


def proved(
    takes: Callable[[Array], bool], usual: int = 1, dtype: DataType = DataType.INT32
) -> dict[str, tuple[int, int]]:
    signature = Signature("s", (TensorSpec("x", dtype, (None, 2)),), ())
    return proved_ranges(signature, model(takes), {"x": np.full((1, 2), usual, dtype.numpy)})


@pytest.mark.parametrize(
    ("lowest", "highest"),
    [(0, 99), (0, 1), (-5, 7), (1, 1), (0, INFO.max), (INFO.min, 6), (INFO.min + 1, INFO.max - 1)],
)
def test_both_ends_are_found(lowest: int, highest: int) -> None:
    """To the number, wherever they are; from one that the model is known to take."""
    assert proved(lambda x: bool((x >= lowest).all() and (x <= highest).all())) == {"x": (lowest, highest)}


def test_a_model_that_takes_all_of_its_type_has_no_bounds() -> None:
    """Nor have inputs that are no integers."""
    assert proved(lambda x: True) == {}
    assert proved(lambda x: bool((x < 2).all()), dtype=DataType.FP32) == {}
    assert proved(lambda x: True, dtype=DataType.UINT8) == {}
    assert proved(lambda x: bool((x < 7).all()), dtype=DataType.UINT8) == {"x": (0, 6)}


def test_bounds_are_sought_from_numbers_that_were_taken() -> None:
    """A model that refuses 0 itself is known by its usual inputs."""
    assert proved(lambda x: bool((x >= 40).all() and (x < 60).all()), usual=50) == {"x": (40, 59)}


def test_an_input_without_elements_says_nothing_of_its_numbers() -> None:
    """Bounds are then sought from 0."""
    signature = Signature("s", (TensorSpec("x", DataType.INT32, (0,)),), ())
    assert proved_ranges(signature, lambda inputs: inputs, {"x": np.zeros(0, np.int32)}) == {}


def test_a_number_that_takes_very_long_counts_as_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An input may be a number of steps: the search ends at what takes much longer than the usual one."""
    machine = Machine()
    monkeypatch.setattr(ranges, "time", machine)
    asked: list[int] = []

    def takes(x: Array) -> bool:
        asked.append(int(x.max()))
        machine.work(max(0.001 * float(x.max()), 0.0))
        return bool((x >= 0).all())

    found = proved(takes)
    assert found["x"][0] == 0
    assert 100 < found["x"][1] < 512
    assert sum(number > 200 for number in asked) == 1


@pytest.mark.parametrize(
    ("numbers", "expected"), [([0, 9], False), ([], False), ([10, 0], True), ([0, -1], True), ([9, 9], False)]
)
def test_what_lies_outside_is_told(numbers: list[int], expected: bool) -> None:
    """One number beyond the ends is enough."""
    inputs = {"x": np.array(numbers, np.int32), "other": np.array([999])}
    assert outside({"x": (0, 9)}, inputs) is expected
    assert outside({}, inputs) is False
