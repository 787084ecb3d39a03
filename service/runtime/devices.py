"""Where a model runs: what ``device`` in its config means on this machine."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.errors import ModelLoadError

_WANTED = re.compile(r"(cpu|gpu|tpu)(?::(\d+|\*))?")
_KINDS = ("GPU", "TPU", "CPU")
"""In the order in which ``auto`` looks for one."""


def load_tensorflow() -> Any:
    """TensorFlow, told to keep quiet and to take a GPU's memory only as it is needed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what matters is raised as well
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    import tensorflow as tf

    tf.get_logger().setLevel(logging.ERROR)
    return tf


def available_devices() -> tuple[str, ...]:
    """TensorFlow's logical devices, as ``CPU:0``, ``GPU:1``; the first call imports TensorFlow."""
    devices = load_tensorflow().config.list_logical_devices()
    return tuple(device.name.rpartition("device:")[2] for device in devices if device.device_type in _KINDS)


def choose_devices(wanted: str, available: Sequence[str]) -> tuple[str, ...]:
    """The devices that ``auto``, ``cpu``, ``gpu:1``, ``gpu:*`` and the like mean: one for each replica.

    Raises:
        ModelLoadError: there is no such device; the text names those that there are.
    """
    if wanted == "auto":
        return next((found[:1] for kind in _KINDS if (found := _of_kind(kind, available))), ("CPU:0",))
    match = _WANTED.fullmatch(wanted)
    if match is None:
        raise ModelLoadError(f"device: auto, cpu, cpu:N, cpu:*, gpu:N, gpu:* or tpu:N expected, got {wanted!r}")
    kind, number = match[1].upper(), match[2] or "0"
    found = _of_kind(kind, available)
    if number != "*":
        found = tuple(device for device in found if device == f"{kind}:{int(number)}")
    if not found:
        raise ModelLoadError(f"device: there is no {wanted!r} here; TensorFlow has {', '.join(available)}")
    return found


def devices_for(wanted: str) -> tuple[str, ...]:
    """`choose_devices` among those of this machine.

    TensorFlow is not imported for a machine that has nothing but CPUs, where the first of them is meant.
    """
    if "tensorflow" not in sys.modules and (wanted in ("cpu", "cpu:0") or (wanted == "auto" and not accelerators())):
        return ("CPU:0",)
    return choose_devices(wanted, available_devices())


def accelerators() -> tuple[str, ...]:
    """Device files of GPUs and TPUs; looking for them takes no TensorFlow."""
    found = [p for pattern in ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*") for p in Path("/dev").glob(pattern)]
    return tuple(sorted(map(str, found)))


def memory_of(device: str) -> str:
    """Whose memory a device uses: ``CPU`` for ``CPU:0`` and ``CPU:1``, which share it, else its own."""
    return "CPU" if device.startswith("CPU") else device


def _of_kind(kind: str, available: Sequence[str]) -> tuple[str, ...]:
    return tuple(device for device in available if device.partition(":")[0] == kind)
