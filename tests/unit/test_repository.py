"""What lies on disk: each form of file and folder, and what is told of the rest."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from service.errors import InvalidArgument
from service.registry.repository import Kind, Problem, Repository, Source, open_models, scan

EXPECTED = "model.keras, model.h5 or a SavedModel (saved_model.pb and variables/) expected"
NAME_RULE = "letters, digits, '_', '-' and '.' expected"


def lay(root: Path, *files: str) -> Path:
    """Write files (empty, with their folders) below `root`; a name that ends in ``/`` is a folder."""
    for name in files:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """An empty folder of models whose own name is no version number."""
    return lay(tmp_path / "models", "./")


@pytest.mark.parametrize(
    ("file", "kind", "path"),
    [
        ("cat/3/model.keras", Kind.KERAS, "cat/3/model.keras"),
        ("cat/3/any name.keras", Kind.KERAS, "cat/3/any name.keras"),
        ("cat/3/model.h5", Kind.H5, "cat/3/model.h5"),
        ("cat/3/model.hdf5", Kind.H5, "cat/3/model.hdf5"),
        ("cat/3/saved_model.pb", Kind.SAVED_MODEL, "cat/3"),
    ],
)
def test_each_form_of_a_version_is_found(models: Path, file: str, kind: Kind, path: str) -> None:
    """A version is one ``.keras`` or ``.h5`` file of any name, or a SavedModel's folder."""
    found = open_models(lay(models, file))
    assert found.sources == (Source("cat", 3, kind, models / path),)
    assert found.problems == ()


def test_a_folder_of_models_is_read_in_order(models: Path) -> None:
    """Sources come by name, then by version as a number, whatever their order on disk."""
    lay(models, "b/10/m.keras", "b/9/m.keras", "a/2/m.h5", "c.d-e_f/1/saved_model.pb")
    found = open_models(models)
    assert [(s.model, s.version) for s in found.sources] == [("a", 2), ("b", 9), ("b", 10), ("c.d-e_f", 1)]


def test_what_is_no_model_is_passed_over(models: Path) -> None:
    """Plain files, hidden folders and ``__pycache__`` beside models and versions are no problem."""
    lay(models, "README.md", ".git/1/m.keras", "__pycache__/x.pyc", "cat/README.md", "cat/1/m.keras", "cat/1/.DS_Store")
    lay(models, "cat/.backup/m.keras", "cat/1/notes.txt")
    found = open_models(models)
    assert [(s.model, s.version) for s in found.sources] == [("cat", 1)]
    assert found.problems == ()


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (["cat/1/"], Problem("cat", 1, f"{EXPECTED}, found nothing")),
        (["cat/1/b.txt", "cat/1/a.H5"], Problem("cat", 1, f"{EXPECTED}, found a.H5, b.txt")),
        (
            ["cat/1/a.keras", "cat/1/b.h5"],
            Problem("cat", 1, "one model expected in the folder, found a.keras, b.h5"),
        ),
        (
            ["cat/1/a.keras", "cat/1/saved_model.pb"],
            Problem("cat", 1, "one model expected in the folder, found a.keras, saved_model.pb"),
        ),
        (["cat/"], Problem("cat", None, "the folder has no version: <name>/<integer version>/ expected")),
        (["cat/v1/m.keras"], Problem("cat", None, "the folder has no version: <name>/<integer version>/ expected")),
        (["lost+found/"], Problem("lost+found", None, f"{NAME_RULE} in a model's name")),
    ],
)
def test_a_folder_that_is_no_version_is_told(models: Path, files: list[str], problem: Problem) -> None:
    """Each folder that cannot be served is a problem with its reason; the others are served."""
    found = open_models(lay(models, *files, "other/1/m.keras"))
    assert found.problems == (problem,)
    assert [s.model for s in found.sources] == ["other"]


@pytest.mark.parametrize("name", ["a b", "a+b", "é", "a:1"])
def test_a_models_name_has_few_characters(models: Path, name: str) -> None:
    """A folder whose name could not stand in a URL is told and not served."""
    found = open_models(lay(models, f"{name}/1/m.keras"))
    assert found.sources == ()
    assert found.problems == (Problem(name, None, f"{NAME_RULE} in a model's name"),)


