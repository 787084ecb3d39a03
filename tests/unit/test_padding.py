"""Padding by length: what is put around sequences, what is cut back, and what a config may say of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Internal, InvalidArgument, ModelLoadError
from service.padding import CutOutput, PaddedInput, Padding, stack
from service.registry.config import ModelConfig, parse_configs
from service.registry.padding import with_padding
from service.tensors import DataType, Signature, Tensors, TensorSpec, is_padded
from tests.signatures import one, only

INT32, FP32, FP16, BYTES, BOOL = DataType.INT32, DataType.FP32, DataType.FP16, DataType.BYTES, DataType.BOOL
MUCH = 1 << 30
TOKENS = one(INT32, (None, None))
PAIR = Signature(
    "serving_default",
    (TensorSpec("a", INT32, (None, None)), TensorSpec("b", INT32, (None, None)), TensorSpec("c", FP32, (None, 2))),
    (TensorSpec("tags", FP32, (None, None, 2)), TensorSpec("topic", FP32, (None, 2))),
)


def nothing(shape: tuple[int, ...]) -> None:
    """No bound on a shape."""


SAID, UNSAID = (ModelConfig.model_validate({"padding": said}) for said in (True, False))


def padded(signature: Signature, said: Any) -> Signature:
    return with_padding(only(signature), ModelConfig(padding=said))[signature.name]


def padding_of(signature: Signature, said: Any) -> Padding:
    padding = padded(signature, said).padding
    assert padding is not None
    return padding


# Padding and cutting


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    data=st.data(),
    side=st.sampled_from(["right", "left"]),
    lengths=st.sampled_from([(), (2, 3, 16), (5,)]),
)
def test_what_is_padded_and_cut_is_as_it_was(shape: list[int], data: st.DataObject, side: Any, lengths: Any):
    """Whatever shape, axis, side and buckets: an output that follows its input comes back whole."""
    axis = data.draw(st.integers(1, len(shape) - 1))
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    padding = Padding((PaddedInput("x", axis, 0, side),), (CutOutput("y", (axis,), "x"),), lengths)
    given_, sizes = padding.pad({"x": array}, MUCH)
    assert given_["x"].shape[axis] == padding.bucket(shape[axis])
    assert given_["x"].sum() == array.sum()
    cut = padding.cut({"y": given_["x"] * 2}, sizes)
    np.testing.assert_array_equal(cut["y"], array * 2)
    assert cut["y"].flags.c_contiguous


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), side=st.sampled_from(["right", "left"]))
def test_rows_of_different_lengths_come_back_each_of_its_own(lengths: list[int], side: Any):
    """Stacked, padded, cut, and cut by row: the rows that were given."""
    rows = [np.full((2, length), place + 1.0, np.float32) for place, length in enumerate(lengths)]
    padding = Padding((PaddedInput("x", 2, 0.0, side),), (CutOutput("y", (2,), "x"),))
    stacked = stack(rows, padding.inputs[0], nothing)
    assert stacked is not None
    array, found = stacked
    assert found == lengths
    assert array.shape == (len(rows), 2, max(lengths))
    inputs, sizes = padding.pad({"x": array}, MUCH)
    outputs = padding.cut({"y": inputs["x"], "z": inputs["x"]}, sizes)
    back = padding.rows_of("y", outputs["y"], {"x": found})
    assert back is not None
    for row, got in zip(rows, back, strict=True):
        np.testing.assert_array_equal(got, row)
    assert padding.rows_of("z", outputs["z"], {"x": found}) is None
    assert padding.rows_of("y", outputs["y"], {}) is None


def test_several_axes_of_an_output_follow_one_length():
    """Attention ``(rows, heads, length, length)`` is cut along both."""
    padding = Padding((PaddedInput("x", 1, 0),), (CutOutput("attention", (2, 3), "x"),))
    _, sizes = padding.pad({"x": np.ones((1, 5), np.int32)}, MUCH)
    cut = padding.cut({"attention": np.ones((1, 2, 8, 8))}, sizes)
    assert cut["attention"].shape == (1, 2, 5, 5)


def test_what_fits_its_bucket_is_not_copied():
    """A length that is a bucket's costs nothing."""
    padding = Padding((PaddedInput("x", 1, 0),), (CutOutput("y", (1,), "x"),))
    array = np.ones((2, 8), np.int32)
    inputs, sizes = padding.pad({"x": array}, 0)
    assert inputs["x"] is array
    assert padding.cut({"y": array}, sizes)["y"] is array


