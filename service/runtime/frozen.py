"""The frozen plan: variables folded into constants, so that TensorFlow's optimiser sees through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from service.runtime.base import PlanUnavailable
from service.runtime.devices import load_tensorflow

LARGEST_BYTES = 512 * 2**20
"""Of variables that are folded: TensorFlow's messages end at 2 GiB, and a graph is copied on its way."""

_LOWERED = "_lower_using_switch_merge"
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


def add_frozen(session: Any, outputs: Iterable[str], frozen: Any, targets: Iterable[str] = ()) -> dict[str, str]:
    """Add a frozen graph to the session's own, with the same inputs and tables.

    Returns the new names of the tensors `outputs` and of the operations `targets`, by the old ones.

    Tables and other resources stay those of the session, which has filled them.
    """
    tf = load_tensorflow()
    graph = session.graph
    shared = {f"{node.name}:0": graph.get_tensor_by_name(f"{node.name}:0") for node in frozen.node if _is_shared(node)}
    wanted = list(dict.fromkeys([*outputs, *targets]))
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
    for node in graph_def.node:
        if node.name not in names:
            kept = rest.node.add()
            kept.CopyFrom(node)
            del kept.input[:]
            kept.input.extend(i for i in node.input if not (i.startswith("^") and i[1:] in names))
    return rest


def with_functions_renamed(graph_def: Any, suffix: str) -> Any:
    """A copy whose functions have other names: a graph takes no two of the same name."""
    copy = type(graph_def)()
    copy.CopyFrom(graph_def)
    names = {function.signature.name: function.signature.name + suffix for function in copy.library.function}
    for function in copy.library.function:
        function.signature.name = names[function.signature.name]
    for gradient in copy.library.gradient:
        gradient.function_name = names.get(gradient.function_name, gradient.function_name)
        gradient.gradient_func = names.get(gradient.gradient_func, gradient.gradient_func)
    for nodes in (copy.node, *(function.node_def for function in copy.library.function)):
        for node in nodes:
            node.op = names.get(node.op, node.op)
            for value in node.attr.values():
                for named in [value.func] * value.HasField("func") + list(value.list.func):
                    named.name = names.get(named.name, named.name)
    return copy


def unlowered(graph_def: Any) -> Any:
    """A copy with its loops and branches left whole, as XLA wants them."""
    copy = type(graph_def)()
    copy.CopyFrom(graph_def)
    for nodes in (copy.node, *(function.node_def for function in copy.library.function)):
        for node in nodes:
            if _LOWERED in node.attr:
                del node.attr[_LOWERED]
    return copy


def _is_shared(node: Any) -> bool:
    return node.op in _SHARED
