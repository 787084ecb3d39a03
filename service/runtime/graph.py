"""Walks through a ``GraphDef``: what an output depends on, and where a value comes from.

Works on TensorFlow's messages without TensorFlow. Wherever it cannot follow, it says so or takes
more than there is: what is asked here decides what a model may do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

MAIN = ""
"""The place of nodes that are in no function."""
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
"""Operations that hand their inputs to a function one by one."""
_HARMLESS_USES = ("ReadVariableOp", "VarIsInitializedOp", "VariableShape", "DisableCopyOnRead")
"""What may be done with a variable's handle without changing the variable or passing the handle on."""


@dataclass
class Reached:
    """Nodes of the main graph, and functions (whole), that a run of some outputs may touch."""

    nodes: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)

    def has(self, place: str, node: str) -> bool:
        """Whether a node, in the main graph or the function `place`, may run."""
        return node in self.nodes if place == MAIN else place in self.functions

    def __or__(self, other: Reached) -> Reached:
        return Reached(self.nodes | other.nodes, self.functions | other.functions)


class Graph:
    """The nodes and functions of one ``GraphDef``."""

    def __init__(self, graph_def: Any) -> None:
        self._graph_def = graph_def
        self.nodes = {node.name: node for node in graph_def.node}
        self.functions = {function.signature.name: function for function in graph_def.library.function}
        self._gradients = {g.function_name: g.gradient_func for g in graph_def.library.gradient}
        self._same: dict[bytes, list[str]] = {}
        for name in self.functions:
            for tag in self._tags(name):
                self._same.setdefault(tag, []).append(name)

    def places(self) -> Iterator[tuple[str, Any]]:
        """Every node there is, with its function (`MAIN` for none), whether it can run or not."""
        for node in self._graph_def.node:
            yield MAIN, node
        for function in self._graph_def.library.function:
            for node in function.node_def:
                yield function.signature.name, node

    def reached(self, tensors: Iterable[str]) -> Reached:
        """All that `tensors` (or operations) of the main graph depend on; unknown names are passed over."""
        found = Reached()
        todo = [(MAIN, self.nodes[name]) for tensor in tensors if (name := _node_of(tensor)) in self.nodes]
        found.nodes.update(node.name for _, node in todo)
        while todo:
            place, node = todo.pop()
            if place == MAIN:
                for name in map(_node_of, node.input):
                    if name in self.nodes and name not in found.nodes:
                        found.nodes.add(name)
                        todo.append((MAIN, self.nodes[name]))
            for name in self._functions_of(node):
                if name not in found.functions:
                    found.functions.add(name)
                    todo += [(name, inner) for inner in self.functions[name].node_def]
        return found

    def operations(self, reached: Reached) -> set[str]:
        """Names of the operations in what was reached."""
        return {node.op for place, node in self.places() if reached.has(place, node.name)}

    def comes_from(self, place: str, tensor: str, known: Iterable[str], live: Reached) -> bool:
        """Whether `tensor` can be nothing but one of the main graph's tensors `known` (``name:0``).

        Followed through identities, arguments of functions and variables; only what is in `live`
        counts. False where the way is lost.
        """
        known = {_with_index(name) for name in known}
        todo = [(place, tensor)]
        seen = set(todo)
        while todo:
            place, tensor = todo.pop()
            if place == MAIN and _with_index(tensor) in known:
                continue
            before = self._before(place, tensor, live)
            if before is None:
                return False
            todo += [step for step in before if step not in seen]
            seen.update(before)
        return True

    def _before(self, place: str, tensor: str, live: Reached) -> list[tuple[str, str]] | None:
        """The places and tensors that `tensor` is a copy of; None where that cannot be told."""
        node = self._node(place, tensor)
        if node is None:
            return self._argument(place, tensor, live)
        if node.op == "Identity":
            return [(place, node.input[0])]
        if node.op == "ReadVariableOp":
            return self._written(place, node.input[0], live)
        return None

    def _argument(self, function: str, argument: str, live: Reached) -> list[tuple[str, str]] | None:
        """What the callers of `function` give for `argument`."""
        if function == MAIN or not self._is_plain(function):
            return None
        names = [arg.name for arg in self.functions[function].signature.input_arg]
        if argument not in names:
            return None
        given = []
        for place, node in self.places():
            if not live.has(place, node.name) or function not in self._functions_of(node):
                continue
            if self._called(node) != function:
                return None
            given.append((place, node.input[names.index(argument)]))
        return given

    def _written(self, place: str, handle: str, live: Reached) -> list[tuple[str, str]] | None:
        """All values that the variable behind `handle` may be given."""
        variable = self._variable(place, handle, live)
        if variable is None:
            return None
        values: list[tuple[str, str]] = []
        todo = [(MAIN, variable.name)]
        for at, name in todo:  # which grows meanwhile
            for user, index in self._users(at, name, live):
                if user.op in _HARMLESS_USES:
                    continue
                called = self._called(user)
                if user.op == "AssignVariableOp" and index == 0:
                    values.append((at, user.input[1]))
                elif called is not None and self._is_plain(called):
                    step = (called, self.functions[called].signature.input_arg[index].name)
                    if step not in todo:
                        todo.append(step)
                else:
                    return None
        return values

    def _variable(self, place: str, handle: str, live: Reached) -> Any:
        """The one ``VarHandleOp`` behind `handle`; None if there may be others."""
        seen: set[str] = set()
        while place != MAIN and place not in seen:
            seen.add(place)
            given = self._argument(place, handle, live)
            if given is None or len(given) != 1:
                return None
            place, handle = given[0]
        variable = self._node(place, handle)
        if variable is None or variable.op != "VarHandleOp":
            return None
        key = _resource(variable)
        others = [n for p, n in self.places() if n.op == "VarHandleOp" and live.has(p, n.name) and _resource(n) == key]
        return variable if len(others) <= 1 else None

    def _users(self, place: str, name: str, live: Reached) -> Iterator[tuple[Any, int]]:
        """Nodes of `place` that take the output of the node, or the argument, `name`; and as which input."""
        nodes = self.nodes.values() if place == MAIN else self.functions[place].node_def
        for node in nodes:
            if live.has(place, node.name):
                for index, source in enumerate(node.input):
                    if not source.startswith("^") and _node_of(source) == name:
                        yield node, index

    def _node(self, place: str, tensor: str) -> Any:
        """The node that `tensor` is an output of; None for an argument of a function."""
        name = _node_of(tensor)
        if place == MAIN:
            return self.nodes.get(name)
        return next((node for node in self.functions[place].node_def if node.name == name), None)

    def _called(self, node: Any) -> str | None:
        """The function whose arguments are the node's inputs, one by one."""
        name = node.attr["f"].func.name if node.op in _CALLS and "f" in node.attr else node.op
        return name if name in self.functions else None

    def _is_plain(self, function: str) -> bool:
        """Whether each of a function's arguments is one tensor."""
        return not any(a.number_attr or a.type_list_attr for a in self.functions[function].signature.input_arg)

    def _functions_of(self, node: Any) -> set[str]:
        """Functions that a node may run: those it names, their gradients, and what may stand in for them.

        Grappler's implementation selector swaps functions with the same ``api_implements``.
        """
        names = set(_named(node.attr.values())) | {node.op}
        names |= {self._gradients[name] for name in names & self._gradients.keys()}
        names &= self.functions.keys()
        for name in list(names):
            names.update(*(self._same[tag] for tag in self._tags(name)))
        return names

    def _tags(self, function: str) -> list[bytes]:
        attributes = self.functions[function].attr
        return [attributes[key].s for key in ("api_implements", "implements", "_implements") if key in attributes]


def _named(values: Iterable[Any]) -> Iterator[str]:
    """Names of functions in the values of attributes, however deep."""
    for value in values:
        for function in [value.func] * value.HasField("func") + list(value.list.func):
            yield function.name
            yield from _named(function.attr.values())


def _node_of(tensor: str) -> str:
    return tensor.lstrip("^").partition(":")[0]


def _with_index(tensor: str) -> str:
    return tensor if ":" in tensor else f"{tensor}:0"


def _resource(variable: Any) -> tuple[bytes, bytes]:
    """What two handles of the same variable share."""
    container = variable.attr["container"].s if "container" in variable.attr else b""
    shared = variable.attr["shared_name"].s if "shared_name" in variable.attr else b""
    return container, shared or variable.name.encode()
