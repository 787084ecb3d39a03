"""Both codecs of classify and regress: JSON and messages become the same examples, results what clients read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidArgument, KilnError, Unimplemented
from service.examples import Classes, Features, Method
from service.rest.examples_codec import decode_examples_body, encode_classes, encode_values
from service.rpc._generated.kiln.tensorflow import example_pb2
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.rpc.examples_codec import (
    ProtoExamples,
    encode_classification,
    encode_regression,
    encode_results,
    tasks_of,
)
from service.tensors import DataType, Signature, TensorSpec
from tests.signatures import prediction

CLASSIFY, REGRESS = Method.CLASSIFY, Method.REGRESS
PROBABILITIES = Signature(
    "probabilities",
    (TensorSpec("x", DataType.FP32, (None,)),),
    (TensorSpec("classes", DataType.BYTES, (None, 2)), TensorSpec("scores", DataType.FP32, (None, 2))),
)
VALUE = Signature(
    "value", (TensorSpec("x", DataType.FP32, (None,)),), (TensorSpec("outputs", DataType.FP32, (None, 1)),)
)
LABELS = np.array([["a", "é"], ["b", "c"]], object)
SCORES = np.array([[0.2, np.nan], [1, np.inf]], np.float32)


def decode(body: Any) -> Any:
    return decode_examples_body(body if isinstance(body, bytes) else json.dumps(body).encode(), 100)


def plain(rows: Sequence[Features]) -> list[dict[str, tuple[str, list[Any]]]]:
    return [{name: (values.dtype.kind, values.tolist()) for name, values in row.items()} for row in rows]


def message(**features: Any) -> example_pb2.Example:
    """Features by name: the keyword arguments of a ``Feature``'s kinds."""
    example = example_pb2.Example()
    for name, kinds in features.items():
        feature = example.features.feature[name]
        for kind, values in kinds.items():
            getattr(feature, kind).SetInParent()
            getattr(feature, kind).value.extend(values)
    return example


# REST


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1.5, "f", [1.5]),
        ([1.5, -2.0], "f", [1.5, -2]),
        (3, "i", [3]),
        ([3, -(2**63)], "i", [3, -(2**63)]),
        (True, "i", [1]),
        ([True, 2, False], "i", [1, 2, 0]),
        ("é", "O", ["é".encode()]),
        ({"b64": "/w=="}, "O", [b"\xff"]),
        ({"b64": "/w"}, "O", [b"\xff"]),
        (["a", {"b64": ""}], "O", [b"a", b""]),
        ([], "f", []),
    ],
)
def test_json_features(value: Any, kind: str, expected: list[Any]):
    """A scalar or a flat list; its JSON type tells the kind."""
    examples, name = decode({"examples": [{"f": value}]})
    assert plain(examples.features()) == [{"f": (kind, expected)}]
    assert (len(examples), name) == (1, "")


def test_tokens_are_floats():
    """Bare, as in predict."""
    examples, _ = decode(b'{"examples": [{"f": [NaN, -Infinity, 1.0]}]}')
    np.testing.assert_array_equal(examples.features()[0]["f"], np.array([np.nan, -np.inf, 1], np.float32))


