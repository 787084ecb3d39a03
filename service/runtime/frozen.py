"""The frozen plan: variables folded into constants, so that TensorFlow's optimiser sees through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from service.runtime.base import PlanUnavailable
from service.runtime.devices import load_tensorflow

LARGEST_BYTES = 512 * 2**20
"""Of variables that are folded: TensorFlow's messages end at 2 GiB, and a graph is copied on its way."""

_SHARED = frozenset(
    ("Placeholder", "HashTableV2", "MutableHashTableV2", "MutableHashTableOfTensorsV2", "MutableDenseHashTableV2")
)


def freeze(session: Any, outputs: Iterable[str]) -> Any:
    """``GraphDef`` that computes the tensors `outputs` of the session's graph, with its variables as constants.

    Raises:
        PlanUnavailable: a variable has no value that could be folded.
    """
    tf = load_tensorflow()
    from tensorflow.python.framework import convert_to_constants

    names = [name.partition(":")[0] for name in outputs]
    with session.graph.as_default():
        part = tf.compat.v1.graph_util.extract_sub_graph(session.graph.as_graph_def(), names)
        try:
            return convert_to_constants.convert_variables_to_constants_from_session_graph(session, part, names)
        except Exception as error:
            raise PlanUnavailable(f"its variables cannot be folded: {str(error).strip().splitlines()[0]}") from error


def add_frozen(session: Any, outputs: Iterable[str], frozen: Any) -> dict[str, str]:
    """Add a frozen graph to the session's own, with the same inputs and tables; new names of `outputs` by the old.

    Tables and other resources stay those of the session, which has filled them.
    """
    tf = load_tensorflow()
    graph = session.graph
    shared = {f"{node.name}:0": graph.get_tensor_by_name(f"{node.name}:0") for node in frozen.node if _is_shared(node)}
    wanted = list(dict.fromkeys(outputs))
    with graph.as_default():
        found = tf.graph_util.import_graph_def(
            without(frozen, shared), input_map=shared, return_elements=wanted, name="frozen"
        )
    return {old: new.name for old, new in zip(wanted, found, strict=True)}


def without(graph_def: Any, tensors: Iterable[str]) -> Any:
    """A copy without the nodes of `tensors`, which an ``input_map`` gives instead."""
    names = {tensor.partition(":")[0] for tensor in tensors}
    rest = type(graph_def)()
    rest.CopyFrom(graph_def)
    del rest.node[:]
    rest.node.extend(node for node in graph_def.node if node.name not in names)
    return rest


def _is_shared(node: Any) -> bool:
    return node.op in _SHARED
