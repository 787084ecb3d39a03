"""Outputs as people read them: classes, numbers with units, tables, texts, pictures; and which of them Accept picks."""

from __future__ import annotations

import base64
import csv
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from service.errors import Internal, NotAcceptable
from service.meaning import ModelMeaning
from service.predictor import Prediction
from service.registry.meaning import with_meaning
from service.rest.door_answer_codec import answer_types, answers_of, choose_type, encode_answers
from service.tensors import DataType, Signature, TensorSpec

FP32, INT32, BYTES = DataType.FP32, DataType.INT32, DataType.BYTES
JSON, PNG, CSV, TEXT = "application/json", "image/png", "text/csv", "text/plain"


def predicted(specs: dict[str, tuple[DataType, Any]], outputs: dict[str, Any], **said: Any) -> Prediction:
    """An answer with these outputs, of a model whose ``model.yaml`` says so of them."""
    plain = Signature(
        "serving_default",
        (TensorSpec("x", FP32, (None,)),),
        tuple(TensorSpec(name, dtype, shape) for name, (dtype, shape) in specs.items()),
    )
    signature = with_meaning({"f": plain}, ModelMeaning.model_validate({"outputs": said}))["f"]
    arrays = {name: np.array(outputs[name], specs[name][0].numpy) for name in specs}
    return Prediction("m", 1, signature, arrays)


def encode(prediction: Prediction, media: str = JSON, *, is_list: bool = False, count: int = 1) -> bytes:
    return encode_answers(answers_of([prediction], count), prediction.signature, media, is_list=is_list)


def told(spec: tuple[DataType, Any], row: Any, **meaning: Any) -> Any:
    """One output of one record, as JSON."""
    said = {"y": meaning} if meaning else {}
    return json.loads(encode(predicted({"y": spec}, {"y": [row]}, **said)))["y"]


@pytest.mark.parametrize(
    ("spec", "row", "meaning", "expected"),
    [
        ((FP32, (None,)), 0.1, {}, 0.1),
        ((FP32, (None, 1)), [0.1], {}, 0.1),
        ((FP32, (None, 1)), [0.1], {"kind": "tensor"}, [0.1]),
        ((FP32, (None,)), 71234.56, {"unit": "CAD", "decimals": 0}, {"value": 71235, "unit": "CAD"}),
        ((FP32, (None,)), 1.256, {"decimals": 2}, 1.26),
        ((FP32, (None,)), np.nan, {"decimals": 0}, None),
        ((INT32, (None,)), 7, {"decimals": 2}, 7),
        ((DataType.BF16, (None,)), 0.5, {}, 0.5),
        ((DataType.BOOL, (None,)), True, {}, True),
        ((FP32, (None, 2)), [1, 2], {}, [1, 2]),
        ((FP32, (None, 2)), [1, 2], {"kind": "number", "unit": "m"}, {"value": [1, 2], "unit": "m"}),
        ((FP32, (None, 2, 1)), [[1], [2]], {"kind": "series", "unit": "m"}, {"values": [1, 2], "unit": "m"}),
        ((FP32, (None, 2, 2)), [[1, 2], [3, 4]], {"kind": "series"}, [[1, 2], [3, 4]]),
        ((BYTES, (None,)), "é".encode(), {}, "é"),
        ((BYTES, (None, 2)), [b"a", b"\xff"], {}, ["a", {"b64": "/w=="}]),
    ],
)
def test_numbers_and_texts(spec: Any, row: Any, meaning: dict[str, Any], expected: Any):
    """Bare, or with their unit; rounded if so said; what is no number is null."""
    assert told(spec, row, **meaning) == expected


def classes(*parts: tuple[str, int, float]) -> list[dict[str, Any]]:
    return [{"label": label, "id": index, "probability": pytest.approx(each)} for label, index, each in parts]


