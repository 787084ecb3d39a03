"""The states of a model version, which go one way, and the counted handles that keep it loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

from service.errors import Unavailable


class State(Enum):
    """``NEW → LOADING → WARMING → READY → DRAINING → UNLOADED``; any → ``FAILED``."""

    NEW = "NEW"
    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    DRAINING = "DRAINING"
    UNLOADED = "UNLOADED"
    FAILED = "FAILED"


INDEX_STATES = {
    State.NEW: "UNAVAILABLE",
    State.LOADING: "LOADING",
    State.WARMING: "LOADING",
    State.READY: "READY",
    State.DRAINING: "UNLOADING",
    State.UNLOADED: "UNAVAILABLE",
    State.FAILED: "UNAVAILABLE",
}
"""States as the repository extension names them."""

_NEXT = {
    State.NEW: {State.LOADING, State.FAILED},
    State.LOADING: {State.WARMING, State.FAILED},
    State.WARMING: {State.READY, State.FAILED},
    State.READY: {State.DRAINING, State.FAILED},
    State.DRAINING: {State.UNLOADED, State.FAILED},
    State.UNLOADED: set(),
    State.FAILED: set(),
}


@dataclass(frozen=True)
class VersionStatus:
    """What is told about a version: `reason` says why it failed, else it is empty.

    `since` is when it came into its state, in seconds since the epoch; `rows` is what it has
    answered, `memory_bytes` what it holds on its device, `left_out` the signatures that cannot be
    served, and a ``model.yaml`` that is broken, and why; `batch_difference` is the most by which
    company in a batch was seen to change an answer.
    """

    model: str
    version: int
    state: State
    reason: str = ""
    since: float = field(default=0.0, compare=False)
    device: str = field(default="", compare=False)
    plans: str = field(default="", compare=False)
    memory_bytes: int = field(default=0, compare=False)
    rows: int = field(default=0, compare=False)
    left_out: str = field(default="", compare=False)
    batch_difference: float = field(default=0.0, compare=False)

    def told(self) -> dict[str, str | int | float]:
        """All of it as names and values; the time as ISO 8601, in UTC."""
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if self.since else ""
        return {
            "model": self.model,
            "version": self.version,
            "state": self.state.value,
            "reason": self.reason,
            "since": since,
            "device": self.device,
            "plans": self.plans,
            "memory_bytes": self.memory_bytes,
            "rows": self.rows,
            "left_out": self.left_out,
            "batch_difference": self.batch_difference,
        }


class Lifecycle:
    """State of one version, and how many requests hold it.

    `on_change` is called after every change of state; `on_idle` once, when the version is
    draining and its last handle has been returned.
    """

    def __init__(self, model: str, version: int, on_change: Callable[[VersionStatus], None]) -> None:
        self._status = VersionStatus(model, version, State.NEW)
        self._on_change = on_change
        self._on_idle: Callable[[], None] | None = None
        self._handles = 0

    def __repr__(self) -> str:
        s = self._status
        return f"<{s.model} v{s.version} {s.state.value}, {self._handles} handles>"

    @property
    def status(self) -> VersionStatus:
        return self._status

    @property
    def state(self) -> State:
        return self._status.state

    @property
    def handles(self) -> int:
        return self._handles

    def advance(self, state: State, reason: str = "") -> None:
        """Go to `state`; a step that the table does not have is a fault of the caller."""
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"{self!r} cannot become {state.value}")
        self._status = VersionStatus(self._status.model, self._status.version, state, reason)
        self._on_change(self._status)

    def acquire(self) -> None:
        """Count one more request; `Unavailable` unless READY."""
        if self.state is not State.READY:
            s = self._status
            why = f": {s.reason}" if s.reason else ""
            raise Unavailable(f"model {s.model!r} version {s.version} is {s.state.value}, not READY{why}")
        self._handles += 1

    def hold(self) -> None:
        """Count a request that was let in elsewhere while this was READY; DRAINING waits for it as well.

        `Unavailable` once the last handle was returned, or the time for that was up.
        """
        if self.state is not State.DRAINING:
            self.acquire()
        else:
            self._handles += 1

    def release(self) -> None:
        """Give one handle back."""
        self._handles -= 1
        self._tell_when_idle()

    def drain(self, on_idle: Callable[[], None]) -> None:
        """Take no more requests; `on_idle` is called once none is left, at once if there is none."""
        self.advance(State.DRAINING)
        self._on_idle = on_idle
        self._tell_when_idle()

    def _tell_when_idle(self) -> None:
        if self._handles == 0 and self._on_idle is not None:
            on_idle, self._on_idle = self._on_idle, None
            on_idle()
