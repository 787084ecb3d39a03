"""Request parameters that mean something here; those that nobody knows are ignored.

Source: Triton's schedule policy and classification extensions.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.errors import InvalidArgument

Parameters = Mapping[str, object]
"""Values as plain Python: bool, int, float, str; whatever else there is, is of no known parameter's type."""

_LONGEST = 2**63 - 1


def timeout_s(parameters: Parameters) -> float | None:
    """Seconds that the request gives itself by ``timeout``, which is in µs; None for none, or for 0.

    Raises:
        InvalidArgument: it is no whole number of at least 0.
    """
    if "timeout" not in parameters:
        return None
    return whole_number(parameters["timeout"], "parameter timeout (µs)") / 1e6 or None


def priority(parameters: Parameters) -> int:
    """The request's ``priority``: 1 goes first, 0 is none; see `service.batching.queue.level_of`.

    Raises:
        InvalidArgument: it is no whole number of at least 0.
    """
    return whole_number(parameters["priority"], "parameter priority") if "priority" in parameters else 0


def whole_number(value: object, name: str, least: int = 0) -> int:
    """`value` if it is an integer of at least `least`, and of 63 bits at most; `InvalidArgument` otherwise."""
    if type(value) is not int or not least <= value <= _LONGEST:
        raise InvalidArgument(f"{name}: a whole number of at least {least} expected, got {value!r}")
    return value


def flag(parameters: Parameters, name: str, *, default: bool = False) -> bool:
    """The boolean of that name, else `default`; `InvalidArgument` for anything else."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidArgument(f"parameter {name}: true or false expected, got {value!r}")
    return value


def text(parameters: Parameters, name: str) -> str:
    """The string of that name, else ``""``; `InvalidArgument` for anything else."""
    value = parameters.get(name, "")
    if not isinstance(value, str):
        raise InvalidArgument(f"parameter {name}: a string expected, got {value!r}")
    return value
