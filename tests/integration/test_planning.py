"""The child that plans, with real TensorFlow: what is refused, what ends it, what it is given and what it leaves."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.runtime import planning
from service.runtime.plan_record import PlanCache
from service.runtime.planning import Planning, PlanningOptions, Request, _send
from service.runtime.programs import program_name
from service.runtime.records import Chosen, ModelRecord, SignatureRecord
from service.tensors import Tensors
from tests.integration.saved_models import save, save_cnn
from tests.signatures import one

KEY = "key"
OTHERS = {"signature-pool", "frozen-pool"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models of this module are: ``cnn``, and ``words``, which takes strings, once only those of 13 bytes."""
    import tensorflow as tf

    root = tmp_path_factory.mktemp("models")
    save_cnn(root / "cnn")

    def thirteen(x: Any) -> Any:
        with tf.control_dependencies([tf.debugging.assert_equal(tf.strings.length(x), 13)]):
            return {"y": tf.strings.length(x)}

    words = {"x": (tf.string, (None,))}
    signatures: dict[str, Any] = {
        "serving_default": (lambda x: {"y": tf.strings.length(x)}, words),
        "thirteen": (thirteen, words),
    }
    save(root / "words", signatures)
    return root


def request(path: Path, cache: Path, **more: Any) -> Request:
    options = more.pop("options", PlanningOptions(4, budget_s=300.0))
    return Request(str(path), "CPU:0", KEY, str(cache), str(cache / "xla"), {}, options, **more)


