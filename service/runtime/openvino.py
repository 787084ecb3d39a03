"""The OpenVINO plan: the SavedModel's default signature, compiled for this CPU."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from service.errors import Internal
from service.runtime.base import PlanUnavailable, Run
from service.runtime.memory import stored_bytes
from service.runtime.programs import program_name, write_whole
from service.tensors import DEFAULT_SIGNATURE, DataType, Signature, Tensors

_LARGEST_FIXED_BYTES = 32 * 2**20
"""Variables of models that are compiled for each bucket by itself: a fifth faster, but each has its own weights."""
_OPEN_ROWS = 0


class OpenVinoPlan:
    """Runs batches of whole buckets, each compiled with its sizes known, on `streams` × `threads` threads."""

    pads = True

    def __init__(
        self,
        path: Path,
        signature: Signature,
        *,
        threads: int = 0,
        streams: int = 1,
        precision: str = "f32",
        programs: Path | None = None,
    ) -> None:
        """`threads` for each stream, 0 for all cores; `programs` is a folder where what was compiled is kept.

        Raises:
            PlanUnavailable: not installed, or the signature is none that it could run.
        """
        self.name = plan_name(threads=threads, streams=streams, precision=precision)
        self._path = path
        self._signature = signature
        self._programs = programs
        check_supported(signature)
        ov = _load_openvino()
        # left to itself OpenVINO takes bfloat16 where the CPU has it, which differed from TensorFlow by 1e-3
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": streams,
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads * streams
        self._core = ov.Core()
        if precision not in ("f32", *map(str.lower, self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))):
            raise PlanUnavailable(f"this CPU has no {precision}")
        self._is_fixed = stored_bytes(path) <= _LARGEST_FIXED_BYTES and not signature.has_open_sizes
        self._compiled: dict[int, Any] = {}

    def program(self, rows: int) -> str:
        """The name of the file that keeps what is compiled for a bucket."""
        return program_name(self.name, rows if self._is_fixed else _OPEN_ROWS)

    def prepare(self, rows: int) -> Run:
        key = rows if self._is_fixed else _OPEN_ROWS
        compiled = self._compiled.get(key)
        if compiled is None:
            try:
                compiled = self._compiled[key] = self._kept(rows) or self._compile(rows)
            except PlanUnavailable:
                raise
            except Exception as error:
                raise PlanUnavailable(_reason(error)) from error
        return _Requests(compiled, self._signature).run

    def close(self) -> None:
        self._compiled.clear()

    def _kept(self, rows: int) -> Any:
        """What was compiled and kept before; None if there is nothing of the kind."""
        file = self._programs / self.program(rows) if self._programs else None
        if file is None or not file.is_file():
            return None
        with contextlib.suppress(Exception):  # of another version, or broken: compiled again
            return self._core.import_model(file.read_bytes(), "CPU", self._options)
        return None

    def _compile(self, rows: int) -> Any:
        model = self._core.read_model(self._path)
        _check_names(model, self._signature)
        if self._is_fixed:
            model.reshape({node: [rows, *list(node.partial_shape)[1:]] for node in model.inputs})
        compiled = self._core.compile_model(model, "CPU", self._options)
        if self._programs is not None:
            write_whole(self._programs / self.program(rows), compiled.export_model().getvalue())
        return compiled


class _Requests:
    """As many requests as threads call at once; a request's own buffers are used again, so that outputs are copies."""

    def __init__(self, compiled: Any, signature: Signature) -> None:
        self._compiled = compiled
        self._outputs = [(spec.name, spec.dtype.numpy) for spec in signature.outputs]
        self._idle: SimpleQueue[Any] = SimpleQueue()
        self._idle.put(compiled.create_infer_request())

    def run(self, inputs: Tensors) -> Tensors:
        """See `service.runtime.base.Run`."""
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = self._compiled.create_infer_request()
        try:
            request.infer(inputs, share_inputs=True)
            return {name: request.get_tensor(name).data.astype(dtype) for name, dtype in self._outputs}
        except Exception as error:
            raise Internal(f"the model failed: {type(error).__name__}: {error}") from error
        finally:
            self._idle.put(request)


def plan_name(*, threads: int = 0, streams: int = 1, precision: str = "f32") -> str:
    """``openvino``, ``openvino-1``, ``openvino-2x1`` (streams × threads), ``openvino-bf16-1``."""
    parts = ["openvino"] + [precision] * (precision != "f32")
    if streams > 1:
        parts.append(f"{streams}x{threads}")
    elif threads:
        parts.append(str(threads))
    return "-".join(parts)


def check_supported(signature: Signature) -> None:
    """Raise `PlanUnavailable` for a signature that OpenVINO's front end does not read from a SavedModel."""
    if signature.name != DEFAULT_SIGNATURE:
        raise PlanUnavailable(f"only the signature {DEFAULT_SIGNATURE!r} can be compiled")
    if not signature.batched:
        raise PlanUnavailable("the signature has no batch dimension")
    if any(spec.dtype is DataType.BYTES for spec in (*signature.inputs, *signature.outputs)):
        raise PlanUnavailable("strings are left to TensorFlow")


def _load_openvino() -> Any:
    """OpenVINO without its telemetry, which would fork this process at the import and send usage to a third party.

    Raises:
        PlanUnavailable: it is not installed.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # an import of it fails; that is foreseen
    try:
        import openvino as ov
    except ImportError as error:
        raise PlanUnavailable("openvino is not installed") from error
    return ov


def _check_names(model: Any, signature: Signature) -> None:
    for kind, nodes, specs in (
        ("inputs", model.inputs, signature.inputs),
        ("outputs", model.outputs, signature.outputs),
    ):
        names = set().union(*(node.get_names() for node in nodes))
        wanted = {spec.name for spec in specs}
        if not wanted <= names:
            raise PlanUnavailable(f"the converted model's {kind} are {sorted(names)}, not {sorted(wanted)}")


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