@pytest.mark.parametrize(
    ("lengths", "length", "bucket"),
    [((), 1, 1), ((), 3, 4), ((), 5, 8), ((), 8, 8), ((), 9, 16), ((4, 10), 1, 4), ((4, 10), 5, 10), ((4, 10), 11, 11)],
)
def test_a_length_goes_to_the_next_bucket(lengths: tuple[int, ...], length: int, bucket: int):
    """Of those of the config, else of the powers of two; what is over the last stays as it is."""
    assert Padding((), lengths=lengths).bucket(length) == bucket


def test_strings_are_padded_with_empty_ones():
    """Unless said otherwise."""
    padding = padding_of(one(BYTES, (None, None)), True)
    inputs, _ = padding.pad({"x": np.array([[b"a", b"b", b"c"]], object)}, MUCH)
    assert inputs["x"].tolist() == [[b"a", b"b", b"c", b""]]


def test_rows_that_differ_in_more_than_length_are_not_stacked():
    """In rank, or along another axis."""
    how = PaddedInput("x", 1, 0)
    assert stack([np.ones((2, 3)), np.ones((2, 4))], how, nothing) is None
    assert stack([np.ones(2), np.ones((2, 3))], how, nothing) is None
    assert stack([np.ones(())], how, nothing) is None


def test_a_shape_is_checked_before_memory_is_spent():
    """Many short rows beside a long one may be more than one request may have."""
    seen: list[tuple[int, ...]] = []
    stack([np.ones(1), np.ones(7)], PaddedInput("x", 1, 0), seen.append)
    assert seen == [(2, 7)]


# What is refused of a request


def check(padding: Padding, inputs: Tensors, rows: Any = None) -> str:
    with pytest.raises(InvalidArgument) as refused:
        padding.check(inputs, rows)
    return str(refused.value)


def ones(*shape: int) -> Any:
    return np.ones(shape, np.int32)


def test_a_sequence_over_the_last_bucket_is_refused():
    """With input, length and limit; or left as it is where the config says so."""
    padding = padding_of(TOKENS, {"lengths": [4, 8]})
    text = check(padding, {"x": ones(1, 9)})
    assert text == "input 'x': a length of at most 8 expected on axis 1 (padding.lengths), got 9"
    padding.check({"x": ones(1, 8)})
    exact = padding_of(TOKENS, {"lengths": [4, 8], "longer": "exact"})
    exact.check({"x": ones(1, 9)})
    assert exact.pad({"x": ones(1, 9)}, MUCH)[0]["x"].shape == (1, 9)


def test_an_empty_sequence_is_refused():
    """Alone, or as one row of several."""
    padding = padding_of(TOKENS, True)
    assert "a length of 1 or more expected on axis 1, got 0" in check(padding, {"x": ones(1, 0)})
    assert "a length of 1 or more expected on axis 1, got 0" in check(padding, {"x": ones(2, 3)}, {"x": [3, 0]})


