"""How property tests draw: the same examples each time, without a limit on the time of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import settings

from service.registry import store
from tests.unit.stores import FakeStore

settings.register_profile("unit", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("unit")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStore]:
    """The store behind ``memory://``, empty."""
    fake = FakeStore()
    monkeypatch.setattr(store, "_client", lambda scheme: fake)
    yield fake
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder for what is fetched, not made yet."""
    return tmp_path / "cache"
