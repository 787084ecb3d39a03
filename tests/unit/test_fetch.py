"""Fetching a version that lies elsewhere: whole and once, or not at all."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelLoadError
from service.registry.remote import Progress, fetch
from tests.fakes import FakeClock
from tests.unit.stores import OPTIONS, ROOT, SAVED_MODEL, FakeStore, assert_nothing_is_kept, content, look, only


def test_a_version_is_fetched_whole_and_once(files: FakeStore, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All its files come, in their folders; a second fetch of the same fingerprint asks the store nothing."""
    caplog.set_level(logging.INFO, "kiln.remote")
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))
    folder = fetch(source, cache, OPTIONS)
    assert content(folder) == SAVED_MODEL
    assert [folder.parent, *folder.parent.iterdir()] == [cache / "remote", folder]
    asked = (list(files.downloads), files.listings)
    assert fetch(source, cache, OPTIONS) == folder
    assert (files.downloads, files.listings) == asked
    assert caplog.messages[0] == f"fetching {ROOT}/cat/1: 13 bytes in 3 files"
    assert caplog.messages[-1].startswith(f"fetched {ROOT}/cat/1 in ")


def test_a_changed_version_is_fetched_beside_the_old_one(files: FakeStore, cache: Path) -> None:
    """The files of the old state stay whole where they are: somebody may be reading them."""
    files.put_files("cat/1", SAVED_MODEL)
    old = fetch(only(look(cache)), cache, OPTIONS)
    files.put_files("cat/1", {"saved_model.pb": b"another graph"})
    new = fetch(only(look(cache)), cache, OPTIONS)
    assert (content(old)["saved_model.pb"], content(new)["saved_model.pb"]) == (b"graph", b"another graph")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


FAULTS = [
    (ConnectionResetError("gone"), "ConnectionResetError: gone"),
    (cut, "BrokenDownload: saved_model.pb: 5 bytes expected, got 4"),
    (flip, "BrokenDownload: saved_model.pb: md5 f8b0b924ebd7046dbfa85a856e4682c8 expected, got "),
]
GRAPH_MD5 = "+LC5JOvXBG2/qFqFbkaCyA=="


@pytest.mark.parametrize(("fault", "text"), FAULTS)
def test_a_broken_download_is_tried_again(
    files: FakeStore, cache: Path, fault: Any, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that breaks off, comes short or comes wrong is downloaded again, alone, and the log says why."""
    files.put_files("cat/1", SAVED_MODEL)
    files.digests["/bucket/models/cat/1/saved_model.pb"] = GRAPH_MD5
    source = only(look(cache))
    files.faults = [fault, fault]
    assert content(fetch(source, cache, OPTIONS)) == SAVED_MODEL
    assert files.downloads.count("cat/1/saved_model.pb") == 3
    assert len(files.downloads) == 5
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [m.partition(" failed")[0] for m in warnings] == [f"{ROOT}/cat/1: attempt {n} of 3" for n in (1, 2)]
    assert text in warnings[0]


@pytest.mark.parametrize(("fault", "text"), FAULTS)
def test_a_broken_download_never_becomes_a_version(files: FakeStore, cache: Path, fault: Any, text: str) -> None:
    """When no attempt works, the error names URL, reason and attempts, and no file of it is left."""
    files.put_files("cat/1", SAVED_MODEL)
    files.digests["/bucket/models/cat/1/saved_model.pb"] = GRAPH_MD5
    source = only(look(cache))
    files.faults = [fault] * 3
    with pytest.raises(ModelLoadError) as caught:
        fetch(source, cache, OPTIONS)
    assert str(caught.value).startswith(f"{ROOT}/cat/1: {text}")
    assert str(caught.value).endswith("(3 attempts)")
    assert_nothing_is_kept(cache)
    assert content(fetch(source, cache, OPTIONS)) == SAVED_MODEL


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_version_that_changes_while_it_is_fetched_is_refused(files: FakeStore, cache: Path, when: str) -> None:
    """Files of two states are never mixed: what was listed must be there before and after the download."""
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))
    if when == "before":
        files.put_files("cat/1", {"saved_model.pb": b"other"})
    else:
        files.faults = [lambda _: files.put_files("cat/1", {"variables/variables.index": b"j"})]
    with pytest.raises(ModelLoadError) as caught:
        fetch(source, cache, OPTIONS)
    assert str(caught.value) == f"{ROOT}/cat/1: it has changed since it was listed"
    assert_nothing_is_kept(cache)
    assert bool(files.downloads) is (when == "meanwhile")


def test_a_version_that_is_gone_is_told(files: FakeStore, cache: Path) -> None:
    """What was taken away between listing and fetching is no passing fault."""
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))
    files.rm("/bucket/models", recursive=True)
    with pytest.raises(ModelLoadError, match=r"cat/1: there is nothing there$"):
        fetch(source, cache, OPTIONS)


def test_two_fetches_of_one_version_do_each_other_no_harm(files: FakeStore, cache: Path) -> None:
    """Who comes second with the same files finds the first's in place, and takes them."""
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))
    inner: list[Path] = []
    files.faults = [lambda _: inner.append(fetch(source, cache, OPTIONS))]
    assert fetch(source, cache, OPTIONS) == inner[0]
    assert content(inner[0]) == SAVED_MODEL
    assert list((cache / "remote").iterdir()) == inner


