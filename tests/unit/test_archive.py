"""Archives: what comes out of good ones, and why evil ones are refused."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from service.errors import ModelLoadError
from service.registry.archive import UnpackLimits, archive_stem, unpack

LIMITS = UnpackLimits(max_bytes=10_000, max_members=10)
FILES = {"1/saved_model.pb": b"graph", "1/variables/variables.index": b"\0" * 300, "note.txt": b""}
ENDINGS = ["zip", "tar.gz", "tgz"]


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info, content


def zip_of(path: Path, *members: tuple[str, bytes, int]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def archive_of(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of plain files, in the form that the path's ending says."""
    if path.suffix == ".zip":
        return zip_of(path, *((name, content, 0o644) for name, content in files.items()))
    return tar_of(path, *(tar_member(name, content) for name, content in files.items()))


def refusal_of(archive: Path, limits: UnpackLimits = LIMITS) -> str:
    with pytest.raises(ModelLoadError) as caught:
        unpack(archive, archive.parent / "out", limits)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("cat.zip", "cat"), ("cat.v2.tar.gz", "cat.v2"), ("CAT.TGZ", "CAT"), ("cat.tar", None), ("cat.keras", None)],
)
def test_an_archive_is_known_by_its_ending(name: str, stem: str | None) -> None:
    """``.zip``, ``.tar.gz`` and ``.tgz`` are archives, in whatever case; nothing else is."""
    assert archive_stem(name) == stem


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_come_out_as_they_went_in(tmp_path: Path, ending: str) -> None:
    """Files, empty ones too, are unpacked with their folders, and without the rights that the archive gives them."""
    unpack(archive_of(tmp_path / f"cat.{ending}", FILES), tmp_path / "out", LIMITS)
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == FILES
    assert not (tmp_path / "out/1/saved_model.pb").stat().st_mode & 0o111


def test_folders_and_names_that_begin_with_a_dot_are_fine(tmp_path: Path) -> None:
    """What ``tar czf x.tar.gz .`` writes, ``./`` before each name and folders by themselves, is unpacked."""
    members = [
        tar_member("./", kind=tarfile.DIRTYPE),
        tar_member("./1/", kind=tarfile.DIRTYPE),
        tar_member("./1/a", b"x"),
    ]
    unpack(tar_of(tmp_path / "a.tgz", *members), tmp_path / "out", LIMITS)
    assert (tmp_path / "out/1/a").read_bytes() == b"x"
    unpack(zip_of(tmp_path / "b.zip", ("empty/", b"", 0o40755)), tmp_path / "zipped", LIMITS)
    assert (tmp_path / "zipped/empty").is_dir()


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a\\..\\x", "..", "a/.."])
@pytest.mark.parametrize("ending", ["zip", "tar.gz"])
def test_a_member_that_leads_out_is_refused_by_name(tmp_path: Path, name: str, ending: str) -> None:
    """Absolute paths, ``..`` and backslashes are refused, and nothing is written outside."""
    archive = archive_of(tmp_path / f"cat.{ending}", {"ok": b"", name: b"evil"})
    assert refusal_of(archive) == f"the archive is refused: its member {name!r} leads out of it"
    assert {path.name for path in tmp_path.iterdir()} == {archive.name, "out"}


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
    ],
)
def test_a_tars_links_and_devices_are_refused(tmp_path: Path, kind: bytes, what: str) -> None:
    """Only plain files and folders may be in a tar archive."""
    archive = tar_of(tmp_path / "cat.tar.gz", tar_member("1/odd", kind=kind))
    assert refusal_of(archive) == f"the archive is refused: its member '1/odd' is {what}"


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    """A file with holes, which says of itself how large it is, is refused."""
    info, content = tar_member("1/holes", b"\0" * 512, tarfile.GNUTYPE_SPARSE)
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[386:410] = b"%011o\0%011o\0" % (0, 512)  # one part of 512 bytes at 0
    raw[483:495] = b"%011o\0" % 2**30  # its size when unpacked
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    (tmp_path / "cat.tgz").write_bytes(gzip.compress(bytes(raw) + content + b"\0" * 1024))
    assert refusal_of(tmp_path / "cat.tgz") == "the archive is refused: its member '1/holes' is a sparse file"


@pytest.mark.parametrize(
    ("mode", "what"), [(stat.S_IFLNK, "a link"), (stat.S_IFCHR, "a device"), (stat.S_IFIFO, "a device")]
)
def test_a_zips_links_and_devices_are_refused(tmp_path: Path, mode: int, what: str) -> None:
    """Only plain files and folders may be in a zip archive."""
    archive = zip_of(tmp_path / "cat.zip", ("1/odd", b"/etc/passwd", mode | 0o777))
    assert refusal_of(archive) == f"the archive is refused: its member '1/odd' is {what}"


