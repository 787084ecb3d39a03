"""What a client may ask of and change in log and trace while the server runs.

Source: Triton's logging and trace extensions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from service.errors import InvalidArgument, Unimplemented
from service.logs import form_in_use

_ROOT = "kiln"
_SWITCHES = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
"""From the least severe to the most; what is shown is everything from some level on."""
_NOTHING = logging.CRITICAL + 1
_TRACE_SETTINGS = ("trace_level", "trace_rate", "trace_count", "trace_file", "trace_mode", "log_frequency")

Settings = Mapping[str, object]


def log_settings() -> dict[str, Any]:
    """The settings in force."""
    level = logging.getLogger(_ROOT).getEffectiveLevel()
    return {
        "log_file": "",
        **{name: level <= own for name, own in _SWITCHES.items()},
        "log_verbose_level": int(level <= logging.DEBUG),
        "log_format": form_in_use(),
    }


def change_log_settings(changes: Settings) -> dict[str, Any]:
    """Show more or less from now on; a value of None changes nothing. Returns the settings in force then.

    Raises:
        InvalidArgument: a setting is unknown or of the wrong type, cannot be changed while the server
            runs, or would show less severe records without more severe ones.
    """
    wanted = log_settings()
    for name, value in changes.items():
        if name not in wanted:
            raise InvalidArgument(f"unknown log setting {name!r}: {', '.join(wanted)} expected")
        if value is not None:
            _check_log_setting(name, value, wanted[name])
            wanted[name] = value
    logging.getLogger(_ROOT).setLevel(_level(wanted))
    return log_settings()


def _check_log_setting(name: str, value: object, present: object) -> None:
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise InvalidArgument(f"log setting {name}: true or false expected, got {value!r}")
    elif name == "log_verbose_level":
        if type(value) is not int or value < 0:
            raise InvalidArgument(f"log setting {name}: a whole number of at least 0 expected, got {value!r}")
    elif value != present:
        raise InvalidArgument(f"log setting {name}: {present!r} until the server is started anew, got {value!r}")


def _level(wanted: Mapping[str, Any]) -> int:
    names = ("log_verbose_level", *_SWITCHES)
    shown = [bool(wanted[name]) for name in names]
    if shown != sorted(shown):
        first = shown.index(True)
        missing = shown.index(False, first)
        raise InvalidArgument(
            f"log setting {names[missing]}: true expected while {names[first]} is on: it is the more severe"
        )
    levels = (logging.DEBUG, *_SWITCHES.values())
    return next((level for level, is_shown in zip(levels, shown, strict=True) if is_shown), _NOTHING)


def trace_settings(share: float | None = None) -> dict[str, Any]:
    """Of a server that traces a `share` of its requests over OpenTelemetry; None: it does not, the level is ``OFF``.

    ``trace_rate`` is Triton's: one of so many requests is traced, 0 for those alone whose callers want it.
    """
    if share is None:
        return {"trace_level": ["OFF"]}
    rate = str(round(1 / share)) if share else "0"
    return {"trace_level": ["TIMESTAMPS"], "trace_rate": rate, "trace_mode": "opentelemetry"}


def change_trace_settings(changes: Settings, share: float | None = None) -> dict[str, Any]:
    """Take what is in force already, as a string or a list; a value of None, or an empty list, changes nothing.

    Raises:
        Unimplemented: a setting is to be changed, which the server's start alone decides.
        InvalidArgument: a setting is unknown.
    """
    present = trace_settings(share)
    for name, value in changes.items():
        if name not in _TRACE_SETTINGS:
            raise InvalidArgument(f"unknown trace setting {name!r}: {', '.join(_TRACE_SETTINGS)} expected")
        if value not in (None, []) and _as_list(value) != _as_list(present.get(name)):
            reason = "requests are not traced, trace_level is OFF" if share is None else "the server's start decides it"
            raise Unimplemented(f"trace setting {name}: {reason}; got {value!r}")
    return present


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value
