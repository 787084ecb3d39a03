"""Which plans are tried for what was asked, on which device, and what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.runtime.base import PlanName, PlanUnavailable
from service.runtime.candidates import Candidates, Workshop, candidate_names, needs_tensorflow, stream_names
from service.runtime.parity import Tolerance
from tests.unit.plan_fakes import BATCHED

ALL = ("openvino-1", "openvino", "litert-1", "litert", "xla", "frozen", "signature-pool", "frozen-pool")
STRICT, LOOSE = Tolerance(1e-4, 1e-5), Tolerance(1e-2, 1e-2)


@pytest.mark.parametrize(
    ("plan", "device", "names"),
    [
        ("auto", "CPU:0", ALL),
        ("signature", "CPU:0", ()),
        ("frozen", "CPU:0", ("frozen", "frozen-pool")),
        ("xla", "CPU:1", ("xla",)),
        ("openvino", "CPU:0", ("openvino-1", "openvino")),
        ("auto", "GPU:0", ("xla", "frozen", "signature-pool", "frozen-pool")),
        ("openvino", "GPU:0", ()),
        ("litert", "CPU:0", ("litert-1", "litert")),
        ("litert", "GPU:0", ()),
        ("xla", "TPU:0", ("xla",)),
    ],
)
def test_the_setting_decides_what_is_tried(plan: PlanName, device: str, names: tuple[str, ...]) -> None:
    """On a device of its own, plans for the CPU are no rivals."""
    assert candidate_names(plan, device) == names


def test_less_precision_is_tried_where_the_config_opts_in() -> None:
    """Beside the full one, and nowhere else."""
    names = candidate_names("openvino", "CPU:0", "bf16")
    assert names == ("openvino-1", "openvino", "openvino-bf16-1", "openvino-bf16")
    assert not any("bf16" in name for name in candidate_names("auto", "CPU:0"))


@pytest.mark.parametrize(
    ("names", "streams", "cores", "expected"),
    [
        (ALL, 2, 2, ("openvino-2x1", "litert-1", "xla", "frozen", "signature")),
        (ALL, 2, 8, ("openvino-2x4", "litert-1", "xla", "frozen", "signature")),
        (ALL, 8, 8, ("openvino-8x1", "litert-1", "xla", "frozen", "signature")),
        (
            ("openvino-1", "openvino", "openvino-bf16-1", "openvino-bf16"),
            2,
            2,
            ("openvino-2x1", "openvino-bf16-2x1", "signature"),
        ),
        (("xla",), 2, 2, ("xla", "signature")),
        ((), 2, 2, ()),
    ],
)
def test_streams_share_the_cores(names: tuple[str, ...], streams: int, cores: int, expected: tuple[str, ...]) -> None:
    """OpenVINO is told how many threads each has; other plans are called from several threads."""
    assert stream_names(names, streams, cores) == expected


def test_streams_of_openvino_and_litert_have_cores_of_their_own() -> None:
    """TensorFlow's share its pools of threads."""
    candidates = Candidates(Workshop(Path("none"), None, None), BATCHED, STRICT, LOOSE, {}).of(stream_names(ALL, 2, 2))
    assert {each.name for each in candidates if each.on_own_cores} == {"openvino-2x1", "litert-1"}


@pytest.mark.parametrize("name", [*ALL, "signature", "openvino-2x1", "openvino-bf16-1", "openvino-bf16-2x4"])
def test_some_plans_need_no_tensorflow(name: str) -> None:
    """OpenVINO's and LiteRT's; all others do."""
    assert needs_tensorflow(name) is not name.startswith(("openvino", "litert"))


class Loaded:
    """A loaded model that says which plan it was asked for."""

    def plan(self, signature: Any, *, pooled: bool) -> str:
        return "signature" + "-pool" * pooled

    def frozen(self, signature: Any, *, pooled: bool) -> str:
        return "frozen" + "-pool" * pooled

    def xla(self, signature: Any) -> str:
        return "xla"


def workshop(model: Any) -> Workshop:
    return Workshop(Path("model"), model, Path("programs"))


@pytest.mark.parametrize("name", ["signature", "signature-pool", "frozen", "frozen-pool", "xla"])
def test_tensorflows_plans_are_built_from_the_loaded_model(name: str) -> None:
    """By their names."""
    built: Any = workshop(Loaded()).build(name, BATCHED)
    assert built == name


@pytest.mark.parametrize("name", ["signature", "frozen", "xla"])
def test_without_tensorflow_its_plans_are_not_available(name: str) -> None:
    """A process that started cold has none of them yet."""
    with pytest.raises(PlanUnavailable, match=f"^{name} needs TensorFlow, which is not loaded$"):
        workshop(None).build(name, BATCHED)


@pytest.mark.parametrize("name", ["onnx", "openvino-x", "xla-pool", ""])
def test_a_name_that_no_plan_has_is_not_available(name: str) -> None:
    """A record may be from a Kiln that has others."""
    with pytest.raises(PlanUnavailable, match=f"^there is no plan '{name}'$"):
        workshop(Loaded()).build(name, BATCHED)


def test_a_candidate_has_the_tolerance_of_its_precision() -> None:
    """What is skipped is told with its reason, and not built."""
    candidates = Candidates(workshop(Loaded()), BATCHED, STRICT, LOOSE, {"frozen": "its child process ended with -11"})
    found = candidates.of(["xla", "frozen", "openvino-bf16-1", "litert-int8"])
    tolerances = [("xla", STRICT), ("openvino-bf16-1", LOOSE), ("litert-int8", LOOSE)]
    assert [(c.name, c.tolerance) for c in found] == tolerances
    assert candidates.skipped == {"frozen": "its child process ended with -11"}
    built: Any = found[0].build()
    assert built == "xla"
