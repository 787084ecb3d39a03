"""Which plans a signature may have on a device, by name, and how one is built from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.runtime.base import Plan, PlanName, PlanUnavailable, Precision
from service.runtime.litert import LiteRtPlan, litert_name
from service.runtime.openvino import OpenVinoPlan, plan_name
from service.runtime.parity import Tolerance
from service.runtime.planner import Candidate
from service.runtime.records import SIGNATURE_PLAN
from service.runtime.savedmodel import SavedModel
from service.tensors import Signature

_LITERT = re.compile(r"litert(?:-(?P<precision>int8))?(?:-(?P<threads>\d+))?")
_OPENVINO = re.compile(r"openvino(?:-(?P<precision>bf16))?(?:-(?:(?P<streams>\d+)x(?P<each>\d+)|(?P<threads>\d+)))?")

_REDUCED = ("bf16", "int8")


@dataclass(frozen=True)
class Workshop:
    """What plans are built from: the SavedModel's files, the loaded model where TensorFlow is needed, kept programs."""

    path: Path
    saved_model: SavedModel | None
    programs: Path | None

    def build(self, name: str, signature: Signature) -> Plan:
        """The plan called `name` for `signature`.

        Raises:
            PlanUnavailable: it cannot run the signature here.
        """
        programs = self.programs / signature.name if self.programs else None
        if match := _OPENVINO.fullmatch(name):
            return OpenVinoPlan(
                self.path,
                signature,
                threads=int(match["each"] or match["threads"] or 0),
                streams=int(match["streams"] or 1),
                precision=match["precision"] or "f32",
                programs=programs,
            )
        if match := _LITERT.fullmatch(name):
            threads, precision = int(match["threads"] or 0), match["precision"] or "f32"
            return LiteRtPlan(self.path, signature, threads=threads, precision=precision, programs=programs)
        model = self.saved_model
        if model is None:
            raise PlanUnavailable(f"{name} needs TensorFlow, which is not loaded")
        kind, _, pool = name.partition("-")
        if kind == SIGNATURE_PLAN:
            return model.plan(signature, pooled=bool(pool))
        if kind == "frozen":
            return model.frozen(signature, pooled=bool(pool))
        if name == "xla":
            return model.xla(signature)
        raise PlanUnavailable(f"there is no plan {name!r}")


class Candidates:
    """Names turned into candidates for one signature; those in `skip` are left out, with the reason, in `skipped`."""

    def __init__(
        self,
        workshop: Workshop,
        signature: Signature,
        tolerance: Tolerance,
        precision_tolerance: Tolerance,
        skip: Mapping[str, str],
    ) -> None:
        self.skipped: dict[str, str] = {}
        self._workshop = workshop
        self._signature = signature
        self._tolerance = tolerance
        self._precision_tolerance = precision_tolerance
        self._skip = skip

    def of(self, names: Iterable[str]) -> list[Candidate]:
        """A candidate for each name, in order."""
        found = []
        for name in names:
            if name in self._skip:
                self.skipped[name] = self._skip[name]
                continue
            is_reduced = any(precision in name for precision in _REDUCED)
            tolerance = self._precision_tolerance if is_reduced else self._tolerance
            build = partial(self._workshop.build, name, self._signature)
            found.append(Candidate(name, build, tolerance, on_own_cores=not needs_tensorflow(name)))
        return found


def needs_tensorflow(name: str) -> bool:
    """Whether the plan called `name` runs in TensorFlow."""
    return not _is_for_cpu(name)


def candidate_names(plan: PlanName, device: str, precision: Precision = "f32") -> tuple[str, ...]:
    """The plans to try beside the signature plan on `device`; the likely winners first, should time run out."""
    openvino_precisions = ("f32", "bf16") if precision == "bf16" else ("f32",)
    litert_precisions = ("f32", "int8") if precision == "int8" else ("f32",)
    openvino = tuple(plan_name(threads=threads, precision=p) for p in openvino_precisions for threads in (1, 0))
    litert = tuple(litert_name(threads=threads, precision=p) for p in litert_precisions for threads in (1, 0))
    by_choice = {
        "auto": (*openvino, *litert, "xla", "frozen", "signature-pool", "frozen-pool"),
        "signature": (),
        "frozen": ("frozen", "frozen-pool"),
        "xla": ("xla",),
        "openvino": openvino,
        "litert": litert,
    }
    names = by_choice[plan]
    if not device.startswith("CPU"):  # what is compiled for the CPU is no rival to the device that TensorFlow found
        names = tuple(name for name in names if not _is_for_cpu(name))
    return names


def stream_names(names: tuple[str, ...], streams: int, cores: int) -> tuple[str, ...]:
    """The plans to try with `streams` batches at once, given those that were tried with one."""
    precisions = [p for p in ("f32", "bf16") if plan_name(threads=1, precision=p) in names]
    threads = max(1, cores // streams)
    split = tuple(plan_name(threads=threads, streams=streams, precision=p) for p in precisions)
    several = {litert_name(threads=1, precision=p) for p in ("f32", "int8")}
    whole = (n for n in names if n in several or (needs_tensorflow(n) and not n.endswith("-pool")))
    return (*split, *whole, *([SIGNATURE_PLAN] if names else []))


def _is_for_cpu(name: str) -> bool:
    return bool(_OPENVINO.fullmatch(name) or _LITERT.fullmatch(name))
