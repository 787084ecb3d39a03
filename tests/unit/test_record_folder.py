"""Files of records: one for each version of a model, bounded one by one and together."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from service.following.record_folder import FolderBounds, LineFile, Part, RecordFolder

ROOMY = FolderBounds(1 << 20, 1 << 24)


def contents(folder: Path) -> dict[str, list[bytes]]:
    """The lines of all files, by their folder and in order of their numbers."""
    found: dict[str, list[bytes]] = {}
    for path in sorted(folder.glob("*/*/*"), key=lambda path: int(path.stem.rpartition("-")[2])):
        found.setdefault(path.parent.relative_to(folder).as_posix(), []).extend(path.read_bytes().splitlines())
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*"))


def test_each_version_has_files_of_its_own(tmp_path: Path):
    """So that each of them can warm up its model; they are there to be read at once."""
    folder = RecordFolder(tmp_path / "new" / "log", "jsonl", ROOMY)
    for model, version, record in (("a", 1, b"1"), ("b", 1, b"2"), ("a", 2, b"3"), ("a", 1, b"4")):
        folder.write(model, version, record)
    assert contents(tmp_path / "new" / "log") == {"a/1": [b"1", b"4"], "b/1": [b"2"], "a/2": [b"3"]}
    assert {path.suffix for path in files(tmp_path / "new" / "log")} == {".jsonl"}
    folder.close()


@pytest.mark.parametrize(("model", "name"), [("../x", "..%2Fx"), ("..", "_.."), ("a b", "a%20b")])
def test_a_name_stays_in_the_folder(model: str, name: str, tmp_path: Path):
    """Whatever a model is called."""
    folder = RecordFolder(tmp_path / "log", "jsonl", ROOMY)
    folder.write(model, 1, b"1")
    folder.close()
    assert contents(tmp_path / "log") == {f"{name}/1": [b"1"]}
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_full_file_is_followed_by_the_next(tmp_path: Path):
    """By bytes, or once it has as many records as a warm-up file may have; none is over the bound."""
    folder = RecordFolder(tmp_path, "jsonl", FolderBounds(1024, 1 << 20))
    for _ in range(6):
        folder.write("a", 1, b"x" * 400)
    assert [path.stat().st_size for path in files(tmp_path)] == [802, 802, 802]
    for _ in range(1001):
        folder.write("b", 1, b"")
    folder.close()
    small = RecordFolder(tmp_path, "jsonl", ROOMY)
    for _ in range(1001):
        small.write("c", 1, b"")
    small.close()
    assert sorted(len(path.read_bytes()) for path in files(tmp_path) if path.parts[-3] == "c") == [1, 1000]


def test_a_record_that_no_file_holds(tmp_path: Path):
    """It is refused, and nothing is deleted for it."""
    folder = RecordFolder(tmp_path, "jsonl", FolderBounds(1024, 2048))
    folder.write("a", 1, b"1")
    with pytest.raises(OSError, match="a record of 1010 bytes is over the limit of a file, 1024"):
        folder.write("a", 1, b"x" * 1010)
    folder.close()
    assert contents(tmp_path) == {"a/1": [b"1"]}


def test_the_oldest_files_make_room(tmp_path: Path):
    """Also those of an earlier run, and one that is still open; together they keep to the bound."""
    before = tmp_path / "z" / "9"
    before.mkdir(parents=True)
    (before / "requests-old-1-1.tfrecord").write_bytes(b"x" * 900)
    (before / "notes.txt").write_bytes(b"y" * 5000)
    bounds = FolderBounds(1024, 2048)
    folder = RecordFolder(tmp_path, "jsonl", bounds)
    folder.write("a", 1, b"a" * 500)
    assert (before / "requests-old-1-1.tfrecord").exists()
    for model in "bcde":
        folder.write(model, 1, b"b" * 600)
    folder.write("a", 1, b"again")
    folder.close()
    kept = [path for path in files(tmp_path) if path.name.startswith("requests")]
    assert sum(path.stat().st_size for path in kept) <= bounds.total_bytes
    assert [path.parts[-3] for path in kept] == ["a", "c", "d", "e"]
    assert (before / "notes.txt").exists()


def test_files_of_many_models_are_not_all_open(tmp_path: Path):
    """The one opened first is closed, and begun anew when it is wanted."""
    folder = RecordFolder(tmp_path, "jsonl", ROOMY)
    for model in [*map(str, range(17)), "0"]:
        folder.write(model, 1, model.encode())
    folder.close()
    assert len(files(tmp_path)) == 18
    assert contents(tmp_path)["0/1"] == [b"0", b"0"]


class FullDisk(LineFile):
    """Writes half of a record of zeros, and then there is no room."""

    def write(self, record: bytes) -> int:
        if record.startswith(b"0"):
            super().write(record[: len(record) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(record)


@pytest.mark.parametrize("before", [[], [b"1", b"2"]])
def test_a_record_that_fails_leaves_no_trace(before: list[bytes], tmp_path: Path):
    """The file is cut back to what was whole, or goes if there was nothing; the next record begins another."""
    folder = RecordFolder(tmp_path, "jsonl", ROOMY, FullDisk)
    for record in before:
        folder.write("a", 1, record)
    with pytest.raises(OSError, match="No space left"):
        folder.write("a", 1, b"0000")
    assert contents(tmp_path) == ({"a/1": before} if before else {})
    folder.write("a", 1, b"3")
    folder.close()
    assert contents(tmp_path) == {"a/1": [*before, b"3"]}
    assert len(files(tmp_path)) == 1 + bool(before)


def test_a_disk_that_takes_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A line is written to its end."""
    file = LineFile(tmp_path / "file")
    real = file._file

    class Parts:
        def write(self, data: memoryview) -> int:
            return real.write(data[:3])

    monkeypatch.setattr(file, "_file", Parts())
    assert file.write(b"0123456789") == 11
    real.close()
    assert (tmp_path / "file").read_bytes() == b"0123456789\n"


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """That is told when it is opened, not with the first request."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RecordFolder(tmp_path / "file", "jsonl", ROOMY)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        RecordFolder(tmp_path, "jsonl", ROOMY)


def test_a_file_that_goes_meanwhile(tmp_path: Path):
    """Somebody may delete what is being looked at."""
    link = tmp_path / "a" / "1" / "requests-1-1-1.jsonl"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "nowhere")
    folder = RecordFolder(tmp_path, "jsonl", ROOMY)
    folder.write("b", 1, b"1")
    folder.close()
    (path,) = tmp_path.glob("b/1/*")
    assert path.read_bytes() == b"1\n"


def test_processes_share_a_folder(tmp_path: Path):
    """Each keeps to its own part of the bound, and lets the files of the others be, also when it starts anew."""
    bounds = FolderBounds(1024, 2048)
    first, second = (RecordFolder(tmp_path, "jsonl", bounds, part=Part(number, 2)) for number in (1, 2))
    for number in range(20):
        first.write("a", 1, b"x" * 900)
        if number < 2:
            second.write("a", 1, b"y" * 900)
    again = RecordFolder(tmp_path, "jsonl", bounds, part=Part(1, 2))
    again.write("a", 1, b"z" * 900)
    assert sorted(record[:1] for record in contents(tmp_path)["a/1"]) == [b"x", b"y", b"y", b"z"]
    assert len({path.name for path in files(tmp_path)}) == 4
    for folder in (first, second, again):
        folder.close()


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (Part(), ["-1-1", "-frontend1-1-1", "-frontend2-1-1", "-frontend9-1-1"]),
        (Part(1, 2), ["-1-1", "-frontend1-1-1", "-frontend9-1-1"]),
        (Part(2, 2), ["-frontend2-1-1"]),
    ],
)
def test_whose_a_file_is(part: Part, names: list[str]):
    """Of its writer; the first process has those of writers that are no more."""
    every = ["-1-1", "-frontend1-1-1", "-frontend2-1-1", "-frontend9-1-1"]
    assert [name for name in every if part.has(f"requests-20260101T000000Z{name}.jsonl")] == names
