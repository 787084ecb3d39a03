"""Who answers: the versions of one model as its requests see them, wherever they run."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Generic, TypeVar

from service.errors import InvalidArgument, NotFound, Unavailable
from service.registry.config import ModelConfig
from service.registry.lifecycle import VersionStatus

V = TypeVar("V")
"""A READY version: what runs it, or what stands for it in another process."""


class Routes(ABC, Generic[V]):
    """The READY versions of one model, its labels, and what is told of those that cannot be asked."""

    name: str
    config: ModelConfig
    is_enabled: bool
    labels: dict[str, int]
    problems: Mapping[int | None, VersionStatus]
    """Folders that could not be a version, by its number, or None for the model's own."""
    default: V | None
    """The highest READY version."""
    _ready: dict[int, V]

    @property
    def ready(self) -> Mapping[int, V]:
        """The READY versions by number."""
        return self._ready

    @abstractmethod
    def statuses(self) -> list[VersionStatus]:
        """Every version that is known, newest first."""

    @property
    @abstractmethod
    def numbers(self) -> Collection[int]:
        """Of all versions that are there, on disk or loaded, whatever their state."""

    @property
    @abstractmethod
    def is_asleep(self) -> bool:
        """Whether it is loaded at its next request, and not before."""

    @property
    @abstractmethod
    def is_moving(self) -> bool:
        """Whether a version is being loaded that requests wait for where none is READY."""

    def route(self, version: int | None, label: str | None) -> V:
        """The READY version that a request means.

        Raises:
            InvalidArgument: no such label.
            NotFound: no such version.
            Unavailable: it is there, but not READY.
        """
        if label is not None:
            version = self.number_of(label)
        if version is not None:
            ready = self._ready.get(version)
            if ready is None:
                raise self._not_ready(version)
            return ready
        if self.config.split and (chosen := self._by_share()) is not None:
            return chosen
        if self.default is None:
            raise self._not_ready(None)
        return self.default

    def number_of(self, label: str) -> int:
        """The version that a label means; `InvalidArgument` if there is no such label."""
        if label not in self.labels:
            known = f"; model {self.name!r} has {', '.join(sorted(self.labels))}" if self.labels else ""
            raise InvalidArgument(f"Unrecognized servable version label: {label}{known}")
        return self.labels[label]

    def resolve(self, name: int | str) -> V | None:
        """The READY version of a number or label; None if there is none."""
        number = name if isinstance(name, int) else self.labels.get(name, int(name) if name.isdigit() else -1)
        return self._ready.get(number)

    def is_coming(self, version: int | None, label: str | None) -> bool:
        """Whether a version is being loaded in the place of the one that went before it.

        A request that finds none READY waits for that; before the first one is READY it is refused.
        """
        if self.default is not None:
            return False
        if self.is_asleep:
            return True
        return version is None and label is None and self.is_moving

    def _by_share(self) -> V | None:
        """One of the READY versions of the split, by weight; None if none of them is READY."""
        shares = [(v, share) for name, share in self.config.split.items() if (v := self.resolve(name)) and share]
        if not shares:
            return None
        weights = [share for _, share in shares]
        return random.choices([version for version, _ in shares], weights)[0]  # noqa: S311 - spreads load, hides nothing

    def _not_ready(self, number: int | None) -> Exception:
        statuses = [s for s in self.statuses() if number is None or s.version == number]
        if statuses:
            status = statuses[0]
            why = f": {status.reason}" if status.reason else ""
            if status.version == 0 and status in self.problems.values():
                return Unavailable(f"model {self.name!r} could not be loaded{why}")
            return Unavailable(f"model {self.name!r} version {status.version} is {status.state.value}, not READY{why}")
        if number is not None:
            known = ", ".join(str(n) for n in sorted(self._ready)) or "none that is READY"
            return NotFound(
                f"Servable not found for request: Specific({self.name}, {number}); "
                f"model {self.name!r} has version {known}"
            )
        if not self.is_enabled:
            return Unavailable(f"model {self.name!r} is not loaded")
        return Unavailable(f"model {self.name!r} has no version that is READY")
