"""What a change of the models sets going; readiness is told when it is another."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from service.registry.served_model import Follower
from service.server import _announce, _Changes


class Told(Follower):
    """Watcher and follower in one, which notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def stir(self) -> None:
        self.calls.append("stir")

    def changed(self) -> None:
        self.calls.append("changed")

    def draining(self, version: Any) -> None:
        self.calls.append(version)


async def test_a_change_is_told_to_all():
    """The watcher may have to look again, and front ends are told; who drains is their business alone."""
    told = Told()
    changes = _Changes(cast("Any", told), told)
    changes.changed()
    assert changes.seen.is_set()
    assert told.calls == ["stir", "changed"]
    version = cast("Any", object())
    changes.draining(version)
    assert told.calls == ["stir", "changed", version]


async def test_readiness_is_told_once_and_when_it_is_another_after_a_change():
    """Not with each change: most leave it as it is."""
    told: list[bool] = []
    now = SimpleNamespace(ready=True)

    async def set_serving(*, serving: bool) -> None:
        told.append(serving)

    changes = _Changes(cast("Any", Told()), Follower())
    announcing = asyncio.create_task(
        _announce(
            cast("Any", SimpleNamespace(is_ready=lambda: now.ready)),
            cast("Any", SimpleNamespace(model_names=list)),
            cast("Any", SimpleNamespace(set_serving=set_serving)),
            cast("Any", SimpleNamespace(ready=lambda *, is_ready: told.append(is_ready))),
            changes.seen,
        )
    )
    for now.ready in (True, True, False, False, True):
        changes.changed()
        while changes.seen.is_set():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    announcing.cancel()
    assert told == [True, True, False, False, True, True]
