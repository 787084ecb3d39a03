"""A loaded model version: its signatures, and for each the plans chosen to run it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from service.batching.queue import Lane
from service.runtime.base import Plan, bucket_for, buckets_up_to
from service.runtime.openvino import OpenVinoPlan
from service.runtime.planner import Candidate, Choice, choose
from service.runtime.savedmodel import SavedModel
from service.tensors import DEFAULT_SIGNATURE, Signature, Tensors

PlanName = Literal["auto", "signature", "openvino"]


@dataclass(frozen=True)
class RuntimeOptions:
    """How a version is placed and planned: see the settings and the fields of `ModelConfig` of the same names."""

    max_batch_rows: int
    plan: PlanName = "auto"
    plan_budget_s: float = 10.0
    device: str = "auto"
    stateful: bool = False
    allow_operations: frozenset[str] = frozenset()


class LoadedModel:
    """What the batcher runs: picks the plan for a lane and a number of rows."""

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        """Load the SavedModel at `path`; raises `ModelLoadError`."""
        self._path = path
        self._options = options
        self._saved_model = SavedModel(path)
        self.signatures = self._saved_model.signatures
        self.device = self._saved_model.device
        self._buckets = buckets_up_to(options.max_batch_rows)
        self._baselines = {name: self._saved_model.plan(s) for name, s in self.signatures.items()}
        self._choices: dict[str, Choice] = {}

    def warm_up(self) -> dict[str, Choice]:
        """Run every signature on every bucket and choose its plans; blocks for seconds.

        Raises:
            KilnError: a signature fails on what it declares.
        """
        for name, signature in self.signatures.items():
            candidates = [] if self._is_alias(signature) else self._candidates(signature)
            buckets = self._buckets if signature.batched else (1,)
            self._choices[name] = choose(
                signature,
                self._baselines[name],
                candidates,
                buckets,
                self._options.plan_budget_s,
            )
        return self._choices

    def bucket_rows(self, lane: Lane, rows: int) -> int:
        """Rows to hand to the plan for `rows` rows of `lane`."""
        return self._plan(lane, rows).bucket_rows(rows)

    def expected_s(self, lane: Lane, rows: int) -> float:
        """Measured seconds of a batch; infinite for shapes that were not measured."""
        signature = lane.signature
        choice = self._choices.get(signature.name)
        if choice is None or not lane.conforms or not lane.fuses or signature.has_open_sizes:
            return math.inf
        cost = choice.costs.get(bucket_for(self._buckets, rows))
        return cost.seconds if cost else math.inf

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        """Run a batch of `lane`, already padded to `bucket_rows`."""
        rows = len(next(iter(inputs.values()))) if lane.fuses else 1
        return self._plan(lane, rows).run(inputs)

    def close(self) -> None:
        """Free all plans and the model."""
        plans = {id(plan): plan for choice in self._choices.values() for plan in choice.plans.values()}
        for plan in plans.values():
            plan.close()
        self._saved_model.close()

    def _plan(self, lane: Lane, rows: int) -> Plan:
        name = lane.signature.name
        choice = self._choices.get(name)
        if not lane.conforms or choice is None:
            return self._baselines[name]
        return choice.plans.get(bucket_for(self._buckets, rows), self._baselines[name])

    def _is_alias(self, signature: Signature) -> bool:
        """Whether it looks the same as the default one: Keras exports its model under two names."""
        default = self.signatures.get(DEFAULT_SIGNATURE)
        return default is not None and default is not signature and default.describe() == signature.describe()

    def _candidates(self, signature: Signature) -> list[Candidate]:
        if self._options.plan == "signature":
            return []
        forced = self._options.plan == "openvino"
        one_thread, all_threads = (
            partial(OpenVinoPlan, self._path, signature, self._buckets, threads) for threads in (1, 0)
        )
        if forced:
            return [Candidate("openvino-1", one_thread, forced=True), Candidate("openvino", all_threads)]
        pooled = Candidate("signature-pool", partial(self._saved_model.plan, signature, pooled=True))
        if self.device != "CPU:0":
            return [pooled]  # compiled for the CPU, OpenVINO is no rival to the device that TensorFlow found
        return [pooled, Candidate("openvino-1", one_thread), Candidate("openvino", all_threads)]
