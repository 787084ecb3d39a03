"""Models at ``http://``: archives and files, from a server on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.errors import InvalidArgument, ModelLoadError
from service.registry.remote import FetchOptions, fetch, open_models
from service.registry.repository import Kind, Source
from service.registry.retry import Retry
from tests.unit.test_archive import archive_of

OPTIONS = FetchOptions(retry=Retry(attempts=3, sleep=lambda _: None))


class Site:
    """What the server has, what it was asked, and how it fails."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.failures: list[int] = []
        """The answers to the next GETs in place of the files: a status, or 0 for half a body."""
        self.encoding = ""
        self.has_length = True


@pytest.fixture
def site() -> Iterator[Site]:
    """A web site that tells ETags."""
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            site.asked.append(f"{self.command} {path}")
            failure = site.failures.pop(0) if with_body and site.failures else None
            body = site.files.get(path)
            if body is None or failure:
                self.send_error(failure or 404)
                return
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()[:32]}"')
            if site.encoding:
                self.send_header("Content-Encoding", site.encoding)
            if site.has_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 2] if failure == 0 else body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


def look(url: str, cache: Path) -> Source:
    (source,) = open_models(url, cache_dir=cache, options=OPTIONS).sources
    return source


def put(site: Site, tmp_path: Path, name: str, files: dict[str, bytes]) -> None:
    (tmp_path / "built").mkdir(exist_ok=True)
    site.files[f"/models/{name}"] = archive_of(tmp_path / "built" / name, files).read_bytes()


@pytest.mark.parametrize("name", ["cat.zip", "cat.tar.gz"])
def test_an_archive_is_fetched_once_for_each_etag(site: Site, tmp_path: Path, name: str) -> None:
    """Looking again is one HEAD request while the ETag is the same; a new ETag is a new fingerprint."""
    put(site, tmp_path, name, {"3/saved_model.pb": b"old", "3/variables/v": b"\0" * 5000})
    url = f"{site.url}/models/{name}?signature=secret"
    first = look(url, tmp_path)
    assert (first.model, first.version, first.kind) == ("cat", 3, Kind.SAVED_MODEL)
    assert (fetch(first, tmp_path, OPTIONS) / "saved_model.pb").read_bytes() == b"old"
    site.asked.clear()
    assert look(url, tmp_path).fingerprint == first.fingerprint
    assert site.asked == [f"HEAD /models/{name}"]
    put(site, tmp_path, name, {"3/saved_model.pb": b"new", "3/variables/v": b"\0" * 5000})
    second = look(url, tmp_path)
    assert second.fingerprint != first.fingerprint
    assert (fetch(second, tmp_path, OPTIONS) / "saved_model.pb").read_bytes() == b"new"
    assert (fetch(first, tmp_path, OPTIONS) / "saved_model.pb").read_bytes() == b"old"


@pytest.mark.parametrize("failures", [[503, 0], [0, 429]])
def test_a_download_that_breaks_off_is_tried_again(
    site: Site, tmp_path: Path, failures: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A busy server and half a body are passing; the log has each attempt, and nothing secret of the URL."""
    put(site, tmp_path, "cat.zip", {"saved_model.pb": b"graph" * 100})
    site.failures = list(failures)
    source = look(f"{site.url}/models/cat.zip?signature=secret", tmp_path)
    assert (fetch(source, tmp_path, OPTIONS) / "saved_model.pb").read_bytes() == b"graph" * 100
    assert site.asked.count("GET /models/cat.zip") == 3
    assert [m.partition(" failed")[0] for m in caplog.messages] == [
        f"{site.url}/models/cat.zip: attempt {number} of 3" for number in (1, 2)
    ]
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("failures", "text"),
    [([0, 0, 0], r"\(3 attempts\)$"), ([503, 503, 503], r"503.*\(3 attempts\)$"), ([403], "403")],
)
def test_a_download_that_never_works_is_told(site: Site, tmp_path: Path, failures: list[int], text: str) -> None:
    """The error names the URL without its query, and the reason; nothing is left in the cache."""
    put(site, tmp_path, "cat.zip", {"saved_model.pb": b"graph" * 100})
    site.failures = list(failures)
    with pytest.raises(ModelLoadError, match=f"^{site.url}/models/cat.zip: .*{text}") as caught:
        look(f"{site.url}/models/cat.zip?signature=secret", tmp_path)
    assert "secret" not in str(caught.value)
    assert site.failures == []
    assert list((tmp_path / "remote").iterdir()) == []


def test_what_is_not_there_is_told_at_once(site: Site, tmp_path: Path) -> None:
    """A 404 is not tried again."""
    with pytest.raises(ModelLoadError, match=r"/models/cat\.zip: there is nothing there$"):
        look(f"{site.url}/models/cat.zip", tmp_path)
    assert site.asked == ["HEAD /models/cat.zip", "GET /models/cat.zip"]


def test_a_server_that_is_down_is_told(site: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A connection that is refused is tried again, then told as what it is."""
    with pytest.raises(ModelLoadError, match=r"^http://127\.0\.0\.1:1/cat\.zip: .*Cannot connect.*\(3 attempts\)$"):
        look("http://127.0.0.1:1/cat.zip", tmp_path)


@pytest.mark.parametrize(("encoding", "has_length"), [("gzip", True), ("", False)])
def test_a_size_that_is_not_told_is_no_hindrance(
    site: Site, tmp_path: Path, encoding: str, *, has_length: bool
) -> None:
    """Servers that call a ``.tar.gz`` "encoded", or tell no length, are taken at their archive's own checksum."""
    put(site, tmp_path, "cat.tar.gz", {"saved_model.pb": b"graph"})
    site.encoding, site.has_length = encoding, has_length
    source = look(f"{site.url}/models/cat.tar.gz", tmp_path)
    assert (fetch(source, tmp_path, OPTIONS) / "saved_model.pb").read_bytes() == b"graph"


def test_a_single_file_is_a_model(site: Site, tmp_path: Path) -> None:
    """A ``.keras`` or ``.h5`` file may be served from the web as well; its name and folder tell what it is."""
    site.files["/models/cat/4/my%20model.keras"] = b"keras"
    source = look(f"{site.url}/models/cat/4/my%20model.keras", tmp_path)
    assert (source.model, source.version, source.kind) == ("cat", 4, Kind.KERAS)
    path = fetch(source, tmp_path, OPTIONS)
    assert (path.name, path.read_bytes()) == ("my model.keras", b"keras")


def test_the_web_has_no_folders(site: Site, tmp_path: Path) -> None:
    """A page is no folder of models, whatever links it has."""
    site.files["/models"] = b"<a href=cat/>cat</a>"
    with pytest.raises(InvalidArgument, match=r"/models' is no \.keras or \.h5 file"):
        look(f"{site.url}/models/", tmp_path)
