"""A cache that came with an image is found through the one that is written to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from service.runtime.plan_record import PlanCache
from service.runtime.records import ModelRecord
from service.server import registry_options
from service.settings import Settings, load_settings
from service.warm_cache import link_warm_cache

ENTRIES = ("model-1/kiln.json", "memory.json", "plans/key/record.json", "plans/xla/program", "remote/fetched/file")


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """A cache with one entry of each kind, and what an import that was cut off has left."""
    for name in (*ENTRIES, ".import-cut/model"):
        file = tmp_path / "warm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"warm {name}")
    return tmp_path / "warm"


def test_everything_in_it_is_found(warm: Path, tmp_path: Path):
    """Converted models, plans, programs, fetched models and what is known of memory; nothing that was not finished."""
    cache = tmp_path / "cache"
    assert link_warm_cache(warm, cache) == len(ENTRIES)
    for name in ENTRIES:
        assert (cache / name).read_text() == f"warm {name}"
    assert not list(cache.glob(".*"))


def test_each_entry_is_one_link_in_a_folder_of_the_caches_own(warm: Path, tmp_path: Path):
    """New entries go into the cache, not through a link into the warm one."""
    cache = tmp_path / "cache"
    link_warm_cache(warm, cache)
    assert {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_symlink()} == {
        "model-1", "memory.json", "plans/key", "plans/xla/program", "remote/fetched"
    }  # fmt: skip


def test_what_the_cache_has_itself_stays(warm: Path, tmp_path: Path):
    """An entry of the cache goes before that of the warm one, and a second start links nothing."""
    own = tmp_path / "cache" / "plans" / "key"
    own.mkdir(parents=True)
    assert link_warm_cache(warm, tmp_path / "cache") == len(ENTRIES) - 1
    assert not own.is_symlink()
    assert link_warm_cache(warm, tmp_path / "cache") == 0


def test_links_to_an_earlier_images_entries_are_renewed(warm: Path, tmp_path: Path):
    """A cache that outlives its image has links that lead nowhere."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "model-1").symlink_to(tmp_path / "gone" / "model-1")
    link_warm_cache(warm, cache)
    assert (cache / "model-1" / "kiln.json").is_file()


def test_another_process_may_be_faster(warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of two that share a cache, the second finds the link made, and goes on."""

    def beaten(self: Path, target: Path) -> None:
        raise FileExistsError(str(self))

    monkeypatch.setattr(Path, "symlink_to", beaten)
    assert link_warm_cache(warm, tmp_path / "cache") == 0


def test_a_relative_warm_cache_is_found(warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Links hold wherever they are read from."""
    monkeypatch.chdir(warm.parent)
    link_warm_cache(Path("warm"), tmp_path / "cache")
    assert (tmp_path / "cache" / "memory.json").read_text() == "warm memory.json"


def test_one_that_is_not_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The server starts without it."""
    with caplog.at_level(logging.WARNING):
        assert link_warm_cache(tmp_path / "none", tmp_path / "cache") == 0
    assert f"there is no warm cache at {tmp_path / 'none'}" in caplog.text


def test_plans_that_do_not_serve_are_forgotten_here_only(warm: Path, tmp_path: Path):
    """Dropping a record of the warm cache removes the link, so that what is found out anew has a place."""
    cache = tmp_path / "cache"
    link_warm_cache(warm, cache)
    plans = PlanCache(cache / "plans")
    plans.drop("key")
    assert not plans.place("key").exists()
    assert (warm / "plans/key/record.json").is_file()
    record = ModelRecord("CPU", {}, {}, {})
    plans.keep("key", record, {})
    assert plans.find("key") == record
    plans.drop("key")
    assert plans.find("key") is None


@pytest.fixture
def settings(warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TF_XLA_FLAGS", "")
    return load_settings({"models": str(tmp_path), "cache_dir": tmp_path / "cache", "warm_cache_dir": warm})


def test_the_server_links_what_the_settings_name(settings: Settings):
    """Before anything is loaded, the cache has what the warm one has."""
    registry_options(settings)
    assert (settings.cache_dir / "plans" / "key").is_symlink()
    assert (settings.cache_dir / "plans" / "xla" / "program").is_symlink()


def test_a_cache_that_cannot_be_written_is_told(settings: Settings):
    """The text has the folder, the flag and the reason."""
    settings.cache_dir.write_text("a file")
    with pytest.raises(
        OSError, match=rf"the cache folder {settings.cache_dir} \(--cache-dir\) cannot be used: \[Errno"
    ):
        registry_options(settings)
