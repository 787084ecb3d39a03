"""Looking for changes: of the folder, of the models' configs; and waiting until files are whole."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import zipfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from service.batching.runner import Runner, result_of
from service.errors import KilnError, ModelLoadError
from service.registry.config import ModelConfigs, read_configs
from service.registry.remote import open_models
from service.registry.repository import Kind, Problem, Repository, Source

_log = logging.getLogger("kiln.registry")
_PATIENCE_S = 10.0
_BEING_COPIED = "its files are still changing: it is loaded once they have been quiet"

Look = Callable[[ModelConfigs], Repository]
"""What lies in the repository now, given the configs that may name other places; blocks."""


def look(models: str | Path, name: str | None, configs: ModelConfigs, cache_dir: Path) -> Repository:
    """What lies at `models`, and where the configs say otherwise, there; both may be URLs.

    Raises:
        InvalidArgument: there is nothing at `models`.
        ModelLoadError: `models` is a URL that cannot be listed.
    """
    found = open_models(models, name, cache_dir=cache_dir)
    elsewhere = {name: config.path for name, config in configs.items() if config.path is not None}
    sources = [source for source in found.sources if source.model not in elsewhere]
    problems = [problem for problem in found.problems if problem.model not in elsewhere]
    unreachable = set()
    for model, path in elsewhere.items():
        try:
            there = open_models(path, model, cache_dir=cache_dir)
        except KilnError as error:
            problems.append(Problem(model, None, str(error)))
            if isinstance(error, ModelLoadError):  # the store does not answer: that does not mean that it is empty
                unreachable.add(model)
            continue
        sources += there.sources
        problems += there.problems
    return Repository(tuple(sources), tuple(problems), frozenset(unreachable))


class Settling:
    """Keeps versions whose files are still being written from being loaded.

    A version is whole once its files have been quiet for `quiet_s`; a ``.keras`` file also as soon
    as its end is there, for a ZIP archive has its directory last.
    """

    def __init__(self, quiet_s: float, wall_clock: Callable[[], float] = time.time) -> None:
        self._quiet_s = quiet_s
        self._now = wall_clock
        self._whole: dict[tuple[str, int], Source] = {}
        self._seen: dict[tuple[str, int], str] = {}
        self._whole_find: Repository | None = None
        """What was asked for last, if all of it was whole."""

    def is_settled(self, found: Repository) -> bool:
        """Whether `found` is the very one that was last asked for, and all of it was whole."""
        return found is self._whole_find

    def settled(self, found: Repository) -> Repository:
        """`found`, with the versions that are not whole as problems, or as they were when they were."""
        sources: list[Source] = []
        problems = list(found.problems)
        seen: dict[tuple[str, int], str] = {}
        for source in found.sources:
            key = (source.model, source.version)
            seen[key] = source.fingerprint
            if self._is_whole(source):
                self._whole[key] = source
                sources.append(source)
            elif key in self._whole:
                sources.append(self._whole[key])
            else:
                problems.append(Problem(source.model, source.version, _BEING_COPIED))
        kept = {key: source for key, source in self._whole.items() if key[0] in found.unreachable}
        sources += kept.values()
        seen |= {key: source.fingerprint for key, source in kept.items()}
        self._seen = seen
        self._whole = {key: source for key, source in self._whole.items() if key in seen}
        are_whole = all(key in self._whole and self._whole[key].fingerprint == seen[key] for key in seen)
        self._whole_find = found if are_whole else None
        return Repository(tuple(sources), tuple(problems))

    def _is_whole(self, source: Source) -> bool:
        key = (source.model, source.version)
        known = self._whole.get(key)
        if known is not None and known.fingerprint == source.fingerprint:
            return True
        if self._now() - source.modified >= self._quiet_s:
            return True
        return source.kind is Kind.KERAS and self._seen.get(key) == source.fingerprint and _has_its_end(source.path)


def _has_its_end(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except OSError:
        return False


class Watcher:
    """Looks every `poll_s` seconds, and at once after `poke`."""

    def __init__(
        self,
        look: Look,
        *,
        config_file: Path | None,
        poll_s: float | None,
        quiet_s: float,
        runner: Runner,
        follows_folder: bool = True,
    ) -> None:
        """Without `poll_s` only a `poke` makes it look.

        Unless it `follows_folder`, what lies there is looked at only after a poke or a change of the config file.
        """
        self._look = look
        self._config_file = config_file
        self._poll_s = poll_s
        self._settling = Settling(quiet_s)
        self._quiet_s = quiet_s
        self._follows_folder = follows_folder
        self._runner = runner
        self._poked = asyncio.Event()
        self._stir = threading.Event()
        """Ends a rest, which keeps the runner from all else."""
        self._last: tuple[ModelConfigs, Repository] = ({}, Repository())
        """What was looked for last, and what there was."""
        self._is_steady = False
        """Whether a look gives the very same again while nothing changes: one that lists a store does not."""
        self._config_stamp: tuple[int, int] | None = None
        self._last_error = ""
        self.configs: ModelConfigs = {}

    def stir(self) -> None:
        """The models have changed by themselves: there may be something to do."""
        self._stir.set()

    def poke(self) -> None:
        """Look now, and read the config file again whether it looks changed or not."""
        self._config_stamp = None
        self._poked.set()
        self.stir()

    def read_config_file(self) -> bool:
        """Read the config file if it has changed; whether it had. Raises `InvalidArgument`."""
        if self._config_file is None or (stamp := _stamp(self._config_file)) == self._config_stamp:
            return False
        self._config_stamp = stamp
        self.configs = read_configs(self._config_file)
        return True

    async def found(self, configs: ModelConfigs) -> Repository:
        """What lies there now and is whole."""
        self.stir()
        found = await result_of(self._runner, lambda: self._look(configs))
        self._is_steady = found is self._last[1]
        self._last = (configs, found)
        return self._settling.settled(found)

    async def found_whole(self, configs: ModelConfigs) -> Repository:
        """As `found`, after a short wait for files that have just been written: `_PATIENCE_S` at most."""
        stop = time.monotonic() + min(5 * self._quiet_s, _PATIENCE_S)
        while True:
            repository = await self.found(configs)
            if time.monotonic() >= stop or all(p.reason != _BEING_COPIED for p in repository.problems):
                return repository
            await asyncio.sleep(min(self._quiet_s / 4, 0.5))

    async def run(self, update: Callable[[ModelConfigs | None], Awaitable[bool]]) -> None:
        """Call `update` at every look, with the configs if the file has changed; runs until cancelled.

        `update` tells whether it has done all there is to do: if so it is not called again before something changes.
        """
        is_done = False
        while True:
            await self._until_due(may_rest=is_done)
            is_poked = self._poked.is_set()
            self._poked.clear()
            is_done = False
            try:
                configs = self.configs if self.read_config_file() else None
                if self._follows_folder or is_poked or configs is not None:
                    is_done = await update(configs)
                self._last_error = ""
            except Exception as error:  # noqa: BLE001 - whatever it is, the next look is made
                if str(error) != self._last_error:
                    is_foreseen = isinstance(error, KilnError | OSError)
                    _log.error("nothing is changed: %s", error, exc_info=None if is_foreseen else error)
                self._last_error = str(error)

    async def _until_due(self, *, may_rest: bool) -> None:
        """Until a look is due, or a poke. A rest leaves the event loop alone until then, however long that takes."""
        if may_rest and self._is_steady and self._poll_s is not None and self._settling.is_settled(self._last[1]):
            self._stir.clear()
            if self._poked.is_set():
                return
            try:
                await result_of(self._runner, partial(self._rest, self._poll_s, *self._last))
            finally:
                self.stir()
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), self._poll_s)

    def _rest(self, poll_s: float, configs: ModelConfigs, found: Repository) -> None:
        """Look every `poll_s` seconds whether anything has changed, in the runner's thread, until it has."""
        with contextlib.suppress(Exception):  # whatever it is, the next look will tell
            while not self._stir.wait(poll_s):
                is_config_changed = self._config_file is not None and _stamp(self._config_file) != self._config_stamp
                if is_config_changed or self._look(configs) is not found:
                    return


def _stamp(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)
