"""Ask again what was asked: a Locust user for the files of ``--request-log``, and for warm-up files.

``REPLAY=FOLDER_OR_FILE locust --locustfile load_tests/replay.py --host http://localhost:8501``. Each user sends the
records in the order of the files, from a place of its own on.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from locust import FastHttpUser, constant, events, task

from load_tests.kept_requests import Question, questions

ENV = "REPLAY"
_asked: list[Question] = []


@events.init.add_listener  # type: ignore[untyped-decorator]
def _read(**_: object) -> None:
    """Once, for all users of this process, before the time of the run begins."""
    path = os.environ.get(ENV)
    if path is None:
        raise SystemExit(f"{ENV}: the folder or file of a request log expected")
    _asked[:] = questions(Path(path))
    if not _asked:
        raise SystemExit(f"{ENV}: {path} has no predict requests")


class Replayer(FastHttpUser):
    """Asks without pause; a request that was answered once and now is not is a failure."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Begin at any of them."""
        self._next = random.randrange(len(_asked))  # noqa: S311 - any

    @task
    def ask(self) -> None:
        """The next one."""
        question = _asked[self._next]
        self._next = (self._next + 1) % len(_asked)
        self.client.post(question.path, json=question.body)
