"""What is made of each store's own way to describe a file."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec  # noqa: F401 - its registry is looked into
import pytest

from service.errors import InvalidArgument
from service.registry import store
from service.registry.store import BrokenDownload, Listing, Store, StoredFile, shown

EMPTY_MD5 = "d41d8cd98f00b204e9800998ecf8427e"
EMPTY_MD5_BASE64 = "1B2M2Y8AsgTpgAmY7PhCfg=="
MULTIPART = '"d41d8cd98f00b204e9800998ecf8427e-3"'


class FakeClient:
    """A client of any store: what it is asked for is downloaded as `content`."""

    def __init__(self, info: dict[str, Any], head: dict[str, Any] | None = None) -> None:
        self.described = {"size": 0, "type": "file", **info}
        self.head = head or {}
        self.content = b""

    def _strip_protocol(self, url: str) -> str:
        return url.partition("://")[2]

    def find(self, root: str, detail: bool) -> dict[str, Any]:
        folder = {"type": "directory", "size": 0}
        return {
            f"{root}/a": self.described,
            f"{root}/b/": self.described,
            f"{root}/c": folder,
            f"{root}2/d": self.described,
        }

    def info(self, path: str) -> dict[str, Any]:
        return self.described

    def get_file(self, address: str, target: str, callback: Any) -> None:
        Path(target).write_bytes(self.content)
        callback.relative_update(len(self.content))

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call_s3(self, method: str, **options: Any) -> dict[str, Any]:
        assert (method, options["Key"]) == ("head_object", "cat/1/a")
        return self.head


def store_of(monkeypatch: pytest.MonkeyPatch, url: str, client: FakeClient) -> Store:
    monkeypatch.setattr(store, "_client", lambda scheme: client)
    return Store(url)


@pytest.mark.parametrize(
    ("scheme", "info", "checksum"),
    [
        ("s3", {"ETag": f'"{EMPTY_MD5}"'}, ("md5", EMPTY_MD5)),
        ("s3", {"ETag": MULTIPART}, None),
        ("gs", {"etag": "CJ/=", "md5Hash": EMPTY_MD5_BASE64}, ("md5", EMPTY_MD5)),
        ("gs", {"etag": "CJ/=", "crc32c": "AAAAAA=="}, None),
        ("az", {"etag": "0x8D", "content_settings": {"content_md5": bytes.fromhex(EMPTY_MD5)}}, ("md5", EMPTY_MD5)),
        ("az", {"etag": EMPTY_MD5, "content_settings": None}, None),
        ("https", {"ETag": f'"{EMPTY_MD5}"'}, None),
        ("https", {"Content-MD5": EMPTY_MD5_BASE64}, ("md5", EMPTY_MD5)),
        ("https", {"Content-MD5": "no base64"}, None),
        ("https", {"Content-MD5": "AAEC"}, None),
        ("https", {"Digest": f"SHA-256={'A' * 43}="}, ("sha256", "00" * 32)),
        ("https", {"Digest": "unixsum=30637"}, None),
    ],
)
def test_the_checksum_is_what_the_store_tells(
    monkeypatch: pytest.MonkeyPatch, scheme: str, info: dict[str, Any], checksum: tuple[str, str] | None
) -> None:
    """An ETag is an MD5 at S3 alone, and there only of what was uploaded in one part."""
    (file,) = store_of(monkeypatch, f"{scheme}://bucket/cat", FakeClient(info)).list().files
    assert file.checksum == checksum


@pytest.mark.parametrize(
    ("info", "mark", "modified"),
    [
        ({"ETag": "e", "LastModified": datetime(2026, 1, 1, tzinfo=UTC)}, "ETag e", 1767225600.0),
        ({"md5Hash": "m", "crc32c": "c", "mtime": 7}, "md5Hash m", 7.0),
        ({"crc32c": "c"}, "crc32c c", 0.0),
        ({"Last-Modified": "Mon", "mtime": "Mon"}, "Last-Modified Mon", 0.0),
        ({"mtime": 7.5}, "7.5", 7.5),
    ],
)
def test_the_mark_is_the_best_sign_of_the_content(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, Any], mark: str, modified: float
) -> None:
    """A tag or checksum tells of a change; the time of it only where there is neither."""
    (file,) = store_of(monkeypatch, "s3://bucket/cat", FakeClient(info)).list().files
    assert (file.mark, file.modified) == (mark, modified)


def test_only_files_of_the_folder_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, their place-holders and what merely begins with the same name are left out."""
    listing = store_of(monkeypatch, "s3://bucket/cat", FakeClient({})).list()
    assert [(file.name, file.address) for file in listing.files] == [("a", "bucket/cat/a")]
    assert not listing.is_file


