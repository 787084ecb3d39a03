"""Work that keeps a blocked model busy: the queue behind it fills."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable

from service.batching.batcher import Batcher
from service.errors import Overloaded
from service.tensors import Tensors
from tests.fakes import DOUBLE, rows
from tests.integration.conftest import Kiln


def batcher_of(kiln: Kiln, model: str = "double") -> Batcher:
    batcher = kiln.registry._models[model].versions[0].batcher
    assert batcher is not None
    return batcher


async def entered(kiln: Kiln) -> None:
    """Wait until the model has begun one more run."""
    assert await asyncio.to_thread(kiln.model.entered.acquire, timeout=30.0)


async def queued(kiln: Kiln, rows_waiting: int, model: str = "double") -> None:
    """Wait until so many rows are in the queue."""
    async with asyncio.timeout(30.0):
        while batcher_of(kiln, model).queue.rows != rows_waiting:
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def busy(kiln: Kiln) -> AsyncIterator[None]:
    """The model runs one row, and does not end until this context does; the queue is empty."""
    kiln.model.block()
    running = asyncio.ensure_future(_answer(batcher_of(kiln).submit(DOUBLE, rows(1.0), None)))
    await entered(kiln)
    try:
        yield
    finally:
        kiln.model.unblock()
        await running


@contextlib.asynccontextmanager
async def full(kiln: Kiln) -> AsyncIterator[None]:
    """`busy`, and the queue is full."""
    async with busy(kiln):
        waiting = []
        with contextlib.suppress(Overloaded):
            while True:
                waiting.append(batcher_of(kiln).submit(DOUBLE, rows(*range(8)), None))
                for _ in range(3):  # a full batch is taken out of the queue at once, one only
                    await asyncio.sleep(0)
        yield
        kiln.model.unblock()
        await asyncio.gather(*waiting)


async def _answer(reply: Awaitable[Tensors]) -> Tensors:
    return await reply
