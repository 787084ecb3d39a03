"""The XLA plan: a frozen graph compiled for each bucket, its sizes known, called through a session."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from service.errors import Internal
from service.runtime.base import PlanUnavailable, Run
from service.runtime.devices import load_tensorflow
from service.runtime.frozen import unlowered, without
from service.tensors import Array, Signature, Tensors, TensorSpec

LARGEST_BYTES = 64 * 2**20
"""Of variables: they are compiled into each bucket's program."""
_UNKNOWN = re.compile(r"No registered '(\w+)' OpKernel")
_CACHE_FLAGS = "--tf_xla_persistent_cache_directory={} --tf_xla_persistent_cache_device_types=CPU"

Call = Callable[..., list[Array]]
MakeCall = Callable[[Any, list[str], list[str]], Call]


def keep_programs_in(folder: Path) -> None:
    """Let TensorFlow keep what XLA compiles in `folder`; without effect once TensorFlow is imported.

    Programs are found there again by what was compiled and for which machine.
    """
    if "tf_xla_persistent_cache" not in os.environ.get("TF_XLA_FLAGS", ""):
        flags = f"{os.environ.get('TF_XLA_FLAGS', '')} {_CACHE_FLAGS.format(folder)}"
        os.environ["TF_XLA_FLAGS"] = flags.strip()


class XlaSession:
    """A session of compiled functions; `make_call` makes what calls tensors of a session, see `SavedModel`."""

    def __init__(self, device: str, make_call: MakeCall) -> None:
        tf = load_tensorflow()
        # the optimiser would rewrite loops into a form that XLA does not know
        config = tf.compat.v1.ConfigProto(allow_soft_placement=True)
        config.graph_options.rewrite_options.disable_meta_optimizer = True
        config.gpu_options.allow_growth = True
        self._session: Any = tf.compat.v1.Session(graph=tf.Graph(), config=config)
        self._device = device
        self._make_call = make_call

    def compile(self, graph_def: Any, feeds: Mapping[str, Array], outputs: Sequence[str]) -> Call:
        """What computes the tensors `outputs` of `graph_def` from arrays of the types and shapes of `feeds`, in order.

        Raises:
            Refused: XLA cannot compile it.
        """
        tf = load_tensorflow()

        @tf.function(jit_compile=True, autograph=False)  # type: ignore[untyped-decorator]
        def compiled(*arrays: Any) -> Any:
            given = dict(zip(feeds, arrays, strict=True))
            return tf.graph_util.import_graph_def(graph_def, input_map=given, return_elements=list(outputs), name="")

        with self._session.graph.as_default(), tf.device(f"/device:{self._device}"):
            places = [tf.compat.v1.placeholder(array.dtype, array.shape) for array in feeds.values()]
            fetches = [tf.identity(tensor) for tensor in compiled(*places)]
        call = self._make_call(self._session, [place.name for place in places], [fetch.name for fetch in fetches])
        try:  # it is compiled at the first call
            call(*feeds.values())
        except Exception as error:
            raise Refused(error) from error
        return call

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


class Refused(PlanUnavailable):
    """XLA cannot compile a graph; `operation` is the one that it does not know, if that is why."""

    def __init__(self, error: Exception) -> None:
        text = str(error).strip() or type(error).__name__
        super().__init__(text.splitlines()[0][:300])
        match = _UNKNOWN.search(text)
        self.operation = match[1] if match else None


class XlaPlan:
    """A signature of numbers, compiled for each bucket."""

    name = "xla"
    pads = True

    def __init__(self, frozen: Any, signature: Signature, session: XlaSession) -> None:
        """`frozen` is the graph of the signature with its variables as constants.

        Raises:
            PlanUnavailable: the signature leaves sizes open.
        """
        if signature.has_open_sizes:
            raise PlanUnavailable("XLA needs sizes that are known")
        self._signature = signature
        self._session = session
        self._graph_def = unlowered(without(frozen, [spec.graph_name for spec in signature.inputs]))

    def prepare(self, rows: int) -> Run:
        inputs, outputs = self._signature.inputs, self._signature.outputs
        feeds = {spec.graph_name: np.zeros(_sized(spec, rows), spec.dtype.numpy) for spec in inputs}
        call = self._session.compile(self._graph_def, feeds, [spec.graph_name for spec in outputs])

        def run(tensors: Tensors) -> Tensors:
            try:
                values = call(*[tensors[spec.name] for spec in inputs])
            except Exception as error:
                raise Internal(f"the model failed: {type(error).__name__}: {error}") from error
            return {
                spec.name: np.asarray(value) for spec, value in zip(outputs, values, strict=True)
            }  # a scalar comes bare

        return run

    def close(self) -> None:
        self._session.close()


def _sized(spec: TensorSpec, rows: int) -> list[int]:
    return [rows if size is None else size for size in spec.shape or ()]
