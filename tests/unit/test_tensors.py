"""Types, signatures, the validation of shapes and rows, and what tells a caller the likely fix."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from service.errors import InvalidArgument
from service.tensors import (
    BY_TENSORFLOW_NUMBER,
    DataType,
    Signature,
    TensorSpec,
    check_data_type,
    check_names,
    check_shape,
    count_rows,
    data_type_of,
    integers_fit,
    trailing_shapes,
)
from tests.fakes import DOUBLE

Shape = tuple[int | None, ...] | None


def spec(shape: Shape, dtype: DataType = DataType.FP32, name: str = "x") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def signature(*inputs: Shape, outputs: tuple[Shape, ...] = ((None, 1),)) -> Signature:
    return Signature(
        "s",
        tuple(spec(shape, name=f"x{n}") for n, shape in enumerate(inputs)),
        tuple(spec(shape, name=f"y{n}") for n, shape in enumerate(outputs)),
    )


# Types


@pytest.mark.parametrize("dtype", DataType)
def test_a_type_is_found_from_its_array_and_its_number(dtype: DataType):
    """Every wire type is that of its NumPy arrays and of its number in TensorFlow."""
    assert data_type_of(np.zeros(2, dtype.numpy)) is dtype
    assert BY_TENSORFLOW_NUMBER[dtype.number] is dtype
    assert DataType[dtype.value] is dtype
    assert dtype.tensorflow.startswith("DT_")


@pytest.mark.parametrize("array", [np.array(["é"]), np.array([b"a"]), np.array([b"a"], object)])
def test_all_kinds_of_strings_are_bytes(array: np.ndarray):
    """Text, fixed-width bytes and objects all travel as BYTES."""
    assert data_type_of(array) is DataType.BYTES


def test_a_type_that_no_wire_has_is_refused():
    """A complex array cannot be sent, and the text says so."""
    with pytest.raises(InvalidArgument, match="tensors of type complex64 cannot be sent"):
        data_type_of(np.zeros(1, np.complex64))


def test_types_know_what_they_are():
    """Floats are the four of them, integers the eight; strings and booleans are neither."""
    assert {t.value for t in DataType if t.is_float} == {"FP16", "BF16", "FP32", "FP64"}
    assert {t.value for t in DataType if t.is_integer} == {f"{u}INT{n}" for u in ("", "U") for n in (8, 16, 32, 64)}


@pytest.mark.parametrize(
    ("array", "is_right"),
    [
        (np.zeros(1, np.float32), True),
        (np.zeros(1, np.float64), False),
        (np.zeros(1, ml_dtypes.bfloat16), False),
        (np.zeros(1, ">f4"), False),
    ],
)
def test_a_wrong_type_is_named_as_the_caller_calls_it(array: np.ndarray, is_right: bool):
    """`check_data_type` passes the declared type alone, and repeats the caller's own word for another."""
    if is_right:
        check_data_type(spec((None,)), "THEIRS", array)
    else:
        with pytest.raises(InvalidArgument, match="input 'x': expected datatype FP32, got THEIRS"):
            check_data_type(spec((None,)), "THEIRS", array)


@pytest.mark.parametrize(
    ("given", "dtype", "text"),
    [
        (np.array([0, 255]), DataType.UINT8, None),
        (np.array([0, 256]), DataType.UINT8, "input 'x': 256 does not fit UINT8"),
        (np.array([-1, 3]), DataType.UINT8, "input 'x': -1 does not fit UINT8"),
        (np.array([2**64 - 1], np.uint64), DataType.INT64, "18446744073709551615 does not fit INT64"),
        (np.array([3]), DataType.FP32, None),
        (np.array([3], np.int64), DataType.INT64, None),
        (np.array([], np.int64), DataType.INT8, None),
        (np.array([True]), DataType.INT8, None),
    ],
)
def test_integers_are_narrowed_only_if_they_fit(given: np.ndarray, dtype: DataType, text: str | None):
    """An integer beyond its type's range is refused by its value, never wrapped around."""
    target = spec((None,), dtype)
    if text:
        with pytest.raises(InvalidArgument, match=text):
            integers_fit(given, target)
    else:
        fitted = integers_fit(given, target)
        assert fitted.dtype == dtype.numpy
        assert fitted.tolist() == given.tolist()


# Signatures


@pytest.mark.parametrize(
    ("sides", "batched"),
    [
        (signature((None, 3)), True),
        (signature((None, 3), (None,)), True),
        (signature((None, 3), (2, 3)), False),
        (signature((None, 3), ()), False),
        (signature(None), False),
        (signature((None, 3), outputs=((1,),)), False),
        (signature((None, 3), outputs=((None, 1), None)), False),
        (signature(), False),
    ],
)
def test_a_signature_is_batched_where_every_tensor_has_open_rows(sides: Signature, batched: bool):
    """Rows of several callers may be fused only if dimension 0 is open in each tensor, and no run leaves a trace."""
    assert sides.batched is batched
    assert not replace(sides, stateful=True).batched


@pytest.mark.parametrize(
    ("sides", "is_open"),
    [
        (signature((None, 3)), False),
        (signature((None, None)), True),
        (signature((3,), outputs=((1,),)), False),
        (signature((None, 3), outputs=((1,),)), True),
        (signature(None), True),
    ],
)
def test_open_sizes_are_those_besides_the_rows(sides: Signature, is_open: bool):
    """A signature has open sizes if its cost depends on more of the request than its rows."""
    assert sides.has_open_sizes is is_open


