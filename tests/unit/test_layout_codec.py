"""Tensors in a block of shared memory: every type and shape there and back; no layout that lies is believed."""

from __future__ import annotations

import mmap
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.errors import InvalidArgument
from service.frontend.frames_codec import CorruptFrame
from service.frontend.layout_codec import LayoutReader, LayoutWriter, Written, get, put
from service.frontend.ring import ALIGNMENT
from service.tensors import DataType, Tensors, TensorSpec
from tests.signatures import assert_same

SPECS = (TensorSpec("a", DataType.FP32, (None, 2)), TensorSpec("b", DataType.BYTES, (None,)))
ROW = {"a": np.ones((1, 2), np.float32)}
"""16 bytes of head, then one tensor."""


def there_and_back(tensors: Tensors, specs: tuple[TensorSpec, ...], at: int = 128) -> Tensors:
    written = LayoutWriter(3, specs).write(tensors)
    buffer = mmap.mmap(-1, at + written.size_bytes + 64)
    put(buffer, at, written)
    layout = LayoutReader().read(written.layout, written.size_bytes)
    assert layout.signature == 3
    return get(buffer[at : at + written.size_bytes], layout, specs)


@pytest.mark.parametrize("dtype", DataType)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4), (100, 1000)])
def test_every_type(dtype: DataType, shape: tuple[int, ...]):
    """Of any shape, none and large ones among them."""
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 100
    if dtype is DataType.BYTES:
        array = np.empty(shape, object)
        array[...] = np.vectorize(lambda n: b"\xff" * (n % 5), otypes=[object])(numbers) if numbers.size else array
    else:
        array = numbers.astype(dtype.numpy)
    assert_same(there_and_back({"x": array}, (TensorSpec("x", dtype, None),))["x"], array)


@given(st.dictionaries(st.sampled_from("abcdef"), hnp.arrays(np.float64, hnp.array_shapes(min_dims=0, max_dims=4))))
def test_several_tensors_in_any_order(tensors: Tensors):
    """Each under its name, in the order in which they were given, and none over another."""
    specs = tuple(TensorSpec(name, DataType.FP64, None) for name in "fedcba")
    got = there_and_back(tensors, specs)
    assert list(got) == list(tensors)
    for name, array in tensors.items():
        assert_same(got[name], array)


def test_arrays_that_are_no_single_piece_of_memory():
    """Small and large ones, cut out of others or turned around."""
    for size in (4, 400):
        whole = np.arange(size * size, dtype=np.float32).reshape(size, size)
        for part in (whole.T, whole[::2, 1:], whole[:, ::-1]):
            assert_same(there_and_back({"x": part}, (TensorSpec("x", DataType.FP32, None),))["x"], part)


def test_tensors_begin_at_multiples_of_the_alignment():
    """So that they can be used where they are."""
    written = LayoutWriter(0, SPECS).write({"a": np.ones((1, 2), np.float32), "b": np.array([b"x"], object)})
    assert [offset % ALIGNMENT for offset in written.offsets] == [0, 0]
    assert written.size_bytes == 2 * ALIGNMENT


def test_layouts_are_written_and_read_once():
    """The second request of the same shape has the same layout, which is known by its bytes."""
    writer, reader = LayoutWriter(0, SPECS), LayoutReader()
    first, second = writer.write(ROW), writer.write({"a": np.zeros((1, 2), np.float32)})
    assert first.layout is second.layout
    assert reader.read(first.layout, 64) is reader.read(bytes(second.layout), 64)


