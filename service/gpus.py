"""What NVIDIA's management library (NVML) tells of the GPUs, where there are any.

Its Python module is ``pynvml``, of the package ``nvidia-ml-py``; without it, or without a driver, there is nothing to
tell. The GPUs are those that the process may see, numbered as NVML numbers them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger("kiln.gpus")


@dataclass(frozen=True)
class Gpu:
    """One GPU now; what it cannot tell is None. `busy` is the share of the last moments that it ran something in."""

    index: int
    name: str
    busy: float | None
    memory_used_bytes: int | None
    memory_bytes: int | None
    power_w: float | None


ReadGpus = Callable[[], Sequence[Gpu]]


def no_gpus() -> Sequence[Gpu]:
    """Of a machine without any."""
    return ()


def gpu_reader() -> ReadGpus:
    """A function that asks every GPU how it is; `no_gpus` where NVML is not to be had."""
    try:
        import pynvml
    except ImportError:
        return no_gpus
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        _log.info("no figures of GPUs: %s", error)
        return no_gpus
    return lambda: _read(pynvml)


def _read(nvml: Any) -> list[Gpu]:
    count = _ask(nvml, nvml.nvmlDeviceGetCount) or 0
    return [gpu for index in range(count) if (gpu := _gpu(nvml, index)) is not None]


def _gpu(nvml: Any, index: int) -> Gpu | None:
    handle = _ask(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:  # lost since it was counted
        return None
    name = _ask(nvml, nvml.nvmlDeviceGetName, handle)
    rates = _ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    memory = _ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    power_mw = _ask(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    return Gpu(
        index,
        name.decode() if isinstance(name, bytes) else name or "",  # bytes in older releases
        None if rates is None else rates.gpu / 100,
        None if memory is None else memory.used,
        None if memory is None else memory.total,
        None if power_mw is None else power_mw / 1e3,
    )


def _ask(nvml: Any, function: Callable[..., Any], *arguments: object) -> Any:
    """What NVML answers; None where this GPU, or the share of it that we see, has no answer."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None
