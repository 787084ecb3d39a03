"""A cache that was filled ahead of time, such as an image's: what it has is linked into the one written to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger("kiln.server")
_SHARED = tuple(map(Path, ("plans", "plans/xla", "remote")))
"""Folders with an entry for each thing that is kept; what else lies in a cache is such an entry itself."""


def link_warm_cache(warm: Path, cache: Path) -> int:
    """Have `cache` find all that `warm` has and it has not itself; returns how many entries were linked.

    Entries are whole before they get their name and do not change, so a link is as good as a copy; what is written
    anew replaces the link. Links to an earlier image's cache, which lead nowhere now, go.

    Raises:
        OSError: `cache` cannot be written, or `warm` not read.
    """
    if not warm.is_dir():
        _log.warning("there is no warm cache at %s", warm)
        return 0
    linked = 0
    for entry in _entries(warm):
        target = cache / entry
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            target.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):  # another process, in the same cache, was faster
            target.symlink_to(warm.resolve() / entry)
            linked += 1
    if linked:
        _log.info("%d entries of the cache are those of %s", linked, warm)
    return linked


def _entries(warm: Path) -> Iterator[Path]:
    """Paths below `warm` of what is kept there; what is hidden was never finished."""
    for folder in (Path(), *_SHARED):
        for path in sorted((warm / folder).glob("[!.]*")):
            if (entry := path.relative_to(warm)) not in _SHARED:
                yield entry
