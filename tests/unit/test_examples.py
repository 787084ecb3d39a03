"""Examples and what classify and regress mean by them, without a wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from service.bounds import Bounds
from service.errors import FailedPrecondition, InvalidArgument, KilnError
from service.examples import Features, Method, classes_of, decode_examples, values_of
from service.predictor import Prediction, validate
from service.tensors import Array, DataType, Signature, TensorSpec
from tests.signatures import only

CLASSIFY, REGRESS = Method.CLASSIFY, Method.REGRESS
PREDICT = "tensorflow/serving/predict"
Specs = dict[str, tuple[DataType, Any]]
SCORES: Specs = {"scores": (DataType.FP32, (None, 2))}
CLASSES: Specs = {"classes": (DataType.BYTES, (None, 2))}
VALUES: Specs = {"outputs": (DataType.FP32, (None, 1))}
PROBABILITIES: Specs = {"output_0": (DataType.FP32, (None, 2))}


class Rows:
    """Examples as a test writes them; serialised, each is its position."""

    def __init__(self, *rows: Features) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def features(self) -> Sequence[Features]:
        return self._rows

    def serialized(self) -> Sequence[bytes]:
        return [b"%d" % index for index in range(len(self))]


def row(**features: Array) -> Features:
    return features


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def strings(*values: bytes) -> Array:
    return np.array(values, object)


def signature(inputs: Specs, outputs: Specs, method: str = PREDICT, name: str = "serving_default") -> Signature:
    before, after = (tuple(TensorSpec(key, *spec) for key, spec in side.items()) for side in (inputs, outputs))
    return Signature(name, before, after, method)


def takes(dtype: DataType = DataType.FP32, shape: Any = (None, 2)) -> Signature:
    """A Keras model of one input ``x``."""
    return signature({"x": (dtype, shape)}, PROBABILITIES)


def parsing(method: Method, outputs: Specs, name: str = "inputs") -> Signature:
    """A signature whose graph parses examples."""
    return signature({name: (DataType.BYTES, (None,))}, outputs, method.value)


def inputs_of(asked: Signature, *rows: Features, method: Method = CLASSIFY) -> dict[str, Array]:
    decoded = decode_examples(method, Rows(*rows), only(asked), "")
    validate(decoded)
    return decoded.inputs


def refusal(asked: Signature, *rows: Features, method: Method = CLASSIFY, name: str = "") -> KilnError:
    with pytest.raises(KilnError) as refused:
        validate(decode_examples(method, Rows(*rows), only(asked), name))
    return refused.value


# Which way in


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        (CLASSIFY, parsing(CLASSIFY, SCORES | CLASSES)),
        (CLASSIFY, parsing(CLASSIFY, SCORES, name="examples")),
        (REGRESS, parsing(REGRESS, VALUES)),
        (CLASSIFY, signature({"inputs": (DataType.BYTES, (None,))}, SCORES)),
        (CLASSIFY, signature({"inputs": (DataType.BYTES, (None,))}, CLASSES)),
        (REGRESS, signature({"inputs": (DataType.BYTES, (None,))}, VALUES)),
    ],
)
def test_a_graph_that_parses_gets_messages(method: Method, asked: Signature):
    """Told by its method, or, as TensorFlow 2 writes them, by the names of its input and outputs."""
    inputs = inputs_of(asked, row(a=floats(1)), row(a=floats(2)), method=method)
    assert {name: array.tolist() for name, array in inputs.items()} == {asked.inputs[0].name: [b"0", b"1"]}


@pytest.mark.parametrize(
    "asked",
    [
        signature({"text": (DataType.BYTES, (None,))}, SCORES),
        signature({"inputs": (DataType.BYTES, (None,))}, PROBABILITIES),
        signature({"inputs": (DataType.BYTES, (None,))}, SCORES | PROBABILITIES),
    ],
)
def test_any_other_string_is_a_feature(asked: Signature):
    """A Keras model of texts."""
    inputs = inputs_of(asked, {asked.inputs[0].name: strings(b"a")})
    assert inputs[asked.inputs[0].name].tolist() == [b"a"]


def test_the_signature_is_the_one_named():
    """An unknown one is the request's fault, as it is not with predict."""
    named = {"serving_default": takes(), "other": takes(shape=(None,))}
    decoded = decode_examples(CLASSIFY, Rows(row(x=floats(1))), named, "other")
    assert decoded.signature is named["other"]
    error = refusal(takes(), row(x=floats(1, 2)), name="none")
    assert isinstance(error, InvalidArgument)
    assert str(error).startswith('Serving signature name: "none" not found')


