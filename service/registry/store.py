"""Where models lie that are not on this disk: one way to list and get files, whatever the scheme, through fsspec.

Credentials and endpoints are each client's own: AWS_…, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_….
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from service.errors import InvalidArgument

_EXTRAS = {"file": "", "memory": "", "s3": "s3", "gs": "gcs", "az": "azure", "http": "http", "https": "http"}
"""The schemes that are read, and which extra of Kiln's installs what each needs."""

_MARKS = ("ETag", "etag", "md5Hash", "crc32c", "Content-MD5", "Digest", "Last-Modified", "LastModified")
_TIMES = ("LastModified", "last_modified", "mtime", "created")
_STALL_S = 60.0
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_MD5_ETAG = re.compile(r'"?([0-9a-f]{32})"?')
_QUERY = re.compile(r"(https?://)(?:[^\s/@'\"]*@)?([^\s?'\"]+)(?:\?[^\s'\"]*)?")


class BrokenDownload(Exception):
    """What came is not what the store said it has; it may be the next time."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a listing: `name` is relative to what was listed, `address` is the store's own.

    `mark` changes with the content; `checksum` is an algorithm of hashlib's and its hexadecimal
    digest, where the store tells one. Sizes are in bytes, times in seconds since the epoch.
    """

    name: str
    address: str
    size: int | None
    mark: str
    checksum: tuple[str, str] | None = None
    modified: float = 0.0

    @property
    def is_safe(self) -> bool:
        """Whether `name` stays below the folder that it is written to."""
        return not any(part in ("", ".", "..") or "\0" in part for part in self.name.split("/"))


