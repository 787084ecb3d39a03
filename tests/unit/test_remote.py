"""Models that lie elsewhere: how folders, files and archives are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidArgument, ModelLoadError
from service.registry import store
from service.registry.remote import fetch, open_models
from service.registry.repository import Kind, Problem, Repository, Source
from tests.unit.stores import OPTIONS, ROOT, SAVED_MODEL, FakeStore, assert_nothing_is_kept, look, only
from tests.unit.test_archive import archive_of


def test_a_folder_of_models_is_listed_as_one_on_disk(files: FakeStore, cache: Path) -> None:
    """Names, versions, kinds and problems are those of the same folder on disk; nothing is downloaded."""
    files.put_files("cat/2", SAVED_MODEL)
    files.put_files("cat/10", {"model.keras": b"k", "README.md": b"-"})
    files.put_files("dog/1", {"notes.txt": b"-"})
    files.put_files("a b/1", {"m.keras": b"k"})
    files.put_files(".trash/1", {"m.keras": b"k"})
    found = look(cache)
    assert [(s.model, s.version, s.kind, str(s.path), s.remote) for s in found.sources] == [
        ("cat", 2, Kind.SAVED_MODEL, ".", f"{ROOT}/cat/2"),
        ("cat", 10, Kind.KERAS, "model.keras", f"{ROOT}/cat/10/model.keras"),
    ]
    assert [(p.model, p.version) for p in found.problems] == [("a b", None), ("dog", 1)]
    assert files.downloads == []
    assert not cache.exists()


@pytest.mark.parametrize(
    ("url", "name", "model", "version"),
    [
        (f"{ROOT}/cat", None, "cat", 7),
        (f"{ROOT}/cat/", "dog", "dog", 7),
        (f"{ROOT}/cat/7", None, "cat", 7),
        (f"{ROOT}/cat/7/model.h5", None, "cat", 7),
        (f"{ROOT}/tom.h5", None, "tom", 1),
    ],
)
def test_one_model_or_version_is_opened_by_its_url(
    files: FakeStore, cache: Path, url: str, name: str | None, model: str, version: int
) -> None:
    """A URL may end at a model, a version or a file: name and version come from it, or from `--name`."""
    files.put_files("cat/7", {"model.h5": b"h"})
    files.put_files("tom.h5", {"": b"h"})
    source = only(look(cache, url, name))
    assert (source.model, source.version, source.kind, source.modified) == (model, version, Kind.H5, 0.0)
    assert fetch(source, cache, OPTIONS).read_bytes() == b"h"


@pytest.mark.parametrize(
    ("url", "name", "error", "text"),
    [
        (ROOT, "cat", InvalidArgument, f"--name goes with one model, but '{ROOT}' is a folder of models"),
        (ROOT, "a b", InvalidArgument, "--name: letters, digits, '_', '-' and '.' expected, got 'a b'"),
        (f"{ROOT}/gone", None, ModelLoadError, f"{ROOT}/gone: there is nothing there"),
        (f"{ROOT}/cat/1/x.txt", None, InvalidArgument, f"'{ROOT}/cat/1/x.txt' is no .keras or .h5 file"),
        ("ftp://host/x", None, InvalidArgument, "ftp://host/x: one of file://, s3://, gs://, az://,"),
        ("file://elsewhere/x", None, InvalidArgument, "file://elsewhere/x: a path of this machine expected"),
    ],
)  # fmt: skip
def test_a_url_that_can_mean_nothing_is_refused(
    files: FakeStore, cache: Path, url: str, name: str | None, error: type[Exception], text: str
) -> None:
    """The error names the URL and what is wrong with it."""
    files.put_files("cat/1", {"x.txt": b"-"})
    with pytest.raises(error) as caught:
        look(cache, url, name)
    assert str(caught.value).startswith(text)


def test_an_empty_folder_is_an_empty_repository(files: FakeStore, cache: Path) -> None:
    """A folder that is there, with nothing in it, has no models and no problems."""
    files.mkdir("/bucket/models")
    assert look(cache) == Repository()


@pytest.mark.parametrize("name", ["../../evil", "x/../../evil", "x//evil"])
def test_a_file_whose_name_leads_out_is_refused(files: FakeStore, cache: Path, name: str) -> None:
    """A store may hold ``..`` in a name: that version is a problem, and its files are never written."""
    files.put_files("cat/1", SAVED_MODEL)
    files.store[f"/bucket/models/cat/1/{name}"] = files.store["/bucket/models/cat/1/saved_model.pb"]
    text = f"the file 'cat/1/{name}' is refused: its name leads out of the folder"
    assert look(cache).problems == (Problem("cat", 1, text),)
    source = Source("cat", 1, Kind.SAVED_MODEL, Path(), remote=f"{ROOT}/cat/1")
    listing = store.Store(f"{ROOT}/cat/1").list()
    with pytest.raises(ModelLoadError, match="its name leads out of the folder"):
        fetch(_with_fingerprint(source, listing.fingerprint), cache, OPTIONS)
    assert_nothing_is_kept(cache)


def _with_fingerprint(source: Source, fingerprint: str) -> Source:
    return Source(source.model, source.version, source.kind, source.path, fingerprint, remote=source.remote)


def test_a_source_on_this_disk_is_its_own(cache: Path) -> None:
    """There is nothing to fetch for a path; and a path, or a ``file://`` URL, is opened where it is."""
    folder = cache / "my models"
    (folder / "cat/1").mkdir(parents=True)
    (folder / "cat/1/m.keras").touch()
    for location in (folder, str(folder), folder.as_uri(), f"file://localhost{folder}"):
        source = only(open_models(location, cache_dir=cache))
        assert fetch(source, cache) == folder / "cat/1/m.keras"


