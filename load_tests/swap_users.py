"""Users for `load_tests.swap`: every answer must come from one version, by default and by label.

The model answers each number of each row with the number of its version.
"""

from __future__ import annotations

from typing import Any

from locust import FastHttpUser, constant, task

_BODY = {"instances": [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]}


class Caller(FastHttpUser):
    """Asks without pause."""

    wait_time = constant(0)

    @task(4)
    def latest(self) -> None:
        """The version that is served when none is named."""
        self._ask("/v1/models/tagged:predict")

    @task
    def stable(self) -> None:
        """The version that the label is on, wherever it has just moved."""
        self._ask("/v1/models/tagged/labels/stable:predict")

    def _ask(self, path: str) -> None:
        with self.client.post(path, json=_BODY, catch_response=True) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code}: {answer.text}")
                return
            numbers = {number for row in _rows(answer.json()) for number in row}
            if len(numbers) != 1:
                answer.failure(f"an answer of several versions: {sorted(numbers)}")


def _rows(answer: Any) -> list[list[float]]:
    rows: list[list[float]] = answer["predictions"]
    return rows