def test_the_fingerprint_knows_no_order() -> None:
    """Two listings of the same files have one fingerprint, whatever order they come in."""
    files = (StoredFile("a", "x/a", 1, "m"), StoredFile("b", "x/b", None, "n"))
    assert Listing(files).fingerprint == Listing(files[::-1]).fingerprint
    assert Listing(files).bytes == 1


@pytest.mark.parametrize(
    ("url", "head", "is_broken"),
    [
        ("s3://bucket", {}, True),
        ("s3://bucket", {"ServerSideEncryption": "AES256"}, True),
        ("s3://bucket", {"ServerSideEncryption": "aws:kms"}, False),
        ("s3://bucket", {"ServerSideEncryption": "aws:kms:dsse"}, False),
        ("s3://bucket", {"SSECustomerAlgorithm": "AES256"}, False),
        ("s3://bucket--use1-az4--x-s3", {}, False),
    ],
)
def test_an_etag_of_an_encrypted_object_is_no_checksum(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, head: dict[str, Any], is_broken: bool
) -> None:
    """S3 has ETags that look like an MD5 and are none; the object's own description tells them apart."""
    client = FakeClient({"ETag": f'"{EMPTY_MD5}"', "size": 1}, head)
    client.content = b"x"
    elsewhere = store_of(monkeypatch, f"{url}/cat/1", client)
    (file,) = elsewhere.list().files
    told: list[int] = []
    if is_broken:
        with pytest.raises(BrokenDownload, match=f"a: md5 {EMPTY_MD5} expected, got "):
            elsewhere.get(file, tmp_path / "a", told.append)
    else:
        elsewhere.get(file, tmp_path / "a", told.append)
    assert told == [1]


def test_what_is_no_s3_object_is_broken_without_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Elsewhere a checksum is a checksum."""
    client = FakeClient({"md5Hash": EMPTY_MD5_BASE64, "size": 1})
    client.content = b"x"
    elsewhere = store_of(monkeypatch, "gs://bucket/cat/1", client)
    with pytest.raises(BrokenDownload):
        elsewhere.get(elsewhere.list().files[0], tmp_path / "a", lambda _: None)


@pytest.mark.parametrize(
    ("package", "scheme", "extra"),
    [("s3fs", "s3", "s3"), ("gcsfs", "gs", "gcs"), ("adlfs", "az", "azure"), ("aiohttp", "https", "http")],
)
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, package: str, scheme: str, extra: str) -> None:
    """Where a client is not installed the error says what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)
    with pytest.raises(InvalidArgument) as caught:
        Store(f"{scheme}://me:secret@place/cat.zip?signature=secret")
    text = str(caught.value)
    assert text.endswith(f": {scheme}:// needs packages that are not here: pip install 'kiln[{extra}]'")
    assert scheme != "https" or text.startswith("https://place/cat.zip: ")


def test_a_download_may_last_but_not_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP and Google's store have no limit on the whole time, a limit on silence, and remember no listing."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr("fsspec.filesystem", lambda scheme, **options: asked.setdefault(scheme, options))
    for scheme in ("s3", "gs", "https"):
        store._client(scheme)
    assert all(options["use_listings_cache"] is False for options in asked.values())
    for options in (asked["gs"]["session_kwargs"], asked["https"]["client_kwargs"]):
        assert (options["timeout"].total, options["timeout"].sock_read) == (None, 60)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://u:p@host/a.zip?sig=x", "https://host/a.zip"),
        ("got 'http://host:1/a?b' and http://u@host/c", "got 'http://host:1/a' and http://host/c"),
        ("s3://bucket/a?b@c", "s3://bucket/a?b@c"),
        ("https://host/a@b", "https://host/a@b"),
    ],
)
def test_secrets_in_urls_are_not_shown(text: str, expected: str) -> None:
    """Users, passwords and queries of web addresses are left out; all else stays."""
    assert shown(text) == expected


def test_what_went_wrong_with_http_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a 404 means that there is nothing; whatever else failed comes as itself."""

    class Refused(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    client = FakeClient({})
    web = store_of(monkeypatch, "https://host/a.zip", client)
    for cause, expected in (
        (Refused(404), FileNotFoundError),
        (None, FileNotFoundError),
        (Refused(503), Refused),
        (TimeoutError(), TimeoutError),
    ):

        def info(path: str, cause: Exception | None = cause) -> dict[str, Any]:
            raise FileNotFoundError(path) from cause

        monkeypatch.setattr(client, "info", info)
        with pytest.raises(expected):
            web.list()
