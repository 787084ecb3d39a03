"""Records as tensors: each type of field from JSON and from text, and the reasons why not."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.bounds import Bounds
from service.errors import InvalidArgument, UnsupportedType
from service.meaning import ModelMeaning
from service.predictor import validate
from service.registry.meaning import with_meaning
from service.rest.door_body_codec import BARE, Records, Text
from service.rest.door_fields import asked_signature, body_types, check_type, columns_of, fields_of
from service.rest.door_records_codec import MAX_RUNS, decode_records
from service.tensors import DataType, Signature, Tensors, TensorSpec

Specs = dict[str, tuple[DataType, Any]]
FP32, INT8, BOOL, BYTES, UINT8 = DataType.FP32, DataType.INT8, DataType.BOOL, DataType.BYTES, DataType.UINT8


def signature(specs: Specs, **said: Any) -> Signature:
    """With one output of rows for each input, and what `said` has for ``model.yaml``."""
    inputs = tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in specs.items())
    outputs = tuple(TensorSpec(f"out_{spec.name}", spec.dtype, spec.shape) for spec in inputs)
    plain = {"serving_default": Signature("serving_default", inputs, outputs)}
    return with_meaning(plain, ModelMeaning.model_validate(said))["serving_default"]


def decode(signature: Signature, *records: Any, is_list: bool = False, bounds: Bounds | None = None) -> list[Tensors]:
    given = Records(list(records), is_list=is_list)
    decoded = decode_records(given, signature, bounds or Bounds(), 100)
    for each in decoded:
        validate(each)
    return [each.inputs for each in decoded]


def value(spec: tuple[DataType, Any], value: Any, **meaning: Any) -> Any:
    """What one value of the only field becomes, without its row."""
    signed = signature({"x": spec}, inputs={"x": meaning})
    (inputs,) = decode(signed, {"x": value})
    array = inputs["x"]
    return (array[0, ...] if signed.batched else array).tolist()


def refused(spec: tuple[DataType, Any], given: Any, **meaning: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        value(spec, given, **meaning)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "given", "expected"),
    [
        ((FP32, (None,)), 1.5, 1.5),
        ((FP32, (None,)), Text(" 1.5 "), 1.5),
        ((FP32, (None,)), 2, 2.0),
        ((FP32, (None, 1)), 1.5, [1.5]),
        ((FP32, (None, 1)), [1.5], [1.5]),
        ((FP32, ()), Text("1e3"), 1000.0),
        ((INT8, (None,)), 3.0, 3),
        ((INT8, (None,)), Text("-3"), -3),
        ((INT8, (None, 2)), [1.0, 2], [1, 2]),
        ((BOOL, (None,)), True, True),
        ((BOOL, (None,)), Text("No"), False),
        ((BYTES, (None,)), "é", "é".encode()),
        ((BYTES, (None,)), Text(" 1 "), b" 1 "),
        ((BYTES, (None,)), {"b64": "/w=="}, b"\xff"),
        ((BYTES, (None,)), b"\xff", b"\xff"),
        ((BYTES, (None, 1)), b"\xff", [b"\xff"]),
        ((BYTES, (None, None)), ["a", "b"], [b"a", b"b"]),
        ((BYTES, (None,)), Text("[1]"), b"[1]"),
        ((FP32, (None, 2, 2)), [[1, 2], [3, 4]], [[1, 2], [3, 4]]),
        ((FP32, (None, 2, 2)), [1, 2, 3, 4], [[1, 2], [3, 4]]),
        ((FP32, (None, 2, 2, 1)), [[1, 2], [3, 4]], [[[1], [2]], [[3], [4]]]),
        ((FP32, (None, None, 1)), [1, 2, 3], [[1], [2], [3]]),
        ((FP32, (None, 3)), Text("[1, 2, 3]"), [1, 2, 3]),
        ((FP32, (None, 2)), b"[1, 2]", [1, 2]),
        ((FP32, None), [[1]], [[1]]),
        ((FP32, (2, 2)), [1, 2, 3, 4], [[1, 2], [3, 4]]),
    ],
)
def test_values(spec: tuple[DataType, Any], given: Any, expected: Any):
    """Of JSON, text and files."""
    assert value(spec, given) == expected


@pytest.mark.parametrize(
    ("spec", "given", "reason"),
    [
        ((FP32, (None,)), "1", 'a number expected, got "1"'),
        ((FP32, (None,)), True, "a number expected, got true"),
        ((FP32, (None,)), None, "a number expected, got null"),
        ((FP32, (None,)), {}, "a number expected, got {}"),
        ((FP32, (None,)), Text("a"), 'a number expected, got "a"'),
        ((FP32, (None,)), Text(""), 'a number expected, got ""'),
        ((FP32, (None,)), Text("1_0"), 'a number expected, got "1_0"'),
        ((FP32, (None,)), Text("nan"), "a finite number expected, got nan"),
        ((FP32, (None,)), Text("-inf"), "a finite number expected, got -inf"),
        ((FP32, (None,)), 1e300, "1e+300 does not fit FP32"),
        ((INT8, (None,)), 1.5, "a whole number expected, got 1.5"),
        ((INT8, (None,)), 128, "128 does not fit INT8"),
        ((INT8, (None,)), Text("9" * 5000), "a whole number expected"),
        ((BOOL, (None,)), 1, "true or false expected, got 1"),
        ((BOOL, (None,)), Text("maybe"), 'true or false expected, got "maybe"'),
        ((BYTES, (None,)), 1, "a text expected, got 1"),
        ((BYTES, (None,)), {"b64": "!"}, "a text expected"),
        ((FP32, (None, 2)), [1, "a"], 'FP32 expected at [1], got "a"'),
        ((FP32, (None, 2)), [1], "shape [2] expected, got [1]"),
        ((FP32, (None, 2)), 1, "shape [2] expected, got []"),
        ((FP32, (None, 2)), Text("[1"), "a list as JSON expected"),
        ((FP32, (None, 2, 3)), [[1, 2], [3, 4], [5, 6]], "shape [2, 3] expected, got [3, 2]"),
        ((FP32, (None, None, 2)), [1, 2, 3], "shape [-1, 2] expected, got [3]"),
        ((FP32, (None, 2)), b"\xff", "a file of text expected"),
        ((BYTES, (None, 2)), [1, "a"], "BYTES expected at [0], got 1"),
    ],
)
def test_values_that_are_refused(spec: tuple[DataType, Any], given: Any, reason: str):
    """The text names the field, what was expected and what came."""
    text = refused(spec, given)
    assert text.startswith("field 'x': ")
    assert reason in text


def test_values_ranges_and_units():
    """Of ``model.yaml``."""
    road = {"values": ["yes", "no"]}
    assert value((BYTES, (None,)), "yes", **road) == b"yes"
    assert refused((BYTES, (None,)), "Yes", **road) == "field 'x': one of yes, no expected, got \"Yes\""
    assert value((FP32, (None,)), 0.1, values=[0.1, 1]) == np.float32(0.1)
    assert (
        refused((FP32, (None,)), 0.2, values=[0.1, 1]) == "field 'x': one of 0.1, 1 expected, got 0.20000000298023224"
    )
    area = {"min": 10, "max": 20, "unit": "m²"}
    assert value((FP32, (None,)), 10, **area) == 10
    assert refused((FP32, (None,)), 9, **area) == "field 'x': at least 10 m² expected, got 9.0"
    assert refused((INT8, (None, 2)), [11, 21], max=20) == "field 'x': at most 20 expected, got 21"


TWO: Specs = {"a": (FP32, (None,)), "b": (BYTES, (None,))}


def test_rows_are_fused():
    """Records become one request."""
    (inputs,) = decode(signature(TWO), {"a": 1, "b": "p"}, {"b": "q", "a": 2}, is_list=True)
    assert inputs["a"].tolist() == [1, 2]
    assert inputs["b"].tolist() == [b"p", b"q"]


def test_rows_that_cannot_be_fused():
    """Each record is a request of its own, up to a limit."""
    scalar = signature({"x": (FP32, ()), "y": (FP32, (None, 2))})
    parts = decode(scalar, {"x": 1, "y": [1, 2]}, {"x": 2, "y": [3, 4]}, is_list=True)
    assert [part["x"].tolist() for part in parts] == [1, 2]
    assert [part["y"].tolist() for part in parts] == [[[1, 2]], [[3, 4]]]
    with pytest.raises(InvalidArgument, match="at most 1024 records expected, for each is run alone; got 1025"):
        decode(scalar, *[{"x": 1, "y": [1, 2]}] * (MAX_RUNS + 1))


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "at least one record is expected"),
        ([{}], "field 'a' is missing: a number expected; got none"),
        ([{"b": "p"}], "field 'a' is missing: a number expected; got \"b\""),
        ([{"a": 1, "b": "p", "c": 1}], 'unknown field "c": a, b expected'),
        ([{"a": 1, "b": "p"}, {"a": 1, "b": 1}], "record 1: field 'b': a text expected, got 1"),
    ],
)
def test_records_that_are_refused(records: list[Any], reason: str):
    """In a list with the record's place."""
    with pytest.raises(InvalidArgument) as caught:
        decode(signature(TWO), *records, is_list=len(records) > 1)
    assert str(caught.value).startswith(reason)