def test_a_folder_that_a_killed_process_left_is_taken_away(files: FakeStore, cache: Path) -> None:
    """Unheld work is removed once it is a minute old; what is held, or new, is left alone."""
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))
    abandoned, new = cache / "remote/.fetch-old", cache / "remote/.fetch-new"
    for folder in (abandoned, new):
        (folder / "files").mkdir(parents=True)
    os.utime(abandoned, (time.time() - 100,) * 2)

    def grow_old(path: Path) -> None:
        work = path.parents[1]
        os.utime(work, (time.time() - 100,) * 2)
        files.put_files("dog/1", {"m.keras": b"k"})
        fetch(only(look(cache, f"{ROOT}/dog")), cache, OPTIONS)  # looks for what was left
        assert work.is_dir()

    files.faults = [grow_old]
    fetch(source, cache, OPTIONS)
    assert (abandoned.exists(), new.exists()) == (False, True)


def test_a_version_that_the_disk_has_no_room_for_is_refused(
    files: FakeStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes are known before the download begins: the error has both numbers."""
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 12}))
    with pytest.raises(ModelLoadError) as caught:
        fetch(source, cache, OPTIONS)
    assert str(caught.value) == f"{ROOT}/cat/1: it has 13 bytes, the cache has room for 12"
    assert files.downloads == []


def test_a_cache_that_cannot_be_written_is_told(files: FakeStore, cache: Path) -> None:
    """The error names the URL and what is wrong with the cache."""
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))
    cache.write_text("a file in its place")
    with pytest.raises(ModelLoadError, match=r"cat/1: it cannot be kept in the cache: .*Not a directory"):
        fetch(source, cache, OPTIONS)


def test_a_target_that_cannot_be_put_in_place_is_told(
    files: FakeStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a folder that is there already excuses a rename that fails."""
    files.put_files("cat/1", SAVED_MODEL)
    source = only(look(cache))

    def refuse(path: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ModelLoadError, match=r"cannot be kept in the cache: .*Read-only file system"):
        fetch(source, cache, OPTIONS)
    assert_nothing_is_kept(cache)


def test_progress_is_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """Percent and bytes of the whole, at most every five seconds; nothing where the size is not known."""
    caplog.set_level(logging.INFO, "kiln.remote")
    clock = FakeClock()
    progress = Progress("cat", 4_000_000_000, clock)
    progress(1)
    progress.add(1_000_000_000)
    clock.advance(5)
    progress(5_000_000)
    clock.advance(4.9)
    progress(500_000_000)
    clock.advance(0.1)
    progress(1_000_000_000)
    assert caplog.messages == [
        "fetching cat: 25 % (1.0 GB of 4.0 GB)",
        "fetching cat: 50 % (2.0 GB of 4.0 GB)",
    ]
    unknown = Progress("cat", 0, clock)
    clock.advance(100)
    unknown(7)
    assert len(caplog.messages) == 2
