"""A front end and its engine in one process, with the socket and the shared memory of two between them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from service.frontend.channel import Channel
from service.frontend.hub import Hub
from service.frontend.link import Link
from service.frontend.memory import Inbox, Outbox, create
from service.frontend.remote import RemoteEngine
from service.metrics import Metrics
from service.shared_memory import OFF, SharedMemory

RING_BYTES = 1 << 16
"""Small, so that tests get around it."""


def channels(ring_bytes: int = RING_BYTES) -> tuple[Channel, Channel]:
    """Two ends of a connection: the first one's outbox is the other one's inbox."""
    left, right = socket.socketpair()
    rings = create(ring_bytes), create(ring_bytes)
    try:
        return (
            Channel(left, Inbox(rings[0], ring_bytes), Outbox(rings[1], ring_bytes)),
            Channel(right, Inbox(rings[1], ring_bytes), Outbox(rings[0], ring_bytes)),
        )
    finally:
        for each in rings:
            os.close(each)


@dataclass
class FrontEnd:
    """One front end: what its predictor sees, and the engine's link with it, whose owner this is."""

    number: int
    hub: Hub
    memory: SharedMemory = OFF
    metrics: Metrics = field(default_factory=Metrics)
    has_ended: bool = False
    is_accepting: bool = False
    failure: str = ""

    def __post_init__(self) -> None:
        theirs, mine = channels()
        self.link = Link(self.number, theirs, self.hub, self)
        self.engine = RemoteEngine(mine, self.metrics, self.memory, self._engine_has_gone)
        self.channel = mine
        self.engine_is_gone = False
        theirs.open(self.link)
        mine.open(self.engine)

    async def join(self) -> None:
        """Until it knows the models."""
        await self.channel.call("joined")

    def close(self) -> None:
        """Close both ends."""
        self.channel.close()
        self.link.close()

    def accepts(self) -> None:
        self.is_accepting = True

    def fails(self, reason: str) -> None:
        self.failure = reason

    def ended(self) -> None:
        self.has_ended = True

    def _engine_has_gone(self) -> None:
        self.engine_is_gone = True
