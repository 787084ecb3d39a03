"""A loaded model version: its signatures, and for each the plans chosen to run it."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

from service.batching.queue import Lane
from service.errors import ModelLoadError
from service.runtime.base import Plan, bucket_for, buckets_up_to
from service.runtime.devices import devices_for
from service.runtime.memory import MemoryUse, Meter, release_memory, stored_bytes
from service.runtime.openvino import OpenVinoPlan
from service.runtime.planner import Candidate, Choice, choose
from service.runtime.savedmodel import SavedModel
from service.runtime.warmup import WARM_UP_FILE, DecodeRecord, replay
from service.tensors import DEFAULT_SIGNATURE, Signature, Tensors

_log = logging.getLogger("kiln.runtime")
PlanName = Literal["auto", "signature", "openvino"]


@dataclass(frozen=True)
class RuntimeOptions:
    """How a version is placed and planned: see the settings and the fields of `ModelConfig` of the same names.

    `decode_warm_up` reads the records of a warm-up file, which is not replayed without it.
    """

    max_batch_rows: int
    plan: PlanName = "auto"
    plan_budget_s: float = 10.0
    device: str = "auto"
    stateful: bool = False
    allow_operations: frozenset[str] = frozenset()
    decode_warm_up: DecodeRecord | None = None


class Replica:
    """The model on one device: its graph, and for each signature TensorFlow's plan and those chosen."""

    def __init__(self, saved_model: SavedModel) -> None:
        self.saved_model = saved_model
        self.baselines = {name: saved_model.plan(s) for name, s in saved_model.signatures.items()}
        self.choices: dict[str, Choice] = {}

    def close(self) -> None:
        """Free all plans, each once, and the graph."""
        plans: list[Plan] = list(self.baselines.values())
        plans += [plan for choice in self.choices.values() for plan in choice.plans.values()]
        for plan in {id(plan): plan for plan in plans}.values():
            plan.close()
        self.saved_model.close()


