"""What lies on disk: model folders, their versions, and what is wrong with them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Protocol, Self, TypeVar

from service.errors import InvalidArgument

_log = logging.getLogger("kiln.registry")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_LARGEST_VERSION = 2**63 - 1
_EXPECTED = "model.keras, model.h5 or a SavedModel (saved_model.pb and variables/) expected"


class Kind(Enum):
    """In which form a version was handed over."""

    KERAS = ".keras"
    H5 = ".h5"
    SAVED_MODEL = "saved_model.pb"


@dataclass(frozen=True)
class Source:
    """One version on disk: `path` is the file, or the SavedModel's folder.

    `fingerprint` changes with its files; `modified` is when the newest of them did, in seconds
    since the epoch. Where `remote` is set the version lies elsewhere, at that URL, and `path` is
    relative to what `service.registry.remote.fetch` makes of it.
    """

    model: str
    version: int
    kind: Kind
    path: Path
    fingerprint: str = field(default="", compare=False)
    modified: float = field(default=0.0, compare=False)
    remote: str | None = None

    @property
    def is_at_hand(self) -> bool:
        """Whether it can be loaded as it lies there, without being fetched or converted."""
        return self.kind is Kind.SAVED_MODEL and self.remote is None


@dataclass(frozen=True)
class Problem:
    """A folder that is no version of a model, and why."""

    model: str
    version: int | None
    reason: str


@dataclass(frozen=True)
class Repository:
    """All that was found, in order of name and version.

    Of the models in `unreachable` it could not be seen whether they are still there.
    """

    sources: tuple[Source, ...] = ()
    problems: tuple[Problem, ...] = ()
    unreachable: frozenset[str] = frozenset()

    def is_same(self, other: Repository) -> bool:
        """Whether it tells of the very same finds: those of another look are others, for their files may be."""
        are_same = all(one is another for one, another in zip(self.sources, other.sources, strict=False))
        return are_same and len(self.sources) == len(other.sources) and self.problems == other.problems


class Entry(Protocol):
    """What the rules below ask of a file or folder: a `Path`, or one that lies elsewhere."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def parent(self) -> Self: ...
    def is_dir(self) -> bool: ...
    def is_file(self) -> bool: ...
    def iterdir(self) -> Iterator[Self]: ...
    def __truediv__(self, name: str, /) -> Self: ...
    def __lt__(self, other: Self, /) -> bool: ...


AnyEntry = TypeVar("AnyEntry", bound=Entry)
MakeSource = Callable[[str, int, Kind, AnyEntry], Source | Problem]
"""What makes a source of model, version, kind and its file or folder, unless that is refused."""


def open_models(path: Path, name: str | None = None) -> Repository:
    """A folder of models, one model's folder of versions, or one version: told by what is in it.

    Raises:
        InvalidArgument: there is nothing at `path`, or `name` is given for several models or
            cannot be a model's name.
    """
    check_name(name)
    if not path.exists():
        raise InvalidArgument(f"there is no file or folder {str(path)!r}")
    path = path.resolve()
    return told_by_content(path, name, _local_source(path))


def told_by_content(place: AnyEntry, name: str | None, make: MakeSource[AnyEntry]) -> Repository:
    """As `open_models`, for files and folders wherever they lie."""
    if place.is_file() or (place / Kind.SAVED_MODEL.value).is_file():
        return _single(place, name, make)
    if any(child.is_dir() and version_number(child.name) is not None for child in place.iterdir()):
        return _versions(place, usable(name or place.name), make)
    if _holds_one_file(place):
        return _single(place, name, make)
    if name is not None:
        raise InvalidArgument(f"--name goes with one model, but {str(place)!r} is a folder of models")
    return _models(place, make)


def scan(root: Path) -> Repository:
    """Every ``<root>/<name>/<integer version>/``."""
    return _models(root, _local_source(root))


def _models(root: AnyEntry, make: MakeSource[AnyEntry]) -> Repository:
    sources: list[Source] = []
    problems: list[Problem] = []
    for folder in visible(root):
        if not folder.is_dir():
            continue
        if not _NAME.fullmatch(folder.name):
            problems.append(Problem(folder.name, None, "letters, digits, '_', '-' and '.' expected in a model's name"))
            continue
        try:
            found = _versions(folder, folder.name, make)
        except OSError as error:
            problems.append(Problem(folder.name, None, f"the folder cannot be read: {error.strerror}"))
            continue
        sources += found.sources
        problems += found.problems
    return Repository(tuple(sources), tuple(problems))