def test_json_context_and_signature():
    """The context is in every example, whose own features win."""
    body = {"signature_name": "s", "context": {"a": 1, "b": 2}, "examples": [{"b": 3}, {}, {"a": [0.5]}]}
    examples, name = decode(body)
    assert name == "s"
    assert plain(examples.features()) == [
        {"a": ("i", [1]), "b": ("i", [3])},
        {"a": ("i", [1]), "b": ("i", [2])},
        {"a": ("f", [0.5]), "b": ("i", [2])},
    ]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "Missing 'examples' key: classify and regress take a list of examples"),
        ({"examples": [{}], "signature_name": 1}, "'signature_name' must be a string, got 1"),
        ({"examples": {}}, "'examples' must be a list of objects, got {}"),
        ({"examples": None}, "'examples' must be a list of objects, got null"),
        ({"examples": []}, "'examples' is empty: at least one example is expected"),
        ({"examples": [{}, 1]}, "example 1: an object of features expected, got 1"),
        ({"examples": [{}], "context": [1]}, "'context': an object of features expected, got [1]"),
        ({"examples": [{}], "context": None}, "'context': an object of features expected, got null"),
        ({"examples": [{}], "context": {"f": None}}, "feature 'f' of 'context': a number, a boolean, a string"),
        ({"examples": [{"f": None}]}, "feature 'f' of example 0: a number, a boolean, a string"),
        ({"examples": [{"f": [[1]]}]}, "feature 'f' of example 0: a number, a boolean, a string"),
        ({"examples": [{"f": [{"b64": 1}]}]}, "feature 'f' of example 0: a number, a boolean, a string"),
        ({"examples": [{"f": {"a": "b"}}]}, "feature 'f' of example 0: a number, a boolean, a string"),
        ({"examples": [{"f": {"b64": "?"}}]}, "feature 'f' of example 0: base64 expected: "),
        ({"examples": [{"f": [1, 2.0]}]}, "feature 'f' of example 0: values of one kind expected, got 1 and 2.0"),
        ({"examples": [{"f": ["a", 1]}]}, "feature 'f' of example 0: values of one kind expected, got \"a\" and 1"),
        ({"examples": [{"f": 2**63}]}, "feature 'f' of example 0: a number does not fit INT64"),
        ({"examples": [{"f": 1e39}]}, "feature 'f' of example 0: a number does not fit FP32"),
        (b'{"examples": [{"f": 1e400}]}', "JSON Parse error: number too big to be stored in double: 1e400"),
        (b'{"examples": [{"f": "\\ud800"}]}', "feature 'f' of example 0: text expected, got a lone surrogate"),
        (b'{"examples": [{"\\ud800": 1}]}', "example 0: a feature's name has a lone surrogate"),
        (b'{"examples": [{"f": [[[[1]]]]}]}', "JSON Parse error: nested deeper than"),
    ],
)
def test_a_wrong_body_is_told_what_was_expected(body: Any, text: str):
    """Names the feature, the example, what was expected and what came."""
    with pytest.raises(InvalidArgument) as refused:
        decode(body)
    assert str(refused.value).startswith(text)


VALUES = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), max_size=4),
)


@given(st.lists(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), VALUES), min_size=1, max_size=3))
def test_serialised_examples_are_those_of_protobuf(rows: list[dict[str, list[Any]]]):
    """What is written by hand is read by protobuf as the same features; an empty list as one of no kind."""
    examples, _ = decode({"examples": rows})
    for row, data in zip(rows, examples.serialized(), strict=True):
        features = example_pb2.Example.FromString(data).features.feature
        assert set(features) == set(row)
        for name, values in row.items():
            kind = features[name].WhichOneof("kind")
            assert bool(kind) == bool(values)
            if kind:
                read = list(getattr(features[name], kind).value)
                assert read == [value.encode() if isinstance(value, str) else value for value in values]


def test_json_results():
    """Under ``results``; scores as short as FP32 is, with the bare tokens."""
    body = encode_classes(Classes(LABELS.tolist(), SCORES))
    assert body.decode() == '{"results": [[["a", 0.2], ["é", NaN]], [["b", 1.0], ["c", Infinity]]]}'
    assert encode_values(np.array([0.2, 1], np.float32)) == b'{"results":[0.2,1.0]}'


# gRPC

EXAMPLES = [
    message(a={"float_list": [1.5]}, b={"int64_list": [-1]}, c={"bytes_list": [b"\xff", b""]}),
    message(a={}, b={"int64_list": []}),
]
EXPECTED: list[dict[str, Any]] = [
    {"a": ("f", [1.5]), "b": ("i", [-1]), "c": ("O", [b"\xff", b""])},
    {"a": ("f", []), "b": ("i", [])},
]


def test_a_list_of_messages():
    """As they are."""
    examples = ProtoExamples(pb.Input(example_list={"examples": EXAMPLES}))
    assert len(examples) == 2
    assert plain(examples.features()) == EXPECTED
    assert [example_pb2.Example.FromString(data) for data in examples.serialized()] == EXAMPLES