class LoadedModel:
    """What the batcher runs: picks the plan for a lane and a number of rows, and a replica that is free.

    There is one replica on each device that the options name; `parallel` batches may run at once.
    """

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        """Load the SavedModel at `path`; raises `ModelLoadError`. `left_out` has the signatures that are not served."""
        self._path = path
        self._options = options
        self._buckets = buckets_up_to(options.max_batch_rows)
        self.devices = devices_for(options.device)
        self.device = ", ".join(self.devices)
        if options.stateful and len(self.devices) > 1:
            raise ModelLoadError(f"a stateful model has one copy, but device {options.device!r} is {self.device}")
        self.memory: dict[str, MemoryUse] = {}
        """What it takes of each memory (``CPU``, ``GPU:0``); known after `warm_up`."""
        self._meter = Meter(self.devices, stored_bytes(path))
        self._replicas: list[Replica] = []
        try:
            for device in self.devices:
                self._replicas.append(Replica(SavedModel(path, device, allow_operations=options.allow_operations)))
        except Exception:
            self.close()
            raise
        saved_model = self._replicas[0].saved_model
        self.left_out = saved_model.left_out
        self.signatures = {n: replace(s, stateful=options.stateful) for n, s in saved_model.signatures.items()}
        self._free: SimpleQueue[Replica] = SimpleQueue()
        for replica in self._replicas:
            self._free.put(replica)

    @property
    def parallel(self) -> int:
        """How many batches may run at once."""
        return len(self._replicas)

    def warm_up(self) -> dict[str, Choice]:
        """Replay the warm-up file, run every signature on every bucket and choose its plans; blocks for seconds.

        Further replicas try the plans that the first one chose, and no others. A stateful model is
        not run at all: TensorFlow's plan serves it.

        Raises:
            KilnError: a signature fails on what it declares, or on a warm-up record.
        """
        first = self._replicas[0]
        if self._options.stateful:
            first.choices = {name: Choice({1: plan}, {}) for name, plan in first.baselines.items()}
            self.memory = self._meter.read()
            return first.choices
        samples = self._replay()
        for replica in self._replicas:
            for name, signature in self.signatures.items():
                candidates = [] if self._is_alias(signature) else self._candidates(signature, replica)
                if replica is not first:
                    chosen = set(first.choices[name].names.values())
                    candidates = [candidate for candidate in candidates if candidate.name in chosen]
                replica.choices[name] = choose(
                    signature,
                    replica.baselines[name],
                    candidates,
                    self._buckets if signature.batched else (1,),
                    self._options.plan_budget_s,
                    sample=samples.get(name),
                )
        self.memory = self._meter.read()
        return first.choices

    def _replay(self) -> dict[str, Tensors]:
        """Run the records of the warm-up file, if there is one; inputs that were seen, by signature."""
        path, decode = self._path / WARM_UP_FILE, self._options.decode_warm_up
        if not path.is_file():
            return {}
        if decode is None:
            _log.warning("%s is not replayed: nothing here decodes it", path)
            return {}

        def run(signature: Signature, inputs: Tensors) -> None:
            for replica in self._replicas:
                replica.baselines[signature.name].run(inputs)

        return replay(path, self.signatures, decode=decode, run=run, keep_rows=self._options.max_batch_rows)

    def bucket_rows(self, lane: Lane, rows: int) -> int:
        """Rows to hand to the plan for `rows` rows of `lane`."""
        return self._plan(self._replicas[0], lane, rows).bucket_rows(rows)

    def expected_s(self, lane: Lane, rows: int) -> float:
        """Measured seconds of a batch; infinite for shapes that were not measured."""
        signature = lane.signature
        choice = self._replicas[0].choices.get(signature.name)
        if choice is None or not lane.conforms or not lane.fuses or signature.has_open_sizes:
            return math.inf
        cost = choice.costs.get(bucket_for(self._buckets, rows))
        return cost.seconds if cost else math.inf

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        """Run a batch of `lane`, already padded to `bucket_rows`, on the replica that has been free for longest."""
        rows = len(next(iter(inputs.values()))) if lane.fuses else 1
        if len(self._replicas) == 1:
            return self._plan(self._replicas[0], lane, rows).run(inputs)
        replica = self._free.get()
        try:
            return self._plan(replica, lane, rows).run(inputs)
        finally:
            self._free.put(replica)

    def close(self) -> None:
        """Free all plans and the model, and give the memory back."""
        for replica in self._replicas:
            replica.close()
        release_memory()

    def _plan(self, replica: Replica, lane: Lane, rows: int) -> Plan:
        name = lane.signature.name
        choice = replica.choices.get(name)
        if not lane.conforms or choice is None:
            return replica.baselines[name]
        return choice.plans.get(bucket_for(self._buckets, rows), replica.baselines[name])

    def _is_alias(self, signature: Signature) -> bool:
        """Whether it looks the same as the default one: Keras exports its model under two names."""
        default = self.signatures.get(DEFAULT_SIGNATURE)
        return default is not None and default is not signature and default.describe() == signature.describe()

    def _candidates(self, signature: Signature, replica: Replica) -> list[Candidate]:
        if self._options.plan == "signature":
            return []
        forced = self._options.plan == "openvino"
        one_thread, all_threads = (
            partial(OpenVinoPlan, self._path, signature, self._buckets, threads) for threads in (1, 0)
        )
        if forced:
            return [Candidate("openvino-1", one_thread, forced=True), Candidate("openvino", all_threads)]
        pooled = Candidate("signature-pool", partial(replica.saved_model.plan, signature, pooled=True))
        if not replica.saved_model.device.startswith("CPU"):
            return [pooled]  # compiled for the CPU, OpenVINO is no rival to the device that TensorFlow found
        return [pooled, Candidate("openvino-1", one_thread), Candidate("openvino", all_threads)]