def test_a_signature_of_another_method_is_refused():
    """Neither does what the other was made for."""
    error = refusal(parsing(REGRESS, VALUES), row())
    assert str(error) == f"signature 'serving_default': method {CLASSIFY.value} expected, got {REGRESS.value}"
    assert isinstance(error, InvalidArgument)


@pytest.mark.parametrize("asked", [takes(), parsing(CLASSIFY, SCORES)])
def test_no_examples_are_refused(asked: Signature):
    """Whichever way they would go in."""
    assert str(refusal(asked)) == "Input is empty: at least one example is expected"


# Features as inputs


@pytest.mark.parametrize(
    ("dtype", "shape", "rows", "expected"),
    [
        (DataType.FP32, (None, 2), [floats(1, 2), floats(3, 4)], [[1, 2], [3, 4]]),
        (DataType.FP32, (None, 2), [floats(1, 2), ints(3, 4)], [[1, 2], [3, 4]]),
        (DataType.FP16, (None,), [floats(0.5), ints(3)], [0.5, 3]),
        (DataType.BF16, (None, 1), [floats(0.5)], [[0.5]]),
        (DataType.FP64, (None,), [ints(2**53)], [2**53]),
        (DataType.INT64, (None,), [ints(2**62)], [2**62]),
        (DataType.UINT8, (None, 2), [ints(0, 255)], [[0, 255]]),
        (DataType.BOOL, (None, 2), [ints(0, 1)], [[False, True]]),
        (DataType.BYTES, (None, 2), [strings(b"a", b"\xff")], [[b"a", b"\xff"]]),
        (DataType.FP32, (None, 2, 2), [floats(1, 2, 3, 4)], [[[1, 2], [3, 4]]]),
        (DataType.FP32, (None, None, 2), [floats(1, 2, 3, 4)], [[[1, 2], [3, 4]]]),
        (DataType.FP32, (None, None), [floats(), floats()], [[], []]),
        (DataType.INT32, (None, 0), [floats()], [[]]),
        (DataType.FP32, None, [floats(1, 2), floats(3, 4)], [[1, 2], [3, 4]]),
        (DataType.FP32, (2, 2), [floats(1, 2), floats(3, 4)], [[1, 2], [3, 4]]),
    ],
)
def test_features_become_inputs(dtype: DataType, shape: Any, rows: list[Array], expected: list[Any]):
    """Each row's flat values in the shape of a row; integers are taken for floats and booleans."""
    inputs = inputs_of(takes(dtype, shape), *(row(x=values) for values in rows))
    assert inputs["x"].dtype == dtype.numpy
    assert inputs["x"].tolist() == expected


def test_a_single_feature_of_another_name_feeds_a_single_input():
    """There is nothing else that it could mean."""
    assert inputs_of(takes(), row(y=floats(1, 2)), row(y=floats(3, 4)))["x"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("asked", "rows", "text"),
    [
        (
            takes(),
            [row(x=floats(1, 2), y=ints(1))],
            "unknown feature 'y': signature 'serving_default' takes x; received x",
        ),
        (takes(), [row(x=floats(1, 2)), row(y=floats(1, 2))], "unknown feature 'y'"),
        (takes(), [row()], "feature 'x' is missing in example 0: signature 'serving_default' takes x; received none"),
        (takes(), [row(x=floats(1, 2)), row()], "feature 'x' is missing in example 1"),
        (takes(), [row(y=floats(1, 2)), row()], "feature 'y' is missing in example 1"),
        (
            signature({"x": (DataType.FP32, (None,)), "y": (DataType.FP32, (None,))}, PROBABILITIES),
            [row(z=floats(1))],
            "unknown feature 'z': signature 'serving_default' takes x, y; received z",
        ),
        (
            takes(),
            [row(x=floats(1, 2)), row(x=floats(1))],
            "feature 'x' of example 1: 2 values expected, as in example 0",
        ),
        (takes(), [row(x=floats(1))], "feature 'x': 2 values expected for a row of shape [2], got 1"),
        (takes(shape=(None, None, 2)), [row(x=floats(1))], "feature 'x': a multiple of 2 values expected"),
        (takes(shape=(None, None, 0)), [row(x=floats(1))], "feature 'x': a multiple of 0 values expected"),
        (takes(shape=(None, None, None)), [row(x=floats(1))], "feature 'x': a row of input 'x' is [-1, -1], which a"),
        (takes(shape=()), [row(x=floats(1))], "feature 'x': input 'x' takes one value and no rows: use predict"),
        (takes(shape=(3, 2)), [row(x=floats(1, 2))], "input 'x': [3, 2] expected, got [1, 2]"),
        (
            takes(DataType.INT32),
            [row(x=ints(1, 2)), row(x=floats(1, 2))],
            "feature 'x' of example 1: integers expected for INT32, got floats",
        ),
        (
            takes(),
            [row(x=strings(b"", b""))],
            "feature 'x' of example 0: integers or floats expected for FP32, got strings",
        ),
        (
            takes(DataType.BYTES),
            [row(x=ints(1, 2))],
            "feature 'x' of example 0: strings expected for BYTES, got integers",
        ),
        (takes(DataType.BOOL), [row(x=ints(1, 2))], "feature 'x' of example 0: 0 or 1 expected for BOOL"),
        (
            takes(DataType.BOOL),
            [row(x=floats(1, 0))],
            "feature 'x' of example 0: integers expected for BOOL, got floats",
        ),
        (takes(DataType.UINT8), [row(x=ints(1, 256))], "feature 'x' of example 0: 256 does not fit UINT8"),
        (takes(DataType.FP16), [row(x=floats(1, 1e6))], "feature 'x' of example 0: a number does not fit FP16"),
    ],
)
def test_a_feature_that_does_not_fit_is_named(asked: Signature, rows: list[Features], text: str):
    """With what was expected and what came."""
    error = refusal(asked, *rows)
    assert isinstance(error, InvalidArgument)
    assert str(error).startswith(text)


