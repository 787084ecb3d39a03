"""Long lists of numbers read in pieces: the same arrays and the same refusals as of a text that is parsed whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import KilnError
from service.predictor import Decoded
from service.rest import json_pieces, openinference_codec, tfserving_codec
from service.rest.json_codec import Document, plain
from service.rest.json_elements import quote
from service.rest.json_pieces import NotPlainError, NumberText, parse_around
from service.tensors import Array, DataType, Signature, TensorSpec
from tests.signatures import many, only

ROWS = st.lists(st.floats(width=32, allow_nan=False) | st.integers(-(2**25), 2**25), min_size=1, max_size=9)
LISTS = st.recursive(ROWS | st.just([]), lambda inner: st.lists(inner, max_size=4), max_leaves=20)
RECTANGLES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9)).map(
    lambda shape: np.arange(np.prod(shape)).reshape(shape).tolist()
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a few bytes are long."""
    monkeypatch.setattr(json_pieces, "_PIECE_BYTES", 5)
    monkeypatch.setattr(json_pieces, "_LONG_BYTES", 4)
    monkeypatch.setattr(tfserving_codec, "LONG_BYTES", 0)
    monkeypatch.setattr(openinference_codec, "LONG_BYTES", 0)


def any_rank(dtype: DataType) -> dict[str, Signature]:
    return only(Signature("serving_default", (TensorSpec("x", dtype, None),), ()))


def outcome(decode: Callable[[], tuple[Decoded, object]]) -> tuple[str, tuple[int, ...], list[Any]]:
    """An array's type, shape and elements, or the text of the refusal."""
    try:
        array = decode()[0].inputs["x"]
    except KilnError as error:
        return str(error), (), []
    return str(array.dtype), array.shape, array.ravel().tolist()


def assert_same_outcome(in_pieces: Any, whole: Any) -> None:
    """Of several faults either may be told, the body is refused both ways."""
    if whole[0].startswith(("JSON Parse error", "input 'x'")) and in_pieces[0].startswith("input 'x': "):
        return
    assert in_pieces == whole


def both_ways(decode: Callable[[], tuple[Decoded, object]]) -> tuple[Any, Any]:
    in_pieces = outcome(decode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfserving_codec, "LONG_BYTES", 10**9)
        patch.setattr(openinference_codec, "LONG_BYTES", 10**9)
        return in_pieces, outcome(decode)


DTYPES = st.sampled_from([DataType.FP32, DataType.FP64, DataType.FP16, DataType.INT16, DataType.UINT64, DataType.BYTES])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    value=LISTS | RECTANGLES,
    dtype=DTYPES,
    form=st.sampled_from(["instances", "inputs"]),
    indent=st.sampled_from([None, 1]),
    cut=st.integers(0, 400) | st.none(),
    letter=st.sampled_from(list('[],{}"0.e- tN')),
)
def test_tfserving_bodies(
    value: Any, dtype: DataType, form: str, indent: int | None, cut: int | None, letter: str
) -> None:
    """Rectangular or not, with or without blanks, and with a letter that someone put anywhere."""
    text = json.dumps({form: value, "signature_name": "serving_default"}, indent=indent)
    if cut is not None:
        text = text[:cut] + letter + text[cut:]
    in_pieces, whole = both_ways(lambda: tfserving_codec.decode_predict(text.encode(), any_rank(dtype), 100))
    assert_same_outcome(in_pieces, whole)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=LISTS | RECTANGLES, dtype=DTYPES, cut=st.integers(0, 200) | st.none(), letter=st.sampled_from("[],0"))
def test_openinference_bodies(value: Any, dtype: DataType, cut: int | None, letter: str) -> None:
    """The same, of data with a shape."""
    shape = np.shape(value) if value in ([], [[]]) or _is_rectangular(value) else (3,)
    tensor = {"name": "x", "shape": shape, "datatype": dtype.value, "data": value}
    text = json.dumps({"inputs": [tensor], "outputs": []})
    if cut is not None:
        text = text[:cut] + letter + text[cut:]
    in_pieces, whole = both_ways(lambda: openinference_codec.decode_infer(text.encode(), None, any_rank(dtype), 100))
    assert_same_outcome(in_pieces, whole)


def _is_rectangular(value: Any) -> bool:
    try:
        np.array(value)
    except ValueError:
        return False
    return True


def read(text: bytes, max_depth: int = 64) -> Array:
    def numbers(part: Any, _: bytes) -> Array | None:
        try:
            return np.array(np.frombuffer(part.as_buffer(of_type="d"), np.float64))
        except TypeError:
            return None

    return NumberText(text, 0, len(text)).array(numbers, np.dtype(np.float32), max_depth)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (9, 1), (2, 3, 4), (1, 1, 1), (2, 40), (3, 2, 2, 2)])