def test_a_version_is_the_integer_that_its_name_means(models: Path) -> None:
    """Leading zeros do not count: ``007`` is version 7."""
    found = open_models(lay(models, "cat/007/m.keras", "cat/0/m.keras"))
    assert [s.version for s in found.sources] == [0, 7]


def test_two_folders_of_one_version_are_told(models: Path) -> None:
    """Of ``01`` and ``1`` the first is served and the second is a problem."""
    found = open_models(lay(models, "cat/01/a.keras", "cat/1/b.keras"))
    assert [s.path.name for s in found.sources] == ["a.keras"]
    assert found.problems == (Problem("cat", 1, "two folders are version 1"),)


@pytest.mark.parametrize("name", ["v2", "1.0", "-1", "²", "٣", str(2**63), "0" * 20 + "9" * 20, "9" * 200])
def test_a_folder_that_is_no_version_number_is_ignored(
    models: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no integer of 63 bits in ASCII digits is ignored, which the log says."""
    caplog.set_level(logging.WARNING, "kiln.registry")
    found = open_models(lay(models, f"cat/{name}/m.keras", "cat/1/m.keras"))
    assert [s.version for s in found.sources] == [1]
    assert found.problems == ()
    assert caplog.messages == [f"cat: {name!r} is ignored: it is no version number"]


def test_the_largest_version_is_served(models: Path) -> None:
    """Versions go up to 2**63 - 1, the largest that either protocol's integer holds."""
    found = open_models(lay(models, f"cat/{2**63 - 1}/m.keras"))
    assert [s.version for s in found.sources] == [2**63 - 1]


@pytest.mark.parametrize("link", ["cat", "cat/1", "cat/1/m.keras", "cat/1/saved_model.pb"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, models: Path, link: str) -> None:
    """A model, version or file that lies elsewhere is a problem, whichever part of the path is the link."""
    outside = lay(tmp_path / "outside", "cat/1/m.keras" if not link.endswith(".pb") else "cat/1/saved_model.pb")
    lay(models, "other/1/m.keras")
    (models / link).parent.mkdir(parents=True, exist_ok=True)
    (models / link).symlink_to(outside / link)
    found = open_models(models)
    named = "saved_model.pb" if link.endswith(".pb") else "m.keras"
    assert found.problems == (Problem("cat", 1, f"{named} is a link out of the models' folder"),)
    assert [s.model for s in found.sources] == ["other"]


def test_a_link_within_the_folder_is_followed(models: Path) -> None:
    """One version may be a link to another's folder, and the whole folder may be reached by a link."""
    lay(models, "cat/1/m.keras")
    (models / "cat" / "2").symlink_to(models / "cat" / "1")
    way = models.parent / "way"
    way.symlink_to(models)
    assert [s.version for s in open_models(way).sources] == [1, 2]


def test_a_dangling_link_is_no_file(models: Path) -> None:
    """A link to nothing does not count as a model's file."""
    lay(models, "cat/1/")
    (models / "cat/1/m.keras").symlink_to(models / "gone.keras")
    assert open_models(models).problems == (Problem("cat", 1, f"{EXPECTED}, found m.keras"),)


@pytest.mark.parametrize(("closed", "version"), [("cat", None), ("cat/1", 1)])
def test_an_unreadable_folder_does_not_keep_others_from_being_found(
    models: Path, closed: str, version: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that may not be listed is a problem of that model, or version, only."""
    lay(models, "cat/1/m.keras", "cat/2/m.keras", "dog/1/m.keras")
    iterdir = Path.iterdir

    def refuse(path: Path) -> object:
        if path == models / closed:
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    found = open_models(models)
    assert found.problems == (Problem("cat", version, "the folder cannot be read: Permission denied"),)
    assert ("dog", 1) in [(s.model, s.version) for s in found.sources]


@pytest.mark.parametrize(
    ("files", "path", "name", "source"),
    [
        (["cat.keras"], "cat.keras", None, ("cat", 1, Kind.KERAS, "cat.keras")),
        (["cat.keras"], "cat.keras", "dog", ("dog", 1, Kind.KERAS, "cat.keras")),
        (["cat/5/m.h5"], "cat/5/m.h5", None, ("cat", 5, Kind.H5, "cat/5/m.h5")),
        (["cat/5/m.h5"], "cat/5", None, ("cat", 5, Kind.H5, "cat/5/m.h5")),
        (["cat/5/m.h5"], "cat/5", "dog", ("dog", 5, Kind.H5, "cat/5/m.h5")),
        (["cat/m.keras"], "cat", None, ("cat", 1, Kind.KERAS, "cat/m.keras")),
        (["cat/saved_model.pb"], "cat", None, ("cat", 1, Kind.SAVED_MODEL, "cat")),
        (["cat/5/saved_model.pb"], "cat/5", None, ("cat", 5, Kind.SAVED_MODEL, "cat/5")),
        (["²/m.keras"], "²/m.keras", None, ("m", 1, Kind.KERAS, "²/m.keras")),
    ],
)
def test_one_version_is_opened_by_itself(
    models: Path, files: list[str], path: str, name: str | None, source: tuple[str, int, Kind, str]
) -> None:
    """A file or a version's folder is one model: its path tells name and version, `--name` has the last word."""
    model, version, kind, place = source
    found = open_models(lay(models, *files) / path, name)
    assert found.sources == (Source(model, version, kind, models / place),)


def test_one_models_folder_is_opened_with_all_its_versions(models: Path) -> None:
    """A folder with integer folders is one model, by its own name or by `--name`."""
    lay(models, "cat/1/m.keras", "cat/2/m.keras", "cat/3/")
    for name, expected in ((None, "cat"), ("dog", "dog")):
        found = open_models(models / "cat", name)
        assert [(s.model, s.version) for s in found.sources] == [(expected, 1), (expected, 2)]
        assert found.problems == (Problem(expected, 3, f"{EXPECTED}, found nothing"),)


def test_the_working_folder_is_named_by_its_real_name(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``kiln serve .`` inside a model's folder serves it under the folder's name."""
    monkeypatch.chdir(lay(models, "cat/1/m.keras") / "cat")
    assert [s.model for s in open_models(Path()).sources] == ["cat"]


@pytest.mark.parametrize(
    ("files", "path", "name", "text"),
    [
        ([], "gone", None, "there is no file or folder '{path}'"),
        (["a/1/m.keras"], ".", "cat", "--name goes with one model, but '{path}' is a folder of models"),
        (["a/1/m.keras"], ".", "no name", f"--name: {NAME_RULE}, got 'no name'"),
        (["a/1/m.keras"], ".", ".cat", f"--name: {NAME_RULE}, got '.cat'"),
        (["a/1/m.keras"], ".", "", f"--name: {NAME_RULE}, got ''"),
        (["my cat.keras"], "my cat.keras", None, "'my cat' cannot be a model's name: give one with --name"),
        (["my cat/1/m.keras"], "my cat", None, "'my cat' cannot be a model's name: give one with --name"),
        (["cat.txt"], "cat.txt", None, "'{path}' is no .keras or .h5 file and no SavedModel folder"),
        (["cat.H5"], "cat.H5", None, "'{path}' is no .keras or .h5 file and no SavedModel folder"),
        (
            ["cat/m.keras", "cat/saved_model.pb"],
            "cat",
            None,
            "'{path}': one model expected in the folder, found m.keras, saved_model.pb",
        ),
    ],
)
def test_what_cannot_be_served_at_all_is_refused(
    models: Path, files: list[str], path: str, name: str | None, text: str
) -> None:
    """A path or name that can mean nothing ends the start with a text that says what is wrong."""
    place = lay(models, *files) / path
    with pytest.raises(InvalidArgument) as caught:
        open_models(place, name)
    assert str(caught.value) == text.format(path=place.resolve() if place.exists() else place)


def test_an_empty_folder_has_nothing_to_tell(models: Path) -> None:
    """A folder without models is an empty repository."""
    assert scan(models) == open_models(models)
    assert open_models(models) == Repository()