def test_inputs_that_an_output_may_follow_have_one_length():
    """Unless the config says which of them it follows, or none does."""
    padding = padding_of(PAIR, True)
    inputs = {"a": ones(2, 3), "b": ones(2, 4), "c": np.ones((2, 2), np.float32)}
    assert "inputs differ in length: 'a' has 3, 'b' has 4, and padding.outputs" in check(padding, inputs)
    inputs["b"] = ones(2, 3)
    padding.check(inputs)
    padding.check(inputs, {"a": [3, 2], "b": [3, 2]})
    assert "'a' has [3, 2], 'b' has 3" in check(padding, inputs, {"a": [3, 2]})
    inputs["b"] = ones(2, 4)
    padding_of(PAIR, {"outputs": {"tags": {"axis": 1, "like": "b"}}}).check(inputs)
    padding_of(PAIR, {"outputs": {}}).check(inputs)


def test_what_padding_makes_too_large_is_refused_before_it_is_made():
    """A bucket that is far off must not make a small request take the memory of the queue."""
    padding = padding_of(TOKENS, {"lengths": [1 << 20]})
    with pytest.raises(
        InvalidArgument, match=r"input 'x': at most 1000 bytes expected, but \[2, 3\] padded to 1048576"
    ):
        padding.pad({"x": ones(2, 3)}, 1000)


def test_an_output_that_does_not_follow_is_never_cut_silently():
    """A model that halves lengths, whose config does not say so, fails."""
    padding = padding_of(TOKENS, True)
    _, sizes = padding.pad({"x": ones(1, 5)}, MUCH)
    with pytest.raises(Internal, match=r"output 'y': 8 expected on axis 1.*got shape \[1, 4\]: padding.outputs"):
        padding.cut({"y": ones(1, 4)}, sizes)
    with pytest.raises(Internal, match=r"got shape \[1\]"):
        padding.cut({"y": ones(1)}, sizes)


def test_shapes_that_a_signature_does_not_declare_are_not_padded():
    """They are left to the graph, as TensorFlow Serving has it."""
    signature = padded(TOKENS, True)
    assert is_padded(signature, {"x": ones(1, 5)})
    assert not is_padded(signature, {"x": ones(5)})
    assert not is_padded(TOKENS, {"x": ones(1, 5)})


# What a config says


def test_the_only_open_dimension_is_found():
    """Of each input that has one; outputs that are open there are cut back."""
    padding = padding_of(PAIR, {"value": 7, "side": "left"})
    assert padding.inputs == (PaddedInput("a", 1, 7, "left"), PaddedInput("b", 1, 7, "left"))
    assert padding.outputs == (CutOutput("tags", (1,), "a"),)
    assert padding.same_length


def test_a_config_may_say_all_of_it():
    """Which inputs and outputs, along which axes, with which value on which side."""
    inputs = {"b": {"axis": 1, "value": 3, "side": "left"}}
    padding = padding_of(PAIR, {"inputs": inputs, "outputs": {"tags": [1]}, "lengths": [4]})
    assert padding == Padding((PaddedInput("b", 1, 3, "left"),), (CutOutput("tags", (1,), "b"),), (4,))


def test_an_output_of_unknown_rank_is_cut_only_where_said():
    """Its shape does not tell whether it follows."""
    signature = Signature("s", TOKENS.inputs, (TensorSpec("y", FP32, None),), stateful=False)
    assert with_padding({"s": signature}, ModelConfig())["s"].padding is None
    with pytest.raises(ModelLoadError):  # rows of an output of unknown rank cannot be told apart: it is not batched
        padded(signature, True)


def test_signatures_that_cannot_be_padded_are_left_as_they_are():
    """As long as another of the model can."""
    fixed = one(FP32, (None, 3), "fixed")
    both = with_padding({"serving_default": TOKENS, "fixed": fixed}, SAID)
    assert both["fixed"] is fixed
    assert both["serving_default"].padding is not None
    assert with_padding(only(TOKENS), UNSAID)["serving_default"] is TOKENS


