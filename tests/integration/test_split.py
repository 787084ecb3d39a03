"""Graphs with strings in them, of which XLA compiles what lies behind, with real TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from service.errors import InvalidArgument
from service.runtime.base import PlanUnavailable
from service.runtime.savedmodel import SavedModel
from service.runtime.split import SplitPlan
from service.tensors import Tensors
from tests.integration.saved_models import save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SavedModel]:
    """Signatures that take strings, each cut at another place."""
    import tensorflow as tf

    weights = tf.constant(np.random.default_rng(1).standard_normal((8, 4)), tf.float32)
    keys = tf.constant(["a", "b", "c"])
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, tf.constant([1, 2, 3], tf.int64)), 0)

    def numbers(text: Any) -> Any:
        codes = tf.io.decode_raw(tf.strings.substr(text + "        ", 0, 8), tf.uint8)
        return tf.cast(codes, tf.float32) / 255.0

    def words(text: Any) -> Any:
        return table.lookup(tf.strings.split(text).to_tensor(shape=(None, 8), default_value=""))

    def looked_up(text: Any) -> Any:
        return {"y": tf.matmul(tf.cast(words(text), tf.float32), weights)}

    def mixed(text: Any, x: Any) -> Any:
        return {"y": tf.matmul(numbers(text) + x, weights), "upper": tf.strings.upper(text)}

    def checked(text: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_less(tf.strings.length(text), 20, message="too long")]):
            return {"y": tf.matmul(numbers(text), weights)}

    def ragged(text: Any) -> Any:
        codes = tf.cast(tf.strings.unicode_decode(text, "UTF-8").to_tensor(), tf.float32)
        return {"y": tf.reduce_sum(tf.matmul(codes[:, :, None], weights[:1]), 1)}

    def loop(text: Any) -> Any:
        def step(index: Any, state: Any) -> Any:
            return index + 1, tf.tanh(tf.matmul(state, tf.matmul(weights, weights, transpose_b=True)))

        return {"y": tf.while_loop(lambda index, _: index < 5, step, [0, numbers(text)])[1]}

    text, x = (tf.string, (None,)), (tf.float32, (None, 8))
    signatures: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "serving_default": (looked_up, {"text": text}),
        "mixed": (mixed, {"text": text, "x": x}),
        "checked": (checked, {"text": text}),
        "ragged": (ragged, {"text": text}),
        "loop": (loop, {"text": text}),
        "only_strings": (lambda text: {"y": tf.strings.upper(text)}, {"text": text}),
        "labels": (lambda x: {"y": tf.strings.as_string(tf.argmax(x, 1))}, {"x": x}),
    }
    loaded = SavedModel(save(tmp_path_factory.mktemp("split") / "model", signatures, [table]))
    yield loaded
    loaded.close()


def texts(*words: bytes) -> Any:
    return np.array(words, object)


GIVEN: dict[str, Tensors] = {
    "serving_default": {"text": texts(b"a b c", b"", b"c nonsense a a a a a a")},
    "mixed": {"text": texts(b"one", b"", b"three"), "x": np.ones((3, 8), np.float32)},
    "checked": {"text": texts(b"one", b"", b"three")},
    "loop": {"text": texts(b"one", b"", b"three")},
}


@pytest.mark.parametrize("name", GIVEN)
def test_the_parts_answer_as_the_whole_does(model: SavedModel, name: str) -> None:
    """Tables, strings beside numbers, assertions and loops; inputs are not those that it was prepared with."""
    signature = model.signatures[name]
    plan = model.xla(signature)
    assert isinstance(plan, SplitPlan)
    got, want = plan.prepare(3)(GIVEN[name]), model.plan(signature).run(GIVEN[name])
    assert got.keys() == want.keys()
    for output, array in want.items():
        if array.dtype == object:
            assert got[output].tolist() == array.tolist()
        else:
            np.testing.assert_allclose(got[output], array, rtol=1e-5, atol=1e-6)
    plan.close()


@pytest.mark.parametrize("name", ["only_strings", "labels", "ragged"])
def test_nothing_may_be_worth_compiling(model: SavedModel, name: str) -> None:
    """Strings to strings, numbers that end in a string, and shapes that follow a text are left to TensorFlow."""
    with pytest.raises(PlanUnavailable, match="nothing worth compiling"):
        model.xla(model.signatures[name])


def test_an_assertion_before_the_cut_still_holds(model: SavedModel) -> None:
    """What the graph refuses is refused, in its words."""
    run = model.xla(model.signatures["checked"]).prepare(1)
    with pytest.raises(InvalidArgument, match="too long"):
        run({"text": texts(b"a text that is much longer than it may be")})


def test_other_shapes_at_the_cut_go_to_the_signature(model: SavedModel) -> None:
    """Rows that the compiled part was not prepared for are answered all the same."""
    signature = model.signatures["loop"]
    run = model.xla(signature).prepare(2)
    got, want = run(GIVEN["loop"]), model.plan(signature).run(GIVEN["loop"])
    np.testing.assert_array_equal(got["y"], want["y"])
