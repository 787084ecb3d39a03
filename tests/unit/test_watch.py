"""Looking for changes: files are loaded once they are whole, and the config file is followed."""

from __future__ import annotations

import asyncio
import contextlib
import zipfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.batching.runner import ThreadRunner
from service.errors import InvalidArgument
from service.registry.config import ModelConfig, ModelConfigs
from service.registry.repository import Kind, Problem, Repository, Source
from service.registry.watch import Settling, Watcher, look
from tests.fakes import FakeClock
from tests.unit.stores import ROOT, FakeStore


def source(fingerprint: str, modified: float, kind: Kind = Kind.SAVED_MODEL, path: str = "there") -> Source:
    return Source("m", 1, kind, Path(path), fingerprint, modified)


def found(settling: Settling, *sources: Source) -> list[str]:
    """Fingerprints of what is whole, and the reasons of what is not."""
    repository = settling.settled(Repository(sources))
    return [s.fingerprint for s in repository.sources] + [p.reason for p in repository.problems]


BEING_COPIED = ["its files are still changing: it is loaded once they have been quiet"]


def test_files_are_whole_once_they_have_been_quiet():
    """A version is held back while its newest file is younger than the quiet time."""
    clock = FakeClock(100.0)
    settling = Settling(2.0, clock)
    assert found(settling, source("a", 99.0)) == BEING_COPIED
    clock.advance(0.9)
    assert found(settling, source("a", 99.0)) == BEING_COPIED
    clock.advance(0.1)
    assert found(settling, source("a", 99.0)) == ["a"]


def test_files_that_go_on_changing_are_not_whole():
    """Each change starts the quiet time again."""
    clock = FakeClock(100.0)
    settling = Settling(2.0, clock)
    for step in range(5):
        assert found(settling, source(str(step), clock.now)) == BEING_COPIED
        clock.advance(1.5)


def test_a_version_stays_as_it_was_while_its_files_are_replaced():
    """What has been whole once is kept until the new files are."""
    clock = FakeClock(100.0)
    settling = Settling(2.0, clock)
    assert found(settling, source("a", 0.0)) == ["a"]
    assert found(settling, source("b", 100.0)) == ["a"]
    clock.advance(2.0)
    assert found(settling, source("b", 100.0)) == ["b"]
    assert found(settling) == []
    assert found(settling, source("c", 102.0)) == BEING_COPIED


def test_a_store_that_does_not_answer_takes_no_version_away():
    """What was whole stays while it cannot be seen whether it is still there, and goes when it is seen to be gone."""
    settling = Settling(2.0, FakeClock(100.0))
    assert found(settling, source("a", 0.0)) == ["a"]
    silent = Repository(problems=(Problem("m", None, "no answer"),), unreachable=frozenset({"m"}))
    for _ in range(2):
        repository = settling.settled(silent)
        assert [s.fingerprint for s in repository.sources] == ["a"]
        assert repository.problems == silent.problems
    assert found(settling) == []
    assert settling.settled(silent).sources == ()


def test_a_model_whose_store_does_not_answer_is_told_apart_from_one_that_is_gone(tmp_path: Path, files: FakeStore):
    """A URL that cannot be listed is a problem of its model, and known to be unreachable; a missing path is not."""
    (tmp_path / "models").mkdir()
    configs = {"far": ModelConfig(path=f"{ROOT}/far"), "gone": ModelConfig(path=str(tmp_path / "nowhere"))}
    repository = look(tmp_path / "models", None, configs, tmp_path / "cache")
    assert [problem.model for problem in repository.problems] == ["far", "gone"]
    assert repository.unreachable == {"far"}


def test_an_archive_is_whole_when_its_end_is_there(tmp_path: Path):
    """A .keras file need not be quiet for long: its directory is written last."""
    clock = FakeClock(100.0)
    settling = Settling(2.0, clock)
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    half = source("half", 100.0, Kind.KERAS, str(path))
    assert found(settling, half) == BEING_COPIED
    assert found(settling, half) == BEING_COPIED
    path.write_bytes(whole)
    done = source("done", 100.0, Kind.KERAS, str(path))
    assert found(settling, done) == BEING_COPIED
    assert found(settling, done) == ["done"]
    path.unlink()
    assert found(settling, source("gone", 100.0, Kind.KERAS, str(path))) == ["done"]


