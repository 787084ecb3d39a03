"""The XLA plan: a frozen graph compiled for each bucket, its sizes known, called through a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.runtime.base import PlanUnavailable, Run
from service.runtime.devices import load_tensorflow
from service.runtime.frozen import without
from service.tensors import Array, DataType, Signature, TensorSpec

LARGEST_BYTES = 64 * 2**20
"""Of variables: they are compiled into each bucket's program."""
_LOWERED = "_lower_using_switch_merge"
_CACHE_FLAGS = "--tf_xla_persistent_cache_directory={} --tf_xla_persistent_cache_device_types=CPU"


def keep_programs_in(folder: Path) -> None:
    """Let TensorFlow keep what XLA compiles in `folder`; without effect once TensorFlow is imported.

    Programs are found there again by what was compiled and for which machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if "tf_xla_persistent_cache" not in os.environ.get("TF_XLA_FLAGS", ""):
        flags = f"{os.environ.get('TF_XLA_FLAGS', '')} {_CACHE_FLAGS.format(folder)}"
        os.environ["TF_XLA_FLAGS"] = flags.strip()


class XlaPlan:
    """One session, and in it a compiled function for each bucket."""

    name = "xla"
    pads = True

    def __init__(self, frozen: Any, signature: Signature, device: str, make_run: MakeRun) -> None:
        """`frozen` is the graph of the signature with its variables as constants; `make_run` see `SavedModel`.

        Raises:
            PlanUnavailable: the signature has strings, or sizes that it leaves open.
        """
        for spec in (*signature.inputs, *signature.outputs):
            if spec.dtype is DataType.BYTES:
                raise PlanUnavailable("XLA has no strings")
        if signature.has_open_sizes:
            raise PlanUnavailable("XLA needs sizes that are known")
        tf = load_tensorflow()
        self._signature = signature
        self._device = device
        self._make_run = make_run
        self._frozen = _unlowered(without(frozen, [spec.graph_name for spec in signature.inputs]))
        # the optimiser would rewrite loops into a form that XLA does not know
        config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        config.gpu_options.allow_growth = True
        self._session: Any = tf.compat.v1.Session(graph=tf.Graph(), config=config)

    def prepare(self, rows: int) -> Run:
        tf = load_tensorflow()
        signature = self._signature
        outputs = [spec.graph_name for spec in signature.outputs]

        @tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]
        def compiled(*arrays: Any) -> Any:
            given = {spec.graph_name: array for spec, array in zip(signature.inputs, arrays, strict=True)}
            return tf.graph_util.import_graph_def(self._frozen, input_map=given, return_elements=outputs, name="")

        with self._session.graph.as_default(), tf.device(f"/device:{self._device}"):
            feeds = [tf.compat.v1.placeholder(spec.dtype.numpy, _sized(spec, rows)) for spec in signature.inputs]
            fetches = [tf.identity(tensor) for tensor in compiled(*feeds)]
        run = self._make_run(self._session, [f.name for f in feeds], [f.name for f in fetches], signature)
        try:  # it is compiled at the first call
            run({spec.name: _zeros(spec, rows) for spec in signature.inputs})
        except Exception as error:
            raise PlanUnavailable(_reason(error)) from error
        return run

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


MakeRun = Callable[[Any, list[str], list[str], Signature], Run]


def _sized(spec: TensorSpec, rows: int) -> list[int]:
    return [rows if size is None else size for size in spec.shape or ()]


def _zeros(spec: TensorSpec, rows: int) -> Array:
    import numpy as np

    return np.zeros(_sized(spec, rows), spec.dtype.numpy)


def _unlowered(graph_def: Any) -> Any:
    """The same graph with its loops and branches left whole, as XLA wants them."""
    for nodes in (graph_def.node, *(function.node_def for function in graph_def.library.function)):
        for node in nodes:
            if _LOWERED in node.attr:
                del node.attr[_LOWERED]
    return graph_def


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
