"""Variables that the session's way of loading leaves without a value, filled from the way that TensorFlow 2 has.

`tf.saved_model.save` of an object with a Keras 3 model in it writes each variable twice into the graph: the restore
operation fills one of them, and the functions read the other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from service.errors import ModelLoadError
from service.runtime.devices import load_tensorflow
from service.runtime.graph import Graph

_log = logging.getLogger("kiln.runtime")


def fill_empty(session: Any, path: Path, outputs: Iterable[str]) -> None:
    """Give a value to each variable without one that the tensors `outputs` may read.

    Raises:
        ModelLoadError: the SavedModel at `path` has no value for one of them.
    """
    tf = load_tensorflow()
    handles = {op.name: op.outputs[0] for op in session.graph.get_operations() if op.type == "VarHandleOp"}
    with session.graph.as_default():
        is_filled = session.run({name: tf.raw_ops.VarIsInitializedOp(resource=r) for name, r in handles.items()})
    empty = [name for name, filled in is_filled.items() if not filled]
    if empty:  # others than those that are read may well be
        reached = Graph(session.graph.as_graph_def()).reached(outputs)
        empty = [name for name in empty if name in reached.nodes]
    if not empty:
        return
    _log.info("%d variables of %s are read as TensorFlow 2 does", len(empty), path.name)
    values = _values(tf, path)
    for name in empty:
        operation = session.graph.get_operation_by_name(name)
        shared = operation.get_attr("shared_name").decode() or name
        if shared not in values:
            raise ModelLoadError(f"its variable {shared!r} has no value")
        with session.graph.as_default():
            given = tf.compat.v1.placeholder(operation.get_attr("dtype"))
            assign = tf.raw_ops.AssignVariableOp(resource=handles[name], value=given)
        session.run(assign, {given: values[shared]})


def _values(tf: Any, path: Path) -> dict[str, Any]:
    """Values by the names under which the signatures read them."""
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelLoadError(
            f"variables are left without a value, and TensorFlow 2 cannot load it: {reason}"
        ) from error
    return {
        variable.name.removesuffix(":0"): variable.numpy()
        for function in loaded.signatures.values()
        for variable in function.graph.variables
    }
