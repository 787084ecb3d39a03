"""JSON ↔ arrays: any rectangular list comes out as the right array, and anything else is refused with its place."""

from __future__ import annotations

import json
import math
import uuid
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from service.errors import InvalidArgument
from service.rest.json_codec import Document, count_lists, dumps, flat_array, jsonable, plain, to_array
from service.rest.json_elements import _TYPES, from_python, quote
from service.tensors import Array, DataType, TensorSpec
from tests.signatures import NUMERIC, assert_same, elements_of

MIXED_LISTS = st.recursive(
    st.integers(-5, 5) | st.sampled_from([0.5, True, None, "1"]), lambda inner: st.lists(inner, max_size=3)
)


def spec(dtype: DataType = DataType.FP32) -> TensorSpec:
    return TensorSpec("x", dtype, None)


def read(text: str, dtype: DataType = DataType.FP32, *, alone: bool = True) -> Array:
    """The value of the key ``v`` of a body; `alone` tells the reader that it is the only array there."""
    document = Document(b'{"v": %s}' % text.encode(), 100)
    return to_array(document.get("v"), spec(dtype), document.text if alone else b"")


@st.composite
def written_arrays(draw: st.DrawFn, dtype: DataType) -> tuple[Array, Any]:
    """An array, and the nested list that a client writes for it."""
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    if dtype is DataType.BYTES:
        array = draw(npst.arrays(object, shape, elements=st.text(max_size=4).map(str.encode)))
        return array, np.vectorize(bytes.decode, otypes=[object])(array).tolist()
    wide = np.float32 if dtype is DataType.BF16 else dtype.numpy
    array = draw(npst.arrays(wide, shape, elements=elements_of(dtype))).astype(dtype.numpy)
    return array, array.astype(np.float64).tolist() if dtype.is_float else array.tolist()


@pytest.mark.parametrize("dtype", DataType)
@settings(max_examples=25)
@given(data=st.data(), alone=st.booleans())
def test_any_rectangular_list_becomes_its_array(dtype: DataType, data: st.DataObject, alone: bool):
    """Every type and shape, from the fast reader or the careful one, NaN and infinities included."""
    array, value = data.draw(written_arrays(dtype))
    given_back = read(json.dumps(value), dtype, alone=alone)
    shape = array.shape
    if array.size == 0 and 0 in shape:
        shape = shape[: shape.index(0) + 1]  # a list of no lists does not tell how long those would be
    assert given_back.dtype == array.dtype
    np.testing.assert_array_equal(given_back, array.reshape(shape))


@given(value=MIXED_LISTS, dtype=st.sampled_from(list(DataType)), alone=st.booleans())
def test_what_is_not_rectangular_is_never_taken(value: Any, dtype: DataType, alone: bool):
    """A list is taken as NumPy would take it, or refused; never with elements moved to other places."""
    try:
        array = read(json.dumps(value), dtype, alone=alone)
    except InvalidArgument as refused:
        assert str(refused).startswith("input 'x'")  # noqa: PT017 - whether it is refused depends on the value
        return
    expected = np.array(value, object)
    assert expected.shape == array.shape
    decoded = array.tolist() if dtype is not DataType.BYTES else np.array(array, str).astype(object).tolist()
    assert decoded == value


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("[[1, 2], [3]]", "2 elements expected at [1], got 1 elements"),
        ("[[1, 2], 3]", "2 elements expected at [1], got 3"),
        ("[[1], [2], [3, 4]]", "1 elements expected at [2], got 2 elements"),
        ("[[[1], [2]], [[3], [4, 5]]]", "1 elements expected at [1][1], got 2 elements"),
        ("[1, [2]]", "a value expected at [1], got a list"),
        ("[[1, [2]]]", "a value expected at [0][1], got a list"),
        ("[1, [2, 3], []]", "a value expected at [1], got a list"),
        ("[[1, [2]], [3, 4]]", "a value expected at [0][1], got a list"),
        ("[[], [1]]", "0 elements expected at [1], got 1 elements"),
        ("[[], [[]]]", "0 elements expected at [1], got 1 elements"),
    ],
)
def test_ragged_lists_are_refused_with_the_place(text: str, place: str, alone: bool):
    """The text says where the first list is that differs, and what was expected there."""
    with pytest.raises(InvalidArgument) as refused:
        read(text, alone=alone)
    assert str(refused.value) == f"input 'x' is ragged: {place}"


