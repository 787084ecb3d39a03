"""The log: one line an event, for people or for machines, with the ids of the request that it is about."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from service.trace_context import NOBODY, Caller, caller

_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access")
_ACCESS = "kiln.access"


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """What a line has beside its message: its own ``fields``, then the ids of the request that it is about.

    That is the ``caller`` which the record was given, else the one whom the current task answers.
    """
    given = record.__dict__
    who = given["caller"] if "caller" in given else caller.get()
    who = who if isinstance(who, Caller) else NOBODY
    ids = {"request_id": who.request_id, "trace_id": who.trace_id}
    return {**{name: value for name, value in ids.items() if value}, **given.get("fields", {})}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, process if there are several, logger, message, fields, exception."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


class ConsoleFormatter(logging.Formatter):
    """Time, level, process if there are several, logger and message, then its fields as ``name=value``."""

    def __init__(self, process: str = "") -> None:
        which = f"{process:11} " if process else ""
        super().__init__(f"%(asctime)s %(levelname)-7s {which}%(name)-15s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = "".join(f" {name}={_plain(value)}" for name, value in fields_of(record).items())
        return super().formatMessage(record) + fields


def _plain(value: object) -> str:
    """A value that cannot be taken for more than one, or for another line: callers choose some of them."""
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(' "=') else json.dumps(text)


def configure(level: str, form: str, process: str = "", *, access: bool = False) -> None:
    """Send all logs to stderr at `level`, as ``console`` or ``json`` lines, which name `process` if it is given.

    With `access` each request is told of too.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if form == "json" else ConsoleFormatter(process))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("kiln").setLevel(level.upper())
    logging.getLogger(_ACCESS).setLevel(logging.INFO if access else logging.NOTSET)
    for name in _UVICORN:
        logging.getLogger(name).setLevel(logging.WARNING)


def form_in_use() -> str:
    """The form of the log's lines: ``console`` or ``json``."""
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
    return "json" if is_json else "console"
