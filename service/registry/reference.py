"""What Keras itself answers: by a model at hand, or by a file that a child process opens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import ModelLoadError
from service.registry.importer import ask_child, open_model, run_as_child
from service.registry.samples import read_batches, write_batches
from service.tensors import Array, Tensors

_MODULE = "service.registry.reference"


def answers_of_file(
    source: Path, batches: Sequence[Tensors], *, work: Path, timeout_s: float, imports: Sequence[str] = ()
) -> list[Tensors]:
    """`answers_of_model` for the model of a ``.keras`` or ``.h5`` file, opened in a child process.

    `work` is a folder of the caller's, `imports` are modules whose Keras classes may be used.

    Raises:
        ModelLoadError: the file is refused, or Keras cannot run it.
    """
    asked, answered = work / "asked.npz", work / "answered.npz"
    write_batches(asked, batches)
    ask_child(_MODULE, [*imports, str(source), str(asked), str(answered)], work, timeout_s)
    return read_batches(answered)


def answers_of_model(model: Any, batches: Sequence[Tensors]) -> list[Tensors]:
    """Outputs of Keras's ``predict`` for each batch of inputs, by the names that an export gives them.

    Raises:
        ModelLoadError: Keras cannot run it; the text says why.
    """
    model.jit_compile = False  # XLA would compile anew for every batch size
    try:
        return [_named(model.predict_on_batch(_arranged(model, batch))) for batch in batches]
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise ModelLoadError(f"Keras cannot run it: {type(error).__name__}: {first}") from error


def _arranged(model: Any, batch: Tensors) -> Any:
    """`batch` in the structure that the model was built with."""
    given = {name: _tensor(array) for name, array in batch.items()}
    if len(given) == 1:
        return next(iter(given.values()))
    return _filled(model.input, lambda tensor: given[tensor.name])


def _filled(structure: Any, fill: Any) -> Any:
    if isinstance(structure, dict):
        return {key: _filled(item, fill) for key, item in structure.items()}
    if isinstance(structure, list | tuple):
        return [_filled(item, fill) for item in structure]
    return fill(structure)


def _tensor(array: Array) -> Any:
    if array.dtype.kind != "O":
        return array
    import tensorflow as tf  # no other backend has strings

    return tf.constant(array)


def _named(outputs: Any) -> Tensors:
    if isinstance(outputs, dict):
        return {str(name): _array(item) for name, item in outputs.items()}
    listed = outputs if isinstance(outputs, list | tuple) else [outputs]
    return {f"output_{number}": _array(item) for number, item in enumerate(listed)}


def _array(item: Any) -> Array:
    array = np.asarray(item)
    return array.astype(object) if array.dtype.kind in "SU" else array


def main(argv: list[str]) -> int:
    """The child: ``[MODULE …] SOURCE ASKED ANSWERED``."""
    modules, (source, asked, answered) = argv[:-3], map(Path, argv[-3:])

    def answer() -> None:
        model = open_model(modules, source, answered.parent)
        write_batches(answered, answers_of_model(model, read_batches(asked)))

    return run_as_child(answered.parent, answer)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
