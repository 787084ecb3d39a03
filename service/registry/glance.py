"""Looking at a folder of models again at little cost: nothing is worked out anew while no file of it has changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from service.registry.config import ModelConfigs
from service.registry.repository import Repository
from service.registry.watch import Look

_STIRRED_S = 10.0
_LEAST_AT_ONCE = 128
_TURNS = 20
"""After ten seconds without a change, what is in a large folder of models is looked at in at most so many turns."""

Stamp = tuple[int, int, int, int]
"""What tells a change of a file or folder: its inode, size, and times of modification and of change."""
Stamps = dict[str, Stamp]
"""By path."""


class Glance:
    """A `Look` at the folder `models` which calls `look` only where something has changed since it did last.

    The folder and those of its models are looked at each time: there new models and versions show. What is in them
    takes turns where there is much of it and it has been quiet. Where configs name other places, and while the folder
    cannot be read, it is always a whole look.
    """

    def __init__(self, look: Look, models: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`look` blocks; `clock` is in seconds."""
        self._look = look
        self._models = models
        self._clock = clock
        self._outer: list[tuple[str, Stamp]] = []
        self._inner: list[tuple[str, Stamp]] = []
        self._next = 0
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
        self._outer = [(path, stamp) for path, stamp in stamps.items() if path in outer]
        self._inner = [(path, stamp) for path, stamp in stamps.items() if path not in outer]

    def _is_current(self) -> bool:
        if not _are_current(self._outer):
            return False
        if self._clock() - self._changed < _STIRRED_S:
            return _are_current(self._inner)
        start = self._next if self._next < len(self._inner) else 0
        self._next = start + max(_LEAST_AT_ONCE, -(-len(self._inner) // _TURNS))
        return _are_current(self._inner[start : self._next])


def stamps_below(folder: Path) -> Stamps:
    """The stamps of `folder` and of all in it; links are followed to where they lead, but not into it."""
    stamps = {str(folder): _stamp(str(folder))}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)  # noqa: PTH118 - a Path for each costs more than the look at it
            stamps[path] = _stamp(path)
    return stamps


def _are_current(stamps: Iterable[tuple[str, Stamp]]) -> bool:
    return all(_stamp(path) == stamp for path, stamp in stamps)


def _stamp(path: str) -> Stamp:
    try:
        stat = os.stat(path)  # noqa: PTH116 - as above
    except OSError:  # it is gone, or a link that leads nowhere
        return (0, 0, 0, 0)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