@pytest.mark.parametrize("cost", [1, 10**6])
def test_shapes(shape: tuple[int, ...], cost: int, monkeypatch: pytest.MonkeyPatch):
    """Whether they are told from the text or from the parsed pieces."""
    monkeypatch.setattr(json_pieces, "PROXY_COST_BYTES", cost)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    got = read(json.dumps(array.tolist()).encode())
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(
    "text",
    [
        "[1,2],[3,4]",
        "[1234567,2],[3,4]",
        "[[1234567,2],[3,4]],[5]",
        "[[1,2],[3]]",
        "[[1,2],3]",
        "[1,[2]]",
        "[1234567,[2,3]]",
        "[[1],2,[3]]",
        "[1[,]2]",
        "[[1][2]]",
        "[1234567,2",
        "[1234567,2]]",
        "[1,,2]",
        "[]",
        "[[],[]]",
        "[[],[1]]",
        "[[1],[]]",
        "[1 2]",
        "[1234567,true]",
        "[[[1],[2]],[[3],[4],[5],[6]]]",
        "[" * 70 + "1" + "]" * 70,
        "[[1,2],[3],[4,5],[6,7,8]]",
    ],
)
@pytest.mark.parametrize("cost", [1, 10**6])
def test_what_is_not_plain(text: str, cost: int, monkeypatch: pytest.MonkeyPatch):
    """No JSON, ragged, empty somewhere, or not numbers."""
    monkeypatch.setattr(json_pieces, "PROXY_COST_BYTES", cost)
    with pytest.raises(NotPlainError):
        read(text.encode())


def test_depth_is_bounded():
    with pytest.raises(NotPlainError):
        read(b"[[[1234567,2],[3,4]]]", max_depth=2)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": [1,2,3], "a": [4,5,6]}',
        '{"a": [1,2,3], "b": NaN}',
        '{"a": [1,2,3], "b": [[[[[["deep"]]]]]]}',
        '{"a": [1,2,3], "b": }',
        '{"a\\"": [1,2,3]}',
        '{"a": ["b", 1,2,3,4]}',
        '{"a": "[1,2,3]"}',
        '{"a": 1234567}',
        '{"a": [1,2,3]',
        '["a", [1,2,3]]',
        '"a',
    ],
)
def test_what_is_around_must_be_simple(text: str):
    """Else the other parser says what it means."""
    with pytest.raises(NotPlainError):
        parse_around(text.encode(), 5)


def test_values_around():
    """Lists of numbers after their keys in order, all else as it is."""
    root, lists = parse_around(b'{"a": [1,2,3], "b": {"c" : [[4,5]], "d": -Infinity}, "e": "x"}', 5)
    assert (root["a"], root["b"]["c"]) == tuple(lists)
    assert (root["b"]["d"], root["e"]) == (-np.inf, "x")
    assert [read_list(one) for one in lists] == [[1, 2, 3], [[4, 5]]]


def read_list(one: NumberText) -> Any:
    return one.array(lambda part, _: np.array(part.as_buffer(of_type="d")).view(float), np.dtype(float), 64).tolist()


def test_much_text_around_is_parsed_whole(monkeypatch: pytest.MonkeyPatch):
    """As are lists after many strings."""
    monkeypatch.setattr(json_pieces, "_MOST_BYTES_AROUND", 10)
    with pytest.raises(NotPlainError):
        parse_around(b'{"a": [1,2,3], "long": "text"}', 5)
    monkeypatch.setattr(json_pieces, "_MOST_STRINGS", 1)
    with pytest.raises(NotPlainError):
        parse_around(b'{"b": "", "a": [1,2,3]}', 5)


def test_a_list_that_nobody_reads_is_parsed_after_all():
    """Whether it is JSON is known only then."""
    body = b'{"instances": [[1, 2]], "other": [1, 2, 3 4]}'
    with pytest.raises(KilnError, match="JSON Parse error"):
        tfserving_codec.decode_predict(body, any_rank(DataType.FP32), 100)
    document = Document.in_pieces(body, 100)
    assert document is not None
    with pytest.raises(NotPlainError):
        document.check_read()


def test_only_arrays_are_made_of_it():
    """Whoever wants anything else has to parse it."""
    number_text = NumberText(b"[1,2,3]", 0, 7)
    for use in (plain, quote):
        with pytest.raises(NotPlainError):
            use(number_text)
    with pytest.raises(NotPlainError):
        NumberText(b"[1,,]", 0, 5).head()


def test_several_inputs():
    """Each its own list."""
    body = b'{"inputs": {"x": [[1.5, 2]], "y": [[3, 4, 5]]}}'
    signatures = only(many(x=DataType.FP32, y=DataType.INT64))
    decoded, _ = tfserving_codec.decode_predict(body, signatures, 100)
    assert (decoded.inputs["x"].tolist(), decoded.inputs["y"].tolist()) == ([[1.5, 2.0]], [[3, 4, 5]])