def zip_bomb(path: Path) -> Path:
    return zip_of(path, ("small", b"x", 0), ("bomb", b"\0" * 20_000, 0))


def lying_zip_bomb(path: Path) -> Path:
    """A zip whose directory says that its member is small."""
    raw = zip_of(path, ("bomb", b"\0" * 20_000, 0)).read_bytes()
    path.write_bytes(raw.replace((20_000).to_bytes(4, "little"), (20).to_bytes(4, "little")))
    return path


def tar_bomb(path: Path) -> Path:
    return tar_of(path, tar_member("small", b"x"), tar_member("bomb", b"\0" * 20_000))


def bomb_of_headers(path: Path) -> Path:
    """A tar whose member has a name of 3 MB."""
    return tar_of(path, tar_member("n" * 3_000_000))


def bomb_after_the_end(path: Path) -> Path:
    """A tar with 9 MB of zeros behind its end."""
    raw = gzip.decompress(tar_of(path, tar_member("a", b"x")).read_bytes())
    path.write_bytes(gzip.compress(raw + b"\0" * 9_000_000))
    return path


@pytest.mark.parametrize(
    ("make", "ending", "text"),
    [
        (zip_bomb, "zip", "it unpacks to 20001 bytes, at most 10000 expected"),
        (tar_bomb, "tgz", "with its member 'bomb' it unpacks to more than 10000 bytes"),
        (bomb_of_headers, "tgz", "it has a header of 3000320 bytes"),
        (bomb_after_the_end, "tgz", "it unpacks to more than 50960 bytes"),
    ],
)
def test_a_bomb_is_refused_before_it_fills_the_disk(
    tmp_path: Path, make: Callable[[Path], Path], ending: str, text: str
) -> None:
    """What unpacks to more than the limit is refused, whether it is in files, in headers or behind them."""
    archive = make(tmp_path / f"cat.{ending}")
    assert archive.stat().st_size < 20_000
    assert refusal_of(archive) == f"the archive is refused: {text}"
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) <= 20_001


def test_a_zip_that_lies_about_its_sizes_is_refused(tmp_path: Path) -> None:
    """A directory that understates a member gets no more out than it stated."""
    text = refusal_of(lying_zip_bomb(tmp_path / "cat.zip"))
    assert text == "the archive cannot be unpacked: BadZipFile: Bad CRC-32 for file 'bomb'"
    assert (tmp_path / "out/bomb").stat().st_size <= 20


@pytest.mark.parametrize("ending", ["zip", "tgz"])
def test_the_number_of_members_is_limited(tmp_path: Path, ending: str) -> None:
    """As many members as the limit are fine, one more is refused."""
    files = {f"{number}": b"" for number in range(11)}
    assert (
        refusal_of(archive_of(tmp_path / f"a.{ending}", files)) == "the archive is refused: it has more than 10 members"
    )
    del files["10"]
    unpack(archive_of(tmp_path / f"b.{ending}", files), tmp_path / "whole", LIMITS)
    assert len(list((tmp_path / "whole").iterdir())) == 10


@pytest.mark.parametrize("ending", ["zip", "tgz"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_a_cut_archive_is_refused(tmp_path: Path, ending: str, keep: float) -> None:
    """An archive that ends too early is never taken for whole, not even if only its checksum is cut."""
    archive = archive_of(tmp_path / f"cat.{ending}", {"1/a": bytes(range(256)) * 20})
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(len(raw) * keep)])
    assert refusal_of(archive).startswith("the archive cannot be unpacked: ")


@pytest.mark.parametrize("ending", ["zip", "tgz"])
def test_a_flipped_bit_is_found(tmp_path: Path, ending: str) -> None:
    """The checksums of both forms are held against what comes out."""
    archive = archive_of(tmp_path / f"cat.{ending}", {"1/a": bytes(range(256)) * 30})
    raw = bytearray(archive.read_bytes())
    position = raw.index(bytes(range(256))) if bytes(range(256)) in raw else len(raw) // 2
    raw[position + 5] ^= 1
    archive.write_bytes(raw)
    assert refusal_of(archive).startswith("the archive cannot be unpacked: ")


@pytest.mark.parametrize("names", [("a", "a"), ("a", "a/b")])
def test_two_members_of_one_place_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """A member that another has the place of is refused: which of them was meant cannot be told."""
    archive = tar_of(tmp_path / "cat.tgz", *(tar_member(name, b"x") for name in names))
    assert refusal_of(archive).startswith("the archive cannot be unpacked: FileExistsError")


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    """A page of text under an archive's name is refused with what is wrong."""
    (tmp_path / "cat.zip").write_text("<html>")
    assert refusal_of(tmp_path / "cat.zip") == "the archive cannot be unpacked: BadZipFile: File is not a zip file"
