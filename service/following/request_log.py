"""The request log: a share of the answered requests with their payload, in files that a model can be warmed up with.

Requests are put in a bounded buffer and written by a thread: a disk that is full or slow costs records, which are
counted, and never a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from service.following.followed import Asked, Followed
from service.following.record_folder import RecordFolder
from service.tensors import size_bytes

_log = logging.getLogger("kiln.request_log")
_MOST_WAITING_BYTES = 64 * 2**20
_MOST_WAITING = 1024
_RETRY_S = 5.0
"""After a record could not be written none is tried for so long."""

Encode = Callable[[Followed, Asked], bytes]
"""One question and its answer as a record."""
Count = Callable[[str], None]
"""Counts a record by what became of it: written, dropped for want of room in the buffer, or failed."""


class RequestLog:
    """Keeps the requests that it is told of."""

    def __init__(
        self,
        folder: RecordFolder,
        encode: Encode,
        count: Count,
        *,
        share: float,
        most_waiting_bytes: int = _MOST_WAITING_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`share` is that of all requests which are to be told of; the thread begins at once."""
        self.share = share
        self._folder = folder
        self._encode = encode
        self._count = count
        self._clock = clock
        self._most_waiting_bytes = most_waiting_bytes
        self._lock = threading.Lock()
        self._waiting: SimpleQueue[tuple[Followed, int] | None] = SimpleQueue()
        self._waiting_bytes = 0
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._work, name="kiln-request-log", daemon=True)
        self._thread.start()

    def tell(self, followed: Followed) -> None:
        """Have its records written; they are dropped if too much waits to be written already."""
        size = sum(size_bytes(asked.inputs) + size_bytes(asked.outputs or {}) for asked in followed.asked)
        with self._lock:
            has_room = self._waiting_bytes + size <= self._most_waiting_bytes and self._waiting.qsize() < _MOST_WAITING
            self._waiting_bytes += size if has_room else 0
        if has_room:
            self._waiting.put((followed, size))
        else:
            for _ in followed.asked:
                self._count("dropped")

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, for no longer than `timeout_s`; blocks."""
        self._waiting.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("%d requests were not written within %.0f s", self._waiting.qsize(), timeout_s)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            followed, size = item
            for asked in followed.asked:
                self._count(self._write(followed, asked))
            with self._lock:
                self._waiting_bytes -= size
            del followed, item  # which hold the payload while nothing comes
        self._folder.close()

    def _write(self, followed: Followed, asked: Asked) -> str:
        """What became of one record."""
        now = self._clock()
        if now < self._retry_at:
            return "failed"
        try:
            self._folder.write(followed.model, followed.version or 0, self._encode(followed, asked))
        except OSError as error:
            _log.warning("a request could not be written, none is for the next %.0f s: %s", _RETRY_S, error)
            self._retry_at = now + _RETRY_S
        except Exception:  # noqa: BLE001 - whatever it is, the next one is tried
            _log.exception("a request could not be written")
        else:
            return "written"
        return "failed"
