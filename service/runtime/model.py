"""A loaded model version: its signatures, and for each the plans chosen to run it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from service.batching.queue import Lane
from service.errors import KilnError, ModelLoadError
from service.runtime.base import PlanUnavailable
from service.runtime.candidates import Workshop, needs_tensorflow
from service.runtime.devices import devices_for, load_tensorflow
from service.runtime.drawing import Drawer
from service.runtime.memory import MemoryUse, Meter, release_memory, stored_bytes, used_bytes
from service.runtime.plan_record import PlanCache, machine, record_key
from service.runtime.planner import first_inputs
from service.runtime.planning import Planning, PlanningOptions, Request
from service.runtime.ranges import outside
from service.runtime.records import SIGNATURE_PLAN, ModelRecord, SignatureRecord
from service.runtime.replica import Replica
from service.runtime.table import Table, build_table, check_table, own_table, quick_record
from service.runtime.warmup import WARM_UP_FILE, DecodeRecord, replay
from service.tensors import Signature, Tensors

_log = logging.getLogger("kiln.runtime")
_WARM_UP_S = 2.0
"""Buckets are warmed up, from the smallest, until so much time is spent."""
_FIRST_RUN_S = 0.05
"""A first run that was shorter is done again, for its time to be known."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How a version is placed and planned: see the settings and the fields of `ModelConfig` of the same names.

    `decode_warm_up` reads the records of a warm-up file, which is not replayed without it. Without `plan_dir`, the
    folder of what planning found, nothing is planned.
    """

    planning: PlanningOptions
    device: str = "auto"
    stateful: bool = False
    allow_operations: frozenset[str] = frozenset()
    decode_warm_up: DecodeRecord | None = None
    plan_dir: Path | None = None


class LoadedModel:
    """What the batcher runs: picks the plan for a lane and a number of rows, and a replica that is free.

    There is one replica on each device that the options name; `parallel` batches may run at once.
    """

    def __init__(self, path: Path, options: RuntimeOptions) -> None:
        """Load the SavedModel at `path`; raises `ModelLoadError`. `left_out` has the signatures that are not served.

        Where its plans are known from before and none of them needs TensorFlow, that is not even imported.
        """
        self._path = path
        self._options = options
        self.devices = devices_for(options.device)
        self.device = ", ".join(self.devices)
        if options.stateful and len(self.devices) > 1:
            raise ModelLoadError(f"a stateful model has one copy, but device {options.device!r} is {self.device}")
        self.memory: dict[str, MemoryUse] = {}
        """What it takes of each memory (``CPU``, ``GPU:0``); known after `warm_up`, and again after `plan`."""
        self.plans: Mapping[str, SignatureRecord] = {}
        """What is known of each signature's plans; known after `warm_up`, and better after `plan`."""
        self.is_planned = False
        self._is_cold = False
        """Whether it runs on what needs no TensorFlow, until that is loaded."""
        self._samples: dict[str, Tensors] = {}
        self._planning: Planning | None = None
        self._is_cancelled = False
        self._running = 0
        self._lock = threading.Lock()
        self._free: SimpleQueue[Replica] = SimpleQueue()
        self._replicas = [Replica(path, device, options.allow_operations) for device in self.devices]
        self._key, self._about = self._identify()
        self._record = self._known()
        is_awaiting_tensorflow = self._record is None or not _can_start_cold(self._record)
        if is_awaiting_tensorflow:
            load_tensorflow()  # which is no model's: what it takes comes before anything is measured
        try:
            self._meter = Meter(self.devices, stored_bytes(path))
            if is_awaiting_tensorflow:
                for replica in self._replicas:
                    replica.load()
        except Exception:
            self.close()
            raise
        loaded = self._replicas[0].loaded
        known = loaded or self._record
        assert known is not None
        self.left_out = known.left_out
        self.signatures = {n: replace(s, stateful=options.stateful) for n, s in known.signatures.items()}
        self._share_out(1)

    @property
    def parallel(self) -> int:
        """How many batches may run at once."""
        return self._streams * len(self._replicas)

    @property
    def needs_planning(self) -> bool:
        """Whether `plan` has something to find out, or TensorFlow to load that was left for later."""
        return (self._may_plan and not self.is_planned) or self._is_awaited

    def most_rows(self, signature: str) -> int:
        """The most rows that one batch is best given: more of them a second are not answered by fusing more."""
        record = self.plans.get(signature)
        return record.best_rows if record is not None and record.best_rows else self._options.planning.max_batch_rows

    def warm_up(self) -> Mapping[str, SignatureRecord]:
        """Replay the warm-up file, and run every signature, by the plans that are known from before.

        A stateful model is not run at all: TensorFlow's plan serves it.

        Raises:
            KilnError: a signature fails on what it declares, or on a warm-up record.
        """
        if self._options.stateful:
            own = {name: quick_record(s, {1: math.inf}, SIGNATURE_PLAN) for name, s in self.signatures.items()}
            self.plans = {name: replace(record, note="stateful") for name, record in own.items()}
        else:
            if self._replicas[0].loaded is not None:
                self._samples = self._replay()
            record = self._record
            if record is not None and self._replicas[0].loaded is None and _starts_tensorflow(record):
                self._is_cold = self._adopt(cold_record(record))
                self.is_planned = False
            elif record is not None:
                self._adopt(record)
            if not self.plans:
                self._warm_up_own()
        self.memory = self._meter.read()
        return self.plans

    @property
    def is_known(self) -> bool:
        """Whether its plans are known from before, so that `plan` has but to load what it did not wait for."""
        return self._record is not None

    def plan(self, tell: Callable[[str], None] = lambda line: None) -> bool:  # noqa: ARG005
        """Find out the plans in a child process and put them in use; blocks. False where nothing has changed."""
        if self._is_awaited:
            load_tensorflow()
        before = used_bytes(self.devices)
        try:
            return self._plan(tell)
        finally:
            for name, used in used_bytes(self.devices).items():
                held = self.memory.get(name, MemoryUse(0, 0))
                kept_bytes = held.kept_bytes + max(used - before[name], 0)
                self.memory[name] = MemoryUse(kept_bytes, max(held.peak_bytes, kept_bytes))

    def _plan(self, tell: Callable[[str], None]) -> bool:
        if self._is_awaited:
            for replica in self._replicas:
                replica.load()
        if not self._may_plan or self.is_planned:
            return False
        if self._is_cold and self._record is not None:
            self._is_cold = False
            if self._adopt(self._record):
                return True
            self._warm_up_own()  # what it began with may be wrong too
        options = self._options
        assert options.plan_dir is not None
        request = Request(
            str(self._path), self.devices[0], self._key, str(options.plan_dir), str(options.plan_dir / "xla"),
            self._about, options.planning, tuple(sorted(options.allow_operations)),
        )  # fmt: skip
        self._planning = Planning(request, self._samples)
        if self._is_cancelled:  # before there was anything to end
            return False
        record = self._planning.run(tell)
        return record is not None and self._adopt(record)

    def cancel_planning(self) -> None:
        """End `plan`, which another thread is in or will be."""
        self._is_cancelled = True
        if self._planning is not None:
            self._planning.cancel()

    def bucket_rows(self, lane: Lane, rows: int) -> int:
        """Rows to hand to the plan for `rows` rows of `lane`."""
        table = self._table(self._replicas[0], lane)
        return rows if table is None else table.cell(rows, beside_others=False).given_rows(rows)

    def expected_s(self, lane: Lane, rows: int) -> float:
        """Measured seconds of a batch; infinite for shapes that were not measured, and where devices share the work."""
        signature = lane.signature
        table = self._table(self._replicas[0], lane)
        if table is None or not lane.fuses or signature.has_open_sizes or len(self._replicas) > 1:
            return math.inf
        return next((cell.seconds for bucket, cell in table.record.chosen.items() if bucket >= rows), math.inf)

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        """Run a batch of `lane`, already padded to `bucket_rows`, on the replica that has been free for longest."""
        if self.parallel == 1:
            return self._run_on(self._replicas[0], lane, inputs, beside_others=False)
        replica = self._free.get()
        with self._lock:
            self._running += 1
            beside_others = self._running > len(self._replicas)
        try:
            return self._run_on(replica, lane, inputs, beside_others=beside_others)
        finally:
            with self._lock:
                self._running -= 1
            self._free.put(replica)

    def close(self) -> None:
        """Free all plans and the model, and give the memory back."""
        self.cancel_planning()
        for replica in self._replicas:
            replica.close()
        release_memory()

    def _run_on(self, replica: Replica, lane: Lane, inputs: Tensors, *, beside_others: bool) -> Tensors:
        name = lane.signature.name
        table = self._table(replica, lane)
        if table is None or (table.record.ranges and outside(table.record.ranges, inputs)):
            return replica.own_run(name)(inputs)
        rows = len(next(iter(inputs.values()))) if lane.fuses else 1
        return table.cell(rows, beside_others=beside_others).run(inputs, rows)

    def _table(self, replica: Replica, lane: Lane) -> Table | None:
        return replica.tables.get(lane.signature.name) if lane.conforms else None

    @property
    def _may_plan(self) -> bool:
        options = self._options
        return options.plan_dir is not None and not options.stateful and options.planning.plan != SIGNATURE_PLAN

    @property
    def _is_awaited(self) -> bool:
        """Whether requests may come that only TensorFlow can answer, which is not loaded."""
        if self._replicas[0].loaded is not None:
            return False
        return (
            self._is_cold
            or any(s.takes_other_shapes for s in self.signatures.values())
            or any(
                record.ranges or any(needs_tensorflow(name) for name, _ in record.needed)
                for record in self.plans.values()
            )
        )

    def _identify(self) -> tuple[str, dict[str, object]]:
        """The key of what is known of its plans, and what that depends on beside its content."""
        options = self._options
        if not self._may_plan:
            return "", {}
        about = {**machine(), "device": self.devices[0], "options": asdict(options.planning)}
        about["allow_operations"] = sorted(options.allow_operations)
        try:
            return record_key(self._path, about), about
        except OSError as error:
            raise ModelLoadError(f"it cannot be read: {error}") from error

    def _known(self) -> ModelRecord | None:
        if not self._key or self._options.plan_dir is None:
            return None
        return PlanCache(self._options.plan_dir).find(self._key)

    def _share_out(self, streams: int) -> None:
        """Let `streams` batches run at once on each replica."""
        if streams < getattr(self, "_streams", 0):
            return  # they are given out already
        for replica in self._replicas:
            for _ in range(streams - getattr(self, "_streams", 0)):
                self._free.put(replica)
        self._streams = streams

    def _warm_up_own(self) -> None:
        """Run every signature in the graph as it is; what that takes is the first estimate of its cost."""
        records: dict[str, SignatureRecord] = {}
        for replica in self._replicas:
            tables = {}
            for name, signature in self.signatures.items():
                own = replica.own_run(name)
                record = records.get(name) or self._time_own(signature, own)
                records[name] = record
                tables[name] = own_table(record, own, pads=self._options.planning.deterministic)
            replica.swap(tables)
        self.plans = records

    def _time_own(self, signature: Signature, own: Callable[[Tensors], Tensors]) -> SignatureRecord:
        buckets = self._options.planning.all_buckets if signature.batched else (1,)
        seconds = dict.fromkeys(buckets, math.inf)
        drawer = Drawer(signature, self._samples.get(signature.name))
        if first_inputs(drawer, own, buckets[:1]):
            stop = time.monotonic() + _WARM_UP_S
            for rows in buckets:
                inputs = drawer.batch(rows)
                seconds[rows] = _time(own, inputs)
                if seconds[rows] < _FIRST_RUN_S:
                    seconds[rows] = _time(own, inputs)
                if time.monotonic() > stop:
                    break
        return quick_record(signature, seconds, SIGNATURE_PLAN)

    def _adopt(self, record: ModelRecord) -> bool:
        """Put the plans of `record` in use, on all replicas or on none; False if one of them cannot be had any more."""
        assert self._options.plan_dir is not None
        cache = PlanCache(self._options.plan_dir)
        made: list[dict[str, Table]] = []
        try:
            for replica in self._replicas:
                made.append({})
                for name, signature in record.signatures.items():
                    plans = record.plans[name]
                    if not plans.twin:
                        made[-1][name] = self._make_table(replica, signature, plans, cache.place(self._key))
                for name, plans in record.plans.items():
                    if plans.twin:
                        made[-1][name] = replace(made[-1][plans.twin], plans=[])
        except (PlanUnavailable, KilnError) as error:
            _log.warning("what was planned for %s before does not serve: %s", self._path.name, error)
            for table in (table for tables in made for table in tables.values()):
                table.close()
            cache.drop(self._key)
            self._record = None
            for replica in self._replicas:
                replica.load()
            return False
        for replica, tables in zip(self._replicas, made, strict=True):
            replica.swap(tables)
        self.plans = record.plans
        self.is_planned = True
        self._share_out(max((r.streams for r in record.plans.values()), default=1))
        return True

    def _make_table(self, replica: Replica, signature: Signature, record: SignatureRecord, programs: Path) -> Table:
        options = self._options.planning
        own = replica.run_own(signature.name)
        workshop = Workshop(self._path, replica.loaded, programs)
        table = build_table(
            record, own, lambda name: workshop.build(name, signature), SIGNATURE_PLAN, pads=options.deterministic
        )
        if record.needed != {(SIGNATURE_PLAN, rows) for rows in record.chosen}:
            drawer = Drawer(signature, self._samples.get(signature.name))
            tolerance = options.precision_tolerance if options.precision != "f32" else options.tolerance
            problem = check_table(table, drawer, tolerance, own if replica.loaded is not None else None)
            if problem:
                table.close()
                raise PlanUnavailable(f"{signature.name}: {problem}")
        return table

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
                replica.own_run(signature.name)(inputs)

        return replay(path, self.signatures, decode=decode, run=run, keep_rows=self._options.planning.max_batch_rows)


def _starts_tensorflow(record: ModelRecord) -> bool:
    """Whether a plan that was chosen runs in TensorFlow."""
    names = {name for plans in record.plans.values() if not plans.twin for name, _ in plans.needed}
    return any(needs_tensorflow(name) for name in names)


def _can_start_cold(record: ModelRecord) -> bool:
    """Whether each signature has plans that need no TensorFlow."""
    return all(plans.twin or plans.cold for plans in record.plans.values())


def cold_record(record: ModelRecord) -> ModelRecord:
    """The same with the plans that need no TensorFlow, one batch at a time."""
    plans = {name: replace(p, chosen=p.cold, streams=1, shared="") for name, p in record.plans.items()}
    return replace(record, plans=plans)


def _time(run: Callable[[Tensors], Tensors], inputs: Tensors) -> float:
    start = time.perf_counter()
    run(inputs)
    return time.perf_counter() - start
