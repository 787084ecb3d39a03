"""Inputs that are drawn for a signature, for each type, size and edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.runtime.drawing import EDGES, Drawer
from service.tensors import DataType, Signature, Tensors, TensorSpec


def drawer(*specs: TensorSpec, sample: Tensors | None = None) -> Drawer:
    outputs = tuple(TensorSpec(spec.name, spec.dtype, (None,)) for spec in specs)
    return Drawer(Signature("s", specs, outputs), sample)


@pytest.mark.parametrize("dtype", list(DataType))
def test_inputs_of_each_type_are_drawn(dtype: DataType) -> None:
    """Each type gets an array of its own, with the rows of the bucket and the declared sizes."""
    array = drawer(TensorSpec("x", dtype, (None, 3, 2))).batch(2)["x"]
    assert array.dtype == dtype.numpy
    assert array.shape == (2, 3, 2)
    if dtype is DataType.BYTES:
        assert {b"", b"a few words"} < set(array.flat)
    elif not dtype.is_float:
        assert set(array.astype(int).flat) == {0, 1}
    else:
        assert len(np.unique(array.astype(float))) > 6


@pytest.mark.parametrize(
    ("shape", "drawn"),
    [((), ()), ((3,), (3,)), (None, ()), ((None, None), (2, 32)), ((None,), (2,)), ((4, None), (4, 32))],
)
def test_sizes_are_drawn_as_declared(shape: tuple[int | None, ...] | None, drawn: tuple[int, ...]) -> None:
    """Dimension 0 is the bucket where it is open, other open sizes are 32, an open rank is a scalar."""
    assert drawer(TensorSpec("x", DataType.FP32, shape)).batch(2)["x"].shape == drawn


def test_several_inputs_are_drawn_alike_each_time() -> None:
    """Inputs differ from each other, and are the same in each draw: plans are compared on equal inputs."""
    specs = [TensorSpec(name, DataType.FP32, (None, 3)) for name in "ab"]
    first, again = drawer(*specs).batch(3), drawer(*specs).batch(3)
    assert not np.array_equal(first["a"], first["b"])
    assert all(np.array_equal(first[name], again[name]) for name in "ab")


@pytest.mark.parametrize(
    ("shape", "sample", "drawn"),
    [((None,), [5, 6, 7], [[5], [5, 6], [5, 6, 7, 5, 6]]), ((2,), [5, 6], [[5, 6]] * 3)],
)
def test_a_sample_takes_the_place_of_what_is_drawn(shape: tuple[int | None], sample: list[int], drawn: Any) -> None:
    """Its rows are cut or repeated to each bucket; without rows it is taken as it is."""
    seen = drawer(TensorSpec("x", DataType.INT32, shape), sample={"x": np.array(sample, np.int32)})
    assert [seen.batch(rows)["x"].tolist() for rows in (1, 2, 5)] == drawn


def test_attempts_go_from_the_sample_to_zeros() -> None:
    """The sample, random numbers of each size, zeros of each size, one after the other."""
    open_ = drawer(TensorSpec("x", DataType.FP32, (None, None)), sample={"x": np.full((1, 9), 7, np.float32)})
    seen = [(batch["x"].shape[1], bool(batch["x"].any())) for _ in open_.attempts() for batch in [open_.batch(1)]]
    assert seen == [(9, True), (32, True), (1, True), (224, True), (32, False), (1, False), (224, False)]


def test_strings_may_be_images() -> None:
    """A model that takes no words is given none, and then PNG files of several sizes, which is how it is warmed up."""
    strings = drawer(TensorSpec("x", DataType.BYTES, (None,)))
    words, empty, images, again = [strings.batch(2)["x"].tolist() for _ in strings.attempts()]
    assert (words, empty) == ([b"a few words", b""], [b"", b""])
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert len(set(images)) == 2
    assert again == images


def edges(spec: TensorSpec, ends: tuple[int, int] | None = None) -> dict[str, Any]:
    drawn = drawer(spec)
    drawn.ranges = {"x": ends} if ends else {}
    return {kind: inputs["x"] for kind, inputs in drawn.edges(4)}


@pytest.mark.parametrize("dtype", [d for d in DataType if d.is_float])
def test_floats_have_zeros_and_large_and_negative_numbers(dtype: DataType) -> None:
    """Large ones are as large as their type has them."""
    found = edges(TensorSpec("x", dtype, (None, 8)))
    assert list(found) == ["zero", "large", "negative"]
    assert all(array.dtype == dtype.numpy and array.shape == (4, 8) for array in found.values())
    assert not found["zero"].any()
    assert np.abs(found["large"].astype(float)).max() > 500
    assert (found["negative"].astype(float) < 0).all()


def test_integers_have_the_ends_of_their_range() -> None:
    """Where the model takes only some, the lowest and highest of those; they are drawn from between."""
    spec = TensorSpec("x", DataType.INT64, (None, 50))
    assert list(edges(spec)) == ["zero"]
    found = edges(spec, (-3, 900))
    assert {kind: set(found[kind].flat) for kind in ("zero", "lowest", "highest")} == {
        "zero": {0}, "lowest": {-3}, "highest": {900},
    }  # fmt: skip
    usual = drawer(spec)
    usual.ranges = {"x": (-3, 5000)}
    numbers = usual.batch(8)["x"]
    assert (numbers.min() >= 0, numbers.max() <= 1000, len(np.unique(numbers)) > 100) == (True, True, True)


def test_strings_have_empty_ones() -> None:
    """All of them are empty then, and nothing else is unusual about strings."""
    found = edges(TensorSpec("x", DataType.BYTES, (None, 2)))
    assert list(found) == ["empty"]
    assert found["empty"].tolist() == [[b"", b""]] * 4


def test_an_edge_keeps_the_other_inputs_as_usual() -> None:
    """Only what a kind says something about is changed; what would change nothing is not drawn."""
    both = drawer(TensorSpec("x", DataType.FP32, (None,)), TensorSpec("words", DataType.BYTES, (None,)))
    usual = both.batch(3)
    by_kind = dict(both.edges(3))
    assert set(by_kind) <= set(EDGES)
    assert by_kind["empty"]["x"].tolist() == usual["x"].tolist()
    assert by_kind["large"]["words"].tolist() == usual["words"].tolist()
    assert dict(drawer().edges(3)) == {}