def test_classes():
    """The most probable first: the best few, or all; without names they are called by their numbers."""
    row, spec = [0.25, 0.5, 0.25], (FP32, (None, 3))
    assert told(spec, row, labels=list("abc"), top_k=2) == classes(("b", 1, 0.5), ("a", 0, 0.25))
    assert told(spec, row, labels=list("abc"), top_k=None) == classes(("b", 1, 0.5), ("a", 0, 0.25), ("c", 2, 0.25))
    assert told(spec, row, kind="labels", top_k=1) == classes(("1", 1, 0.5))
    assert told((FP32, (None, None)), row, labels=["a"])[0] == {"label": "1", "id": 1, "probability": 0.5}


def test_classes_from_scores():
    """Softmax, or sigmoid where there is one column; large scores do no harm."""
    two = told((FP32, (None, 2)), [0.0, 1000.0], labels=["a", "b"], logits=True)
    assert two == classes(("b", 1, 1.0), ("a", 0, 0.0))
    assert told((FP32, (None, 1)), [-1000.0], labels=["a", "b"], logits=True) == classes(("a", 0, 1.0), ("b", 1, 0.0))
    assert told((FP32, (None,)), 0.0, logits=True) == classes(("0", 0, 0.5), ("1", 1, 0.5))


def test_one_column_of_two_classes():
    """Is the probability of the second."""
    assert told((FP32, (None, 1)), [0.75], labels=["no", "yes"]) == classes(("yes", 1, 0.75), ("no", 0, 0.25))


def test_the_number_of_a_class():
    """Where the model has chosen already."""
    assert told((INT32, (None,)), 1, labels=["a", "b"]) == {"label": "b", "id": 1}
    assert told((INT32, (None,)), 7, labels=["a", "b"]) == {"label": "7", "id": 7}


def test_classes_of_each_place():
    """Of a sequence, say."""
    answer = told((FP32, (None, 2, 2)), [[0.9, 0.1], [0.2, 0.8]], labels=["a", "b"], top_k=1)
    assert answer == [classes(("a", 0, 0.9)), classes(("b", 1, 0.8))]


def test_classes_that_are_no_number():
    """Come last."""
    assert [each["label"] for each in told((FP32, (None, 2)), [np.nan, 0.1], labels=["a", "b"])] == ["b", "a"]


@given(row=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=9))
def test_probabilities_of_scores_add_up(row: list[float]):
    """To one, in falling order."""
    answer = told((FP32, (None, len(row))), row, kind="labels", logits=True)
    shares = [each["probability"] for each in answer]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert shares == sorted(shares, reverse=True)


def test_labels_of_a_file_beside_the_model():
    """Are used where ``model.yaml`` names none."""
    spec = TensorSpec("y", FP32, (None, 2), labels=("a", "b"))
    signature = Signature("f", (TensorSpec("x", FP32, (None,)),), (spec,))
    prediction = Prediction("m", 1, signature, {"y": np.array([[0.25, 0.75]], np.float32)})
    assert json.loads(encode(prediction)) == {"y": classes(("b", 1, 0.75), ("a", 0, 0.25))}


def test_rows_and_runs():
    """A list has one answer for each record, whether they were one batch or a run each."""
    prediction = predicted({"y": (FP32, (None,))}, {"y": [1, 2]})
    assert json.loads(encode(prediction, is_list=True, count=2)) == [{"y": 1}, {"y": 2}]
    with pytest.raises(Internal, match="3 answers expected, the model gave 2"):
        encode(prediction, count=3)
    alone = Signature("f", (TensorSpec("x", FP32, ()),), (TensorSpec("a", FP32, ()), TensorSpec("b", FP32, (None, 2))))
    runs = [
        Prediction("m", 1, alone, {"a": np.float32(each) * np.ones(()), "b": np.full((rows, 2), each)})
        for each, rows in ((1, 1), (2, 2))
    ]
    body = encode_answers(answers_of(runs, 2), alone, JSON, is_list=True)
    assert json.loads(body) == [{"a": 1, "b": [1, 1]}, {"a": 2, "b": [[2, 2], [2, 2]]}]


MIXED = predicted(
    {"digit": (FP32, (None, 2)), "price": (FP32, (None,)), "series": (FP32, (None, 2)), "word": (BYTES, (None,))},
    {"digit": [[0.25, 0.75], [1, 0]], "price": [0.1, np.inf], "series": [[1, 2], [3, 4]], "word": [b'a,"b', b"c"]},
    digit={"labels": ["a", "b"]},
    price={"unit": "CAD"},
)