def test_a_signature_is_described_in_one_line():
    """Both sides with names, types and shapes, an open size as -1, an open rank as [-1]."""
    assert DOUBLE.describe() == "x FP32 [-1, 3] → y FP32 [-1, 3]"
    assert signature(None, ()).describe() == "x0 FP32 [-1], x1 FP32 [] → y0 FP32 [-1, 1]"
    assert [*DOUBLE.input_by_name, *DOUBLE.output_by_name] == ["x", "y"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("x0 x1", None),
        ("x0 x1 z", "unknown input 'z': signature 's' takes x0, x1"),
        ("x1", "input 'x0' is missing: signature 's' takes x0, x1; received x1"),
        ("", "input 'x0' is missing: signature 's' takes x0, x1; received none"),
    ],
)
def test_exactly_the_inputs_of_the_signature_are_taken(given: str, text: str | None):
    """An unknown or missing input is named, with what the signature takes and what came."""
    names = dict.fromkeys(given.split())
    if text is None:
        check_names(signature((None,), (None,)), names)
    else:
        with pytest.raises(InvalidArgument) as refused:
            check_names(signature((None,), (None,)), names)
        assert str(refused.value) == text


# Shapes


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ((None, 28, 28, 1), (7, 28, 28, 1)),
        ((None, None), (0, 9)),
        (None, ()),
        (None, (1, 2)),
        ((), ()),
        ((2, 3), (2, 3)),
    ],
)
def test_a_shape_that_fits_passes(declared: Shape, shape: tuple[int, ...]):
    """Open sizes take any size, an open rank any shape."""
    assert spec(declared).admits(shape)
    check_shape(spec(declared), shape)


@pytest.mark.parametrize(
    ("declared", "shape", "text"),
    [
        ((None, 28, 28, 1), (2, 28, 28), "[28, 28, 1] expected, got [28, 28]: add a channel axis?"),
        ((None, 28, 28, 1), (28, 28, 1), "[-1, 28, 28, 1] expected, got [28, 28, 1]: add a batch dimension?"),
        ((None, 28, 28), (2, 28, 28, 1), "[28, 28] expected, got [28, 28, 1]: drop the last axis?"),
        ((None, 28, 28), (1, 2, 28, 28), "[28, 28] expected, got [2, 28, 28]: drop the first axis?"),
        ((None, 8, 9, 3), (2, 3, 8, 9), "[8, 9, 3] expected, got [3, 8, 9]: channels last is expected, transpose?"),
        ((None, 8, 8), (2, 64), "[8, 8] expected, got [64]: reshape each row?"),
        ((None, 8, None), (2, 64), "[8, -1] expected, got [64]"),
        ((None, 8, 8), (2, 63), "[8, 8] expected, got [63]"),
        ((None, 8), (2, 9), "[8] expected, got [9]"),
        ((None,), (), "[-1] expected, got []: add a batch dimension?"),
        ((None, 3), (), "[-1, 3] expected, got []"),
        ((3,), (1, 3), "[3] expected, got [1, 3]"),
        ((3,), (3, 1), "[3] expected, got [3, 1]: drop the last axis?"),
        ((), (1,), "[] expected, got [1]"),
    ],
)
def test_a_shape_that_does_not_fit_is_told_with_the_likely_fix(declared: Shape, shape: tuple[int, ...], text: str):
    """The refusal names what was expected and what came, less the rows, and the one change that would make it fit."""
    assert not spec(declared).admits(shape)
    with pytest.raises(InvalidArgument) as refused:
        check_shape(spec(declared, name="image"), shape)
    assert str(refused.value) == f"input 'image': {text}"


# Rows


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((2, 3), (2,)), 2),
        (((2, 3), (3,)), "inputs differ in rows: 'x0' has 2, 'x1' has 3"),
        (((), (3,)), "input 'x0': a batch dimension is expected, got a scalar"),
        (((3,), ()), "input 'x1': a batch dimension is expected, got a scalar"),
        (((0, 3), (0,)), "input 'x0': at least one row is expected, got an empty batch"),
    ],
)
def test_rows_are_counted_and_must_agree(shapes: tuple[tuple[int, ...], ...], expected: int | str):
    """All inputs of a request have the same number of rows, and at least one."""
    sides = signature((None, 3), (None,))
    inputs = {f"x{n}": np.zeros(shape, np.float32) for n, shape in enumerate(shapes)}
    if isinstance(expected, int):
        assert count_rows(sides, inputs) == expected
    else:
        with pytest.raises(InvalidArgument) as refused:
            count_rows(sides, inputs)
        assert str(refused.value) == expected


@pytest.mark.parametrize("sides", [signature((2, 3)), signature()])
def test_what_cannot_be_batched_counts_as_one_row(sides: Signature):
    """A request for a signature without rows, or without inputs, counts as one."""
    inputs = {each.name: np.zeros((2, 3), np.float32) for each in sides.inputs}
    assert count_rows(sides, inputs) == 1


def test_trailing_shapes_leave_the_rows_out_in_the_order_of_the_signature():
    """What requests must agree on to share a batch depends on neither their rows nor the order of their inputs."""
    inputs = {"x1": np.zeros((2, 4)), "x0": np.zeros((2, 3, 5))}
    assert trailing_shapes(signature((None, 3, 5), (None, 4)), inputs) == ((3, 5), (4,))