def test_messages_with_context():
    """The context is in every example, whose own features win, as values and as bytes."""
    source = pb.Input()
    source.example_list_with_context.context.CopyFrom(
        message(b={"int64_list": [7]}, d={"float_list": [8]}, a={"float_list": [9]})
    )
    source.example_list_with_context.examples.extend(EXAMPLES)
    examples = ProtoExamples(source)
    expected = [{"d": ("f", [8.0])} | row for row in EXPECTED]
    assert plain(examples.features()) == expected
    merged = pb.Input()
    merged.example_list.examples.extend(example_pb2.Example.FromString(data) for data in examples.serialized())
    assert plain(ProtoExamples(merged).features()) == expected


def test_no_input_has_no_examples():
    """An ``Input`` of neither kind."""
    assert len(ProtoExamples(pb.Input())) == 0


def test_responses():
    """Results, and which model, version and signature made them."""
    classified = pb.ClassificationResponse.FromString(
        encode_classification(prediction(PROBABILITIES, LABELS, SCORES), 2)
    )
    rows = [[(each.label, each.score) for each in row.classes] for row in classified.result.classifications]
    np.testing.assert_equal(rows, [[("a", np.float32(0.2)), ("é", np.nan)], [("b", 1.0), ("c", np.inf)]])
    spec = classified.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 3, "probabilities")
    regressed = pb.RegressionResponse.FromString(encode_regression(prediction(VALUE, [[1], [2]]), 2))
    assert [each.value for each in regressed.result.regressions] == [1, 2]
    assert regressed.model_spec.signature_name == "value"


def test_results_of_tasks():
    """One for each, in their order."""
    answers = [prediction(VALUE, [[1], [2]]), prediction(PROBABILITIES, LABELS, SCORES)]
    response = pb.MultiInferenceResponse.FromString(encode_results(answers, [REGRESS, CLASSIFY], 2))
    assert [result.WhichOneof("result") for result in response.results] == [
        "regression_result",
        "classification_result",
    ]
    assert [result.model_spec.signature_name for result in response.results] == ["value", "probabilities"]
    assert response.results[0].regression_result.regressions[1].value == 2
    assert response.results[1].classification_result.classifications[1].classes[0].label == "b"


def task(signature: str = "", method: str = CLASSIFY.value, **spec: Any) -> pb.InferenceTask:
    return pb.InferenceTask(model_spec={"name": "m", "signature_name": signature, **spec}, method_name=method)


def test_tasks():
    """What each asks for; the version of the first holds for all."""
    tasks = [task(version={"value": 1}), task("b", REGRESS.value), task("c", version={"value": 1})]
    assert tasks_of(pb.MultiInferenceRequest(tasks=tasks)) == [(CLASSIFY, ""), (REGRESS, "b"), (CLASSIFY, "c")]


@pytest.mark.parametrize(
    ("tasks", "error", "text"),
    [
        ([], InvalidArgument, "tasks: at least one expected, got none"),
        ([task(name="")], InvalidArgument, "task 0: found ModelSpec with an empty model name"),
        ([task(), task("b", name="n")], InvalidArgument, "all ModelSpecs in a MultiInferenceRequest must access the"),
        ([task(), task("serving_default")], InvalidArgument, "task 1: duplicate evaluation of signature 'serving_def"),
        ([task(), task("b", version={"value": 2})], InvalidArgument, "task 1: the version of task 0 expected, got"),
        (
            [task(version_label="x"), task("b", version_label="y")],
            InvalidArgument,
            "task 1: the version of task 0 expected",
        ),
        (
            [task(), task("b", "tensorflow/serving/predict")],
            Unimplemented,
            "task 1: method_name tensorflow/serving/classify or tensorflow/serving/regress expected, got",
        ),
    ],
)
def test_tasks_that_do_not_go_together(tasks: list[pb.InferenceTask], error: type[KilnError], text: str):
    """Tasks of one request run on one version, each with a signature of its own."""
    with pytest.raises(error) as refused:
        tasks_of(pb.MultiInferenceRequest(tasks=tasks))
    assert str(refused.value).startswith(text)
