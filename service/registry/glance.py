"""Looking at a folder of models again at little cost: nothing is worked out anew while no file of it has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from service.registry.config import ModelConfigs
from service.registry.repository import Repository
from service.registry.watch import Look

Stamps = dict[str, tuple[int, int, int, int]]
"""What tells a change of a file or folder, by path: its inode, size, and times of modification and of change."""


class Glance:
    """A `Look` at the folder `models` which calls `look` only where something has changed since it did last.

    Where configs name other places, and while the folder cannot be read, it is always a whole look.
    """

    def __init__(self, look: Look, models: Path, *, walk: Callable[[Path], Stamps] | None = None) -> None:
        """`walk` stamps all that lies in a folder, itself included; blocks, as `look` does."""
        self._look = look
        self._models = models
        self._walk = walk or stamps_below
        self._stamps: Stamps = {}
        self._found: Repository | None = None

    def __call__(self, configs: ModelConfigs) -> Repository:
        if any(config.path is not None for config in configs.values()):
            self._found = None
            return self._look(configs)
        if self._found is not None and _are_current(self._stamps):
            return self._found
        self._found = None
        self._stamps = self._walk(self._models)  # before the look: what changes meanwhile is seen at the next
        found = self._look(configs)
        self._found = found
        return found


def stamps_below(folder: Path) -> Stamps:
    """The stamps of `folder` and of all in it; links are followed to where they lead, but not into it."""
    stamps = {str(folder): _stamp(str(folder))}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)  # noqa: PTH118 - a Path for each costs more than the look at it
            stamps[path] = _stamp(path)
    return stamps


def _are_current(stamps: Stamps) -> bool:
    return all(_stamp(path) == stamp for path, stamp in stamps.items())


def _stamp(path: str) -> tuple[int, int, int, int]:
    try:
        stat = os.stat(path)  # noqa: PTH116 - as above
    except OSError:  # it is gone, or a link that leads nowhere
        return (0, 0, 0, 0)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
