"""A Keras model as a SavedModel whose inputs are called what its Input layers are; in a child process only."""

from __future__ import annotations

import contextlib
import keyword
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_SAVED_MODEL_FILE = "saved_model.pb"
_TAKEN = frozenset({"self"})
"""What TensorFlow calls a parameter of its own."""
_STAND_IN = "kiln_input_{}"


def export_model(model: Any, target: Path) -> None:
    """Write `model` to the folder `target`, as Keras's own ``export`` does, whatever its inputs are called.

    It answers as ``predict`` does: Keras itself leaves layers such as `RandomFlip` at work, whose
    ``training`` is true unless something else is said. An export makes a Python function with the
    inputs as parameters; names that none can have, such as ``from`` or ``number of rooms``, are written
    into the signatures afterwards. Raises whatever Keras does.
    """
    own_names = [tensor.name for tensor in getattr(model, "inputs", None) or ()]
    stand_ins = {}
    if not are_parameters(own_names):
        stand_ins = {name: _STAND_IN.format(number) for number, name in enumerate(own_names)}
    signature = _signature(model, stand_ins) if stand_ins else None
    with _at_inference(model):
        model.export(str(target), format="tf_saved_model", verbose=False, input_signature=signature)
    if stand_ins:
        _rename(target / _SAVED_MODEL_FILE, {stand_in: name for name, stand_in in stand_ins.items()})


@contextlib.contextmanager
def _at_inference(model: Any) -> Iterator[None]:
    """Meanwhile ``model.__call__``, which is what an export traces, says that nothing is being trained."""

    def call(*inputs: Any) -> Any:
        return type(model).__call__(model, *inputs, training=False)

    vars(model)["__call__"] = call
    try:
        yield
    finally:
        del vars(model)["__call__"]


def are_parameters(names: Sequence[str]) -> bool:
    """Whether a Python function that TensorFlow traces may have parameters of these names, and keeps them."""
    is_each = all(
        name.isascii()
        and name.isidentifier()
        and not keyword.iskeyword(name)
        and not name.startswith("_")
        and name not in _TAKEN
        for name in names
    )
    return is_each and len({name.lower() for name in names}) == len(names)


def _signature(model: Any, stand_ins: Mapping[str, str]) -> list[Any]:
    """The model's inputs in their structure, under other names."""
    import keras

    def spec(tensor: Any) -> Any:
        return keras.InputSpec(shape=(None, *tensor.shape[1:]), dtype=tensor.dtype, name=stand_ins[tensor.name])

    if isinstance(model, keras.Sequential):
        return [spec(model.inputs[0])]
    return [keras.tree.map_structure(spec, model.input)]


def _rename(file: Path, own_names: Mapping[str, str]) -> None:
    """Call the inputs of every signature in `file` by their own names."""
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    for graph in saved.meta_graphs:
        for signature in graph.signature_def.values():
            for stand_in in own_names.keys() & set(signature.inputs):
                signature.inputs[own_names[stand_in]].CopyFrom(signature.inputs.pop(stand_in))
    file.write_bytes(saved.SerializeToString())
