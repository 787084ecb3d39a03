"""The log: one line an event, for people or for machines."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator

import pytest

from service import logs

NAMES = ("kiln", "uvicorn", "uvicorn.error", "uvicorn.access")


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
