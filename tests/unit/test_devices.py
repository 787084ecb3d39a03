"""What ``device`` in a model's config means on a machine."""

from __future__ import annotations

import pytest

from service.errors import ModelLoadError
from service.runtime.devices import choose_devices, memory_of

CPUS = ("CPU:0", "CPU:1")
GPUS = ("CPU:0", "GPU:0", "GPU:1")


@pytest.mark.parametrize(
    ("wanted", "available", "chosen"),
    [
        ("auto", CPUS, ("CPU:0",)),
        ("auto", GPUS, ("GPU:0",)),
        ("auto", ("CPU:0", "TPU:0", "TPU:1"), ("TPU:0",)),
        ("auto", ("CPU:0", "TPU:0", "GPU:1"), ("GPU:1",)),
        ("auto", (), ("CPU:0",)),
        ("cpu", GPUS, ("CPU:0",)),
        ("cpu:1", CPUS, ("CPU:1",)),
        ("cpu:*", CPUS, CPUS),
        ("gpu", GPUS, ("GPU:0",)),
        ("gpu:1", GPUS, ("GPU:1",)),
        ("gpu:01", GPUS, ("GPU:1",)),
        ("gpu:*", GPUS, ("GPU:0", "GPU:1")),
        ("tpu", ("CPU:0", "TPU:0"), ("TPU:0",)),
        ("tpu:3", ("CPU:0", "TPU:3"), ("TPU:3",)),
    ],
)
def test_a_device_is_found(wanted: str, available: tuple[str, ...], chosen: tuple[str, ...]):
    """A kind means its first device, a number that one, a star all of them; ``auto`` an accelerator if there is one."""
    assert choose_devices(wanted, available) == chosen


@pytest.mark.parametrize("wanted", ["gpu", "gpu:0", "gpu:*", "tpu", "cpu:2"])
def test_a_device_that_is_not_there_is_refused(wanted: str):
    """The text names what was asked for and what there is: a model never ends up elsewhere in silence."""
    with pytest.raises(ModelLoadError) as caught:
        choose_devices(wanted, CPUS)
    assert str(caught.value) == f"device: there is no {wanted!r} here; TensorFlow has CPU:0, CPU:1"


@pytest.mark.parametrize("wanted", ["", "npu", "cpu:", "cpu:x", "gpu:-1", "CPU", "gpu:0,gpu:1"])
def test_what_is_no_device_is_refused(wanted: str):
    """Anything else is refused with the forms that are taken."""
    with pytest.raises(ModelLoadError, match=r"^device: auto, cpu, .* expected, got "):
        choose_devices(wanted, GPUS)


@pytest.mark.parametrize(("device", "memory"), [("CPU:0", "CPU"), ("CPU:1", "CPU"), ("GPU:1", "GPU:1")])
def test_all_cpus_share_one_memory(device: str, memory: str):
    """Logical CPU devices count as the machine's memory; other devices have their own."""
    assert memory_of(device) == memory