def test_a_config_may_say_where_a_model_lies(tmp_path: Path):
    """The folder of models is left aside for a model whose config names another place."""
    for place in ("models/a/1", "models/b/1", "elsewhere/2"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "model.keras").write_text("x")
    configs = {"b": ModelConfig(path=str(tmp_path / "elsewhere")), "c": ModelConfig(path=str(tmp_path / "nowhere"))}
    repository = look(tmp_path / "models", None, configs, tmp_path / "cache")
    assert [(s.model, s.version) for s in repository.sources] == [("a", 1), ("b", 2)]
    (problem,) = repository.problems
    assert (problem.model, problem.version) == ("c", None)
    assert "there is no file or folder" in problem.reason


class Followed:
    """A watcher on a fake repository, and what it said."""

    def __init__(
        self, config_file: Path | None = None, poll_s: float | None = None, *, follows_folder: bool = True
    ) -> None:
        self.runner = ThreadRunner("watcher", asyncio.get_running_loop())
        self.repository = Repository()
        self.looks = 0
        self.told: asyncio.Queue[ModelConfigs | None] = asyncio.Queue()
        self.error: Exception | None = None
        self.is_done = self.is_fresh = False
        self.watcher = Watcher(
            self.look,
            config_file=config_file,
            poll_s=poll_s,
            quiet_s=0.02,
            runner=self.runner,
            follows_folder=follows_folder,
        )

    def look(self, configs: ModelConfigs) -> Repository:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return replace(self.repository) if self.is_fresh else self.repository

    async def update(self, configs: ModelConfigs | None) -> bool:
        await self.told.put(configs)
        await self.watcher.found(self.watcher.configs)
        return self.is_done


async def test_a_poke_makes_it_look_at_once():
    """Without polling only a poke is followed; the config file is then read again though it did not change."""
    followed = Followed()
    task = asyncio.create_task(followed.watcher.run(followed.update))
    followed.watcher.poke()
    assert await followed.told.get() is None
    task.cancel()
    followed.runner.close()


async def test_only_the_config_file_is_followed_where_the_folder_is_not(tmp_path: Path):
    """A change of the file, or a poke, is told; the mere passing of time is not."""
    file = tmp_path / "models.yaml"
    file.write_text("models: {a: {}}")
    followed = Followed(config_file=file, poll_s=0.001, follows_folder=False)
    assert followed.watcher.read_config_file()
    task = asyncio.create_task(followed.watcher.run(followed.update))
    file.write_text("models: {a: {}, b: {}}")
    assert list(await followed.told.get() or ()) == ["a", "b"]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(followed.told.get(), 0.05)
    followed.watcher.poke()
    assert list(await followed.told.get() or ()) == ["a", "b"]
    task.cancel()
    followed.runner.close()


@pytest.mark.parametrize("error", [InvalidArgument("the folder is gone"), ZeroDivisionError("the folder is gone")])
async def test_polling_goes_on_after_an_error(caplog: pytest.LogCaptureFixture, error: Exception):
    """An error, foreseen or not, is told once, and the next look is made all the same."""
    followed = Followed(poll_s=0.001)
    followed.error = error
    task = asyncio.create_task(followed.watcher.run(followed.update))
    for _ in range(3):
        await followed.told.get()
    assert [r.getMessage() for r in caplog.records] == ["nothing is changed: the folder is gone"]
    task.cancel()
    followed.runner.close()


@contextlib.asynccontextmanager
async def resting(file: Path, poll_s: float) -> AsyncIterator[Followed]:
    """A watcher that was told once that nothing is left to do."""
    _write(file, "models: {a: {}}")
    followed = Followed(config_file=file, poll_s=0.001)
    followed.is_done = True
    task = asyncio.create_task(followed.watcher.run(followed.update))
    assert list(await followed.told.get() or ()) == ["a"]
    assert await followed.told.get() is None  # to see that there is nothing new
    followed.watcher._poll_s = poll_s
    while followed.watcher._stir.is_set():
        await asyncio.sleep(0.001)
    yield followed
    task.cancel()
    followed.runner.close()