@pytest.mark.parametrize("body", [b'{"k": "[", "v": [[1, 2], [3, 4]]}', b'{"v": [[1,2],[3,4]], "k": []}'])
def test_brackets_elsewhere_in_the_body_do_no_harm(body: bytes):
    """Counting brackets only decides how closely to look."""
    value = Document(body, 100).get("v")
    assert to_array(value, spec(), body).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("text", "dtype", "message"),
    [
        ("[1.5]", DataType.INT32, "INT32 expected at [0], got 1.5"),
        ("[1, true]", DataType.INT32, "INT32 expected at [1], got true"),
        ("[1, true]", DataType.FP32, "FP32 expected at [1], got true"),
        ("[[null]]", DataType.FP32, "FP32 expected at [0][0], got null"),
        ('["1"]', DataType.FP64, 'FP64 expected at [0], got "1"'),
        ('{"a": [1]}', DataType.FP32, 'FP32 expected at the top, got {"a": [1]}'),
        ("[NaN]", DataType.INT8, "INT8 expected at [0], got NaN"),
        ("[1]", DataType.BOOL, "BOOL expected at [0], got 1"),
        ("[1]", DataType.BYTES, "BYTES expected at [0], got 1"),
        ("[128]", DataType.INT8, "128 does not fit INT8"),
        ("[-1]", DataType.UINT64, "a number does not fit UINT64"),
        ("[18446744073709551616]", DataType.UINT64, "a number does not fit UINT64"),
        ("[9223372036854775808]", DataType.INT64, "a number does not fit INT64"),
        ("[1e39, -3e39]", DataType.FP32, "-3e+39 does not fit FP32"),
        ("[NaN, 1e39]", DataType.FP32, "1e+39 does not fit FP32"),
        ("[65520]", DataType.FP16, "65520.0 does not fit FP16"),
        ("[1" + "0" * 400 + "]", DataType.FP64, "a number does not fit FP64"),
        ('["' + "x" * 90 + '"]', DataType.FP32, 'FP32 expected at [0], got "' + "x" * 59 + "…"),
        (r'["\ud800"]', DataType.BYTES, "text expected at [0], got a lone surrogate"),
        ('[{"b64": "%"}]', DataType.BYTES, "base64 expected at [0]: Only base64 data is allowed"),
        ('[{"b64": 5}]', DataType.BYTES, 'a string or {"b64": "…"} expected at [0], got {"b64": 5}'),
        ('[{"b64": "", "a": 1}]', DataType.BYTES, 'a string or {"b64": "…"} expected at [0], got {"b64": "", "a": 1}'),
    ],
)
def test_elements_that_do_not_fit_are_refused(text: str, dtype: DataType, message: str):
    """The text names the input, the type or range that was expected, the place and what came."""
    with pytest.raises(InvalidArgument) as refused:
        read(text, dtype)
    assert str(refused.value) == f"input 'x': {message}"


@pytest.mark.parametrize(
    ("text", "dtype", "expected"),
    [
        ("[3]", DataType.FP32, [3.0]),
        ("7", DataType.INT16, 7),
        ("[18446744073709551615]", DataType.UINT64, [2**64 - 1]),
        ("[1" + "0" * 30 + "]", DataType.FP64, [1e30]),
        ('["é", {"b64": "AP8="}]', DataType.BYTES, ["é".encode(), b"\x00\xff"]),
        ('{"b64": "aGk="}', DataType.BYTES, b"hi"),
    ],
)
def test_forms_that_fit(text: str, dtype: DataType, expected: object):
    """Integers are numbers for a float input, scalars need no list, and bytes may come as base64."""
    assert read(text, dtype).tolist() == expected


@pytest.mark.parametrize("dtype", [DataType.FP32, DataType.BYTES])
@pytest.mark.parametrize("levels", [65, 90])
def test_more_dimensions_than_arrays_have_are_refused(dtype: DataType, levels: int):
    """Nesting is bounded before any recursion follows it."""
    with pytest.raises(InvalidArgument, match="nested deeper than 64 levels"):
        read("[" * levels + ("1" if dtype is DataType.FP32 else '"a"') + "]" * levels, dtype)


def test_lists_and_tokens_too_deep_are_refused_by_the_careful_reader():
    """A NaN sends a body through Python's parser, whose lists have the same bound."""
    with pytest.raises(InvalidArgument, match="nested deeper than 64 levels"):
        read("[" * 70 + "NaN" + "]" * 70)


STRINGS = st.text(max_size=3) | st.sampled_from(["é", "\ud800"]) | st.fixed_dictionaries({"b64": st.just("YQ==")})


@given(value=st.recursive(STRINGS | st.integers(0, 1), lambda inner: st.lists(inner, max_size=3)))
def test_strings_in_bulk_are_those_read_one_by_one(value: Any):
    """Texts, base64, both, lone surrogates, other things among them, ragged or not: the same array or refusal."""

    def outcome(read_it: Any) -> tuple[Any, ...]:
        try:
            array = read_it()
        except InvalidArgument as refused:
            return (str(refused),)
        return array.shape, array.ravel().tolist()

    parsed = Document(b'{"v": %s}' % json.dumps(value).encode(), 100).get("v")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_TYPES, "O", frozenset())  # nothing goes without a closer look
        slow = outcome(lambda: from_python(plain(parsed), spec(DataType.BYTES), exact=False))
    assert outcome(lambda: to_array(parsed, spec(DataType.BYTES))) == slow
    assert outcome(lambda: from_python(plain(parsed), spec(DataType.BYTES), exact=False)) == slow


