"""Planning in a child process: what it compiles can end the child, not the server; and it yields to whatever else runs.

The parent sends a `Request` as JSON and follows on stdout what is tried; a child that dies is begun
anew without the plan that it was at.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
from pydantic import TypeAdapter

from service.errors import KilnError
from service.runtime.base import PlanName, Precision, buckets_up_to
from service.runtime.candidates import Candidates, Workshop, candidate_names, needs_tensorflow, stream_names
from service.runtime.devices import load_tensorflow
from service.runtime.drawing import Drawer
from service.runtime.parity import Tolerance
from service.runtime.plan_record import PlanCache, usable_cores
from service.runtime.planner import REFUSED, Budget, Candidate, PlanOptions, Survey, unplanned
from service.runtime.programs import program_name
from service.runtime.records import SIGNATURE_PLAN, ModelRecord, SignatureRecord
from service.runtime.savedmodel import SavedModel
from service.runtime.xla import keep_programs_in
from service.tensors import DEFAULT_SIGNATURE, Signature, Tensors

_log = logging.getLogger("kiln.planner")
_NICENESS = 19
_SILENCE_S = 300.0
"""A child that tells nothing for so long is ended: what it tries hangs."""
_MOST_CHILDREN = 6
_LAST_LINES = 20
_DETERMINISTIC_ROWS = 8

RANDOM_OPERATIONS = frozenset(
    "RandomUniform RandomUniformInt RandomStandardNormal ParameterizedTruncatedNormal TruncatedNormal RandomShuffle "
    "Multinomial RandomGamma RandomPoisson RandomPoissonV2 StatefulUniform StatefulUniformFullInt StatefulUniformInt "
    "StatefulStandardNormal StatefulStandardNormalV2 StatefulTruncatedNormal StatefulRandomBinomial RngSkip "
    "RngReadAndSkip AssignVariableOp AssignAddVariableOp AssignSubVariableOp ResourceScatterAdd ResourceScatterUpdate "
    "LookupTableInsertV2 LookupTableRemoveV2 QueueEnqueueV2 QueueDequeueV2 StackPushV2 StackPopV2 Timestamp".split()
)
"""A signature that may run one of these answers differently from run to run, or leaves a trace."""


@dataclass(frozen=True)
class PlanningOptions:
    """How a version is planned; see the settings and the fields of `ModelConfig` of the same names.

    `buckets` empty: powers of two up to `max_batch_rows`. With `deterministic` there is one bucket.
    """

    max_batch_rows: int
    plan: PlanName = "auto"
    buckets: tuple[int, ...] = ()
    budget_s: float = 60.0
    tolerance: Tolerance = field(default_factory=Tolerance)
    deterministic: bool = False
    precision: Precision = "f32"
    precision_tolerance: Tolerance = field(default_factory=lambda: Tolerance(1e-2, 1e-2))

    @property
    def all_buckets(self) -> tuple[int, ...]:
        """The batch sizes that plans are prepared for, ascending."""
        if self.deterministic:
            return (min(max(self.buckets, default=_DETERMINISTIC_ROWS), self.max_batch_rows),)
        if self.buckets:
            return tuple(sorted({min(rows, self.max_batch_rows) for rows in self.buckets} | {self.max_batch_rows}))
        return buckets_up_to(self.max_batch_rows)


@dataclass(frozen=True)
class Request:
    """What the child is asked: to plan the SavedModel at `path` on `device`, and to write the record into `cache`.

    `programs_dir` keeps what XLA compiles; `skip` has plans that are not tried, with the reason.
    """

    path: str
    device: str
    key: str
    cache: str
    programs_dir: str
    about: dict[str, Any]
    options: PlanningOptions
    allow_operations: tuple[str, ...] = ()
    samples: str | None = None
    skip: dict[str, str] = field(default_factory=dict)


_ADAPTER = TypeAdapter(Request)


class Planning:
    """Plans one version; `run` blocks and `cancel`, from another thread, ends it."""

    def __init__(self, request: Request, samples: Mapping[str, Tensors], command: tuple[str, ...] = ()) -> None:
        """`command` stands in for the child, in tests."""
        self._request = request
        self._samples = samples
        self._command = command or (sys.executable, "-P", "-m", "service.runtime.planning")
        self._child: subprocess.Popen[str] | None = None
        self._is_cancelled = False
        self._lock = threading.Lock()

    def run(self, tell: Callable[[str], None] = lambda line: None) -> ModelRecord | None:  # noqa: ARG005
        """The record, which is in the cache then; None if planning could not be finished, which is logged."""
        cache, skip = PlanCache(Path(self._request.cache)), dict(self._request.skip)
        with tempfile.TemporaryDirectory(prefix="kiln-plan-") as work:
            samples = None
            if self._samples:
                samples = str(Path(work) / "samples.npz")
                write_samples(Path(samples), self._samples)
            for _ in range(_MOST_CHILDREN):
                request = replace(self._request, samples=samples, skip=dict(skip))
                status, at, last = self._run_child(request, Path(work), tell)
                if self._is_cancelled:
                    return None
                if status == 0:
                    record = cache.find(request.key)
                    if record is not None:
                        self._log_left_out(record)
                    return record
                if at in ("", SIGNATURE_PLAN):
                    break
                reason = f"its child process ended with {status}" if status is not None else "it took too long"
                _log.warning("%s: %s: %s: %s", self._request.path, at, reason, last)
                skip[at] = f"not available: {reason}"
        _log.warning("%s could not be planned, the signature plan serves it: %s", self._request.path, last)
        return None

    def _log_left_out(self, record: ModelRecord) -> None:
        """Every plan that was not used, and why: a wrong one with the largest difference, as a warning."""
        for name, plans in record.plans.items():
            for plan, reason in plans.left_out.items() if not plans.twin else ():
                level = logging.WARNING if reason.startswith(REFUSED) else logging.INFO
                _log.log(level, "%s: %s: %s: %s", self._request.path, name, plan, reason)

    def cancel(self) -> None:
        """End the child, if there is one; `run` returns None then."""
        with self._lock:
            self._is_cancelled = True
            if self._child is not None:
                _end(self._child)

    def _run_child(self, request: Request, work: Path, tell: Callable[[str], None]) -> tuple[int | None, str, str]:
        """Exit code (None: ended for its silence), the plan that it was at, and its last words."""
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TMPDIR": str(work)}
        environment.pop("TF_XLA_FLAGS", None)
        with self._lock:
            if self._is_cancelled:
                return 1, "", ""
            self._child = child = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment, start_new_session=True,
            )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        last: deque[str] = deque(maxlen=_LAST_LINES)
        errors = threading.Thread(target=lambda: last.extend(child.stderr or ()), daemon=True)
        errors.start()
        with child:
            _send(child.stdin, request)
            at, is_hung = _follow(child, tell)
            status = child.wait()
            _end(child)
            errors.join()
        return None if is_hung else status, at, " ".join(line.strip() for line in last if line.strip())[-300:]


def _end(child: subprocess.Popen[str]) -> None:
    """End the child, and what it has started: a process of its own that lives on holds its pipes open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _send(stdin: IO[str], request: Request) -> None:
    """The request in one line; what stays open tells the child that its parent lives."""
    try:
        stdin.write(json.dumps(asdict(request), default=lambda value: getattr(value, "value", str(value))) + "\n")
        stdin.flush()
    except OSError:
        _log.debug("the child ended before it was asked")
        with contextlib.suppress(OSError):
            stdin.close()  # which would try once more, and raise, at the end


