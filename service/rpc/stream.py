"""A stream's messages answered in their order, several at once; knows no transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

Answer = Callable[[bytes], Coroutine[Any, Any, bytes]]


async def in_order(messages: AsyncIterator[bytes], answer: Answer, *, most: int) -> AsyncGenerator[bytes, None]:
    """The answer to each message, in the order of the messages.

    Up to `most` messages are being answered, or wait for their answer to be taken; beyond that none
    is read. Closing the iterator, or cancelling the task that takes from it, cancels what is under way.

    Raises:
        Exception: whatever `messages` or `answer` raises, once the answers before it are taken.
    """
    room = asyncio.Semaphore(most)
    tasks: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
    running: set[asyncio.Task[bytes]] = set()

    async def read() -> None:
        try:
            await room.acquire()
            async for message in messages:
                task = asyncio.create_task(answer(message))
                running.add(task)
                tasks.put_nowait(task)
                await room.acquire()
        finally:
            tasks.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (next_task := await tasks.get()) is not None:
            yield await next_task
            running.discard(next_task)
            room.release()
        await reader
    finally:
        left = [reader, *running]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
