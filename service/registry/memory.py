"""The budget of each memory, and what to do about a version that does not fit: pure, no clock, no lock.

A memory is ``CPU``, which all CPU devices share, or a device with its own: ``GPU:0``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Owner = tuple[str, int]
"""Model and version."""
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclass(frozen=True)
class Resident:
    """A loaded version, as far as it matters to who goes: `last_used` is of any clock."""

    model: str
    version: int
    last_used: float
    is_idle: bool
    on_demand: bool


@dataclass(frozen=True)
class Fits:
    """There is room."""


@dataclass(frozen=True)
class Evict:
    """There is room once these are gone, in this order."""

    versions: tuple[Owner, ...]


@dataclass(frozen=True)
class Refuse:
    """There is none, and cannot be made; `reason` has the numbers."""

    reason: str


class MemoryBudget:
    """Who holds how much of which memory."""

    def __init__(self, limits_bytes: Mapping[str, int]) -> None:
        """A memory without a limit is not watched: everything fits into it."""
        self.limits_bytes = dict(limits_bytes)
        self._held: dict[Owner, dict[str, int]] = {}

    def __repr__(self) -> str:
        used = (f"{memory} {self.used_bytes(memory)}/{limit}" for memory, limit in sorted(self.limits_bytes.items()))
        return f"<MemoryBudget {', '.join(used)}>"

    def reserve(self, model: str, version: int, needs_bytes: Mapping[str, int]) -> None:
        """Note what a version holds; what it held before no longer counts."""
        self._held[model, version] = dict(needs_bytes)

    def release(self, model: str, version: int) -> None:
        """A version holds nothing any more; it need not have held anything."""
        self._held.pop((model, version), None)

    def used_bytes(self, memory: str) -> int:
        """What all versions hold of `memory`."""
        return sum(held.get(memory, 0) for held in self._held.values())

    def held_bytes(self, model: str, version: int) -> dict[str, int]:
        """What one version holds, by memory."""
        return dict(self._held.get((model, version), {}))

    def decide(
        self, model: str, version: int, needs_bytes: Mapping[str, int], residents: Iterable[Resident]
    ) -> Fits | Evict | Refuse:
        """Whether a version that needs so much may be loaded now, or after others have gone.

        Only versions that are `on_demand` and idle go: the least recently used first, and none
        whose going is not needed.
        """
        residents = list(residents)
        short = self._short((model, version), needs_bytes, ())
        if not short:
            return Fits()
        leaving: list[Owner] = []
        for resident in sorted(residents, key=lambda r: r.last_used):
            owner = (resident.model, resident.version)
            helps = any(self._held.get(owner, {}).get(memory) for memory in short)
            if resident.is_idle and resident.on_demand and owner != (model, version) and helps:
                leaving.append(owner)
                if not self._short((model, version), needs_bytes, leaving):
                    return Evict(self._fewest((model, version), needs_bytes, leaving))
        return Refuse(self._reason((model, version), needs_bytes, short[0], residents))

    def _short(self, owner: Owner, needs_bytes: Mapping[str, int], leaving: Iterable[Owner]) -> list[str]:
        """The memories in which there is no room for it although `leaving` have gone."""
        gone = {owner, *leaving}
        return [
            memory
            for memory, need in sorted(needs_bytes.items())
            if memory in self.limits_bytes and need > self._free_bytes(memory, gone)
        ]

    def _free_bytes(self, memory: str, gone: set[Owner]) -> int:
        held = sum(held.get(memory, 0) for owner, held in self._held.items() if owner not in gone)
        return self.limits_bytes[memory] - held

    def _fewest(self, owner: Owner, needs_bytes: Mapping[str, int], leaving: list[Owner]) -> tuple[Owner, ...]:
        """`leaving` without those that may stay after all, of which the last used come first."""
        for candidate in reversed(leaving):
            others = [other for other in leaving if other != candidate]
            if not self._short(owner, needs_bytes, others):
                leaving = others
        return tuple(leaving)

    def _reason(self, owner: Owner, needs_bytes: Mapping[str, int], memory: str, residents: list[Resident]) -> str:
        """Needed, free, the budget and who holds it, of the memory that is short."""
        facts = {(resident.model, resident.version): resident for resident in residents}
        holders = sorted(
            ((held[memory], other) for other, held in self._held.items() if held.get(memory) and other != owner),
            reverse=True,
        )
        text = (
            f"it needs {size_text(needs_bytes[memory])} of {memory} memory, but "
            f"{size_text(max(self._free_bytes(memory, {owner}), 0))} of the budget of "
            f"{size_text(self.limits_bytes[memory])} are free"
        )
        if not holders:
            return text
        return f"{text}; held by {', '.join(_holder(other, size, facts.get(other)) for size, other in holders)}"


def size_text(size_bytes: int) -> str:
    """A number of bytes to be read by people: ``1.5 GiB``."""
    for unit, name in _UNITS:
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"


def _holder(owner: Owner, size_bytes: int, resident: Resident | None) -> str:
    if resident is None:
        state = "not ready"
    elif not resident.on_demand:
        state = "not on demand"
    else:
        state = "idle" if resident.is_idle else "in use"
    return f"{owner[0]} v{owner[1]} ({size_text(size_bytes)}, {state})"