# Which outputs


@pytest.mark.parametrize(
    ("method", "outputs", "text"),
    [
        (
            CLASSIFY,
            PROBABILITIES | {"more": (DataType.FP32, (None, 2))},
            "signature 'serving_default': one output of floats expected, or one called scores; "
            "got output_0 (FP32), more (FP32)",
        ),
        (CLASSIFY, {"y": (DataType.INT32, (None, 2))}, "signature 'serving_default': one output of floats expected"),
        (CLASSIFY, {"y": (DataType.FP32, (None,))}, "output 'y': shape [rows, classes] expected, got [-1]"),
        (CLASSIFY, {"y": (DataType.FP32, (None, 2, 2))}, "output 'y': shape [rows, classes] expected, got [-1, 2, 2]"),
        (
            CLASSIFY,
            {"scores": (DataType.BYTES, (None, 2))},
            "signature 'serving_default': output 'scores': floats expected, got BYTES",
        ),
        (
            CLASSIFY,
            {"classes": (DataType.FP32, (None, 2)), "y": (DataType.FP32, (None, 2))},
            "signature 'serving_default': output 'classes': strings or integers expected, got FP32",
        ),
        (REGRESS, PROBABILITIES, "output 'output_0': shape [rows] or [rows, 1] expected, got [-1, 2]"),
        (REGRESS, {"y": (DataType.BYTES, (None,))}, "signature 'serving_default': one output of numbers expected"),
        (
            REGRESS,
            {"outputs": (DataType.BOOL, (None,))},
            "signature 'serving_default': output 'outputs': numbers expected, got BOOL",
        ),
    ],
)
def test_outputs_that_hold_no_answer_are_told_before_the_run(method: Method, outputs: Specs, text: str):
    """With no way to choose, of another type, or of another shape."""
    error = refusal(signature({"x": (DataType.FP32, (None,))}, outputs), row(x=floats(1)), method=method)
    assert isinstance(error, InvalidArgument)
    assert str(error).startswith(text)


@pytest.mark.parametrize(("method", "names"), [(CLASSIFY, "classes or scores"), (REGRESS, "outputs")])
def test_a_signature_of_the_method_must_have_its_outputs(method: Method, names: str):
    """TensorFlow Serving says that it is a failed precondition."""
    error = refusal(parsing(method, PROBABILITIES), row(), method=method)
    assert isinstance(error, FailedPrecondition)
    assert str(error) == f"signature 'serving_default': an output called {names} expected, got output_0"


def answer(outputs: Specs, method: str = PREDICT, /, **arrays: Any) -> Prediction:
    asked = signature({"x": (DataType.FP32, (None,))}, outputs, method)
    return Prediction("m", 1, asked, {name: np.asarray(array) for name, array in arrays.items()})


SOME = np.array([[0.25, 0.75], [1, 0]], np.float32)


