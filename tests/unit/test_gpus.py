"""What is asked of NVML, before a library that answers as it does."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from service.gpus import Gpu, gpu_reader, no_gpus


class NVMLError(Exception):
    """As pynvml's."""


class FakeNvml(ModuleType):
    """Two GPUs: a whole one, and a share of one that tells its memory alone."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.has_driver = True
        self.lost: set[int] = set()

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.has_driver:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index in self.lost:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:  # noqa: N802
        return "H100" if handle == 0 else b"H100 MIG"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:  # noqa: N802
        if handle == 1:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=40, memory=10)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=80, used=20 + handle, free=60 - handle)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        if handle == 1:
            raise NVMLError("Not Supported")
        return 350_500


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_each_gpu_is_asked(nvml: FakeNvml):
    """In NVML's units: per cent and milliwatts; what one does not support is None."""
    assert gpu_reader()() == [Gpu(0, "H100", 0.4, 20, 80, 350.5), Gpu(1, "H100 MIG", None, 21, 80, None)]


def test_a_gpu_that_is_lost_is_left_out(nvml: FakeNvml):
    """The others are told of still."""
    read = gpu_reader()
    nvml.lost = {0}
    assert [gpu.index for gpu in read()] == [1]


def test_without_a_driver_there_are_none(nvml: FakeNvml):
    """The library is there, and finds nothing to manage."""
    nvml.has_driver = False
    assert gpu_reader() is no_gpus
    assert no_gpus() == ()


def test_without_the_library_there_are_none(monkeypatch: pytest.MonkeyPatch):
    """It is not needed."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_reader() is no_gpus
