"""Outputs as classes: Triton's form, in its order."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.errors import InvalidArgument
from service.extensions.classification import class_count, classified
from service.predictor import Prediction
from service.tensors import Array, DataType, Signature, TensorSpec, data_type_of


def prediction(array: Array, shape: tuple[int | None, ...] | None = None, labels: tuple[str, ...] = ()) -> Prediction:
    """An answer with `array` as output ``y``, and another beside it."""
    spec = TensorSpec("y", data_type_of(array), (None, *array.shape[1:]) if shape is None else shape, labels=labels)
    other = TensorSpec("z", DataType.FP32, (None, 1))
    signature = Signature("serving_default", (), (spec, other))
    return Prediction("m", 1, signature, {"y": array, "z": np.zeros((len(array), 1), np.float32)})


def classes(array: Array, count: int, **keys: Any) -> Any:
    return classified(prediction(array, **keys), {"y": count}).outputs["y"].tolist()


def test_the_best_come_first_with_score_and_index():
    """The example of the extension's documentation, two rows of it."""
    array = np.array([[1, 5, 10, 4], [4, 3, 2, 1]], np.int32)
    assert classes(array, 2) == [[b"10:2", b"5:1"], [b"4:0", b"3:1"]]


def test_floats_are_written_with_six_digits():
    """As C's to_string does, which clients split at the colons."""
    assert classes(np.array([[1.1, 3.3, 0.5, 2.4]], np.float32), 2) == [[b"3.300000:1", b"2.400000:3"]]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_written_as_floats(dtype: Any):
    """Types that JSON has no form for have one as classes."""
    assert classes(np.array([[0.5, 2.0]], dtype), 1) == [[b"2.000000:1"]]


def test_labels_follow_the_index():
    """A third part, where there are names."""
    array = np.array([[1, 5, 10]], np.uint8)
    assert classes(array, 2, labels=("pear", "pickle", "apple")) == [[b"10:2:apple", b"5:1:pickle"]]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 2**64 - 1, 1]], np.uint64), [b"18446744073709551615:1", b"1:2", b"0:0"]),
        (np.array([[-(2**63), 0, 2**63 - 1]], np.int64), [b"9223372036854775807:2", b"0:1", b"-9223372036854775808:0"]),
        (np.array([[-1.0, np.nan, np.inf]]), [b"inf:2", b"-1.000000:0", b"nan:1"]),
        (np.array([[2, 2, 3, 2]], np.int8), [b"3:2", b"2:0", b"2:1", b"2:3"]),
    ],
    ids=["unsigned", "signed", "not a number", "equal"],
)
def test_order_at_the_edges(array: Array, expected: list[bytes]):
    """No overflow; what is no number comes last; equal scores in the order of their index."""
    assert classes(array, 9) == [expected]


def test_more_dimensions_count_as_one():
    """As many classes as a row has elements."""
    assert classes(np.array([[[1, 2], [3, 4]]], np.int32), 3) == [[b"4:3", b"3:2", b"2:1"]]


def test_without_rows_there_is_one_list():
    """An output that does not begin with the batch is one set of classes."""
    assert classes(np.array([1, 5, 3], np.int32), 2, shape=(3,)) == [b"5:1", b"3:2"]


def test_other_outputs_stay_as_they_are():
    """Only the type of what was asked for changes, and the answer it was made from does not."""
    before = prediction(np.array([[1.0, 2.0]], np.float32))
    after = classified(before, {"y": 1})
    assert after.signature.output_by_name["y"].dtype is DataType.BYTES
    assert after.signature.output_by_name["z"].dtype is DataType.FP32
    assert after.outputs["z"] is before.outputs["z"]
    assert before.signature.output_by_name["y"].dtype is DataType.FP32
    assert before.outputs["y"].tolist() == [[1.0, 2.0]]


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.integers(-50, 50)),
    st.integers(1, 8),
)
def test_all_is_there_in_falling_order(array: Array, count: int):
    """Each index once, with its own score, never a better one after a worse."""
    for row, texts in zip(array, classes(array, count), strict=True):
        pairs = [tuple(map(int, text.decode().split(":"))) for text in texts]
        assert [score for score, _ in pairs] == sorted(row.tolist(), reverse=True)[:count]
        assert all(row[index] == score for score, index in pairs)
        assert len({index for _, index in pairs}) == min(count, len(row))


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None])
def test_a_count_is_a_positive_integer(value: object):
    """The text names the output."""
    with pytest.raises(InvalidArgument, match=r"output 'y': parameter classification: a whole number of at least 1"):
        class_count(value, TensorSpec("y", DataType.FP32, (None, 3)))


@pytest.mark.parametrize("dtype", [DataType.BYTES, DataType.BOOL])
def test_classes_are_of_numbers(dtype: DataType):
    """Text and truth have no order."""
    with pytest.raises(InvalidArgument, match=f"output 'y': classes are of numbers, and this is {dtype.value}"):
        class_count(1, TensorSpec("y", dtype, (None, 3)))