def _single(path: AnyEntry, name: str | None, make: MakeSource[AnyEntry]) -> Repository:
    """One version by itself: ``<name>/<version>/model.keras`` tells both, else it is version 1."""
    folder = path.parent if path.is_file() else path
    version = version_number(folder.name)
    if name is None:
        name = folder.parent.name if version is not None else path.stem if path.is_file() else path.name
    version = 1 if version is None else version
    name = usable(name)
    if path.is_file():
        kind = _kind_of_file(path)
        if kind is None:
            raise InvalidArgument(f"{str(path)!r} is no .keras or .h5 file and no SavedModel folder")
        found = make(name, version, kind, path)
    else:
        found = _version(path, name, version, make)  # a folder that holds a SavedModel or one file
    if isinstance(found, Problem):
        raise InvalidArgument(f"{str(path)!r}: {found.reason}")
    return Repository((found,))


def check_name(name: str | None) -> None:
    """Raise `InvalidArgument` for a name that was given, and that no model can have."""
    if name is not None and not _NAME.fullmatch(name):
        raise InvalidArgument(f"--name: letters, digits, '_', '-' and '.' expected, got {name!r}")


def usable(name: str) -> str:
    """`name`, which a file or folder gave; raises `InvalidArgument` if no model can have it."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} cannot be a model's name: give one with --name")
    return name


def _versions(folder: AnyEntry, name: str, make: MakeSource[AnyEntry]) -> Repository:
    """The versions of one model."""
    sources: dict[int, Source] = {}
    problems: list[Problem] = []
    for child in visible(folder):
        if not child.is_dir():
            continue
        version = version_number(child.name)
        if version is None:
            _warn_once(f"{name}: {child.name!r} is ignored: it is no version number")
            continue
        if version in sources:
            problems.append(Problem(name, version, f"two folders are version {version}"))
            continue
        try:
            found = _version(child, name, version, make)
        except OSError as error:
            found = Problem(name, version, f"the folder cannot be read: {error.strerror}")
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sources[version] = found
    if not sources and not problems:
        problems.append(Problem(name, None, "the folder has no version: <name>/<integer version>/ expected"))
    return Repository(tuple(sources[v] for v in sorted(sources)), tuple(problems))


def _version(folder: AnyEntry, name: str, version: int, make: MakeSource[AnyEntry]) -> Source | Problem:
    candidates: list[tuple[Kind, AnyEntry]] = []
    if (folder / Kind.SAVED_MODEL.value).is_file():
        candidates.append((Kind.SAVED_MODEL, folder))
    candidates += [(kind, file) for file in visible(folder) if file.is_file() and (kind := _kind_of_file(file))]
    if not candidates:
        names = ", ".join(sorted(child.name for child in visible(folder))) or "nothing"
        return Problem(name, version, f"{_EXPECTED}, found {names}")
    if len(candidates) > 1:
        names = ", ".join(sorted(Kind.SAVED_MODEL.value if p == folder else p.name for _, p in candidates))
        return Problem(name, version, f"one model expected in the folder, found {names}")
    return make(name, version, *candidates[0])


def _local_source(root: Path) -> MakeSource[Path]:
    """Makes sources of what lies below `root`, which no link may lead out of."""

    def make(name: str, version: int, kind: Kind, path: Path) -> Source | Problem:
        for entry in (path, path / kind.value) if kind is Kind.SAVED_MODEL else (path,):
            if not entry.resolve().is_relative_to(root.resolve()):
                return Problem(name, version, f"{entry.name} is a link out of the models' folder")
        return _stamped(Source(name, version, kind, path))

    return make


def _stamped(source: Source) -> Source:
    """`source` with the fingerprint of its files.

    The time of change counts as well as that of modification, which copying may preserve.
    """
    files = sorted(source.path.rglob("*")) if source.path.is_dir() else [source.path]
    stats = [(file, file.stat()) for file in files]
    lines = [f"{file.name} {stat.st_size} {stat.st_mtime_ns}" for file, stat in stats]
    newest = max((max(stat.st_mtime, stat.st_ctime) for _, stat in stats), default=0.0)
    return replace(source, fingerprint=hashlib.sha256("\n".join(lines).encode()).hexdigest(), modified=newest)


@lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    """The folder is looked at again and again."""
    _log.warning("%s", text)


def version_number(name: str) -> int | None:
    """The version that a folder's name means; None if it means none."""
    if not (name.isascii() and name.isdigit()) or int(name) > _LARGEST_VERSION:
        return None
    return int(name)


def _kind_of_file(path: Entry) -> Kind | None:
    """By the exact name, as Keras decides: it opens no ``model.H5``."""
    return {".keras": Kind.KERAS, ".h5": Kind.H5, ".hdf5": Kind.H5}.get(path.suffix)


def _holds_one_file(folder: Entry) -> bool:
    return sum(1 for child in visible(folder) if child.is_file() and _kind_of_file(child)) == 1


def visible(folder: AnyEntry) -> Iterator[AnyEntry]:
    """What counts in a folder, in order: hidden entries and ``__pycache__`` do not."""
    return (child for child in sorted(folder.iterdir()) if not child.name.startswith((".", "__")))