def test_records_of_different_shapes():
    """Cannot be one batch."""
    with pytest.raises(InvalidArgument, match=r"field 'x': records differ in shape: \[1\] and \[2\]"):
        decode(signature({"x": (FP32, (None, None))}), {"x": [1]}, {"x": [1, 2]})


def test_what_is_too_much():
    """Is bounded as in the other dialects."""
    with pytest.raises(InvalidArgument, match="max_string_bytes"):
        decode(signature({"x": (BYTES, (None,))}), {"x": "abc"}, bounds=Bounds(max_string_bytes=2))


@pytest.mark.parametrize("names", [("x[0]", "x[1]"), ("x.0", "x.1"), ("x_0", "x_1"), ("left", "right")])
def test_elements_may_be_fields(names: tuple[str, str]):
    """By their place or, where columns are named, by these."""
    pair = signature({"x": (FP32, (None, 2)), "x_2": (FP32, (None,))}, inputs={"x": {"columns": ["left", "right"]}})
    (inputs,) = decode(pair, {names[1]: Text("2"), names[0]: b"1", "x_2": 3})
    assert inputs["x"].tolist() == [[1, 2]]
    assert inputs["x_2"].tolist() == [3]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"left": 1}, "field 'right' is missing"),
        ({"left": 1, "right": 1, "x": [1, 2]}, "field 'x': whole or by its elements expected, got both"),
        ({"left": 1, "right": 1, "x[7]": 1}, "field 'x': 2 elements expected, got 3"),
        ({"left": 1, "right": 1, "y[7]": 1}, 'unknown field "y[7]": left, right expected'),
    ],
)
def test_elements_that_are_refused(record: dict[str, Any], reason: str):
    """All of them are needed, once."""
    with pytest.raises(InvalidArgument) as caught:
        decode(signature({"x": (FP32, (None, 2))}, inputs={"x": {"columns": ["left", "right"]}}), record)
    assert str(caught.value) == reason