@pytest.mark.parametrize("change", ["content", "size", "added", "removed", "renamed"])
def test_a_change_of_any_file_is_a_new_fingerprint(files: FakeStore, cache: Path, change: str) -> None:
    """The version's fingerprint changes with its files, and only then; other versions keep theirs."""
    files.put_files("cat/1", SAVED_MODEL)
    files.put_files("cat/2", SAVED_MODEL)
    before = look(cache).sources
    assert [s.fingerprint for s in look(cache).sources] == [s.fingerprint for s in before]
    weights = "/bucket/models/cat/2/variables/variables.data"
    if change == "content":
        files.digests[weights] = "AAAA"
    elif change == "size":
        files.pipe(weights, b"more weights")
    elif change == "added":
        files.put_files("cat/2", {"assets/words.txt": b"w"})
    elif change == "removed":
        files.rm(weights)
    else:
        files.mv(weights, weights + ".old")
    after = look(cache).sources
    assert after[0].fingerprint == before[0].fingerprint
    assert after[1].fingerprint != before[1].fingerprint
    assert after[1].modified >= before[1].modified > 0


GOOD_ARCHIVES = [
    ({"saved_model.pb": b"g"}, [(1, Kind.SAVED_MODEL, ".")]),
    ({"model.keras": b"k"}, [(1, Kind.KERAS, "model.keras")]),
    ({"3/saved_model.pb": b"g", "4/m.h5": b"h"}, [(3, Kind.SAVED_MODEL, "3"), (4, Kind.H5, "4/m.h5")]),
    ({"7/m.h5": b"h"}, [(7, Kind.H5, "7/m.h5")]),
    ({"pets/saved_model.pb": b"g"}, [(1, Kind.SAVED_MODEL, "pets")]),
    ({"pets/3/m.h5": b"h", "__MACOSX/._x": b"", ".DS_Store": b""}, [(3, Kind.H5, "pets/3/m.h5")]),
]


