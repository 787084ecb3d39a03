"""Whether the server takes requests, as one function."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from service.registry.lifecycle import State, VersionStatus

_UNSETTLED = {State.NEW, State.LOADING, State.WARMING}


class Health:
    """Readiness of the server; it is alive as long as it answers at all."""

    def __init__(self, statuses: Callable[[], Iterable[VersionStatus]]) -> None:
        self._statuses = statuses
        self.loaded = False
        self.draining = False

    def is_ready(self) -> bool:
        """Ready: not draining, every model has settled, and at least one can be asked.

        A model that failed does not keep the others from serving.
        """
        if self.draining or not self.loaded:
            return False
        states = [status.state for status in self._statuses()]
        return State.READY in states and not _UNSETTLED.intersection(states)