@pytest.mark.parametrize(
    ("prediction", "labels", "scores"),
    [
        (answer(PROBABILITIES, output_0=SOME), [["0", "1"]] * 2, SOME),
        (answer(SCORES, output_0=SOME, scores=SOME), [["0", "1"]] * 2, SOME),
        (answer(SCORES | PROBABILITIES, scores=SOME, output_0=SOME + 1), [["0", "1"]] * 2, SOME),
        (
            answer(CLASSES | PROBABILITIES, classes=np.array([[b"a", b"\xc3\xa9"]] * 2, object), output_0=SOME),
            [["a", "é"]] * 2,
            SOME,
        ),
        (
            answer({"classes": (DataType.INT32, None)} | SCORES, classes=np.array([[7, 8], [8, 7]]), scores=SOME),
            [["7", "8"], ["8", "7"]],
            SOME,
        ),
        (
            answer(CLASSES, CLASSIFY.value, classes=np.array([["a", "b"]], object)),
            [["a", "b"]],
            np.zeros((1, 2), np.float32),
        ),
        (answer({"y": (DataType.FP64, None)}, y=np.array([[0.5]])), [["0"]], np.array([[0.5]], np.float32)),
        (answer({"y": (DataType.FP64, None)}, y=np.array([[1e300]])), [["0"]], np.array([[np.inf]], np.float32)),
    ],
)
def test_classes(prediction: Prediction, labels: list[list[str]], scores: Array):
    """Labels from the output ``classes``, else by index; scores in FP32, or 0 where there are none."""
    classes = classes_of(prediction, len(scores))
    assert classes.labels == labels
    assert classes.scores.dtype == np.float32
    np.testing.assert_array_equal(classes.scores, scores)


@pytest.mark.parametrize(
    "prediction",
    [
        answer(VALUES, outputs=np.array([[1], [2]], np.float32)),
        answer({"y": (DataType.FP32, (None,))}, y=np.array([1, 2], np.float32)),
        answer({"y": (DataType.INT64, None)}, y=np.array([1, 2])),
        answer({"y": (DataType.FP32, (None, None))} | CLASSES, y=np.array([[1], [2]], np.float32), classes=None),
        answer(VALUES | PROBABILITIES, outputs=np.array([1, 2], np.float32), output_0=SOME),
    ],
)
def test_values(prediction: Prediction):
    """The output ``outputs``, else the only one of numbers; of one column or none."""
    values = values_of(prediction, 2)
    assert values.dtype == np.float32
    assert values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("prediction", "text"),
    [
        (answer({"y": (DataType.FP32, None)}, y=SOME[0]), "output 'y': shape [rows, classes] expected, got [2]"),
        (answer(PROBABILITIES, output_0=SOME[:1]), "output 'output_0': 2 rows expected, as many as examples, got 1"),
        (
            answer(CLASSES | SCORES, classes=np.array([["a"]] * 2, object), scores=SOME),
            "classes and scores of one shape expected, got [2, 1] and [2, 2]",
        ),
    ],
)
def test_outputs_of_other_shapes_are_told(prediction: Prediction, text: str):
    """A signature may leave shapes open; what comes then is looked at."""
    with pytest.raises(InvalidArgument) as refused:
        classes_of(prediction, 2)
    assert str(refused.value) == text


def test_values_of_another_shape_are_told():
    """Two columns are no value."""
    with pytest.raises(InvalidArgument, match=r"output 'y': shape \[rows\] or \[rows, 1\] expected, got \[2, 2\]"):
        values_of(answer({"y": (DataType.FP32, None)}, y=SOME), 2)


def test_a_label_that_is_no_text_is_told():
    """No wire can carry it."""
    prediction = answer(CLASSES, CLASSIFY.value, classes=np.array([[b"\xff", b"a"]], object))
    with pytest.raises(FailedPrecondition, match="output 'classes': a label of text expected, got b'\\\\xff'"):
        classes_of(prediction, 1)


@pytest.mark.parametrize(
    ("asked", "rows", "bounds", "text"),
    [
        (
            takes(),
            [row(x=floats(1, 2))] * 2,
            Bounds(max_tensor_elements=3),
            "input 'x': at most 3 elements expected (max_tensor_elements), got shape [2, 2]",
        ),
        (
            takes(DataType.BYTES, (None, 1)),
            [row(x=strings(b"abc"))],
            Bounds(max_string_bytes=2),
            "input 'x': strings of at most 2 bytes expected (max_string_bytes), got one of 3",
        ),
        (
            parsing(CLASSIFY, CLASSES),
            [row()] * 3,
            Bounds(max_tensor_elements=32),
            "input 'inputs': at most 2 elements expected (max_tensor_elements), got shape [3]",
        ),
        (
            parsing(CLASSIFY, CLASSES),
            [row()],
            Bounds(max_string_bytes=0),
            "input 'inputs': strings of at most 0 bytes expected (max_string_bytes), got one of 1",
        ),
    ],
)
def test_features_are_bounded(asked: Signature, rows: list[Features], bounds: Bounds, text: str):
    """As the inputs that they become, and serialised examples as the strings that they are."""
    with pytest.raises(InvalidArgument) as refused:
        decode_examples(CLASSIFY, Rows(*rows), only(asked), "", bounds)
    assert str(refused.value) == text
    assert decode_examples(CLASSIFY, Rows(*rows), only(asked), "").signature is asked