@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
@pytest.mark.parametrize(("inside", "expected"), GOOD_ARCHIVES)
def test_an_archive_is_one_model(
    files: FakeStore, cache: Path, tmp_path: Path, ending: str, inside: dict[str, bytes], expected: list[Any]
) -> None:
    """What is inside decides: folders of versions, or one version, which is then 1; the file's stem is the name."""
    archive = archive_of(tmp_path / f"cat.{ending}", inside)
    files.put_files(archive.name, {"": archive.read_bytes()})
    found = look(cache, f"{ROOT}/{archive.name}")
    assert [(s.version, s.kind, str(s.path)) for s in found.sources] == expected
    assert {(s.model, s.remote) for s in found.sources} == {("cat", f"{ROOT}/{archive.name}")}
    for source in found.sources:
        assert fetch(source, cache, OPTIONS).exists()
    assert [s.model for s in look(cache, f"{ROOT}/{archive.name}", "dog").sources] == ["dog"] * len(expected)
    assert files.downloads == [archive.name]


def test_a_changed_archive_is_fetched_anew(files: FakeStore, cache: Path, tmp_path: Path) -> None:
    """A new archive under the old name gives its versions a new fingerprint."""
    sources = []
    for version in ("1", "2"):
        archive = archive_of(tmp_path / "cat.zip", {f"{version}/m.keras": b"k" * int(version)})
        files.put_files("cat.zip", {"": archive.read_bytes()})
        sources.append(only(look(cache, f"{ROOT}/cat.zip")))
    assert [source.version for source in sources] == [1, 2]
    assert sources[0].fingerprint != sources[1].fingerprint
    assert fetch(sources[0], cache, OPTIONS).read_bytes() == b"k"


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        ({"../evil": b""}, "the archive is refused: its member '../evil' leads out of it"),
        ({"m.keras": b"\0" * 200_000}, "the archive is refused: it unpacks to 200000 bytes, at most 100000 expected"),
        (
            {"cat/1/m.keras": b"", "dog/1/m.keras": b""},
            "folders of versions (1/, 2/, …) or one version expected in the archive, found cat, dog",
        ),
        ({}, "folders of versions (1/, 2/, …) or one version expected in the archive, found nothing"),
    ],
)
def test_an_archive_that_cannot_be_a_model_is_refused(
    files: FakeStore, cache: Path, tmp_path: Path, inside: dict[str, bytes], text: str
) -> None:
    """The error names the URL and the member or what was found; what was unpacked of an evil one is gone."""
    archive = archive_of(tmp_path / "cat.zip", inside)
    files.put_files("cat.zip", {"": archive.read_bytes()})
    with pytest.raises(ModelLoadError) as caught:
        look(cache, f"{ROOT}/cat.zip")
    assert str(caught.value) == f"{ROOT}/cat.zip: {text}"
    if "refused" in text:
        assert_nothing_is_kept(cache)


def test_an_archives_name_must_do_for_a_model(files: FakeStore, cache: Path) -> None:
    """A stem that cannot be a model's name needs one to be given, before anything is fetched."""
    files.put_files("my cat.zip", {"": b"-"})
    with pytest.raises(InvalidArgument, match="'my cat' cannot be a model's name: give one with --name"):
        look(cache, f"{ROOT}/my cat.zip")
    assert files.downloads == []


def test_an_archive_on_this_disk_is_opened_by_its_url(tmp_path: Path, cache: Path) -> None:
    """``file:///…/cat.zip`` is unpacked into the cache as one that lies elsewhere; a change of it is seen."""
    archive = archive_of(tmp_path / "my cat.zip", {"5/m.keras": b"old"})
    source = only(open_models(archive.as_uri(), "cat", cache_dir=cache))
    assert (source.version, fetch(source, cache).read_bytes()) == (5, b"old")
    archive_of(archive, {"5/m.keras": b"newer"})
    assert fetch(only(open_models(archive.as_uri(), "cat", cache_dir=cache)), cache).read_bytes() == b"newer"
