"""The access log: one line for each predict request, once it has been answered or refused."""

from __future__ import annotations

import logging

from service.following.followed import Followed

_log = logging.getLogger("kiln.access")


def log_access(followed: Followed) -> None:
    """Write the line: protocol, model, version, code (``ok`` or an error's), ms, rows, and the ids that there are."""
    fields = {
        "protocol": followed.protocol,
        "model": followed.model,
        "version": "" if followed.version is None else followed.version,
        "code": "ok" if followed.code is None else followed.code.value,
        "ms": round((followed.ended - followed.started) * 1e3, 3),
        "rows": followed.rows,
        "request_id": followed.caller.request_id,
        "trace_id": followed.trace_id,
    }
    given = {name: value for name, value in fields.items() if value != ""}
    _log.info("predict", extra={"caller": None, "fields": given})