def _follow(child: subprocess.Popen[str], tell: Callable[[str], None]) -> tuple[str, bool]:
    """Read what the child tells until it ends: the plan that it was at, and whether it had to be ended."""
    heard = [time.monotonic()]
    is_hung = threading.Event()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            is_dead = child.poll() is not None
            if not is_dead and time.monotonic() - heard[0] > _SILENCE_S:
                is_hung.set()
            if is_dead or is_hung.is_set():
                _end(child)
                return

    threading.Thread(target=watch, daemon=True).start()
    at = ""
    assert child.stdout is not None
    for line in child.stdout:
        heard[0] = time.monotonic()
        word, _, rest = line.strip().partition(" ")
        if word == "try":
            at = rest.partition(" ")[0]
        elif word == "tell":
            tell(rest)
    done.set()
    return at, is_hung.is_set()


def write_samples(file: Path, samples: Mapping[str, Tensors]) -> None:
    """Inputs by signature and name as an ``.npz`` without pickles: strings as bytes and lengths."""
    arrays: dict[str, Any] = {}
    for number, (signature, tensors) in enumerate(sorted(samples.items())):
        for position, (name, array) in enumerate(sorted(tensors.items())):
            key = f"{number}_{position}"
            arrays[f"{key}_name"] = np.array(json.dumps([signature, name]))
            if array.dtype.kind == "O":
                flat = [bytes(item) for item in array.ravel()]
                arrays[f"{key}_lengths"] = np.array([len(item) for item in flat], np.int64).reshape(array.shape)
                arrays[f"{key}_bytes"] = np.frombuffer(b"".join(flat), np.uint8)
            else:
                arrays[f"{key}_raw"] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
                arrays[f"{key}_shape"] = np.array(array.shape, np.int64)
    np.savez(file, **arrays)


def read_samples(file: Path, signatures: Mapping[str, Signature]) -> dict[str, Tensors]:
    """What `write_samples` wrote; types are those of the signatures."""
    found: dict[str, Tensors] = {}
    with np.load(file) as stored:
        for key in [name.removesuffix("_name") for name in stored.files if name.endswith("_name")]:
            signature, name = json.loads(str(stored[f"{key}_name"]))
            if f"{key}_raw" in stored:
                dtype = signatures[signature].input_by_name[name].dtype.numpy
                array = np.frombuffer(stored[f"{key}_raw"].tobytes(), dtype).reshape(stored[f"{key}_shape"])
            else:
                data, lengths = stored[f"{key}_bytes"].tobytes(), stored[f"{key}_lengths"]
                ends = np.cumsum(lengths.ravel())
                array = np.empty(lengths.size, object)
                for i, (end, length) in enumerate(zip(ends, lengths.ravel(), strict=True)):
                    array[i] = data[end - length : end]
                array = array.reshape(lengths.shape)
            found.setdefault(signature, {})[name] = array
    return found


