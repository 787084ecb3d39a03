"""Which versions should be there, and the one next step towards that; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from service.registry.lifecycle import State

Transition = Literal["availability", "resource"]
_MOVING = {State.LOADING, State.WARMING, State.DRAINING}


@dataclass(frozen=True)
class Latest:
    """The `count` highest versions."""

    count: int = 1


@dataclass(frozen=True)
class All:
    """Every version."""


@dataclass(frozen=True)
class Specific:
    """These versions and no others."""

    versions: frozenset[int]


VersionPolicy = Latest | All | Specific


@dataclass(frozen=True)
class Load:
    """Bring this version in."""

    version: int


@dataclass(frozen=True)
class Unload:
    """Let this version go."""

    version: int


def wanted(versions: Iterable[int], policy: VersionPolicy) -> set[int]:
    """The versions that `policy` wants among those that exist."""
    if isinstance(policy, Specific):
        return set(policy.versions).intersection(versions)
    if isinstance(policy, All):
        return set(versions)
    return set(sorted(versions, reverse=True)[: policy.count])


def next_action(
    want: set[int], states: Mapping[int, State], transition: Transition = "availability"
) -> Load | Unload | None:
    """The next step of one model, or None where there is nothing to do but wait.

    `states` has every version that is known. One step at a time. With ``availability`` what is no
    longer wanted goes only when everything wanted is READY, so a new version that fails never takes
    the old one down; with ``resource`` it goes first, so that both never need room at once.
    """
    if any(state in _MOVING for state in states.values()):
        return None
    missing = [v for v in want if states.get(v, State.NEW) is State.NEW]
    surplus = [v for v, state in states.items() if state is State.READY and v not in want]
    if surplus and (not want or all(states.get(v) is State.READY for v in want)):
        return Unload(min(surplus))
    if surplus and missing and transition == "resource":
        return Unload(min(surplus))
    if missing:
        return Load(max(missing))
    return None
