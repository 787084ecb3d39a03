"""Trying a version on real requests: it is asked as well, its answers are compared and thrown away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping

from service.batching.queue import Spent
from service.errors import KilnError
from service.metrics import Metrics
from service.registry.version import Version, VersionHandle
from service.runtime.parity import disagreement
from service.tensors import Signature, Tensors

Keep = Callable[[asyncio.Task[None]], None]


class ShadowedHandle:
    """A `Handle` that sends a copy of a share of its requests to another version."""

    __slots__ = ("_handle", "_keep", "_metrics", "_other", "_share", "model", "signatures", "version")

    def __init__(self, handle: VersionHandle, other: Version, share: float, metrics: Metrics, keep: Keep) -> None:
        """`keep` holds the task that asks `other` until it ends."""
        self.model = handle.model
        self.version = handle.version
        self.signatures: Mapping[str, Signature] = handle.signatures
        self._handle = handle
        self._other = other
        self._share = share
        self._metrics = metrics
        self._keep = keep

    def submit(
        self,
        signature: Signature,
        inputs: Tensors,
        deadline: float | None,
        spent: Spent | None = None,
        priority: int = 0,
    ) -> Awaitable[Tensors]:
        """The other version is asked only once there is an answer to compare with."""
        answer = self._handle.submit(signature, inputs, deadline, spent, priority)
        if random.random() >= self._share:  # noqa: S311 - a sample
            return answer
        return self._compared(answer, signature, inputs)

    async def _compared(self, answer: Awaitable[Tensors], signature: Signature, inputs: Tensors) -> Tensors:
        outputs = await answer
        if self._other.is_ready:
            told = self._metrics.shadow(self.model, self._other.source.version)
            self._other.lifecycle.acquire()
            trial = VersionHandle(self._other)
            self._keep(asyncio.create_task(_try(trial, signature, inputs, outputs, told)))
        return outputs

    def release(self) -> None:
        self._handle.release()


async def _try(
    handle: VersionHandle, signature: Signature, inputs: Tensors, outputs: Tensors, told: Callable[[str], None]
) -> None:
    """Ask the version on trial; tell ``agree``, ``differ`` or ``error``, and never raise."""
    try:
        own = handle.signatures.get(signature.name)
        if own is None or (own.inputs, own.outputs) != (signature.inputs, signature.outputs):
            told("differ")
            return
        got = await handle.submit(own, inputs, None)
        told("differ" if disagreement(outputs, got) else "agree")
    except KilnError:
        told("error")
    finally:
        handle.release()