LARGE_INTEGERS = [
    ("16777215", DataType.FP32, True),
    ("16777216", DataType.FP32, False),
    ("-16777216", DataType.FP32, False),
    ("16777216.0", DataType.FP32, True),
    ("1.6777217e7", DataType.FP32, True),
    ("18446744073709551615", DataType.FP32, False),
    ("18446744073709551616", DataType.FP32, True),
    ("9007199254740991", DataType.FP64, True),
    ("9007199254740992", DataType.FP64, False),
    ("9007199254740992.0", DataType.FP64, True),
    ("60000", DataType.FP16, True),
    ("16777217", DataType.BF16, True),
]


@pytest.mark.parametrize(("number", "dtype", "taken"), LARGE_INTEGERS)
@pytest.mark.parametrize("text", ["[[1, %s]]", "[[%s, 2.5]]", "[[NaN, 1], [2.5, %s]]", "[[0.5], [%s]]", "%s"])
@pytest.mark.parametrize("fill", [0, 10_000])
def test_integers_that_a_float_rounds_are_refused_if_so_asked(
    number: str, dtype: DataType, taken: bool, text: str, fill: int
):
    """As TensorFlow Serving does; with a point or an exponent, or over 64 bits, they are floats to it."""
    text = text % number
    text = text.replace("[[1, ", "[[1, " + "0, " * fill)
    document = Document(b'{"v": %s}' % text.encode(), 100)

    def read_it(*, exact: bool) -> Array:
        return to_array(document.get("v"), spec(dtype), document.text, exact=exact)

    assert dtype.numpy.type(float(number)) in read_it(exact=False)
    if taken:
        np.testing.assert_array_equal(read_it(exact=True).astype(float), read_it(exact=False).astype(float))
    else:
        with pytest.raises(
            InvalidArgument, match=f"Cannot convert JSON value: {number} to .* without loss of precision"
        ):
            read_it(exact=True)


# Flat data with a shape


@pytest.mark.parametrize("dtype", DataType)
@settings(max_examples=25)
@given(data=st.data(), nested=st.booleans(), known=st.booleans())
def test_data_comes_flat_or_nested(dtype: DataType, data: st.DataObject, nested: bool, known: bool):
    """Row-major elements of a stated shape; how many lists there are need not be known."""
    array, value = data.draw(written_arrays(dtype))
    if not array.size or not array.ndim:
        nested = False
    flat = value if nested else np.array(value, object).reshape(-1).tolist()
    text = json.dumps(flat)
    parsed = Document(b'{"v": %s}' % text.encode(), 100).get("v")
    most_lists = count_lists(text.encode()) if known else None
    np.testing.assert_array_equal(flat_array(parsed, spec(dtype), array.shape, most_lists=most_lists), array)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("[1, 2, 3]", (2, 2), ": shape [2, 2] has 4 elements, the data has 3 in shape [3]"),
        ("[[1, 2, 3, 4]]", (2, 2), ": shape [2, 2] has 4 elements, the data has 4 in shape [1, 4]"),
        ("[[1], [2]]", (2,), ": shape [2] has 2 elements, the data has 2 in shape [2, 1]"),
        ("[]", (1,), ": shape [1] has 1 elements, the data has 0 in shape [0]"),
        ("[1, [2]]", (2,), " is ragged: a value expected at [1], got a list"),
        ("[[1, 2], []]", (2,), " is ragged: 2 elements expected at [1], got 0 elements"),
    ],
)
def test_data_that_is_not_the_stated_shape_is_refused(text: str, shape: tuple[int, ...], message: str, known: bool):
    """Too few, too many, nested otherwise, or ragged: the text has both shapes or the place."""
    data = Document(b'{"v": %s}' % text.encode(), 100).get("v")
    with pytest.raises(InvalidArgument) as refused:
        flat_array(data, spec(), shape, most_lists=count_lists(text.encode()) if known else None)
    assert str(refused.value) == f"input 'x'{message}"


