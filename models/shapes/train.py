"""Make the model of shapes and types: nothing is trained, every answer can be told by hand.

Its signatures take a scalar, a vector, a matrix and a tensor of four dimensions without rows, rows of
one and of several tensors, and give back ("echo") each type that a request can carry. It is for trying
protocols and clients with. Writes the SavedModel `1/` and `example.json` beside this script.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))

import real_digits as data

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

FOLDER = Path(__file__).resolve().parent
METRIC = "exact"
GOAL = 1.0
ECHOES = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 string".split()
"""What TensorFlow calls the types that a request can carry."""
Function = Callable[..., dict[str, Any]]


def held_out() -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """Return ``{"x": (50, 3)}`` for the default signature, and what it must answer, (50, 3)."""
    x = np.arange(150, dtype=np.float32).reshape(50, 3) / 4 - 8
    return {"x": x}, 2 * x + 1


def score(outputs: dict[str, NDArray[np.float32]], truth: NDArray[np.float32]) -> float:
    """Return the share of ``outputs["y"]`` (rows, 3) that is exactly as it must be."""
    return float(np.mean(outputs["y"] == truth))


def build() -> dict[str, tuple[Function, dict[str, Any]]]:
    """Return each signature's function, in TensorFlow, and the specs of its inputs by name."""
    import tensorflow as tf

    def spec(shape: tuple[int | None, ...] | None, dtype: Any = tf.float32) -> Any:
        return tf.TensorSpec(shape, dtype)

    def several(number: Any, flag: Any, word: Any) -> dict[str, Any]:
        """Half of the number, and the word with a mark behind it where the flag is set."""
        return {"half": tf.cast(number, tf.float64) / 2, "said": tf.where(flag, tf.strings.join([word, "!"]), word)}

    made: dict[str, tuple[Function, dict[str, Any]]] = {
        "serving_default": (lambda x: {"y": 2 * x + 1}, {"x": spec((None, 3))}),
        "scalar": (lambda x: {"y": 2 * x + 1}, {"x": spec(())}),
        "vector": (lambda x: {"reversed": x[::-1], "sum": tf.reduce_sum(x)}, {"x": spec((4,))}),
        "matrix": (lambda x: {"transposed": tf.transpose(x)}, {"x": spec((2, 3))}),
        "product": (lambda a, b: {"product": a @ b}, {"a": spec((2, 3)), "b": spec((3, 2))}),
        "tensor4": (lambda x: {"channels_first": tf.transpose(x, (0, 3, 1, 2))}, {"x": spec((2, 3, 4, 2))}),
        "rows4": (lambda x: {"mirrored": x[:, :, ::-1]}, {"x": spec((None, 2, 3, 2))}),
        "open": (lambda x: {"largest": tf.reduce_max(x)}, {"x": spec((1, None))}),
        "several": (
            several,
            {"number": spec((None,), tf.int64), "flag": spec((None,), tf.bool), "word": spec((None,), tf.string)},
        ),
    }
    for name in ECHOES:
        made[f"echo_{name}"] = (lambda x: {"y": tf.identity(x)}, {"x": spec((None, 2), tf.as_dtype(name))})
        made[f"echo_scalar_{name}"] = (lambda x: {"y": tf.identity(x)}, {"x": spec((), tf.as_dtype(name))})
    return made


def main() -> None:
    """Write the SavedModel and the example request, once the default signature answers exactly."""
    import tensorflow as tf

    module = tf.Module()
    signatures = {name: tf.function(call).get_concrete_function(**specs) for name, (call, specs) in build().items()}
    inputs, truth = held_out()
    answer = {name: each.numpy() for name, each in signatures["serving_default"](**inputs).items()}
    data.report(METRIC, score(answer, truth), GOAL)
    folder = FOLDER / "1"
    shutil.rmtree(folder, ignore_errors=True)
    tf.saved_model.save(module, str(folder), signatures=signatures)
    data.write_json({"instances": [[1.0, 2.0, 3.0], [-0.5, 0.0, 100.0]]}, FOLDER / "example.json")


if __name__ == "__main__":
    main()