def test_a_table():
    """The best class and its probability, a column for each element."""
    table = list(csv.reader(io.StringIO(encode(MIXED, CSV, count=2).decode())))
    assert table == [
        ["digit", "digit_probability", "price", "series[0]", "series[1]", "word"],
        ["b", "0.75", "0.1", "1.0", "2.0", 'a,"b'],
        ["a", "1.0", "", "3.0", "4.0", "c"],
    ]


def test_a_text():
    """A line for each record, by name where there are several outputs."""
    assert encode(MIXED, TEXT, count=2).decode().splitlines() == [
        'digit: b, price: 0.1 CAD, series: 1.0 2.0, word: a,"b',
        "digit: a, price:  CAD, series: 3.0 4.0, word: c",
    ]
    one = predicted({"y": (FP32, (None, 2))}, {"y": [[0.25, 0.75]]}, y={"labels": ["a", "b"]})
    assert encode(one, TEXT) == b"b\n"
    words = predicted({"y": (BYTES, (None, 2)), "t": (DataType.BOOL, (None,))}, {"y": [[b"a", b"b"]], "t": [True]})
    assert encode(words, TEXT) == b"y: a b, t: true\n"
    chosen = predicted({"y": (INT32, (None,))}, {"y": [1]}, y={"labels": ["a", "b"]})
    assert encode(chosen, CSV) == b"y\r\nb\r\n"


def test_what_is_no_table():
    """Answers of different shapes, and classes of each place."""
    alone = Signature("f", (TensorSpec("x", FP32, ()),), (TensorSpec("y", FP32, None),))
    runs = [Prediction("m", 1, alone, {"y": np.zeros(size)}) for size in (1, 2)]
    with pytest.raises(NotAcceptable, match="differ in shape"):
        encode_answers(answers_of(runs, 2), alone, CSV, is_list=True)
    places = predicted({"y": (FP32, (None, 1, 2))}, {"y": [[[0, 1]]]}, y={"labels": ["a", "b"]})
    with pytest.raises(NotAcceptable, match="output 'y' is no column"):
        encode(places, CSV)


PICTURE = predicted(
    {"n": (FP32, (None,)), "picture": (FP32, (None, 1, 2))},
    {"n": [1, 2], "picture": [[[0, 0.2]], [[1, 0.4]]]},
    picture={"kind": "image", "scale": 255},
)


def test_pictures():
    """A data URI in JSON; one sheet as a PNG, several side by side."""
    answers = json.loads(encode(PICTURE, is_list=True, count=2))
    kind, _, text = answers[0]["picture"].partition(",")
    assert kind == "data:image/png;base64"
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).tolist() == [[0, 51]]
    sheet = Image.open(io.BytesIO(encode(PICTURE, PNG, count=2)))
    assert np.asarray(sheet).tolist() == [[0, 51, 255, 102]]


def test_which_answers_a_model_can_give():
    """JSON in any case."""
    assert answer_types(MIXED.signature) == [JSON, CSV, TEXT]
    assert answer_types(PICTURE.signature) == [JSON, PNG]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("text/csv", CSV),
        ("TEXT/*", CSV),
        ("text/plain, */*;q=0.1", TEXT),
        ("text/csv;q=0.5, text/plain", TEXT),
        ("text/html, application/xhtml+xml, */*;q=0.8", JSON),
        ("application/json;q=0, */*", CSV),
        ("text/csv;q=x, text/plain;q=nan, application/json;q=0.1", JSON),
        (",", JSON),
    ],
)
def test_accept(accept: str | None, expected: str):
    """The type of the highest weight, by the most specific range; JSON where it does not matter."""
    assert choose_type(accept, [JSON, CSV, TEXT]) == expected


@pytest.mark.parametrize("accept", ["image/png", "image/*", "text/html", "*/*;q=0"])
def test_nothing_that_is_accepted(accept: str):
    """The text has what there is."""
    with pytest.raises(NotAcceptable, match="header Accept: one of application/json, text/csv expected, got"):
        choose_type(accept, [JSON, CSV])
