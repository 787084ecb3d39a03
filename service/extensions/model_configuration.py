"""How a model is served, in the words of Triton's model configuration, pure.

Source: Triton's model configuration extension and its ``model_config.proto``.
"""

from __future__ import annotations

from typing import Any

from service.extensions.plans import plans_of
from service.predictor import ModelInfo, choose_signature
from service.registry.policy import All, Latest, VersionPolicy
from service.runtime.base import buckets_up_to
from service.tensors import DataType, TensorSpec


def model_configuration(info: ModelInfo) -> dict[str, Any]:
    """``ModelConfig`` of the default signature, in the form that JSON has.

    ``max_batch_size`` is 0 where requests are not fused; shapes are whole then, and else without
    their rows. ``plans`` is Kiln's own, see `plans_of`.
    """
    signature = choose_signature(info.signatures)
    start = int(signature.batched)
    inputs = [
        {**_tensor(spec, start), "format": "FORMAT_NONE", "is_shape_tensor": False, "optional": False}
        for spec in signature.inputs
    ]
    outputs = [
        {**_tensor(spec, start), "label_filename": "labels.txt" if spec.labels else "", "is_shape_tensor": False}
        for spec in signature.outputs
    ]
    told: dict[str, Any] = {
        "name": info.name,
        "platform": info.platform,
        "backend": "tensorflow",
        "version_policy": _policy(info.config.versions),
        "max_batch_size": info.max_batch_rows if signature.batched else 0,
        "input": inputs,
        "output": outputs,
        "instance_group": [_instances(info)],
        "model_transaction_policy": {"decoupled": False},
    }
    plans = info.plans.get(signature.name)
    if signature.batched:
        told["dynamic_batching"] = {
            "preferred_batch_size": sorted(plans.chosen) if plans else list(buckets_up_to(info.max_batch_rows)),
            "max_queue_delay_microseconds": round(info.batch_wait_s * 1e6),
            "default_queue_policy": {"allow_timeout_override": True},
        }
    told["plans"] = plans_of(info.plans)
    return told


def _tensor(spec: TensorSpec, start: int) -> dict[str, Any]:
    kind = "STRING" if spec.dtype is DataType.BYTES else spec.dtype.value
    return {"name": spec.name, "data_type": f"TYPE_{kind}", "dims": spec.wire_shape()[start:]}


def _policy(policy: VersionPolicy) -> dict[str, Any]:
    if isinstance(policy, All):
        return {"all": {}}
    if isinstance(policy, Latest):
        return {"latest": {"num_versions": policy.count}}
    return {"specific": {"versions": sorted(policy.versions)}}


def _instances(info: ModelInfo) -> dict[str, Any]:
    """One instance on each device."""
    devices = [device.partition(":") for device in info.device.split(", ")]
    gpus = [int(number or 0) for kind, _, number in devices if kind == "GPU"]
    kind = "KIND_GPU" if gpus else "KIND_CPU" if devices[0][0] == "CPU" else "KIND_AUTO"
    return {"name": info.name, "kind": kind, "count": 1 if gpus else len(devices), "gpus": gpus}