# Documents


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON Parse error: The document is empty"),
        (b" \n", "JSON Parse error: The document is empty"),
        (b"{,}", "JSON Parse error: Expecting property name enclosed in double quotes at offset: 1"),
        (b'{"a": 1} x', "JSON Parse error: Extra data at offset: 9"),
        (b'{"a": "\xff"}', "JSON Parse error: 'utf-8' codec can't decode byte 0xff"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "JSON Parse error: Exceeds the limit (4300 digits)"),
        (b"[1, 2]", "JSON Value: [1, 2] Is not object"),
        (b"NaN", "JSON Value: NaN Is not object"),
        (b'{"a": ' + b"[" * 101 + b"NaN" + b"]" * 101 + b"}", "JSON Parse error: nested deeper than 100 levels"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "JSON Parse error: nested deeper than 100 levels"),
        (b"[" * 100_000, "JSON Parse error: nested deeper than 100 levels"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes, message: str):
    """In TensorFlow Serving's words, with the offset where there is one; depth cannot exhaust a stack."""
    with pytest.raises(InvalidArgument) as refused:
        Document(body, 100)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("text", ['{"a": "' + "[" * 200 + '", "b": NaN}', r'{"a": "\"[[[[[[[", "b": NaN}'])
def test_brackets_within_strings_are_no_depth(text: str):
    """Only what nests counts."""
    assert math.isnan(Document(text.encode(), 5).get("b"))


def test_a_document_gives_its_values_by_key():
    """Keys that are not there give None."""
    document = Document(b'{"a": {"b": [1]}}', 100)
    assert document.keys == {"a"}
    assert plain(document.get("a")) == {"b": [1]}
    assert document.get("c") is None


def test_plain_bounds_the_depth():
    """A value nested deeper than asked for is not followed."""
    value = Document(b'{"a": [[{"b": [1]}]]}', 100).get("a")
    assert plain(value, 4) == [[{"b": [1]}]]
    with pytest.raises(InvalidArgument, match="nested deeper than 3 levels"):
        plain(value, 3)


def test_a_quote_is_cut_short():
    """What the caller wrote is shown up to a bound."""
    assert quote([1, "é"]) == '[1, "\\u00e9"]'
    assert quote("x" * 100) == '"' + "x" * 59 + "…"


# Writing


@pytest.mark.parametrize("dtype", DataType)
@settings(max_examples=25)
@given(data=st.data())
def test_what_is_written_reads_as_the_same_array(dtype: DataType, data: st.DataObject):
    """Numbers survive exactly, NaN and infinities included."""
    array, _ = data.draw(written_arrays(dtype))
    value = json.loads(dumps({"v": jsonable(array)}))["v"]
    if dtype is DataType.BYTES:
        assert value == np.vectorize(bytes.decode, otypes=[object])(array).tolist()
    else:
        wide = np.dtype(np.float64) if dtype.is_float else dtype.numpy
        np.testing.assert_array_equal(np.array(value, wide).astype(dtype.numpy).reshape(array.shape), array)


@pytest.mark.parametrize("dtype", NUMERIC)
def test_scalars_are_written_bare(dtype: DataType):
    """An array of no dimensions is a JSON value."""
    assert dumps(jsonable(np.ones((), dtype.numpy))) in {b"1", b"1.0", b"true"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"v": np.array([0.1, np.nan], np.float32)}, b'{"v": [0.1, NaN]}'),
        ({"v": [np.float32(0.1), np.int8(3), np.bool_(True)], "w": math.inf}, b'{"v": [0.1, 3, true], "w": Infinity}'),
        ({"v": np.array([[-np.inf, 0.1]])}, b'{"v": [[-Infinity, 0.1]]}'),
        ({"v": "null", "w": np.array([0.1], np.float32)}, b'{"v": "null", "w": [0.1]}'),
        ({"v": np.array([0.1], np.float32)}, b'{"v":[0.1]}'),
    ],
)
def test_tokens_that_json_has_not_are_written_bare(value: dict[str, Any], expected: bytes):
    """NaN and the infinities as TensorFlow Serving has them, other numbers as short as ever."""
    text = dumps(value)
    assert text == expected or text == orjson.dumps({"v": "null", "w": [0.1]})


def test_an_object_that_json_has_not_is_a_fault():
    """It does not pass silently."""
    with pytest.raises(TypeError, match="UUID is not a JSON value"):
        dumps({"v": None, "w": uuid.UUID(int=1)})


@pytest.mark.parametrize(
    ("items", "as_base64", "expected"),
    [
        ([b"a", "é"], False, ["a", "é"]),
        ([b"\xff"], False, [{"b64": "/w=="}]),
        ([b"a"], True, [{"b64": "YQ=="}]),
    ],
)
def test_strings_are_text_where_they_can_be(items: list[Any], as_base64: bool, expected: object):
    """Bytes that are no UTF-8, or are asked for so, come as base64."""
    assert jsonable(np.array(items, object), as_base64=as_base64) == expected


def test_half_precision_is_written_as_its_number():
    """bfloat16, which JSON writers do not know, has its value."""
    array = np.array([1.5, -2], DataType.BF16.numpy)
    assert dumps(jsonable(array)) == b"[1.5,-2.0]"
    assert_same(jsonable(np.array([1.5], np.float16)), np.array([1.5], np.float16))
