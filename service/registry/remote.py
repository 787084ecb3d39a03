"""Models that lie elsewhere: listed by the rules for folders, fetched into a cache that has whole versions only."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from service.errors import InvalidArgument, ModelLoadError
from service.registry import repository
from service.registry.archive import UnpackLimits, archive_stem, unpack
from service.registry.repository import Kind, Problem, Repository, Source
from service.registry.retry import Retry
from service.registry.store import Listing, Store, StoredFile, scheme_of, shown

_log = logging.getLogger("kiln.remote")
_FOLDER = "remote"
_WORK_PREFIX = ".fetch-"
_ABANDONED_S = 60.0
"""A folder of work that nobody holds is taken away once it is this old."""
_PROGRESS_S = 5.0


@dataclass(frozen=True)
class FetchOptions:
    """How often each step is tried, what an archive may come to, and the clock (in seconds) that logs go by."""

    retry: Retry = field(default_factory=Retry)
    limits: UnpackLimits = field(default_factory=UnpackLimits)
    clock: Callable[[], float] = time.monotonic


_DEFAULTS = FetchOptions()


def open_models(
    location: str | Path, name: str | None = None, *, cache_dir: Path, options: FetchOptions = _DEFAULTS
) -> Repository:
    """What lies at a path or URL: see `repository.open_models`, whose rules hold for both. Blocks.

    An archive is one model, by `name` or the file's stem; it is fetched into `cache_dir` to see
    what is in it, once for each state that it has.

    Raises:
        InvalidArgument: as `repository.open_models`; or the URL's scheme is unknown or its extra missing.
        ModelLoadError: it cannot be listed, or is an archive that cannot be fetched.
    """
    scheme = None if isinstance(location, Path) else scheme_of(location)
    if scheme is None:
        return repository.open_models(Path(location), name)
    url = str(location)
    if scheme == "file":
        path = Path(unquote(urlsplit(url).path))
        if urlsplit(url).netloc not in ("", "localhost"):
            raise InvalidArgument(f"{url}: a path of this machine expected, as file:///srv/models")
        if archive_stem(path.name) is None or not path.is_file():
            return repository.open_models(path, name)
    repository.check_name(name)
    store = Store(url)
    listing = _listed(store, options)
    stem = archive_stem(store.path.name)
    if listing.is_file and stem is not None:
        return _models_in_archive(store, listing, repository.usable(name or stem), cache_dir, options)
    tree = _Tree.of(store, listing)
    return repository.told_by_content(_Entry(store.path, tree), name, tree.source)


def fetch(source: Source, cache_dir: Path, options: FetchOptions = _DEFAULTS) -> Path:
    """The file or SavedModel folder of `source` on this disk; blocks while it is downloaded.

    A source that lies on this disk is its own. The others are downloaded once for each fingerprint.

    Raises:
        ModelLoadError: it cannot be fetched whole, or is no longer what was listed; the text says why.
    """
    if source.remote is None:
        return source.path
    return _fetched(source.remote, source.fingerprint, cache_dir, options) / source.path


@dataclass(frozen=True)
class _Tree:
    """A listing as folders and files."""

    store: Store
    files: dict[PurePosixPath, StoredFile]
    children: dict[PurePosixPath, set[PurePosixPath]]

    @classmethod
    def of(cls, store: Store, listing: Listing) -> _Tree:
        root = store.path.parent if listing.is_file else store.path
        files = {root.joinpath(*filter(None, file.name.split("/"))): file for file in listing.files}
        children: dict[PurePosixPath, set[PurePosixPath]] = {root: set()}
        for path in files:
            for child in takewhile(root.__ne__, (path, *path.parents)):
                children.setdefault(child.parent, set()).add(child)
        return cls(store, files, children)

    def source(self, name: str, version: int, kind: Kind, entry: _Entry) -> Source | Problem:
        """The source of a version that was found; a `repository.MakeSource`."""
        is_file = entry.path in self.files
        inside = {path: file for path, file in self.files.items() if path.is_relative_to(entry.path)}
        for file in inside.values():
            if not file.is_safe:
                return Problem(name, version, f"the file {file.name!r} is refused: its name leads out of the folder")
        listing = Listing(
            tuple(
                replace(file, name=path.name if is_file else str(path.relative_to(entry.path)))
                for path, file in inside.items()
            )
        )
        below = entry.path.relative_to(self.store.path)
        return Source(
            name,
            version,
            kind,
            Path(entry.name) if is_file else Path(),
            fingerprint=listing.fingerprint,
            modified=0.0 if is_file else listing.modified,  # stores show a file once it is whole
            remote="/".join((self.store.url, *below.parts)),
        )


@dataclass(frozen=True)
class _Entry:
    """A file or folder of a tree; a `repository.Entry`."""

    path: PurePosixPath
    tree: _Tree = field(compare=False, repr=False)

    def __str__(self) -> str:
        return "/".join((str(self.tree.store), *self.path.relative_to(self.tree.store.path).parts))

    def __lt__(self, other: _Entry) -> bool:
        return self.path < other.path

    def __truediv__(self, name: str) -> _Entry:
        return _Entry(self.path / name, self.tree)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def suffix(self) -> str:
        return self.path.suffix

    @property
    def parent(self) -> _Entry:
        return _Entry(self.path.parent, self.tree)

    def is_dir(self) -> bool:
        return self.path in self.tree.children

    def is_file(self) -> bool:
        return self.path in self.tree.files

    def iterdir(self) -> Iterator[_Entry]:
        return (_Entry(path, self.tree) for path in self.tree.children[self.path])


def _models_in_archive(store: Store, listing: Listing, name: str, cache_dir: Path, options: FetchOptions) -> Repository:
    """Its version folders, or its one version; either may be in a folder that is all there is."""
    unpacked = _fetched(store.url, listing.fingerprint, cache_dir, options)

    def source(name: str, version: int, kind: Kind, path: Path) -> Source:
        inside = path.relative_to(unpacked)
        return Source(name, version, kind, inside, fingerprint=listing.fingerprint, remote=store.url)

    content = list(repository.visible(unpacked))
    is_wrapped = len(content) == 1 and content[0].is_dir() and repository.version_number(content[0].name) is None
    try:
        return repository.told_by_content(content[0] if is_wrapped else unpacked, name, source)
    except InvalidArgument:
        found = ", ".join(entry.name for entry in content) or "nothing"
        raise ModelLoadError(
            f"{store}: folders of versions (1/, 2/, …) or one version expected in the archive, found {found}"
        ) from None


def _fetched(url: str, fingerprint: str, cache_dir: Path, options: FetchOptions) -> Path:
    """The folder of the cache with the files that `url` has (unpacked) while its fingerprint is this."""
    key = hashlib.sha256(f"{url}\n{fingerprint}".encode()).hexdigest()[:40]
    target = cache_dir / _FOLDER / key
    if target.is_dir():
        _log.debug("%s was fetched before", shown(url))
        return target
    store = Store(url)
    start = options.clock()
    try:
        with _work_folder(target.parent) as work:
            files = _download(store, fingerprint, work, options)
            if archive_stem(store.path.name) is not None:
                packed, files = files / store.path.name, work / "unpacked"
                _unpack(store, packed, files, options.limits)
            _publish(files, target)
    except OSError as error:
        raise ModelLoadError(f"{store}: it cannot be kept in the cache: {error}") from error
    _log.info("fetched %s in %.1f s", store, options.clock() - start)
    return target


def _download(store: Store, fingerprint: str, work: Path, options: FetchOptions) -> Path:
    """All files, in a new folder of `work`, once they are what the fingerprint says before and after."""
    listing = _listed(store, options)
    _check_unchanged(store, listing, fingerprint)
    free_bytes = shutil.disk_usage(work).free
    if listing.bytes > free_bytes:
        raise ModelLoadError(f"{store}: it has {listing.bytes} bytes, the cache has room for {free_bytes}")
    _log.info("fetching %s: %s in %d files", store, _size(listing.bytes), len(listing.files))
    progress = Progress(str(store), listing.bytes, options.clock)
    target = work / "files"
    for stored in listing.files:
        if not stored.is_safe:
            raise ModelLoadError(f"{store}: the file {stored.name!r} is refused: its name leads out of the folder")
        options.retry.run(str(store), partial(store.get, stored, target / stored.name, progress))
        progress.add(stored.size or 0)
    _check_unchanged(store, _listed(store, options), fingerprint)
    return target


def _check_unchanged(store: Store, listing: Listing, fingerprint: str) -> None:
    if listing.fingerprint != fingerprint:
        raise ModelLoadError(f"{store}: it has changed since it was listed")


def _unpack(store: Store, packed: Path, target: Path, limits: UnpackLimits) -> None:
    try:
        unpack(packed, target, limits)
    except ModelLoadError as error:
        raise ModelLoadError(f"{store}: {error}") from error


class Progress:
    """Logs how far a download is, when it is told and some time has passed."""

    def __init__(self, what: str, total_bytes: int, clock: Callable[[], float]) -> None:
        self._what = what
        self._total_bytes = total_bytes
        self._clock = clock
        self._whole_bytes = 0
        self._last = clock()

    def add(self, size: int) -> None:
        """A file of `size` bytes is whole."""
        self._whole_bytes += size

    def __call__(self, file_bytes: int) -> None:
        """So many bytes of the present file are here."""
        now = self._clock()
        if now - self._last < _PROGRESS_S or not self._total_bytes:
            return
        self._last = now
        done_bytes = self._whole_bytes + file_bytes
        share = 100 * done_bytes // self._total_bytes
        _log.info("fetching %s: %d %% (%s of %s)", self._what, share, _size(done_bytes), _size(self._total_bytes))


def _listed(store: Store, options: FetchOptions) -> Listing:
    return options.retry.run(str(store), store.list)


@contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards; and sooner or later, should this process be killed."""
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob(f"{_WORK_PREFIX}*"):
        _remove_if_abandoned(other)
    with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=parent, ignore_cleanup_errors=True) as work:
        handle = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # falls with this process
            yield Path(work)
        finally:
            os.close(handle)


def _remove_if_abandoned(work: Path) -> None:
    with suppress(OSError):  # it is held, or gone
        handle = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - work.stat().st_mtime > _ABANDONED_S:  # younger ones may be held in a moment
                shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(handle)


def _publish(files: Path, target: Path) -> None:
    """Move into place whole; another process may have been first with the same."""
    try:
        files.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
