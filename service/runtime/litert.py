"""The LiteRT plan: the signature converted by TensorFlow, once, and run by XNNPACK's kernels without it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from service.errors import Internal
from service.runtime.base import PlanUnavailable, Run
from service.runtime.devices import load_tensorflow
from service.runtime.memory import stored_bytes
from service.runtime.plan_record import usable_cores
from service.runtime.programs import program_name, write_whole
from service.tensors import DataType, Signature, Tensors

_LARGEST_BYTES = 64 * 2**20
"""Of variables: every interpreter packs them anew, and there is one for each bucket and thread."""


class LiteRtPlan:
    """Interpreters of one converted model, each for the rows of a bucket, on `threads` threads (0: all cores)."""

    pads = True

    def __init__(
        self, path: Path, signature: Signature, *, threads: int, precision: str = "f32", programs: Path | None = None
    ) -> None:
        """With `precision` ``int8`` weights are integers of 8 bits, and activations are made so as they come.

        Raises:
            PlanUnavailable: the signature is none that could be converted.
        """
        self.name = litert_name(threads=threads, precision=precision)
        self._path = path
        self._signature = signature
        self._threads = threads or usable_cores()
        self._precision = precision
        self._file = programs / program_name(f"litert-{precision}", 0) if programs else None
        if any(spec.dtype is DataType.BYTES for spec in (*signature.inputs, *signature.outputs)):
            raise PlanUnavailable("strings are left to TensorFlow")
        if signature.has_open_sizes or not signature.batched:
            raise PlanUnavailable("only rows of known sizes are converted")
        if (size := stored_bytes(path)) > _LARGEST_BYTES:
            raise PlanUnavailable(f"{size / 2**20:.0f} MiB of variables are too much for an interpreter a bucket")
        self._content = b""
        if find_spec("ai_edge_litert") is None:
            raise PlanUnavailable("ai-edge-litert is not installed")

    def prepare(self, rows: int) -> Run:
        try:
            self._content = self._content or self._kept() or self._convert()
            return _Interpreters(self._content, self._signature, rows, self._threads).run
        except PlanUnavailable:
            raise
        except Exception as error:
            raise PlanUnavailable(_reason(error)) from error

    def close(self) -> None:
        self._content = b""

    def _kept(self) -> bytes:
        return self._file.read_bytes() if self._file is not None and self._file.is_file() else b""

    def _convert(self) -> bytes:
        tf = load_tensorflow()
        converter = tf.lite.TFLiteConverter.from_saved_model(str(self._path), signature_keys=[self._signature.name])
        if self._precision == "int8":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        content: bytes = converter.convert()
        if self._file is not None:
            write_whole(self._file, content)
        return content


class _Interpreters:
    """As many interpreters as threads call at once: one runs one batch at a time."""

    def __init__(self, content: bytes, signature: Signature, rows: int, threads: int) -> None:
        self._content = content
        self._signature = signature
        self._rows = rows
        self._threads = threads
        self._idle: SimpleQueue[_Interpreter] = SimpleQueue()
        self._idle.put(self._make())

    def run(self, inputs: Tensors) -> Tensors:
        """See `service.runtime.base.Run`."""
        try:
            interpreter = self._idle.get_nowait()
        except Empty:
            interpreter = self._make()
        try:
            return interpreter.run(inputs)
        except Exception as error:
            raise Internal(f"the model failed: {type(error).__name__}: {error}") from error
        finally:
            self._idle.put(interpreter)

    def _make(self) -> _Interpreter:
        return _Interpreter(self._content, self._signature, self._rows, self._threads)


class _Interpreter:
    def __init__(self, content: bytes, signature: Signature, rows: int, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = made = Interpreter(model_content=content, num_threads=threads)
        self._inputs, self._outputs = _places(made, signature.name)
        for spec in signature.inputs:
            made.resize_tensor_input(self._inputs[spec.name], [rows, *(spec.shape or ())[1:]])
        made.allocate_tensors()

    def run(self, inputs: Tensors) -> Tensors:
        made = self._interpreter
        for name, index in self._inputs.items():
            made.set_tensor(index, inputs[name])
        made.invoke()
        return {name: made.get_tensor(index) for name, index in self._outputs.items()}


def _places(interpreter: Any, signature: str) -> tuple[dict[str, int], dict[str, int]]:
    """Where inputs and outputs lie; what tells it must be gone before sizes are changed."""
    runner = interpreter.get_signature_runner(signature)
    sides = runner.get_input_details(), runner.get_output_details()
    inputs, outputs = ({name: int(detail["index"]) for name, detail in side.items()} for side in sides)
    return inputs, outputs


def litert_name(*, threads: int, precision: str = "f32") -> str:
    """``litert``, ``litert-1``, ``litert-int8-1``."""
    return "-".join(["litert"] + [precision] * (precision != "f32") + [str(threads)] * bool(threads))


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"it cannot be converted: {text.splitlines()[0][:200] if text else type(error).__name__}"
