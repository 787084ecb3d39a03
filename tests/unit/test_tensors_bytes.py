"""Fusing and cutting batches, and tensors as raw bytes: what goes in comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from service.errors import InvalidArgument
from service.tensors import DataType, Tensors, concatenate, pack_strings, size_bytes, split, unpack_raw

STRINGS = st.lists(st.binary(max_size=20), max_size=8)
NUMERIC = [dtype for dtype in DataType if dtype is not DataType.BYTES]


@st.composite
def batches(draw: st.DrawFn) -> list[Tensors]:
    """Requests of one lane: two inputs, of any type and trailing shape, and some rows each."""
    dtypes = draw(st.lists(st.sampled_from([np.dtype(t) for t in "?bhilqBefd"] + [np.dtype(object)]), min_size=1))[:2]
    shapes = [draw(npst.array_shapes(min_dims=0, max_dims=2, max_side=3)) for _ in dtypes]
    parts = []
    for rows in draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)):
        part = {}
        for position, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True)):
            elements: Any = st.binary(max_size=3) if dtype.kind == "O" else None
            part[f"x{position}"] = draw(npst.arrays(dtype, (rows, *shape), elements=elements))
        parts.append(part)
    return parts


@given(parts=batches(), padding=st.integers(0, 5))
def test_split_undoes_concatenate(parts: list[Tensors], padding: int):
    """Cutting a fused batch yields each request's rows again, whatever was padded behind them."""
    rows = [len(part["x0"]) for part in parts]
    fused = concatenate(parts, sum(rows) + padding)
    assert all(len(array) == sum(rows) + padding for array in fused.values())
    for part, again in zip(parts, split(fused, rows), strict=True):
        assert part.keys() == again.keys()
        for name, array in part.items():
            assert again[name].dtype == array.dtype
            np.testing.assert_array_equal(again[name], array)


@given(parts=batches(), padding=st.integers(1, 5))
def test_padding_is_copies_of_the_first_row(parts: list[Tensors], padding: int):
    """A batch is filled with a real row, for zeros may not be safe for a model."""
    rows = sum(len(part["x0"]) for part in parts)
    fused = concatenate(parts, rows + padding)
    for name, array in fused.items():
        for row in range(rows, rows + padding):
            np.testing.assert_array_equal(array[row], parts[0][name][0])


def test_one_request_is_not_copied():
    """A batch of one request that needs no padding is that request's arrays, both ways."""
    part = {"x": np.ones((3, 2))}
    assert concatenate([part], 3) is part
    assert concatenate([part], 2) is part
    assert split(part, [3]) == [part]


def test_surplus_rows_are_cut_off_a_single_request_too():
    """`split` into one part drops padding as well."""
    (part,) = split({"y": np.arange(4)}, [3])
    assert part["y"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("array", "size"),
    [(np.zeros((2, 3), np.float32), 24), (np.array([b"four", b""], object), 4 + 2 * np.dtype(object).itemsize)],
)
def test_the_size_of_strings_is_that_of_their_bytes(array: np.ndarray, size: int):
    """What counts against the queue's bytes is the memory that a request holds, strings included."""
    assert size_bytes({"x": array, "again": array}) == 2 * size


@given(data=st.data(), dtype=st.sampled_from(NUMERIC), shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0))
def test_numbers_survive_as_raw_bytes(data: st.DataObject, dtype: DataType, shape: tuple[int, ...]):
    """The bytes of an array and its shape are the array, bit by bit."""
    count = int(np.prod(shape)) * dtype.numpy.itemsize
    raw = data.draw(st.binary(min_size=count, max_size=count))
    for given_bytes in (raw, memoryview(raw)):
        array = unpack_raw(given_bytes, dtype, shape, "x")
        assert (array.shape, array.dtype) == (shape, dtype.numpy)
        assert array.tobytes() == raw if dtype is not DataType.BOOL else (array.ravel() == [b != 0 for b in raw]).all()


@pytest.mark.parametrize("length", [0, 23, 25])
def test_the_wrong_number_of_bytes_is_refused(length: int):
    """Bytes that do not make exactly the shape are told with both numbers."""
    with pytest.raises(InvalidArgument) as refused:
        unpack_raw(bytes(length), DataType.FP32, (2, 3), "x")
    assert str(refused.value) == f"input 'x': 24 bytes expected for FP32 [2, 3], got {length}"


@given(strings=STRINGS, as_view=st.booleans())
def test_strings_survive_packing(strings: list[bytes], as_view: bool):
    """Each string is its length and its bytes; reading yields the same strings."""
    packed = pack_strings(np.array([*strings, None], object)[:-1])
    array = unpack_raw(memoryview(packed) if as_view else packed, DataType.BYTES, (len(strings),), "x")
    assert array.dtype == object
    assert array.tolist() == strings


def test_text_is_packed_as_utf_8():
    """Python's text and NumPy's own strings become bytes in UTF-8."""
    assert pack_strings(np.array([["é"], ["ab"]])) == b"\x02\x00\x00\x00\xc3\xa9\x02\x00\x00\x00ab"
    assert unpack_raw(pack_strings(np.array([b"a", b"bc"])), DataType.BYTES, (2, 1), "x").tolist() == [[b"a"], [b"bc"]]


@pytest.mark.parametrize(
    ("raw", "count", "text"),
    [
        (b"\x01\x00\x00\x00a", 2, "2 strings expected, got 5 bytes"),
        (b"\x05\x00\x00\x00abc", 1, "string 0 of 1 goes past the end of the data"),
        (b"\x04\x00\x00\x00abcd" + b"\x01\x00", 2, "string 1 of 2 goes past the end of the data"),
        (b"\xff\xff\xff\xff", 1, "string 0 of 1 goes past the end of the data"),
        (b"\x01\x00\x00\x00abc", 1, "2 bytes follow the last of 1 strings"),
        (b"a", 0, "1 bytes follow the last of 0 strings"),
    ],
)
def test_malformed_strings_are_refused(raw: bytes, count: int, text: str):
    """Lengths that do not add up are told with the string at fault."""
    with pytest.raises(InvalidArgument) as refused:
        unpack_raw(raw, DataType.BYTES, (count,), "x")
    assert str(refused.value) == f"input 'x': {text}"


@given(raw=st.binary(max_size=40), count=st.integers(0, 5))
def test_any_bytes_are_strings_or_refused(raw: bytes, count: int):
    """No sequence of bytes makes reading strings fail in another way, or be read as something else."""
    try:
        array = unpack_raw(raw, DataType.BYTES, (count,), "x")
    except InvalidArgument:
        return
    assert pack_strings(array) == raw