@pytest.mark.parametrize(
    ("signature", "said", "text"),
    [
        (TOKENS, {"inputs": {"tokens": {}}}, "padding.inputs: one of x expected, got 'tokens'"),
        (TOKENS, {"outputs": {"tags": 1}}, "padding.outputs: one of y expected, got 'tags'"),
        (TOKENS, {"inputs": {"x": {"axis": 2}}}, "padding.inputs.x.axis: an open dimension of [-1, -1] expected"),
        (PAIR, {"inputs": {"c": {"axis": 1}}}, "padding.inputs.c.axis: an open dimension of [-1, 2] expected, got 1"),
        (PAIR, {"inputs": {"c": {}}}, "padding.inputs.c.axis: expected, for not one dimension"),
        (one(FP32, (None, None, None)), True, "padding.inputs.x.axis: expected, for not one dimension"),
        (PAIR, {"outputs": {"topic": 1}}, "padding.outputs.topic: an open dimension of [-1, 2] expected, got axis 1"),
        (PAIR, {"outputs": {"tags": [1, 3]}}, "an open dimension of [-1, -1, 2] expected, got axis 3"),
        (PAIR, {"outputs": {"tags": {"axis": 1, "like": "c"}}}, "outputs.tags.like: one of a, b expected, got 'c'"),
        (TOKENS, {"value": 0.5}, "padding.value: a value of INT32 expected for input 'x', got 0.5"),
        (TOKENS, {"value": 2**31}, "padding.value: a value of INT32 expected for input 'x', got 2147483648"),
        (TOKENS, {"value": True}, "padding.value: a value of INT32 expected for input 'x', got True"),
        (TOKENS, {"value": float("inf")}, "padding.value: a value of INT32 expected for input 'x', got inf"),
        (TOKENS, {"inputs": {"x": {"value": "a"}}}, "padding.inputs.x.value: a value of INT32 expected"),
        (one(FP16, (None, None)), {"value": 1e9}, "padding.value: a value of FP16 expected"),
        (one(BYTES, (None, None)), {"value": 0}, "padding.value: a value of BYTES expected"),
        (one(BOOL, (None, None)), {"value": 1}, "padding.value: a value of BOOL expected"),
        (one(FP32, (None, 3)), True, "padding: a signature that can be batched and has an input"),
        (one(FP32, (2, None)), True, "padding: a signature that can be batched"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_its_model_fails_the_load(signature: Signature, said: Any, text: str):
    """The text names the field, what was expected and what came."""
    with pytest.raises(ModelLoadError) as refused:
        padded(signature, said)
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"lengths": [16, 16]}, "models.m.padding.lengths: Value error, ascending lengths expected, got [16, 16]"),
        ({"lengths": [0]}, "models.m.padding.lengths.0"),
        ({"lengths": 16}, "models.m.padding.lengths"),
        ({"longer": "cut"}, "models.m.padding.longer"),
        ({"side": "top"}, "models.m.padding.side"),
        ({"value": [1]}, "models.m.padding.value: Value error, a number, a text, true or false expected, got [1]"),
        ({"inputs": {"x": {"axis": 0}}}, "models.m.padding.inputs.x.axis"),
        ({"outputs": {"y": []}}, "models.m.padding.outputs.y.axis"),
        ({"outputs": {"y": "1"}}, "models.m.padding.outputs.y"),
        ({"axes": 1}, "models.m.padding.axes"),
        (5, "models.m.padding"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(said: Any, text: str):
    """Before any model is looked at."""
    with pytest.raises(InvalidArgument) as refused:
        parse_configs({"models": {"m": {"padding": said}}}, "file")
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("dtype", "said", "value"),
    [
        (FP32, None, 0.0),
        (FP32, -1, -1.0),
        (FP32, float("-inf"), -np.inf),
        (BOOL, None, False),
        (BOOL, True, True),
        (INT32, None, 0),
        (INT32, 3.0, 3),
        (BYTES, None, b""),
        (BYTES, "[PAD]", b"[PAD]"),
    ],
)
def test_the_value_is_of_the_inputs_type(dtype: DataType, said: Any, value: Any):
    """Zero, false or the empty string unless said otherwise."""
    assert padding_of(one(dtype, (None, None)), {"value": said}).inputs[0].value == value