def test_elements_of_any_number():
    """As many as there are, without a gap."""
    open_size = signature({"x": (FP32, (None, None))})
    (inputs,) = decode(open_size, {"x[0]": Text("1"), "x[1]": Text("2")})
    assert inputs["x"].tolist() == [[1, 2]]
    with pytest.raises(InvalidArgument, match=r"field 'x\[0\]' is missing"):
        decode(open_size, {"x[99999999]": 1})


def png() -> bytes:
    file = io.BytesIO()
    Image.new("L", (2, 2), 7).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "given",
    [
        png(),
        base64.b64encode(png()).decode(),
        Text(base64.b64encode(png()).decode()),
        {"b64": base64.b64encode(png()).decode()},
        "data:image/png;base64," + base64.b64encode(png()).decode(),
        [[7, 7], [7, 7]],
    ],
)
def test_images(given: Any):
    """As a file, as base64, as a data URI, or as what the tensor holds."""
    assert value((UINT8, (None, 2, 2)), given, kind="image") == [[7, 7], [7, 7]]


def test_images_that_the_model_decodes():
    """Are looked at, and passed on as they came."""
    assert value((BYTES, (None,)), png(), kind="image") == png()
    assert value((BYTES, (None, 1)), png(), kind="image") == [png()]
    assert "a PNG or JPEG image expected" in refused((BYTES, (None,)), b"x", kind="image")


@pytest.mark.parametrize("given", [3, None, {"a": 1}, "!", "data:image/png;base64,!"])
def test_what_is_no_image(given: Any):
    """In JSON."""
    assert "image" in refused((UINT8, (None, 2, 2)), given, kind="image")


