"""Cut a frozen graph in two: what only TensorFlow's own kernels can run (strings, tables), and the numbers behind it.

The first part stays in the session; the second is compiled by XLA for the shapes that come out of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.runtime.base import PlanUnavailable, Run
from service.runtime.devices import load_tensorflow
from service.runtime.drawing import Drawer
from service.runtime.frozen import unlowered, with_functions_renamed
from service.runtime.planner import first_inputs
from service.runtime.xla import Call, Refused, XlaSession
from service.tensors import Array, Signature, Tensors

_HEAVY = frozenset("MatMul BatchMatMulV2 Conv2D Conv3D DepthwiseConv2dNative Einsum While StatelessWhile".split())
"""Operations worth compiling: one at least has to be in the second part."""
_FEW_ROWS = 3
_NOTHING = "nothing worth compiling lies behind its strings"


@dataclass(frozen=True)
class Parts:
    """A graph cut at the tensors `boundary`: `compiled` computes `inner` of the outputs from them, the rest the others.

    `named` has the tensor, of one part or the other, that each output is a copy of.
    `targets` are operations of the first part that have to run though nothing is fetched from them: assertions.
    """

    whole: Any
    compiled: Any
    boundary: list[str]
    inner: list[str]
    outer: list[str]
    targets: list[str]
    named: dict[str, str]


def inline(frozen: Any, inputs: Iterable[str], outputs: Iterable[str]) -> Any:
    """The same graph with the functions that it calls put in their place; loops and branches stay whole."""
    tf = load_tensorflow()
    from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
    from tensorflow.python.grappler import tf_optimizer

    plain = unlowered(frozen)
    for function in plain.library.function:  # else the optimiser swaps whole layers
        if "api_implements" in function.attr:
            del function.attr["api_implements"]
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(plain, name="")
    meta = tf.compat.v1.train.export_meta_graph(graph_def=graph.as_graph_def(), graph=graph)
    meta.collection_def["train_op"].node_list.value.extend([*inputs, *outputs])
    config = config_pb2.ConfigProto()
    rewrite = config.graph_options.rewrite_options
    rewrite.min_graph_nodes = -1
    rewrite.optimizers.append("function")
    rewrite.function_optimization = rewriter_config_pb2.RewriterConfig.AGGRESSIVE
    return tf_optimizer.OptimizeGraph(config, meta)


def measurable(graph_def: Any) -> list[str]:
    """Names of all tensors of an inlined graph that can be fetched as numbers, constants aside."""
    tf = load_tensorflow()
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    return [
        tensor.name
        for op in graph.get_operations()
        if op.type not in ("Const", "Placeholder")
        for tensor in op.outputs
        if tensor.dtype.base_dtype.is_numpy_compatible
        and tensor.dtype.base_dtype not in (tf.string, tf.resource, tf.variant)
    ]


def cut(graph_def: Any, outputs: Iterable[str], refused: Collection[str] = (), unsteady: Collection[str] = ()) -> Parts:
    """Cut an inlined graph behind the last of its operations that XLA cannot have.

    `refused` are types of operations that it was seen to refuse, `unsteady` names of operations whose shapes change.

    Raises:
        PlanUnavailable: nothing worth compiling is left behind the cut.
    """
    tf = load_tensorflow()
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    host: set[Any] = set()
    _add_with_ancestors(
        host, (op for op in graph.get_operations() if op.type in refused or _is_host(tf, op) or _is_near(op, unsteady))
    )
    for op in graph.get_operations():  # in an order in which what comes before is before
        if any(t.op in host and t.dtype.base_dtype == tf.variant for t in op.inputs):
            _add_with_ancestors(host, [op])
    sources = {name: _source(graph.get_tensor_by_name(name)) for name in outputs}
    wanted = list({tensor.name: tensor for tensor in sources.values()}.values())
    inner = [tensor for tensor in wanted if tensor.op not in host]
    behind = _behind(inner, host)
    if not any(op.type in _HEAVY for op in behind):
        raise PlanUnavailable(_NOTHING)
    boundary = list(dict.fromkeys(t.name for op in behind for t in op.inputs if t.op not in behind))
    targets = list(dict.fromkeys(c.name for op in behind for c in op.control_inputs if c in host))
    compiled = type(graph_def)()
    compiled.versions.CopyFrom(graph_def.versions)
    compiled.library.CopyFrom(graph_def.library)
    names = {op.name for op in behind}
    for node in graph_def.node:
        if node.name in names:
            kept = compiled.node.add()
            kept.CopyFrom(node)
            del kept.input[:]
            kept.input.extend(i for i in node.input if not i.startswith("^") or i[1:] in names)
    outer = [t.name for t in wanted if t.op in host]
    named = {name: tensor.name for name, tensor in sources.items()}
    return Parts(graph_def, compiled, boundary, [t.name for t in inner], outer, targets, named)


class SplitPlan:
    """A signature with strings: its numbers are compiled for each bucket, the rest stays in the model's session."""

    name = "xla"
    pads = True

    def __init__(self, frozen: Any, signature: Signature, session: XlaSession, add_host: AddHost, own: Run) -> None:
        """`frozen` see `XlaPlan`; `add_host` adds a graph to the model's session; `own` is the signature's own run.

        Raises:
            PlanUnavailable: nothing worth compiling lies behind the strings.
        """
        self._signature = signature
        self._session = session
        self._add_host = add_host
        self._own = own
        self._feeds = [spec.graph_name for spec in signature.inputs]
        self._fetches = [spec.graph_name for spec in signature.outputs]
        self._drawer = Drawer(signature)
        if not first_inputs(self._drawer, own, (1,)):
            raise PlanUnavailable("no strings that were drawn for it suit the model")
        self._inlined = with_functions_renamed(inline(frozen, self._feeds, self._fetches), "_split")
        self._refused: set[str] = set()
        self._unsteady = self._look_for_unsteady()
        self._parts = self._cut()
        self._host: Call | None = None

    def prepare(self, rows: int) -> Run:
        while True:
            try:
                return self._prepare(rows)
            except Refused as refused:
                if refused.operation is None or refused.operation in self._refused:
                    raise
                self._refused.add(refused.operation)  # it stays in the session, with all before it
                self._parts, self._host = self._cut(), None

    def close(self) -> None:
        self._session.close()

    def _prepare(self, rows: int) -> Run:
        parts = self._parts
        if self._host is None:
            self._host = self._add_host(parts.whole, self._feeds, [*parts.boundary, *parts.outer], parts.targets)
        boundary = self._steady_boundary(self._host, rows)
        feeds = dict(zip(parts.boundary, boundary, strict=True))
        compiled = self._session.compile(parts.compiled, feeds, parts.inner)
        shapes = [array.shape for array in boundary]
        return _joined(self._signature, parts, shapes, (self._host, compiled), self._own)

    def _cut(self) -> Parts:
        return cut(self._inlined, self._fetches, self._refused, self._unsteady)

    def _look_for_unsteady(self) -> set[str]:
        """Names of operations whose shapes follow what is in the strings, as far as that can be seen."""
        names = measurable(self._inlined)
        if not names:
            raise PlanUnavailable(_NOTHING)
        call = self._add_host(self._inlined, self._feeds, names, [])
        seen = [[array.shape for array in self._call(call, inputs)] for inputs in self._draws(_FEW_ROWS)]
        return {name.partition(":")[0] for name, *shapes in zip(names, *seen, strict=True) if len(set(shapes)) > 1}

    def _steady_boundary(self, host: Call, rows: int) -> list[Array]:
        """What lies between the parts, if its shapes do not follow what is in the strings."""
        count = len(self._parts.boundary)
        seen = [self._call(host, inputs)[:count] for inputs in self._draws(rows)]
        if len({tuple(np.shape(array) for array in arrays) for arrays in seen}) > 1:
            raise PlanUnavailable("the shapes behind its strings follow what is in them")
        return [np.asarray(array) for array in seen[0]]

    def _draws(self, rows: int) -> list[Tensors]:
        usual = self._drawer.batch(rows)
        edges = [] if self._drawer.images else [edge for _, edge in self._drawer.edges(rows)]
        return [usual, *edges]

    def _call(self, call: Call, inputs: Tensors) -> list[Array]:
        try:
            return [np.asarray(value) for value in call(*[inputs[spec.name] for spec in self._signature.inputs])]
        except Exception as error:
            raise PlanUnavailable("the strings drawn for it do not suit the model") from error