async def test_while_nothing_changes_nothing_is_told(tmp_path: Path):
    """Looks are made all the same; with what they find it is told again."""
    async with resting(tmp_path / "models.yaml", 0.001) as followed:
        await asyncio.sleep(0.1)
        assert followed.looks > 10
        assert followed.told.empty()
        followed.repository = Repository((source("a", 0.0),))
        assert await asyncio.wait_for(followed.told.get(), 5.0) is None


@pytest.mark.parametrize("why", ["something is left to do", "files have to be quiet", "each look is another"])
async def test_where_there_may_be_something_to_do_it_is_told_at_every_look(why: str):
    """While models are being loaded, or copied, and of a store that is listed anew each time."""
    followed = Followed(poll_s=0.001)
    followed.is_done = why != "something is left to do"
    followed.is_fresh = why == "each look is another"
    followed.repository = Repository((source("a", 1e12 if why == "files have to be quiet" else 0.0),))
    task = asyncio.create_task(followed.watcher.run(followed.update))
    for count in range(1, 6):
        assert await asyncio.wait_for(followed.told.get(), 5.0) is None
        assert followed.looks <= count
    task.cancel()
    followed.runner.close()


def _write(file: Path, text: str) -> None:
    file.write_text(text)


def _config(followed: Followed, file: Path) -> None:
    _write(file, "models: {a: {}, b: {}}")


def _folder_gone(followed: Followed, file: Path) -> None:
    followed.error = InvalidArgument("the folder is gone")


def _bug(followed: Followed, file: Path) -> None:
    followed.error = ZeroDivisionError("unforeseen")


@pytest.mark.parametrize("change", [_config, _folder_gone, _bug])
async def test_what_ends_a_rest(tmp_path: Path, change: Callable[[Followed, Path], None]):
    """Another file of configs, and whatever makes a look fail."""
    file = tmp_path / "models.yaml"
    async with resting(file, 0.001) as followed:
        change(followed, file)
        told = await asyncio.wait_for(followed.told.get(), 5.0)
        assert (told is None) is (change is not _config)


@pytest.mark.parametrize("way", ["poke", "stir", "look"])
async def test_a_rest_holds_up_nobody(tmp_path: Path, way: str):
    """However long it is: a poke, a change that the models made, and a look that somebody waits for."""
    async with resting(tmp_path / "models.yaml", 600.0) as followed:
        if way == "poke":
            followed.watcher.poke()
        elif way == "stir":
            followed.watcher.stir()
        else:
            assert await asyncio.wait_for(followed.watcher.found({}), 5.0) == followed.repository
        await asyncio.wait_for(followed.told.get(), 5.0)


async def test_the_config_file_is_read_when_it_changes(tmp_path: Path):
    """Configs are handed on when the file has changed, and not otherwise; a wrong file changes nothing."""
    file = tmp_path / "models.yaml"
    file.write_text("models: {a: {versions: all}}")
    followed = Followed(config_file=file)
    assert followed.watcher.read_config_file()
    assert list(followed.watcher.configs) == ["a"]
    assert not followed.watcher.read_config_file()
    file.write_text("models: {a: {versions: none at all}}")
    with pytest.raises(InvalidArgument, match=r"models\.a\.versions: .*expected, got 'none at all'"):
        followed.watcher.read_config_file()
    assert list(followed.watcher.configs) == ["a"]
    followed.runner.close()


async def test_it_waits_a_little_for_files_that_were_just_written(tmp_path: Path):
    """At the start and on request, versions that are being written are waited for."""
    followed = Followed()
    file = tmp_path / "model.h5"
    file.write_text("x")
    stat = file.stat()
    followed.repository = Repository((Source("m", 1, Kind.H5, file, "a", stat.st_ctime),), (Problem("n", 1, "no"),))
    repository = await followed.watcher.found_whole({})
    assert [s.model for s in repository.sources] == ["m"]
    followed.runner.close()
