"""The signature plan: a SavedModel's own graph, run by TensorFlow.

The graph is loaded into a session, as TensorFlow Serving does: its callable takes NumPy arrays
directly (47 µs for a dense model where the eager signature takes 150 µs), does not enforce
the signature's static shapes, and gives all memory back when the session is closed.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import Internal, InvalidArgument, KilnError, ModelLoadError
from service.runtime.base import Plan, PlanUnavailable, Run
from service.runtime.devices import available_devices, choose_devices, load_tensorflow
from service.runtime.frozen import LARGEST_BYTES, add_frozen, freeze
from service.runtime.graph import Graph
from service.runtime.graph_scan import check_saved_model
from service.runtime.memory import large_blocks_apart, stored_bytes
from service.runtime.split import SplitPlan
from service.runtime.variables import fill_empty
from service.runtime.xla import LARGEST_BYTES as LARGEST_XLA_BYTES
from service.runtime.xla import Call, XlaPlan, XlaSession
from service.tensors import BY_TENSORFLOW_NUMBER, Array, DataType, Signature, Tensors, TensorSpec

_log = logging.getLogger("kiln.runtime")
_SERVE_TAG = "serve"
_CALLING_THREAD = -1
"""``RunOptions.inter_op_thread_pool``: no pool (TensorFlow's config.proto)."""

SHAPE_SAFE_OPERATIONS = frozenset(
    "Placeholder Const Identity IdentityN NoOp VarHandleOp ReadVariableOp PartitionedCall StatefulPartitionedCall "
    "Add AddV2 Sub Mul Div RealDiv DivNoNan Neg Abs Square Sqrt Rsqrt Exp Log Log1p Pow Maximum Minimum Sign Floor "
    "Round Sin Cos Erf SquaredDifference Relu Relu6 LeakyRelu Elu Selu Sigmoid Tanh Softplus Softmax MatMul BiasAdd "
    "Cast Reshape Shape".split()
)
"""Operations that refuse a shape they cannot take with an error.

Others end the whole process: a convolution given three dimensions for four is a failed ``CHECK`` in
TensorFlow 2.21 (``tensor_format.h: Invalid index from the dimension``).
"""


class SavedModel:
    """A loaded SavedModel and its signatures; `left_out` has the reason for each that cannot be served."""

    def __init__(self, path: Path, device: str | None = None, *, allow_operations: Collection[str] = ()) -> None:
        """Load from `path` onto `device` (``CPU:0``, ``GPU:1``); slow, and the first one imports TensorFlow.

        Without a device it is the first GPU, else the CPU. Operations that the device lacks run on
        the CPU; those that the graph places by itself inside a function stay where it says.

        Raises:
            ModelLoadError: it has an operation that is refused (see `check_saved_model`), cannot be
                loaded, or has no signature that can be served.
        """
        tf = load_tensorflow()
        check_saved_model(path, allow_operations)
        self._path = path
        self._frozen_names: dict[str, dict[str, str]] = {}
        devices = available_devices()
        self.device = device or choose_devices("auto", devices)[0]
        graph = tf.Graph()
        config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
        config.device_count["CPU"] = sum(name.startswith("CPU") for name in devices)
        config.gpu_options.allow_growth = True
        self._session: Any = tf.compat.v1.Session(graph=graph, config=config)
        try:
            with graph.as_default(), tf.device(f"/device:{self.device}"), large_blocks_apart():
                meta = tf.compat.v1.saved_model.load(self._session, [_SERVE_TAG], str(path), clear_devices=True)
            self.signatures, self._tensor_names, self.left_out = _read_signatures(meta)
            fill_empty(self._session, path, {name for _, fetches in self._tensor_names.values() for name in fetches})
        except KilnError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise ModelLoadError(f"TensorFlow cannot load it: {_first_line(error)}") from error

    def plan(self, signature: Signature, *, pooled: bool = False) -> SessionPlan:
        """The plan that runs `signature` as it is in the graph.

        Operations run in the calling thread, one after another, each on as many threads as it
        likes; with `pooled` several may run at once in TensorFlow's pool, which pays for wide
        graphs of heavy operations only (a dense model: 111 µs against 15).
        """
        feeds, fetches = self._tensor_names[signature.name]
        return SessionPlan("signature" + "-pool" * pooled, signature, self._callable(feeds, fetches, pooled=pooled))

    def frozen(self, signature: Signature, *, pooled: bool = False) -> SessionPlan:
        """The same with variables folded into constants, in this session.

        Raises:
            PlanUnavailable: they cannot be folded.
        """
        feeds, fetches = self._tensor_names[signature.name]
        new = self._frozen_names.get(signature.name)
        if new is None:
            new = add_frozen(self._session, fetches, self._freeze(signature, LARGEST_BYTES))
            self._frozen_names[signature.name] = new
        call = self._callable(feeds, [new[name] for name in fetches], pooled=pooled)
        return SessionPlan("frozen" + "-pool" * pooled, signature, call)

    def xla(self, signature: Signature) -> Plan:
        """The signature compiled by XLA, in a session of its own; with strings, what lies behind them.

        Raises:
            PlanUnavailable: it has something that XLA cannot compile.
        """
        frozen = self._freeze(signature, LARGEST_XLA_BYTES)
        session = XlaSession(self.device, _callable)
        if not any(spec.dtype is DataType.BYTES for spec in (*signature.inputs, *signature.outputs)):
            return XlaPlan(frozen, signature, session)
        return SplitPlan(frozen, signature, session, self._add_host, self.plan(signature).run)

    def _add_host(self, graph_def: Any, feeds: list[str], fetches: list[str], targets: list[str]) -> Call:
        """A graph with the same inputs and tables, added to this session."""
        new = add_frozen(self._session, fetches, graph_def, targets)
        with self._session.graph.as_default():  # what is fed cannot be fetched
            copies = {name: load_tensorflow().identity(self._session.graph.get_tensor_by_name(name)) for name in feeds}
        new |= {name: copy.name for name, copy in copies.items() if name in fetches}
        return _callable(self._session, feeds, [new[n] for n in fetches], targets=[new[n] for n in targets])

    def operations(self, signature: Signature) -> set[str]:
        """Names of all operations that a run of `signature` may touch."""
        graph = Graph(self._session.graph.as_graph_def())
        return graph.operations(graph.reached(self._tensor_names[signature.name][1]))

    def _freeze(self, signature: Signature, largest_bytes: int) -> Any:
        size = stored_bytes(self._path)
        if size > largest_bytes:
            raise PlanUnavailable(f"{size / 2**20:.0f} MiB are too much to fold, {largest_bytes / 2**20:.0f} the most")
        return freeze(self._session, self._tensor_names[signature.name][1])

    def _callable(self, feeds: Sequence[str], fetches: Sequence[str], *, pooled: bool) -> Callable[..., list[Array]]:
        return _callable(self._session, feeds, fetches, pooled=pooled)

    def close(self) -> None:
        """Free the graph, its variables and their device memory."""
        session, self._session = self._session, None
        if session is None:
            return
        session.close()
        is_free = _dismantle(session.graph)
        del session
        if not is_free:
            gc.unfreeze()
            gc.collect()


class SessionPlan:
    """Runs a signature in the session it was loaded into; takes any number of rows as it is."""

    pads = False

    def __init__(self, name: str, signature: Signature, call: Callable[..., list[Array]]) -> None:
        self.name = name
        self._inputs = [spec.name for spec in signature.inputs]
        self._outputs = [spec.name for spec in signature.outputs]
        self._scalars = {spec.name: spec.dtype.numpy for spec in signature.outputs if not spec.shape}
        """Outputs that are, or may be, scalars: the session gives them bare, a string as `bytes`."""
        self._call = call

    def prepare(self, rows: int) -> Run:  # noqa: ARG002 - the same for all
        return self.run

    def run(self, inputs: Tensors) -> Tensors:
        """See `service.runtime.base.Run`; an input that the graph refuses is `InvalidArgument`."""
        try:
            outputs = self._call(*[inputs[name] for name in self._inputs])
        except Exception as error:
            raise _translate(error) from error
        named = dict(zip(self._outputs, outputs, strict=True))
        for name, dtype in self._scalars.items():
            named[name] = np.asarray(named[name], dtype)
        return named

    def close(self) -> None:
        """Let go of the session, which belongs to the `SavedModel`; a run is `Internal` from now on."""
        self._call = _closed


def _dismantle(graph: Any) -> bool:
    """Cut a graph, which holds all its constants, into parts that no longer refer to each other.

    Left to the garbage collector it stays for ever once the server has frozen what is loaded, and
    one look of it at everything takes 0.2 s. Returns whether this TensorFlow can.
    """
    from tensorflow.python.framework import ops

    dismantle = getattr(ops, "dismantle_graph", None)
    if dismantle is None:
        return False
    dismantle(graph)
    return True


def _closed(*_: Array) -> list[Array]:
    raise RuntimeError("it is unloaded")


def _callable(
    session: Any, feeds: Sequence[str], fetches: Sequence[str], *, pooled: bool = False, targets: Sequence[str] = ()
) -> Callable[..., list[Array]]:
    """A function from feed arrays to fetched arrays.

    `Session.make_callable` is the public way; what it wraps costs 150 µs less a call, can run in
    the calling thread, and is used where this TensorFlow has it.
    """
    direct = getattr(session, "_make_callable_from_options", None)
    if direct is None:
        operations = [session.graph.get_operation_by_name(name) for name in targets]
        call = session.make_callable([list(fetches), operations], feed_list=list(feeds))
        return lambda *arrays: call(*arrays)[0]
    from tensorflow.core.protobuf import config_pb2

    options = config_pb2.CallableOptions(feed=feeds, fetch=fetches, target=targets)
    options.run_options.inter_op_thread_pool = 0 if pooled else _CALLING_THREAD
    return direct(options)  # type: ignore[no-any-return]


def _read_signatures(
    meta: Any,
) -> tuple[dict[str, Signature], dict[str, tuple[list[str], list[str]]], dict[str, str]]:
    """Signatures by name, for each the graph's tensors to feed and to fetch, and the reasons of the others.

    A signature with a type that no wire carries is left out with a warning.
    """
    signatures, tensor_names = {}, {}
    left_out: dict[str, str] = {}
    graph = Graph(meta.graph_def)
    for name, definition in sorted(meta.signature_def.items()):
        if name.startswith("__"):
            continue  # TensorFlow's own, such as __saved_model_init_op
        try:
            inputs, outputs = (_specs(name, side, graph) for side in (definition.inputs, definition.outputs))
        except ModelLoadError as error:
            left_out[name] = str(error)
            _log.warning("%s", error)
            continue
        tolerant = graph.operations(graph.reached(s.graph_name for s in outputs)) <= SHAPE_SAFE_OPERATIONS
        signatures[name] = Signature(name, inputs, outputs, definition.method_name, tolerant)
        tensor_names[name] = ([s.graph_name for s in inputs], [s.graph_name for s in outputs])
    if not signatures:
        why = "; ".join(left_out.values()) or "it was saved without one (model.export() writes one)"
        raise ModelLoadError(f"no signature can be served: {why}")
    return signatures, tensor_names, left_out


def _specs(signature: str, side: Any, graph: Graph) -> tuple[TensorSpec, ...]:
    specs = []
    for name, info in sorted(side.items()):
        where = f"signature {signature!r}: tensor {name!r}"
        if not info.name:
            raise ModelLoadError(f"{where} is sparse or composite, which no protocol carries")
        if info.name.partition(":")[0] not in graph.nodes:
            raise ModelLoadError(f"{where} is {info.name!r}, which the graph does not have")
        dtype = BY_TENSORFLOW_NUMBER.get(info.dtype)
        if dtype is None:
            raise ModelLoadError(f"{where} has a type that no protocol carries ({_type_name(info.dtype)})")
        shape = None
        if not info.tensor_shape.unknown_rank:
            shape = tuple(None if d.size < 0 else int(d.size) for d in info.tensor_shape.dim)
        specs.append(TensorSpec(name, dtype, shape, info.name))
    return tuple(specs)


def _type_name(number: int) -> str:
    from tensorflow.core.framework import types_pb2

    names: dict[int, str] = {value: name for name, value in types_pb2.DataType.items()}
    return names.get(number, f"DataType {number}")


def _translate(error: Exception) -> KilnError:
    """TensorFlow's refusal of an input as the caller's fault, anything else as ours."""
    import tensorflow as tf

    refusals = (
        tf.errors.InvalidArgumentError,
        tf.errors.OutOfRangeError,
        tf.errors.FailedPreconditionError,
        ValueError,
        TypeError,
    )
    if isinstance(error, refusals):
        return InvalidArgument(f"the model refused the input: {_first_line(error)}")
    return Internal(f"the model failed: {type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The part of TensorFlow's text that says what was wrong, without its stack of nodes."""
    text = str(getattr(error, "message", "") or error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("[[", "Detected at node", "(0)", "(1)"))] or lines
    return lines[0] if lines else type(error).__name__