def test_a_bare_value_is_that_of_the_only_field():
    """Whatever it is called."""
    given = Records([{BARE: Text("hello")}], is_bare=True)
    (decoded,) = decode_records(given, signature({"x": (BYTES, (None,))}), Bounds(), 5)
    assert decoded.inputs["x"].tolist() == [b"hello"]


@pytest.mark.parametrize(
    ("specs", "said", "texts", "images"),
    [
        ({"x": (BYTES, (None,))}, {}, True, True),
        ({"x": (BYTES, (None,))}, {"x": {"kind": "text"}}, True, False),
        ({"x": (BYTES, (None,))}, {"x": {"kind": "image"}}, False, True),
        ({"x": (BYTES, (None, 3))}, {}, False, False),
        ({"x": (FP32, (None, 2, 2))}, {}, False, False),
        ({"x": (FP32, (None, 2, 2))}, {"x": {"kind": "image"}}, False, True),
        (TWO, {}, False, False),
    ],
)
def test_which_bodies_a_model_takes(specs: Specs, said: Any, texts: bool, images: bool):
    """Raw ones where there is one field that they can mean."""
    signed = signature(specs, inputs=said)
    types = body_types(signed)
    assert ("text/plain" in types, "image/png" in types, "application/octet-stream" in types) == (texts, images, images)
    check_type("text/csv", signed)
    if not texts:
        with pytest.raises(UnsupportedType, match=r"expected for the fields .*, got text/plain"):
            check_type("text/plain", signed)


@pytest.mark.parametrize(
    ("specs", "said", "order"),
    [
        ({"x": (FP32, (None, 2, 2))}, {}, ("x[0]", "x[1]", "x[2]", "x[3]")),
        ({"x": (FP32, (None, 2))}, {"x": {"columns": ["a", "b"]}}, ("a", "b")),
        ({"x": (FP32, (None, 1))}, {}, ("x",)),
        ({"x": (FP32, (None, 2, 2))}, {"x": {"kind": "image"}}, ("x",)),
        ({"x": (FP32, (None, None))}, {}, ()),
        ({"x": (FP32, None)}, {}, ()),
        (TWO, {}, ()),
        (TWO, {next(iter(TWO)): {}}, ()),
        (TWO, {name: {} for name in reversed(TWO)}, tuple(reversed(TWO))),
    ],
)
def test_the_order_of_a_row(specs: Specs, said: Any, order: tuple[str, ...]):
    """That of the only input's elements, or the one in which ``model.yaml`` tells all inputs."""
    columns = columns_of(signature(specs, inputs=said))
    assert columns.order == order
    assert columns.known >= {*specs, *order}


def test_which_signature_is_asked():
    """The one that is named, else that of ``model.yaml``, else the default."""
    plain = {name: Signature(name, (), ()) for name in ("serving_default", "other")}
    told = with_meaning(plain, ModelMeaning(signature="other"))
    assert asked_signature(plain).name == "serving_default"
    assert asked_signature(told).name == "other"
    assert asked_signature(told, "serving_default").name == "serving_default"


def test_what_a_field_wants():
    """In words, for the error texts."""
    fields = fields_of(signature({"x": (FP32, None), "y": (INT8, (None, 2, None))}))
    assert [field.wanted for field in fields] == [
        "a number for each element of any shape",
        "a whole number for each element of shape [2, -1]",
    ]


JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)


@given(
    value=JSON_VALUES | st.text().map(Text) | st.binary(),
    dtype=st.sampled_from(DataType),
    shape=st.sampled_from([(None,), (None, 2), (None, None), (), (2, 1), None]),
    kind=st.sampled_from([None, "image"]),
)
def test_whatever_comes(value: Any, dtype: DataType, shape: Any, kind: str | None):
    """It is a valid request, or there is a reason."""
    try:
        signed = signature({"x": (dtype, shape)}, inputs={"x": {"kind": kind if dtype is BYTES else None}})
        (inputs,) = decode(signed, {"x": value})
    except InvalidArgument:
        return
    assert inputs["x"].dtype == dtype.numpy
    assert dtype is BYTES or all(math.isfinite(item) for item in inputs["x"].astype(np.float64).flat)
