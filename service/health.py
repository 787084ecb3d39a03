"""Whether the server takes requests, as one function."""

from __future__ import annotations

from collections.abc import Callable


class Health:
    """Readiness of the server; it is alive as long as it answers at all."""

    def __init__(self, can_serve: Callable[[], bool]) -> None:
        """`can_serve` tells whether there is anything to ask."""
        self._can_serve = can_serve
        self.loaded = False
        self.draining = False

    def is_ready(self) -> bool:
        """Ready: not draining, all models of the start have settled, and at least one can be asked.

        A model that failed does not keep the others from serving, nor does one that is being loaded
        later on.
        """
        return self.loaded and not self.draining and self._can_serve()
