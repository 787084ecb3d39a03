"""Room for a version before it is loaded: what is idle goes for it, or it is refused with the numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Protocol

from service.errors import ModelLoadError
from service.metrics import Metrics
from service.registry.memory import Evict, MemoryBudget, Refuse, Resident


class Tenants(Protocol):
    """Those who hold memory now; see `Registry`."""

    def residents(self) -> list[Resident]:
        """The loaded versions."""

    async def evict(self, model: str, version: int) -> None:
        """Let an idle version go until it is asked for again."""


class Room:
    """The memory budget, put into practice; one decision at a time."""

    def __init__(self, tenants: Tenants, metrics: Metrics) -> None:
        self._budget = MemoryBudget({})
        self._tenants = tenants
        self._metrics = metrics
        self._deciding = asyncio.Lock()

    async def make(
        self, model: str, version: int, needs_bytes: Mapping[str, int], limits_bytes: Mapping[str, int]
    ) -> None:
        """Reserve what a version needs, after others have gone where they must.

        `limits_bytes` are the budgets of the memories that it needs.

        Raises:
            ModelLoadError: there is no room, and none can be made.
        """
        async with self._deciding:
            for memory, limit in limits_bytes.items():
                if memory not in self._budget.limits_bytes:
                    self._budget.limits_bytes[memory] = limit
                    self._metrics.memory_budget(memory, limit)
            while True:
                decision = self._budget.decide(model, version, needs_bytes, self._tenants.residents())
                if isinstance(decision, Refuse):
                    raise ModelLoadError(decision.reason)
                if not isinstance(decision, Evict):
                    break
                for name, number in decision.versions:
                    await self._tenants.evict(name, number)
            self._budget.reserve(model, version, needs_bytes)

    def settle(self, model: str, version: int, held_bytes: Mapping[str, int]) -> None:
        """A version is loaded, and this is what it holds."""
        self._budget.reserve(model, version, held_bytes)
        self._metrics.memory(model, version, held_bytes)

    def release(self, model: str, version: int) -> None:
        """A version is gone."""
        self._budget.release(model, version)
        self._metrics.memory(model, version, {})
