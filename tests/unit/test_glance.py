"""Glances at a folder of models: the whole look is taken where something has changed, and only there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import InvalidArgument
from service.registry import glance
from service.registry.config import ModelConfig, ModelConfigs
from service.registry.glance import Glance
from service.registry.repository import Repository, open_models


class Looks:
    """A glance at a folder with one model, whose whole looks are counted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "a" / "1" / "saved_model.pb"
        (self.file.parent / "variables").mkdir(parents=True)
        self.file.write_bytes(b"graph")
        (self.file.parent / "variables" / "data").write_bytes(b"weights")
        self.count = 0
        self.now = 0.0
        self.glance = Glance(self._look, root, clock=lambda: self.now)

    def _look(self, configs: ModelConfigs) -> Repository:
        self.count += 1
        return open_models(self.root)


@pytest.fixture
def looks(tmp_path: Path) -> Looks:
    return Looks(tmp_path / "models")


def _grow(looks: Looks) -> None:
    looks.file.write_bytes(b"another graph")


def _touch(looks: Looks) -> None:
    os.utime(looks.file.parent / "variables" / "data", ns=(1, 1))


def _add_model(looks: Looks) -> None:
    (looks.root / "b" / "1").mkdir(parents=True)


def _add_version(looks: Looks) -> None:
    (looks.root / "a" / "2").mkdir()


def _remove(looks: Looks) -> None:
    looks.file.unlink()


def _replace(looks: Looks) -> None:
    other = looks.root.parent / "other"
    other.write_bytes(b"grapH")
    other.replace(looks.file)


@pytest.mark.parametrize("change", [_grow, _touch, _add_model, _add_version, _remove, _replace])
def test_a_change_is_seen_at_the_next_look_and_worked_out_once(looks: Looks, change: Callable[[Looks], None]):
    """Of a file's content or times, or of what there is."""
    before = looks.glance({})
    assert looks.glance({}) is before
    assert looks.count == 1
    change(looks)
    after = looks.glance({})
    assert after == open_models(looks.root)
    assert not after.is_same(before)
    assert after.is_same(Repository(after.sources, after.problems))
    assert looks.glance({}) is after
    assert looks.count == 2


def test_a_link_that_is_turned_is_a_change(looks: Looks):
    """The folder itself may be a link, as where a volume is replaced whole."""
    link = looks.root.parent / "link"
    other = Looks(looks.root.parent / "others")
    link.symlink_to(looks.root)
    glances = Glance(lambda configs: open_models(link), link)
    assert glances({}).sources[0].path.is_relative_to(looks.root)
    link.unlink()
    link.symlink_to(other.root)
    assert glances({}).sources[0].path.is_relative_to(other.root)


def test_models_that_lie_elsewhere_are_always_looked_at(looks: Looks):
    """A glance knows nothing of other folders, or of URLs."""
    configs = {"b": ModelConfig(path="s3://bucket/b")}
    for _ in range(3):
        looks.glance(configs)
    assert looks.count == 3
    looks.glance({})
    looks.glance({})
    assert looks.count == 4


def test_a_folder_that_is_gone_is_refused_each_time(looks: Looks):
    """And found again as soon as it is back."""
    gone = looks.root.rename(looks.root.parent / "away")
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="there is no file or folder"):
            looks.glance({})
    gone.rename(looks.root)
    assert [source.model for source in looks.glance({}).sources] == ["a"]


def test_what_changes_during_a_look_is_seen_at_the_next(looks: Looks):
    """The files are stamped before they are looked at."""

    def look(configs: ModelConfigs) -> Repository:
        found = open_models(looks.root)
        if looks.count == 0:
            _add_model(looks)
        looks.count += 1
        return found

    glances = Glance(look, looks.root)
    assert not glances({}).problems
    assert [problem.model for problem in glances({}).problems] == ["b"]


def _grown(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make it a large folder that has long been quiet; the paths that are stamped from now on."""
    for number in range(19):
        (looks.root / f"m{number}" / "1").mkdir(parents=True)
        (looks.root / f"m{number}" / "1" / "saved_model.pb").write_bytes(b"graph")
    monkeypatch.setattr(glance, "_LEAST_AT_ONCE", 10)
    looks.glance({})
    looks.now += 10.0
    stamped: list[str] = []
    real = glance._stamp

    def stamp(path: str) -> glance.Stamp:
        stamped.append(path)
        return real(path)

    monkeypatch.setattr(glance, "_stamp", stamp)
    return stamped


def _outer_and_inner(looks: Looks) -> tuple[set[str], set[str]]:
    outer = {str(looks.root), *(str(path) for path in looks.root.iterdir())}
    return outer, {str(path) for path in looks.root.rglob("*")} - outer


def test_of_a_large_quiet_folder_all_is_looked_at_in_turns(looks: Looks, monkeypatch: pytest.MonkeyPatch):
    """The folders of models each time, what is in them by and by, and then from the beginning."""
    stamped = _grown(looks, monkeypatch)
    before = looks.glance({})
    outer, inner = _outer_and_inner(looks)
    assert (len(outer), len(inner)) == (21, 42)
    assert (set(stamped[:21]), len(stamped)) == (outer, 21 + 10)
    for _ in range(4):
        looks.glance({})
    assert set(stamped) == outer | inner
    assert len(stamped) == 5 * 21 + 42
    for _ in range(5):
        looks.glance({})
    assert len(stamped) == 2 * (5 * 21 + 42)
    assert (looks.glance({}), looks.count) == (before, 1)


def test_a_very_large_folder_is_through_in_twenty_looks(looks: Looks, monkeypatch: pytest.MonkeyPatch):
    """However much there is, a change is not left unseen for longer."""
    stamped = _grown(looks, monkeypatch)
    monkeypatch.setattr(glance, "_LEAST_AT_ONCE", 1)
    for _ in range(20):
        looks.glance({})
    assert set(stamped) == set().union(*_outer_and_inner(looks))


@pytest.mark.parametrize(("change", "most"), [(_add_model, 1), (_add_version, 1), (_grow, 5), (_replace, 5)])
def test_a_change_of_a_large_quiet_folder_is_seen(
    looks: Looks, monkeypatch: pytest.MonkeyPatch, change: Callable[[Looks], None], most: int
):
    """New models and versions at once, the rest when its turn comes; then all of it each time, for seconds."""
    stamped = _grown(looks, monkeypatch)
    change(looks)
    for _ in range(most):
        looks.glance({})
    assert looks.count == 2
    looks.now += 9.0
    stamped.clear()
    looks.glance({})
    assert set(stamped) == set().union(*_outer_and_inner(looks))