AddHost = Callable[[Any, list[str], list[str], list[str]], Call]
"""A graph, its feeds, fetches and further targets, as a function of the feeds."""


def _joined(
    signature: Signature, parts: Parts, shapes: list[tuple[int, ...]], calls: tuple[Call, Call], own: Run
) -> Run:
    """One part after the other; inputs that lead to other shapes between them go to `own`."""
    host, compiled = calls
    inputs = [spec.name for spec in signature.inputs]
    places = {name: place for place, name in enumerate([*parts.outer, *parts.inner])}
    outputs = [(spec.name, places[parts.named[spec.graph_name]]) for spec in signature.outputs]
    count = len(parts.boundary)

    def run(tensors: Tensors) -> Tensors:
        try:
            found = host(*[tensors[name] for name in inputs])
            if [array.shape for array in found[:count]] == shapes:
                values = [*found[count:], *compiled(*found[:count])]
                return {name: values[place] for name, place in outputs}
        except Exception:  # noqa: BLE001 - told in the signature plan's words, below
            return own(tensors)
        return own(tensors)

    return run


def _is_host(tf: Any, op: Any) -> bool:
    if op.type in ("Placeholder", "IdentityN"):  # the latter only gathers what leaves a function
        return bool(op.type == "Placeholder")
    return any(tensor.dtype.base_dtype in (tf.string, tf.resource) for tensor in (*op.inputs, *op.outputs))


def _source(tensor: Any) -> Any:
    """What a tensor is a copy of: outputs of all kinds leave a function through one operation."""
    while tensor.op.type in ("Identity", "IdentityN"):
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def _is_near(op: Any, unsteady: Collection[str]) -> bool:
    """Whether an operation is unsteady, or is given what is."""
    return any(each.name in unsteady for each in (op, *(tensor.op for tensor in op.inputs)))


def _add_with_ancestors(found: set[Any], operations: Iterable[Any]) -> None:
    todo = list(operations)
    while todo:
        op = todo.pop()
        if op not in found:
            found.add(op)
            todo += [t.op for t in op.inputs] + list(op.control_inputs)


def _behind(outputs: Iterable[Any], host: Collection[Any]) -> set[Any]:
    """Operations that `outputs` depend on and that are not the host's; constants are had by both."""
    found: set[Any] = set()
    todo = [tensor.op for tensor in outputs]
    while todo:
        op = todo.pop()
        if op in found or (op in host and op.type != "Const"):
            continue
        found.add(op)
        todo += [t.op for t in op.inputs] + [c for c in op.control_inputs if c not in host]
    return found
