"""The request log's buffer and thread: a full or slow disk costs records, and never a request."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from service.following.followed import Asked, Followed
from service.following.record_folder import FolderBounds, RecordFolder
from service.following.request_log import RequestLog
from service.trace_context import NOBODY
from tests.fakes import DOUBLE, FakeClock, rows

ROW_BYTES = 12


class Disk:
    """A folder that keeps what is written; it can block, and fail with what it is told."""

    def __init__(self) -> None:
        self.written: list[tuple[str, int, bytes]] = []
        self.failure: Exception | None = None
        self.released = threading.Event()
        self.released.set()
        self.closed = threading.Event()

    def write(self, model: str, version: int, record: bytes) -> None:
        assert self.released.wait(30)
        if self.failure is not None:
            raise self.failure
        self.written.append((model, version, record))

    def close(self) -> None:
        self.closed.set()


class Setup:
    def __init__(self, **options: Any) -> None:
        self.disk = Disk()
        self.clock = FakeClock()
        self.counted: Counter[str] = Counter()
        self.log = RequestLog(
            cast("RecordFolder", self.disk), encode, self._count, share=1.0, clock=self.clock, **options
        )

    def _count(self, outcome: str) -> None:
        self.counted[outcome] += 1

    def tell(self, *values: float, times: int = 1) -> None:
        followed = Followed(NOBODY, None, is_kept=True, model="double", version=7)
        for _ in range(times):
            followed.asks(DOUBLE, rows(*values)).outputs = {}
        self.log.tell(followed)


def encode(followed: Followed, asked: Asked) -> bytes:
    return f"{followed.model} {asked.inputs['x'][:, 0].tolist()}".encode()


def test_what_waits_is_written_in_order_before_the_end():
    """Each question of a request is a record; to close is to write what waits."""
    setup = Setup()
    setup.disk.released.clear()
    setup.tell(1)
    setup.tell(2, times=2)
    setup.disk.released.set()
    setup.log.close()
    assert [record for _, _, record in setup.disk.written] == [b"double [1.0]", b"double [2.0]", b"double [2.0]"]
    assert setup.disk.written[0][:2] == ("double", 7)
    assert setup.counted == {"written": 3}
    assert setup.disk.closed.is_set()


def test_a_slow_disk_costs_records():
    """What does not fit into the buffer is dropped and counted, at once; later ones have room again."""
    setup = Setup(most_waiting_bytes=3 * ROW_BYTES)
    setup.disk.released.clear()
    for value in range(5):
        setup.tell(value)
    assert setup.counted == {"dropped": 2}
    setup.tell(1, 2, 3, 4)
    assert setup.counted == {"dropped": 3}
    setup.disk.released.set()
    setup.log.close()
    assert setup.counted == {"dropped": 3, "written": 3}


def test_a_full_disk_costs_records(caplog: pytest.LogCaptureFixture):
    """It is told of once, none is tried for a while, and then again."""
    setup = Setup()
    setup.disk.failure = OSError("No space left on device")
    setup.tell(1, times=3)
    setup.log.close()
    assert setup.counted == {"failed": 3}
    assert [record.getMessage() for record in caplog.records] == [
        "a request could not be written, none is for the next 5 s: No space left on device"
    ]


def test_after_a_while_it_is_tried_again():
    """Five seconds after a failure."""
    setup = Setup()
    setup.disk.failure = OSError("No space left on device")
    asked = Followed(NOBODY, None, is_kept=True, model="double").asks(DOUBLE, rows(1))
    followed = Followed(NOBODY, None, is_kept=True, model="double")
    assert setup.log._write(followed, asked) == "failed"
    setup.disk.failure = None
    setup.clock.advance(4.9)
    assert setup.log._write(followed, asked) == "failed"
    setup.clock.advance(0.2)
    assert setup.log._write(followed, asked) == "written"
    setup.log.close()


def test_a_record_that_cannot_be_made_is_the_only_one_lost(caplog: pytest.LogCaptureFixture):
    """Whatever goes wrong with it, the thread goes on."""
    setup = Setup()
    setup.disk.failure = ValueError("odd")
    setup.tell(1)
    setup.log._waiting.put((Followed(NOBODY, None, is_kept=True), 0))  # asked nothing
    setup.log.close()
    assert setup.counted == {"failed": 1}
    assert "a request could not be written" in caplog.text


def test_a_disk_that_hangs_does_not_hold_up_the_end(caplog: pytest.LogCaptureFixture):
    """What is not written in time is given up."""
    setup = Setup()
    setup.disk.released.clear()
    setup.tell(1)
    setup.log.close(0.01)
    assert "were not written within" in caplog.text
    setup.disk.released.set()
    assert setup.disk.closed.wait(30)


def test_a_real_folder(tmp_path: Path):
    """Told of, closed, and there."""
    folder = RecordFolder(tmp_path, "jsonl", FolderBounds(1024, 1024))
    log = RequestLog(folder, encode, lambda outcome: None, share=1.0)
    followed = Followed(NOBODY, None, is_kept=True, model="double", version=7)
    followed.asks(DOUBLE, rows(1))
    log.tell(followed)
    log.close()
    (path,) = tmp_path.glob("double/7/requests-*.jsonl")
    assert path.read_bytes() == b"double [1.0]\n"