@dataclass(frozen=True)
class Listing:
    """All files of a folder, or (`is_file`) the one that was asked for itself."""

    files: tuple[StoredFile, ...]
    is_file: bool = False

    @property
    def fingerprint(self) -> str:
        """Changes whenever a file comes, goes or changes."""
        lines = sorted(f"{file.name} {file.size} {file.mark}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def modified(self) -> float:
        return max((file.modified for file in self.files), default=0.0)

    @property
    def bytes(self) -> int:
        return sum(file.size or 0 for file in self.files)


def scheme_of(location: str) -> str | None:
    """The scheme of a URL; None for a path."""
    match = _URL.match(location)
    return match[1].lower() if match else None


def shown(url: str) -> str:
    """`url`, or a text with URLs in it, as logs and errors may show it: without passwords and signatures."""
    return _QUERY.sub(r"\1\2", url)


class Store:
    """What lies at one URL. All methods block, and raise whatever the client of that scheme raises.

    Raises:
        InvalidArgument: the scheme is unknown, or the extra that it needs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme = scheme_of(url)
        if scheme not in _EXTRAS:
            schemes = ", ".join(f"{scheme}://" for scheme in _EXTRAS if scheme != "memory")
            raise InvalidArgument(f"{shown(url)}: one of {schemes} expected")
        self.scheme = scheme
        try:
            self._files = _client(scheme)
        except ImportError as error:
            extra = f"pip install 'kiln[{_EXTRAS[scheme]}]'"
            raise InvalidArgument(f"{shown(url)}: {scheme}:// needs packages that are not here: {extra}") from error
        if scheme in ("file", "http", "https"):
            path = unquote(urlsplit(self.url).path)
            self._root = path if scheme == "file" else self.url
        else:
            path = self._root = str(self._files._strip_protocol(self.url))
        self.path = PurePosixPath("/" + path.strip("/"))
        """Where it lies in its store; the last part is its name."""

    def __str__(self) -> str:
        return shown(self.url)

    def list(self) -> Listing:
        """All files there are. Raises `FileNotFoundError` where there is nothing."""
        if self.scheme in ("http", "https"):  # has no folders
            return self._one_file(self._http_info())
        found: Mapping[str, Mapping[str, Any]] = self._files.find(self._root, detail=True)
        if self._root in found:
            return self._one_file(self._files.info(self._root))
        if not found and not self._files.exists(self._root):
            raise FileNotFoundError(self._root)
        prefix = self._root.rstrip("/") + "/"
        return Listing(
            tuple(
                self._stored(address.removeprefix(prefix), address, info)
                for address, info in sorted(found.items())
                if info["type"] == "file" and address.startswith(prefix) and not address.endswith("/")
            )
        )

    def get(self, file: StoredFile, target: Path, on_progress: Callable[[int], None]) -> None:
        """Download to `target` and hold it against what the listing said of it.

        `on_progress` is told the bytes of this file so far, from another thread.

        Raises:
            BrokenDownload: size or checksum differ.
        """
        from fsspec.callbacks import Callback

        callback = Callback(hooks={"bytes": lambda _, done_bytes: on_progress(done_bytes)})
        target.parent.mkdir(parents=True, exist_ok=True)
        self._files.get_file(file.address, str(target), callback=callback)
        size = target.stat().st_size
        if file.size is not None and size != file.size:
            raise BrokenDownload(f"{file.name}: {file.size} bytes expected, got {size}")
        with target.open("rb") as content:
            os.fsync(content.fileno())  # the folder is taken for whole once it has its name
            if file.checksum is None:
                return
            algorithm, expected = file.checksum
            actual = hashlib.file_digest(content, algorithm).hexdigest()
        if actual != expected and not self._has_opaque_etag(file):
            raise BrokenDownload(f"{file.name}: {algorithm} {expected} expected, got {actual}")

    def _one_file(self, info: Mapping[str, Any]) -> Listing:
        return Listing((self._stored(self.path.name, self._root, info),), is_file=True)

    def _http_info(self) -> Mapping[str, Any]:
        """As ``info``, which says of whatever fails that there is no such file."""
        try:
            return dict(self._files.info(self._root))
        except FileNotFoundError as error:
            cause = error.__cause__
            if cause is None or getattr(cause, "status", None) == 404:
                raise
            raise cause from None

    def _stored(self, name: str, address: str, info: Mapping[str, Any]) -> StoredFile:
        mark = next((f"{key} {info[key]}" for key in _MARKS if info.get(key)), None)
        modified = next((_timestamp(info[key]) for key in _TIMES if info.get(key)), 0.0)
        return StoredFile(name, address, info["size"], mark or f"{modified}", self._checksum(info), modified)

    def _checksum(self, info: Mapping[str, Any]) -> tuple[str, str] | None:
        etag = _MD5_ETAG.fullmatch(str(info.get("ETag", ""))) if self.scheme == "s3" else None
        if etag:  # of an object that was not uploaded in parts; see `_has_opaque_etag`
            return "md5", etag[1]
        settings = info.get("content_settings") or {}
        md5 = info.get("md5Hash") or info.get("Content-MD5") or settings.get("content_md5")
        if md5:
            return _checksum_of("md5", md5)
        algorithm, _, digest = str(info.get("Digest", "")).partition("=")
        return _checksum_of("sha256", digest) if algorithm.lower() == "sha-256" else None

    def _has_opaque_etag(self, file: StoredFile) -> bool:
        """Whether the object's ETag is no MD5 although it looks like one: it is encrypted with a key, or "express".

        https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html, ETag.
        """
        if self.scheme != "s3":
            return False
        bucket, key, _ = self._files.split_path(file.address)
        head = self._files.call_s3("head_object", Bucket=bucket, Key=key)
        is_encrypted = str(head.get("ServerSideEncryption")).startswith("aws:kms") or "SSECustomerAlgorithm" in head
        return is_encrypted or bucket.endswith("--x-s3")


def _client(scheme: str) -> Any:
    """A client for `scheme` that never answers from a listing that it remembers."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme in ("http", "https", "gs"):
        import aiohttp

        # without a limit on the whole, which is five minutes else: it may be long, but not stall
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALL_S, sock_read=_STALL_S)
        if scheme == "gs":
            options["session_kwargs"] = {"timeout": timeout}
        else:
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True, "auto_decompress": False}
            options["headers"] = {"Accept-Encoding": "identity"}  # the bytes that its size is stated of
    return fsspec.filesystem(scheme, **options)


def _checksum_of(algorithm: str, value: str | bytes) -> tuple[str, str] | None:
    """`value` is a digest, or base64 of one; None for what a server has made of it otherwise."""
    try:
        digest = base64.b64decode(value) if isinstance(value, str) else bytes(value)
    except ValueError:
        return None
    return (algorithm, digest.hex()) if len(digest) == hashlib.new(algorithm).digest_size else None


def _timestamp(value: Any) -> float:
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, int | float) else 0.0
