"""The log: one line an event, for people or for machines."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest

from service import logs
from service.errors import Code
from service.following.access_log import log_access
from service.following.followed import Followed, SpanIds
from service.trace_context import Caller, caller
from tests.fakes import DOUBLE, rows

NAMES = ("kiln", "kiln.access", "uvicorn", "uvicorn.error", "uvicorn.access")


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """Reads what the log wrote to stderr; the loggers are put back at the end."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in NAMES}
    root.handlers = []
    yield lambda: capsys.readouterr().err
    root.handlers, root.level = handlers, level
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


def test_a_line_for_people_has_time_level_and_logger(written: Callable[[], str]):
    """The console form is one aligned line."""
    logs.configure("info", "console")
    logging.getLogger("kiln.server").info("listens on %d", 8501)
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    kiln\.server     listens on 8501\n", written())


def test_a_line_for_machines_is_one_json_object(written: Callable[[], str]):
    """The JSON form has time (UTC), level, logger and message, whatever the message has in it."""
    logs.configure("info", "json")
    logging.getLogger("kiln.batcher").warning('two\nlines, "quoted" %s', "é")
    (line,) = written().splitlines()
    event = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    assert event == {"level": "warning", "logger": "kiln.batcher", "message": 'two\nlines, "quoted" é'}


def test_lines_of_several_processes_tell_whose_they_are(written: Callable[[], str]):
    """In both forms, between the level and the logger."""
    logs.configure("info", "console", "frontend-1")
    logging.getLogger("kiln.server").info("ready")
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    frontend-1  kiln\.server     ready\n", written())
    logs.configure("info", "json", "engine")
    logging.getLogger("kiln.server").info("ready")
    assert json.loads(written())["process"] == "engine"


def test_the_time_is_that_of_the_event_in_utc():
    """The time in the JSON form comes from the record, to the millisecond."""
    record = logging.LogRecord("kiln", logging.INFO, "x.py", 1, "hello", None, None)
    record.created, record.msecs = 1_000_000_000.0, 7.0
    assert json.loads(logs.JsonFormatter().format(record))["time"] == "2001-09-09T01:46:40.007Z"


def test_an_exception_stays_in_its_line(written: Callable[[], str]):
    """In the JSON form the traceback is a field of the event, not lines of its own."""
    logs.configure("info", "json")
    logging.getLogger("kiln").error("the model failed", exc_info=ValueError("no such weight"))
    (line,) = written().splitlines()
    event = json.loads(line)
    assert event["message"] == "the model failed"
    assert event["exception"].endswith("ValueError: no such weight")


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_the_level_is_the_least_severe_shown(level: str, shown: list[str], written: Callable[[], str]):
    """Kiln's own events below the level are left out."""
    logs.configure(level, "json")
    for each in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger("kiln.registry"), each)("event")
    assert [json.loads(line)["level"] for line in written().splitlines()] == shown


@pytest.mark.parametrize("name", ["uvicorn.error", "uvicorn.access", "h5py"])
def test_others_are_heard_only_when_they_warn(name: str, written: Callable[[], str]):
    """Libraries do not fill the log, whatever Kiln's own level."""
    logs.configure("debug", "console")
    logging.getLogger(name).info("chatter")
    logging.getLogger(name).warning("trouble")
    assert re.search(rf"WARNING {name} +trouble\n$", text := written())
    assert "chatter" not in text


def test_configuring_again_replaces_what_was(written: Callable[[], str]):
    """An event is written once, in the last form asked for."""
    logs.configure("info", "console")
    logs.configure("info", "json")
    logging.getLogger("kiln").info("once")
    assert json.loads(written())["message"] == "once"


@pytest.fixture
def asked() -> Iterator[None]:
    """The current task answers a request."""
    token = caller.set(Caller("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", True, "r 1"))
    yield
    caller.reset(token)


@pytest.mark.usefixtures("asked")
def test_a_line_that_belongs_to_a_request_has_its_ids(written: Callable[[], str]):
    """In both forms, before the traceback; quoted where they could be taken for more."""
    logs.configure("info", "json")
    logging.getLogger("kiln.rest").info("failed")
    event = json.loads(written())
    assert (event["request_id"], event["trace_id"]) == ("r 1", "4bf92f3577b34da6a3ce929d0e0e4736")
    logs.configure("info", "console")
    logging.getLogger("kiln.rest").error("failed", exc_info=ValueError("why"))
    first, *others = written().splitlines()
    assert first.endswith('failed request_id="r 1" trace_id=4bf92f3577b34da6a3ce929d0e0e4736')
    assert others[-1] == "ValueError: why"


@pytest.mark.usefixtures("asked")
def test_a_line_may_belong_to_another_request(written: Callable[[], str]):
    """What is logged of a batch is of the request that the record names, not of the one that happens to be answered."""
    logs.configure("info", "json")
    log = logging.getLogger("kiln.batcher")
    log.info("one", extra={"caller": Caller(request_id="r-2")})
    log.info("none", extra={"caller": None})
    one, none = map(json.loads, written().splitlines())
    assert one["request_id"] == "r-2"
    assert "trace_id" not in one
    assert "request_id" not in none


def followed(code: Code | None = None, model: str = "double") -> Followed:
    told = Followed(Caller(request_id="r-1"), SpanIds(255, 1, 0), is_kept=False)
    told.model, told.protocol, told.version, told.code = model, "rest-v2", 7, code
    told.started, told.ended = 10.0, 10.0015
    told.asks(DOUBLE, rows(1, 2))
    return told


def test_the_access_log_has_a_line_for_each_request(written: Callable[[], str]):
    """Protocol, model, version, outcome, time, rows and ids, shown whatever the level."""
    logs.configure("error", "json", access=True)
    log_access(followed())
    event = json.loads(written())
    del event["time"]
    assert event == {
        "level": "info",
        "logger": "kiln.access",
        "message": "predict",
        "protocol": "rest-v2",
        "model": "double",
        "version": 7,
        "code": "ok",
        "ms": 1.5,
        "rows": 2,
        "request_id": "r-1",
        "trace_id": f"{255:032x}",
    }


def test_a_name_cannot_make_a_line(written: Callable[[], str]):
    """What callers choose is quoted in the console form."""
    logs.configure("info", "console", access=True)
    log_access(followed(Code.NOT_FOUND, "a\nb=c"))
    (line,) = written().splitlines()
    assert ' model="a\\nb=c" version=7 code=not_found ms=1.5 ' in line


def test_the_access_log_is_off_again(written: Callable[[], str]):
    """Configured anew without it, its level is that of Kiln's log."""
    logs.configure("warning", "json", access=True)
    logs.configure("warning", "json")
    log_access(followed())
    assert written() == ""
