"""The log: one line an event, for people or for machines."""

from __future__ import annotations

import json
import logging
import time

_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, process if there are several, logger, message, exception if any."""

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
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


def configure(level: str, form: str, process: str = "") -> None:
    """Send all logs to stderr at `level`, as ``console`` or ``json`` lines, which name `process` if it is given."""
    handler = logging.StreamHandler()
    if form == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        which = f"{process:11} " if process else ""
        form = f"%(asctime)s %(levelname)-7s {which}%(name)-15s %(message)s"
        handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("kiln").setLevel(level.upper())
    for name in _UVICORN:
        logging.getLogger(name).setLevel(logging.WARNING)


def form_in_use() -> str:
    """The form of the log's lines: ``console`` or ``json``."""
    is_json = any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
    return "json" if is_json else "console"
