"""The engine's side of all front ends: tells them of the models, and gathers what they have counted."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable, Iterable

from service.frontend.link import Link, Served
from service.frontend.snapshot import Region, Shared, take_snapshot
from service.metrics import Metrics
from service.registry.registry import Registry
from service.registry.served_model import Follower
from service.registry.version import Version

_ACKNOWLEDGE_S = 2.0
"""A front end that does not answer within that is not waited for: it is busy, or about to be found dead."""
_GATHER_S = 1.0


class Hub(Follower):
    """Follows the registry, and answers what concerns more than one front end."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.links: dict[int, Link] = {}
        """By the number of the front end."""
        self.served: dict[int, Served] = {}
        """What the latest snapshot has READY, by key."""
        self._registry: Registry | None = None
        self._is_ready: Callable[[], bool] = lambda: False
        self._shared = Shared(logging.getLogger("kiln").level)
        self._is_push_planned = False

    def follow(self, registry: Registry, is_ready: Callable[[], bool]) -> None:
        """Tell of these models, and of this readiness, from now on."""
        self._registry = registry
        self._is_ready = is_ready

    @property
    def registry(self) -> Registry:
        assert self._registry is not None
        return self._registry

    # What the registry tells

    def changed(self) -> None:
        """Tell all front ends, once the current step of the event loop is done."""
        if self.links and not self._is_push_planned:
            self._is_push_planned = True
            asyncio.get_running_loop().call_soon(self._push)

    def draining(self, version: Version) -> None:
        """Have front ends that may still send requests of `version` counted among those that hold it."""
        for link in self.links.values():
            link.lease(version)

    # What front ends are told

    def _push(self) -> list[asyncio.Future[None]]:
        self._is_push_planned = False
        return self._tell(self.links.values())

    def tell(self, link: Link) -> None:
        """Tell one front end how things are now."""
        self._tell([link])

    def _tell(self, links: Iterable[Link]) -> list[asyncio.Future[None]]:
        snapshot = take_snapshot(self.registry, is_ready=self._is_ready(), shared=self._shared)
        ready = {v.key: v for model in self.registry.routes.values() for v in model.ready.values()}
        self.served = {key: self.served.get(key) or Served(version) for key, version in ready.items()}
        data = pickle.dumps(snapshot)
        return [link.tell(data, ready.keys()) for link in list(links)]

    async def settle(self) -> None:
        """Until every front end knows how things are now."""
        if told := self._push():
            await asyncio.wait(told, timeout=_ACKNOWLEDGE_S)

    async def share(self, log_level: int, added: frozenset[Region], removed: frozenset[Region]) -> None:
        """A client has changed one front end; have all of them changed before it is answered."""
        self._shared = Shared(log_level, (self._shared.regions - removed) | added)
        logging.getLogger("kiln").setLevel(log_level)
        await self.settle()

    # What front ends have counted

    async def gather(self) -> None:
        """Add to the metrics what front ends have counted since they were last asked."""
        asked = {number: link.counts() for number, link in self.links.items()}
        if asked:
            await asyncio.wait(asked.values(), timeout=_GATHER_S)
        for number, counts in asked.items():
            if counts.done() and not counts.cancelled() and counts.exception() is None and number in self.links:
                self.metrics.add(number, counts.result())

    async def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics of all processes as one page; see `Metrics.page`."""
        await self.gather()
        return self.metrics.page(accept)

    # What becomes of front ends

    def joined(self, link: Link) -> None:
        """A front end is there."""
        self.links[link.number] = link
        self.metrics.frontends(self.links)
        self.tell(link)

    def left(self, link: Link) -> None:
        """A front end is gone, and with it what it had not told."""
        if self.links.get(link.number) is link:
            del self.links[link.number]
            self.metrics.frontends(self.links)
