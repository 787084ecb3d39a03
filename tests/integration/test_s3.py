"""Models at ``s3://``, from a real S3 server on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from service.errors import ModelLoadError
from service.registry.archive import UnpackLimits
from service.registry.remote import FetchOptions, fetch, open_models
from service.registry.repository import Kind, Source
from service.registry.retry import Retry

SAVED_MODEL = {
    "saved_model.pb": b"graph" * 100,
    "variables/variables.data-00000-of-00001": bytes(range(256)) * 40,
    "variables/variables.index": b"index",
}
OPTIONS = FetchOptions(retry=Retry(attempts=2, sleep=lambda _: None), limits=UnpackLimits())
URL = "s3://kiln-models/prod"


class Bodies:
    """What stands before the server, and can change what it answers to a GET of an object."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.change: Any = None
        self.downloads: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET" or "list-type" in environ["QUERY_STRING"] or path.count("/") < 2:
            return self._app(environ, start_response)
        self.downloads.append(path.removeprefix("/kiln-models/prod/"))
        answered: list[Any] = []
        body = b"".join(self._app(environ, lambda *args: answered.extend(args[:2])))
        status, headers = answered
        if self.change is not None and status.startswith("200"):
            body = self.change(body)
            # the checksums of transport would be the changed body's own
            headers = [(k, v) for k, v in headers if not k.lower().startswith(("x-amz-checksum", "content-length"))]
            headers.append(("Content-Length", str(len(body))))
        start_response(status, headers)
        return [body]


@pytest.fixture(scope="module")
def server() -> Iterator[Bodies]:
    """The S3 server, and the environment that clients find it by."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    assert server._server is not None
    bodies = Bodies(server._server.app)
    server._server.app = bodies
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "kiln")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "kiln")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        yield bodies
        S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def bucket(server: Bodies) -> Iterator[S3FileSystem]:
    """A bucket with one model of one version, as others upload it."""
    files = S3FileSystem(use_listings_cache=False)
    files.mkdir("kiln-models")
    upload(files, "cat/1", SAVED_MODEL)
    server.downloads.clear()
    yield files
    server.change = None
    files.rm("kiln-models", recursive=True)


def upload(files: S3FileSystem, folder: str, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        files.pipe(f"kiln-models/prod/{folder}/{name}", data)


def only_source(cache: Path, url: str = URL) -> Source:
    found = open_models(url, cache_dir=cache, options=OPTIONS)
    assert found.problems == ()
    (source,) = found.sources
    return source


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_version_in_s3_is_listed_and_fetched_once(bucket: S3FileSystem, server: Bodies, tmp_path: Path) -> None:
    """A SavedModel's folder comes with all its files; nothing is downloaded to list it, or to fetch it again."""
    source = only_source(tmp_path)
    assert (source.model, source.version, source.kind) == ("cat", 1, Kind.SAVED_MODEL)
    assert source.remote == f"{URL}/cat/1"
    assert source.modified > 0
    assert server.downloads == []
    folder = fetch(source, tmp_path, OPTIONS)
    assert content(folder) == SAVED_MODEL
    assert len(server.downloads) == 3
    assert fetch(only_source(tmp_path), tmp_path, OPTIONS) == folder
    assert len(server.downloads) == 3


def test_place_holders_of_folders_are_no_files(bucket: S3FileSystem, tmp_path: Path) -> None:
    """The empty objects that S3's console makes of folders change nothing."""
    for key in ("prod/", "prod/cat/", "prod/cat/1/", "prod/cat/1/variables/"):
        bucket.call_s3("put_object", Bucket="kiln-models", Key=key, Body=b"")
    assert content(fetch(only_source(tmp_path), tmp_path, OPTIONS)) == SAVED_MODEL


def test_a_changed_object_is_a_new_fingerprint(bucket: S3FileSystem, tmp_path: Path) -> None:
    """An object of the same size with other content is seen at the next look, and fetched beside the old state."""
    before = only_source(tmp_path)
    old = fetch(before, tmp_path, OPTIONS)
    upload(bucket, "cat/1", {"variables/variables.index": b"xedni"})
    after = only_source(tmp_path)
    assert after.fingerprint != before.fingerprint
    assert content(fetch(after, tmp_path, OPTIONS)) == {**SAVED_MODEL, "variables/variables.index": b"xedni"}
    assert content(old) == SAVED_MODEL
    upload(bucket, "cat/1", SAVED_MODEL)
    assert only_source(tmp_path).fingerprint == before.fingerprint
    with pytest.raises(ModelLoadError, match="cat/1: it has changed since it was listed"):
        fetch(after, tmp_path / "another cache", OPTIONS)


def test_a_new_version_appears(bucket: S3FileSystem, tmp_path: Path) -> None:
    """A version that is uploaded beside another is found at the next look."""
    upload(bucket, "cat/2", {"model.keras": b"keras"})
    found = open_models(f"{URL}/cat", "tom", cache_dir=tmp_path, options=OPTIONS)
    assert [(s.model, s.version, s.kind) for s in found.sources] == [
        ("tom", 1, Kind.SAVED_MODEL),
        ("tom", 2, Kind.KERAS),
    ]
    assert fetch(found.sources[1], tmp_path, OPTIONS).read_bytes() == b"keras"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda body: body[:-1], "bytes expected, got"),
        (lambda body: bytes([body[0] ^ 1]) + body[1:], "md5 .* expected"),
    ],
    ids=["cut", "corrupted"],
)
def test_a_damaged_object_never_becomes_a_version(
    bucket: S3FileSystem, server: Bodies, tmp_path: Path, change: Any, text: str
) -> None:
    """A body that is cut or altered on its way is tried again, then told, and leaves nothing in the cache."""
    source = only_source(tmp_path)
    server.change = change
    with pytest.raises(
        ModelLoadError, match=rf"^{URL}/cat/1: BrokenDownload: saved_model.pb: .*{text}.*\(2 attempts\)$"
    ):
        fetch(source, tmp_path, OPTIONS)
    assert server.downloads == ["cat/1/saved_model.pb"] * 2
    assert list((tmp_path / "remote").iterdir()) == []
    server.change = None
    assert content(fetch(source, tmp_path, OPTIONS)) == SAVED_MODEL


def test_an_object_uploaded_in_parts_is_fetched(bucket: S3FileSystem, tmp_path: Path) -> None:
    """An object whose ETag is no MD5 is held against its size alone."""
    big = bytes(6 * 2**20)
    with bucket.open("kiln-models/prod/dog/1/model.keras", "wb", block_size=5 * 2**20) as file:
        file.write(big)
    assert "-" in bucket.info("kiln-models/prod/dog/1/model.keras")["ETag"]
    assert fetch(only_source(tmp_path, f"{URL}/dog"), tmp_path, OPTIONS).read_bytes() == big


@pytest.mark.parametrize("url", [f"{URL}/gone", "s3://no-such-bucket/models"])
def test_a_place_where_nothing_is_is_told(bucket: S3FileSystem, tmp_path: Path, url: str) -> None:
    """A prefix without objects, and a bucket that does not exist, are told with their URL, at once."""
    with pytest.raises(ModelLoadError) as caught:
        open_models(url, cache_dir=tmp_path, options=OPTIONS)
    assert str(caught.value) == f"{url}: there is nothing there"