def test_no_more_layouts_are_kept_than_callers_may_be_let_choose(monkeypatch: pytest.MonkeyPatch):
    """Shapes without end fill no memory."""
    monkeypatch.setattr("service.frontend.layout_codec._MOST_KNOWN", 4)
    writer, reader = LayoutWriter(0, SPECS), LayoutReader()
    for rows in range(20):
        written = writer.write({"a": np.zeros((rows, 2), np.float32)})
        reader.read(written.layout, written.size_bytes)
    assert len(writer._known) <= 4
    assert len(reader._known) <= 4


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"z": np.ones(1, np.float32)}, "tensor 'z': a, b expected"),
        ({"a": np.ones(1, np.complex64)}, "tensors of type complex64 cannot be sent"),
    ],
)
def test_tensors_that_cannot_be_sent(tensors: Tensors, text: str):
    """Are refused by name or type."""
    with pytest.raises(InvalidArgument, match=text):
        LayoutWriter(0, SPECS).write(tensors)


def layout(*tensors: tuple[int, int, int, int, tuple[int, ...]], count: int = -1, rest: bytes = b"") -> bytes:
    """As it would be sent: place of the specification, type, dimensions, bytes, and sizes of each tensor."""
    data = struct.pack("<HH", 0, len(tensors) if count < 0 else count)
    for spec, number, dimensions, size, shape in tensors:
        data += struct.pack("<HBBxxxxQ", spec, number, dimensions, size) + struct.pack(f"<{len(shape)}Q", *shape)
    return data + rest


FP32, BYTES = DataType.FP32.number, DataType.BYTES.number


@pytest.mark.parametrize(
    ("sent", "size", "text"),
    [
        (b"", 0, "cut short"),
        (layout(count=1), 0, "cut short"),
        (layout((0, FP32, 2, 8, (1,))), 64, "cut short"),
        (layout(rest=b"more"), 0, "4 bytes follow the layout of 0 tensors"),
        (layout((0, 99, 1, 8, (2,))), 64, "no tensor has type 99 and 1 dimensions"),
        (layout((0, FP32, 65, 4, (1,) * 65)), 64, "no tensor has type 1 and 65 dimensions"),
        (layout((0, FP32, 1, 9, (2,))), 64, r"8 bytes expected for FP32 \[2\], got 9"),
        (layout((0, FP32, 2, 0, (2**63, 2**63))), 0, "bytes expected for FP32"),
        (layout((0, BYTES, 1, 3, (1,))), 64, r"4 bytes expected for BYTES \[1\], got 3"),
        (layout((0, FP32, 1, 8, (2,))), 128, "a block of 64 bytes expected by its layout, got 128"),
    ],
)
def test_a_layout_that_lies(sent: bytes, size: int, text: str):
    """Is not believed: nothing outside of the block can be read."""
    with pytest.raises(CorruptFrame, match=text):
        LayoutReader().read(sent, size)


def test_a_tensor_that_the_signature_has_not():
    """Is no tensor of this version."""
    read = LayoutReader().read(layout((7, FP32, 1, 8, (2,))), 64)
    with pytest.raises(CorruptFrame, match="tensors that do not fit their layout"):
        get(bytes(64), read, SPECS)


def test_strings_that_go_past_their_end():
    """Are refused like any other damage."""
    read = LayoutReader().read(layout((1, BYTES, 1, 8, (1,))), 64)
    with pytest.raises(CorruptFrame, match="goes past the end"):
        get(struct.pack("<I", 2**31) + bytes(60), read, SPECS)


@given(st.binary(max_size=80), st.sampled_from([0, 64, 128]))
def test_damage_is_told_from_layouts(sent: bytes, size: int):
    """Any bytes are a layout that fits its block, or corrupt; nothing else happens."""
    try:
        read = LayoutReader().read(sent, size)
        assert read.size_bytes == size
        get(bytes(size), read, SPECS)
    except CorruptFrame:
        pass


def test_a_written_block_has_nothing_of_its_neighbours():
    """What lies before and behind it stays as it was."""
    written = Written(b"", [np.full(3, 7, np.uint8), b"xy"], [0, 64], 128)
    buffer = mmap.mmap(-1, 256)
    buffer[:] = b"." * 256
    put(buffer, 64, written)
    assert buffer[:64] == b"." * 64
    assert buffer[64:67] == b"\7\7\7"
    assert buffer[128:130] == b"xy"
    assert buffer[130:] == b"." * 126
