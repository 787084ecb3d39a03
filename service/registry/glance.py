"""Looking at a folder of models again at little cost: nothing is worked out anew while no file of it has changed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from service.registry.config import ModelConfigs
from service.registry.repository import Repository
from service.registry.watch import Look

_STIRRED_S = 60.0
_BUDGET_S = 2e-3
"""CPU time of a look at each of folders and files, once nothing has changed for a minute: what is left takes turns.

It is enough for 500 of either, but where one that was not looked at for seconds costs 70 µs (as measured on a virtual
machine) for 30: 200 models were 0.7 % of a core else.
"""

Stamp = tuple[int, int, int, int]
"""What tells a change of a file or folder: its inode, size, and times of modification and of change."""
Stamps = dict[str, Stamp]
"""By path."""


class Glance:
    """A `Look` at the folder `models` which calls `look` only where something has changed since it did last.

    New models and versions show in the folder and those of its models, so these are looked at apart from what is in
    them. Where configs name other places, and while the folder cannot be read, it is always a whole look.
    """

    def __init__(
        self,
        look: Look,
        models: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """`look` blocks; clocks are in seconds."""
        self._look = look
        self._models = models
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._parts: tuple[_Part, ...] = ()
        self._changed = 0.0
        self._found: Repository | None = None

    def __call__(self, configs: ModelConfigs) -> Repository:
        if any(config.path is not None for config in configs.values()):
            self._found = None
            return self._look(configs)
        if self._found is not None and self._is_current():
            return self._found
        self._found = None
        self._changed = self._clock()
        self._note(stamps_below(self._models))  # before the look: what changes meanwhile is seen at the next
        found = self._look(configs)
        self._found = found
        return found

    def _note(self, stamps: Stamps) -> None:
        root = str(self._models)
        outer = {path for path in stamps if path == root or os.path.dirname(path) == root}  # noqa: PTH120 - as below
        self._parts = tuple(
            _Part({path: stamp for path, stamp in stamps.items() if (path in outer) is is_outer})
            for is_outer in (True, False)
        )

    def _is_current(self) -> bool:
        is_stirred = self._clock() - self._changed < _STIRRED_S
        return all(part.is_current(self._cpu_clock, math.inf if is_stirred else _BUDGET_S) for part in self._parts)


class _Part:
    """Some of the files and folders, looked at in turns where the time is not enough for all."""

    def __init__(self, stamps: Stamps) -> None:
        self._stamps = list(stamps.items())
        self._next = 0

    def is_current(self, clock: Callable[[], float], budget_s: float) -> bool:
        """Whether what is looked at is as it was: from where the last time ended, and everything at most."""
        stop = clock() + budget_s
        for _ in self._stamps:
            path, stamp = self._stamps[self._next]
            self._next = (self._next + 1) % len(self._stamps)
            if _stamp(path) != stamp:
                return False
            if clock() >= stop:
                break
        return True


def stamps_below(folder: Path) -> Stamps:
    """The stamps of `folder` and of all in it; links are followed to where they lead, but not into it."""
    stamps = {str(folder): _stamp(str(folder))}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)  # noqa: PTH118 - a Path for each costs more than the look at it
            stamps[path] = _stamp(path)
    return stamps


def _stamp(path: str) -> Stamp:
    try:
        stat = os.stat(path)  # noqa: PTH116 - as above
    except OSError:  # it is gone, or a link that leads nowhere
        return (0, 0, 0, 0)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
