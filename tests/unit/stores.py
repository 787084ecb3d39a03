"""A store in memory for the tests of models that lie elsewhere, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from service.registry.archive import UnpackLimits
from service.registry.remote import FetchOptions, open_models
from service.registry.repository import Repository, Source
from service.registry.retry import Retry

SAVED_MODEL = {"saved_model.pb": b"graph", "variables/variables.data": b"weights", "variables/variables.index": b"i"}
ROOT = "memory://bucket/models"
OPTIONS = FetchOptions(retry=Retry(attempts=3, sleep=lambda _: None), limits=UnpackLimits(100_000, 100))


class FakeStore(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory, of which some come late, short or wrong. Counts what is downloaded."""

    cachable = False
    protocol = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.downloads: list[str] = []
        self.listings = 0
        self.faults: list[Exception | Callable[[Path], object]] = []
        """What happens to the next downloads: they raise, or what they wrote is changed."""
        self.on_list: Callable[[], object] = lambda: None
        self.digests: dict[str, str] = {}

    def put_files(self, folder: str, files: dict[str, bytes]) -> None:
        for name, content in files.items():
            self.pipe(f"/bucket/models/{folder}/{name}".rstrip("/"), content)

    def find(self, path: str, **options: Any) -> Any:
        self.listings += 1
        self.on_list()
        return {name: self.info(name) for name in super().find(path)}

    def info(self, path: str, **options: Any) -> Any:
        return {**super().info(path, **options), "Content-MD5": self.digests.get(path)}

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self.downloads.append(rpath.removeprefix("/bucket/models/"))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        super().get_file(rpath, lpath, **options)
        if fault is not None:
            fault(Path(lpath))


def look(cache: Path, url: str = ROOT, name: str | None = None) -> Repository:
    return open_models(url, name, cache_dir=cache, options=OPTIONS)


def only(repository: Repository) -> Source:
    assert repository.problems == ()
    (source,) = repository.sources
    return source


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_nothing_is_kept(cache: Path) -> None:
    assert not [path for path in cache.rglob("*") if path.name != "remote"]