def plan_model(
    model: SavedModel, request: Request, samples: Mapping[str, Tensors], tell: Callable[[str], None]
) -> ModelRecord:
    """Survey every signature of a loaded model; `tell` gets lines: ``try PLAN ROWS``, ``tell TEXT``."""
    options = request.options
    plans: dict[str, SignatureRecord] = {}
    budget = Budget(options.budget_s)
    ordered = sorted(model.signatures.values(), key=lambda s: s.name != DEFAULT_SIGNATURE)
    place = PlanCache(Path(request.cache)).place(request.key)
    workshop = Workshop(Path(request.path), model, place)
    tried = candidate_names(options.plan, model.device, options.precision)
    cores = usable_cores()
    for signature in ordered:
        candidates = Candidates(workshop, signature, options.tolerance, options.precision_tolerance, request.skip)
        if (twin := _twin(signature, model)) is not None:
            plans[signature.name] = replace(plans[twin], twin=twin, note=f"the same as {twin}")
            continue
        names = tried
        plan_options = PlanOptions(
            options.all_buckets,
            budget,
            forced=options.plan not in ("auto", SIGNATURE_PLAN),
            steady=options.deterministic,
            cores=cores,
            streams=_with_streams(candidates, names, cores),
            report=lambda plan, rows: tell(f"try {plan or SIGNATURE_PLAN} {rows}"),
            is_cold=lambda plan: not needs_tensorflow(plan),
        )
        survey = Survey(signature, model.plan(signature), plan_options, sample=samples.get(signature.name))
        tell(f"tell {signature.name}: {', '.join(names) or SIGNATURE_PLAN}")
        repeats = not model.operations(signature) & RANDOM_OPERATIONS
        try:
            record = survey.run(candidates.of(names), repeats=repeats)
        except KilnError as error:
            record = unplanned(plan_options.buckets if signature.batched else (1,), f"could not be planned: {error}")
        record.left_out.update(candidates.skipped)
        plans[signature.name] = record
    return ModelRecord(model.device, dict(model.signatures), dict(model.left_out), plans)


def _with_streams(candidates: Candidates, names: tuple[str, ...], cores: int) -> Callable[[int], list[Candidate]]:
    return lambda streams: candidates.of(stream_names(names, streams, cores))


def _twin(signature: Signature, model: SavedModel) -> str | None:
    """The default signature's name, if `signature` is the same function: Keras exports its model under two names.

    They count as the same if they look alike, run the same operations and give the very same answers.
    """
    default = model.signatures.get(DEFAULT_SIGNATURE)
    if default is None or default is signature or default.describe() != signature.describe():
        return None
    if model.operations(default) != model.operations(signature):
        return None
    drawer, plans = Drawer(default), (model.plan(default).prepare(1), model.plan(signature).prepare(1))
    try:
        for inputs in (drawer.batch(1), drawer.batch(5), *(edge for _, edge in drawer.edges(2))):
            first, second = (run(inputs) for run in plans)
            if any(not np.array_equal(first[name], second[name]) for name in first):
                return None
    except (KilnError, TypeError):
        return None
    return default.name


def _end_with_parent(stdin: TextIO) -> None:
    def watch() -> None:
        stdin.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _clear_programs(place: Path, record: ModelRecord) -> None:
    """Remove what was compiled for plans that were not chosen."""
    for name, plans in record.plans.items():
        cells = plans.needed | {(cell.plan, cell.piece_rows) for cell in plans.cold.values()}
        wanted = {program_name(plan, rows) for plan, rows in cells} | {program_name(plan, 0) for plan, _ in cells}
        wanted |= {
            program_name(f"litert-{p}", 0) for p in ("f32", "int8") if any("litert" in plan for plan, _ in cells)
        }
        for file in (place / name).glob("*"):
            if file.name not in wanted:
                file.unlink()


def main() -> int:
    """Plan as the request on stdin says, and write the record; 0 if that was done."""
    os.nice(_NICENESS)
    with contextlib.suppress(OSError):  # should memory run out, no other process is to go for it
        Path("/proc/self/oom_score_adj").write_text("1000")
    request = _ADAPTER.validate_json(sys.stdin.readline())
    _end_with_parent(sys.stdin)
    Path(request.programs_dir).mkdir(parents=True, exist_ok=True)
    keep_programs_in(Path(request.programs_dir))
    load_tensorflow()
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is none of the parent's

    def tell(line: str) -> None:
        output.write(line + "\n")

    try:
        model = SavedModel(Path(request.path), request.device, allow_operations=request.allow_operations)
        samples = read_samples(Path(request.samples), model.signatures) if request.samples else {}
        record = plan_model(model, request, samples, tell)
    except KilnError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    cache = PlanCache(Path(request.cache))
    _clear_programs(cache.place(request.key), record)
    cache.keep(request.key, record, request.about)
    output.flush()
    return 0


if __name__ == "__main__":
    os._exit(main())  # libraries' threads have nothing left to do
