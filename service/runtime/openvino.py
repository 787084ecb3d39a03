"""The OpenVINO plan: the SavedModel's default signature, compiled for this CPU in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.errors import Internal
from service.runtime.base import PlanUnavailable, bucket_for
from service.tensors import DEFAULT_SIGNATURE, DataType, Signature, Tensors


class OpenVinoPlan:
    """Runs batches padded to the next bucket, so that each kernel is built once, at warm-up."""

    def __init__(self, path: Path, signature: Signature, buckets: tuple[int, ...], threads: int) -> None:
        """Convert and compile; `threads` 0 takes all cores.

        Raises:
            PlanUnavailable: not installed, or the model has something that OpenVINO cannot run.
        """
        self.name = f"openvino-{threads}" if threads else "openvino"
        self._buckets = buckets
        _check_supported(signature)
        try:
            import openvino as ov
        except ImportError as error:
            raise PlanUnavailable("openvino is not installed") from error
        # float32 throughout: left to itself OpenVINO takes bfloat16 where the CPU has it, which
        # differed from TensorFlow by 1e-3
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            core = ov.Core()
            model = core.read_model(path)
            _check_names(model, signature)
            self._request = core.compile_model(model, "CPU", options).create_infer_request()
        except PlanUnavailable:
            raise
        except Exception as error:
            raise PlanUnavailable(str(error).strip().splitlines()[-1]) from error
        self._outputs = [(spec.name, spec.dtype.numpy) for spec in signature.outputs]

    def bucket_rows(self, rows: int) -> int:
        return bucket_for(self._buckets, rows)

    def run(self, inputs: Tensors) -> Tensors:
        """See `Plan.run`. The outputs are copies: the request's own buffers are used again."""
        try:
            self._request.infer(inputs, share_inputs=True)
            return {name: self._request.get_tensor(name).data.astype(dtype) for name, dtype in self._outputs}
        except Exception as error:
            raise Internal(f"the model failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        del self._request


def _check_supported(signature: Signature) -> None:
    if signature.name != DEFAULT_SIGNATURE:  # the one that OpenVINO's front end reads from a SavedModel
        raise PlanUnavailable(f"only the signature {DEFAULT_SIGNATURE!r} can be compiled")
    if not signature.batched:
        raise PlanUnavailable("the signature has no batch dimension")
    if any(spec.dtype is DataType.BYTES for spec in (*signature.inputs, *signature.outputs)):
        raise PlanUnavailable("strings are left to TensorFlow")


def _check_names(model: Any, signature: Signature) -> None:
    for kind, nodes, specs in (
        ("inputs", model.inputs, signature.inputs),
        ("outputs", model.outputs, signature.outputs),
    ):
        names = set().union(*(node.get_names() for node in nodes))
        wanted = {spec.name for spec in specs}
        if not wanted <= names:
            raise PlanUnavailable(f"the converted model's {kind} are {sorted(names)}, not {sorted(wanted)}")