def child(*faults: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.integration.bad_planner", *faults)


class Keep(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Refusals:
    """One planning with four plans that are wrong, each in its way; its record, and what was logged."""

    def __init__(self, root: Path, cache: Path) -> None:
        handler = Keep()
        self.logged = handler.records
        log = logging.getLogger("kiln.planner")
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        self.lines: list[str] = []
        faults = ("off=openvino", "off_when_large=openvino-1", "off_in_one_bucket=frozen", "off_at_second_run=xla")
        try:
            record = Planning(request(root / "cnn", cache), {}, child(*faults)).run(self.lines.append)
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
        assert record is not None
        self.record = record


@pytest.fixture(scope="module")
def refusals(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Refusals:
    return Refusals(root, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("plan", "rows", "where"),
    [("openvino", 1, ""), ("openvino-1", 1, " with large inputs"), ("frozen", 4, ""), ("xla", 1, "")],
)
def test_a_plan_made_wrong_on_purpose_is_refused(refusals: Refusals, plan: str, rows: int, where: str) -> None:
    """Wrong always, for large numbers only, in one bucket only, at the second run only: with the largest difference."""
    plans = refusals.record.plans["serving_default"]
    reason = plans.left_out[plan]
    assert reason.startswith(f"refused at {rows} rows: output 'output_0' differs by up to 0.25")
    assert reason.endswith(where)
    assert plan not in {m.plan for m in plans.measured} | {cell.plan for cell in plans.chosen.values()}
    told = [r for r in refusals.logged if f"serving_default: {plan}: refused" in r.getMessage()]
    assert [r.levelno for r in told] == [logging.WARNING]
    assert "0.25" in told[0].getMessage()


def test_the_other_plans_are_measured_all_the_same(refusals: Refusals) -> None:
    """Every bucket has a cost of each plan that is left."""
    plans = refusals.record.plans["serving_default"]
    names = {m.plan for m in plans.measured}
    assert names >= {"signature", *OTHERS}
    assert {m.rows for m in plans.measured} == {1, 2, 4}
    assert {cell.plan for cell in (*plans.chosen.values(), *plans.cold.values())} <= names
    assert plans.ranges == {}


def test_a_signature_that_is_the_same_function_has_a_twin(refusals: Refusals) -> None:
    """Keras exports a model under two names: it is planned once."""
    twin = refusals.record.plans["serve"]
    assert (twin.twin, twin.note) == ("serving_default", "the same as serving_default")
    assert twin.chosen == refusals.record.plans["serving_default"].chosen
    assert refusals.lines[0].startswith("serving_default: openvino-1, ")


def test_a_plan_that_ends_the_process_is_left_out(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A signal while compiling costs one child each; the others are planned by the next."""
    caplog.set_level(logging.WARNING, "kiln.planner")
    found = Planning(request(root / "cnn", tmp_path), {}, child("crash=openvino-1", "abort=xla")).run()
    assert found is not None
    plans = found.plans["serving_default"]
    assert {name: reason for name, reason in plans.left_out.items() if "child" in reason} == {
        "openvino-1": f"not available: its child process ended with {-signal.SIGSEGV}",
        "xla": f"not available: its child process ended with {-signal.SIGABRT}",
    }
    assert {m.plan for m in plans.measured} >= {"signature", "openvino", "frozen", *OTHERS}
    crashes = [m for m in caplog.messages if "its child process ended" in m and "not available" not in m]
    assert len(crashes) == 2
    assert PlanCache(tmp_path).find(KEY) == found
    programs = {file.name for file in (tmp_path / KEY / "serving_default").glob("*")}
    needed = plans.needed | {(cell.plan, cell.piece_rows) for cell in plans.cold.values()}
    assert programs <= {program_name(plan, rows) for plan, rows in needed} | {program_name("litert-f32", 0)}


STUB = "import json, sys, os, threading; request = json.loads(sys.stdin.readline()); skip = request['skip']; "
HANG = "threading.Event().wait()"
RECORD = ModelRecord("CPU:0", {"s": one()}, {}, {"s": SignatureRecord({1: Chosen("signature", 1, 0.1)})})


def stub(code: str) -> tuple[str, ...]:
    """A child of few lines, that knows its request and what to `skip`."""
    return (sys.executable, "-S", "-c", STUB + code)


def test_a_child_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that tells nothing for too long is killed, and begun anew without the plan that it was at."""
    monkeypatch.setattr(planning, "_SILENCE_S", 3.0)
    PlanCache(tmp_path).keep(KEY, RECORD, {})
    code = f"skip or (print('try xla 4', flush=True), {HANG}); print('tell', skip, flush=True)"
    lines: list[str] = []
    assert Planning(request(tmp_path, tmp_path), {}, stub(code)).run(lines.append) == RECORD
    assert lines == ["{'xla': 'not available: it took too long'}"]


@pytest.mark.parametrize(
    ("code", "children"),
    [
        ("sys.exit(3)", 1),
        ("print('try signature 4', flush=True); os.abort()", 1),
        ("print('try', 'plan-%d' % len(skip), '4', flush=True); os.abort()", 6),
    ],
)
def test_planning_that_never_ends_well_is_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: str, children: int
) -> None:
    """A child that dies at no plan, or at the signature's own, would again; and there are six at most."""
    caplog.set_level(logging.WARNING, "kiln.planner")
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x'); print('last words', file=sys.stderr, flush=True); " + code
    assert Planning(request(tmp_path, tmp_path), {}, stub(code)).run() is None
    assert count.read_text() == "x" * children
    assert caplog.messages[-1].startswith(f"{tmp_path} could not be planned, the signature plan serves it: last words")


def test_what_a_child_leaves_behind_is_ended(tmp_path: Path) -> None:
    """A process that it started, with its pipes, neither holds planning up nor lives on."""
    code = (
        f"pid = os.fork(); pid or {HANG}; os.write(1, ('tell %d\\n' % pid).encode()); "
        "os.write(1, b'try xla 1\\n'); skip or os.abort()"
    )
    PlanCache(tmp_path).keep(KEY, RECORD, {})
    lines: list[str] = []
    assert Planning(request(tmp_path, tmp_path), {}, stub(code)).run(lines.append) == RECORD
    assert len(lines) == 2
    for pid in map(int, lines):
        assert not _lives(pid)


def _lives(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        return " (python) Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_child_that_does_not_listen_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that is gone before it was asked is like one that dies."""
    command = (sys.executable, "-S", "-c", "import os, sys; os.close(0); sys.exit(5)")
    assert Planning(request(tmp_path, tmp_path), {}, command).run() is None
    assert "could not be planned" in caplog.text


def test_a_child_that_has_gone_is_not_asked_again(tmp_path: Path) -> None:
    """What it did not read is not written once more when its pipe is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdin:
        _send(stdin, request(tmp_path, tmp_path))
        assert stdin.closed


def test_cancelling_ends_the_child(tmp_path: Path) -> None:
    """Whoever waits for it is told that there is nothing; what was cancelled before it began never begins."""
    pid: list[int] = []
    told = threading.Event()

    def tell(line: str) -> None:
        pid.append(int(line))
        told.set()

    running = Planning(request(tmp_path, tmp_path), {}, stub(f"print('tell', os.getpid(), flush=True); {HANG}"))
    results: list[ModelRecord | None] = []
    thread = threading.Thread(target=lambda: results.append(running.run(tell)))
    thread.start()
    assert told.wait(30)
    running.cancel()
    thread.join(30)
    assert results == [None]
    with pytest.raises(ProcessLookupError):
        os.kill(pid[0], 0)
    early = Planning(request(tmp_path, tmp_path), {}, stub("print('tell 1', flush=True)"))
    early.cancel()
    assert early.run(tell) is None
    assert len(pid) == 1


def test_a_child_ends_with_its_parent(root: Path, tmp_path: Path) -> None:
    """It notices that its stdin is closed, whatever it is at."""
    process = subprocess.Popen(
        child(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(asdict(request(root / "cnn", tmp_path))) + "\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith("tell serving_default: ")
    process.stdin.close()
    assert process.wait(30) == 1
    process.stdout.close()
    assert PlanCache(tmp_path).find(KEY) is None


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The child's last words are the reason."""
    (tmp_path / "bad").mkdir()
    assert Planning(request(tmp_path / "bad", tmp_path), {}, child()).run() is None
    assert "could not be planned, the signature plan serves it: " in caplog.text
    assert "saved_model.pb" in caplog.text


def test_samples_reach_the_child(root: Path, tmp_path: Path) -> None:
    """Strings too: a signature that takes few words only is measured on those that were seen, and else not."""
    samples: dict[str, Tensors] = {"thirteen": {"x": np.array([b"thirteen long", b"\xff" * 13], object)}}
    options = PlanningOptions(2, "frozen")
    found = Planning(request(root / "words", tmp_path / "a", options=options), samples, child()).run()
    assert found is not None
    assert {m.plan for m in found.plans["thirteen"].measured} == {"signature", "frozen", "frozen-pool"}
    assert set(found.plans["serving_default"].chosen) == {1, 2}
    without = Planning(request(root / "words", tmp_path / "b", options=options), {}, child()).run()
    assert without is not None
    assert without.plans["thirteen"].note == "nothing drawn for its inputs suits the model"
    assert without.plans["thirteen"].measured == ()
