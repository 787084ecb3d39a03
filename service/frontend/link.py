"""The engine's side of one front end: its requests go to the batchers, the answers back."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any, Protocol

from service.batching.queue import Spent
from service.errors import INTERNAL_ERROR, Internal, KilnError, Unavailable
from service.frontend.channel import Channel
from service.frontend.frames_codec import (
    REQUEST,
    Answered,
    Asked,
    CorruptFrame,
    Frame,
    Kind,
    decode_asker,
    decode_request,
    encode_answer,
    encode_error,
)
from service.frontend.layout_codec import LayoutReader, LayoutWriter, get
from service.frontend.memory import segment
from service.frontend.snapshot import Region
from service.metrics import RequestCounts
from service.predictor import Handle
from service.registry.registry import Registry
from service.registry.version import Version
from service.tensors import Signature, Tensors

_log = logging.getLogger("kiln.frontend")


class Served:
    """A version that requests from other processes are for; they name a signature by its place."""

    def __init__(self, version: Version) -> None:
        assert version.model is not None
        by_name: Mapping[str, Signature] = version.model.signatures
        self.version = version
        self.signatures = [by_name[name] for name in sorted(by_name)]
        self.writers = [LayoutWriter(place, each.outputs) for place, each in enumerate(self.signatures)]


class Center(Protocol):
    """What links share; see `service.frontend.hub.Hub`."""

    served: dict[int, Served]

    @property
    def registry(self) -> Registry: ...
    def joined(self, link: Link, /) -> None: ...
    def tell(self, link: Link, /) -> None: ...
    async def settle(self) -> None: ...
    async def share(self, log_level: int, added: frozenset[Region], removed: frozenset[Region]) -> None: ...
    async def page(self, accept: str) -> tuple[bytes, str]: ...
    def left(self, link: Link, /) -> None: ...


class Owner(Protocol):
    """Who has started a front end."""

    def accepts(self) -> None:
        """It takes requests from now on."""

    def fails(self, reason: str) -> None:
        """It does not come to that, and is about to go."""

    def ended(self) -> None:
        """It has gone."""


class Link:
    """One front end, as the engine has it; a `Peer` of its channel."""

    def __init__(self, number: int, channel: Channel, center: Center, owner: Owner) -> None:
        self.number = number
        self._channel = channel
        self._center = center
        self._owner = owner
        self._layouts = LayoutReader()
        self._context = contextvars.copy_context()
        """Of all callbacks: a copy for each request would cost as much as its callback."""
        self._running: dict[int, asyncio.Future[Tensors]] = {}
        self._known: Collection[int] = ()
        self._leases: dict[int, Served] = {}
        """Versions that are gone but that the front end may still send requests of, by key."""

    def __repr__(self) -> str:
        return f"<Link {self.number}: {len(self._running)} running, {len(self._leases)} leases>"

    # What the front end is told

    def tell(self, snapshot: bytes, ready: Collection[int]) -> asyncio.Future[None]:
        """Tell a pickled `Snapshot`, which has the versions `ready`; done once the front end goes by it."""
        self._known = frozenset(ready)
        return self._channel.call("snapshot", snapshot)

    def counts(self) -> asyncio.Future[RequestCounts]:
        """What the front end has counted."""
        return self._channel.call("counts")

    def stop(self) -> asyncio.Future[None]:
        """Have the front end finish and go."""
        return self._channel.call("stop")

    def close(self) -> None:
        """Let the connection go."""
        self._channel.close()

    def lease(self, version: Version) -> None:
        """Count the front end among those who hold `version`, until it says that it does not."""
        served = self._center.served.get(version.key)
        if version.key in self._known and served is not None:
            version.lifecycle.hold()
            self._leases[version.key] = served

    # What the front end says

    def on_frame(self, got: Frame) -> None:
        """See `Peer`."""
        if got.kind == REQUEST:
            asked = decode_request(got)
            self._take(got.number, asked, decode_asker(got, asked))
        elif got.kind == Kind.CANCEL:
            if (running := self._running.get(got.number)) is not None:
                running.cancel()
        elif got.kind == Kind.RELEASE:
            if (lease := self._leases.pop(got.number, None)) is not None:
                lease.version.lifecycle.release()
        else:
            raise CorruptFrame(f"a front end sends no frame of kind {got.kind}")

    def on_call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """See `Peer`."""
        center, registry = self._center, self._center.registry
        changes: dict[str, Callable[..., Awaitable[None]]] = {
            "load": registry.load,
            "unload": registry.unload,
            "configure": registry.configure,
            "wait": registry.wait,
        }
        if (change := changes.get(name)) is not None:
            return self._changing(change, arguments)
        answers: dict[str, Callable[..., Any]] = {
            "joined": partial(center.joined, self),
            "accepts": self._owner.accepts,
            "fails": self._owner.fails,
            "refresh": partial(center.tell, self),
            "share": center.share,
            "page": center.page,
        }
        return answers[name](*arguments)

    async def _changing(self, change: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        """Once all front ends know what has become of a change."""
        try:
            await change(*arguments)
        finally:
            await self._center.settle()

    def on_end(self) -> None:
        """See `Peer`: nobody waits for the answers any more."""
        for running in list(self._running.values()):
            running.cancel()
        for lease in self._leases.values():
            lease.version.lifecycle.release()
        self._leases.clear()
        self._center.left(self)
        self._owner.ended()

    # Requests

    def _take(self, number: int, asked: Asked, spent: Spent) -> None:
        block = self._channel.take(asked.block)
        layout = self._layouts.read(asked.layout, asked.block.size_bytes)
        served = self._center.served.get(asked.version) or self._leases.get(asked.version)
        if served is None:
            self._refuse(number, Unavailable("the model is stopping"))
            return
        if layout.signature >= len(served.signatures):
            raise CorruptFrame(f"{served.version!r} has no signature {layout.signature}")
        signature = served.signatures[layout.signature]
        inputs = get(block, layout, signature.inputs)
        try:
            handle = self._center.registry.hold(served.version, is_named=asked.is_named)
        except KilnError as error:
            self._refuse(number, error)
            return
        try:
            submitted = handle.submit(signature, inputs, asked.deadline, spent, asked.priority)
            answer = submitted if isinstance(submitted, asyncio.Future) else asyncio.ensure_future(submitted)
        except Exception as error:  # noqa: BLE001 - whatever it is, its caller is told
            handle.release()
            self._refuse(number, error, spent)
            return
        self._running[number] = answer
        done = partial(self._done, number, handle, served.writers[layout.signature], spent)
        answer.add_done_callback(done, context=self._context)

    def _done(
        self, number: int, handle: Handle, writer: LayoutWriter, spent: Spent, answer: asyncio.Future[Tensors]
    ) -> None:
        self._running.pop(number, None)
        handle.release()
        if answer.cancelled():
            return
        error = answer.exception()
        if error is None:
            try:
                self._answer(number, writer, spent, answer.result())
            except Exception as failure:  # noqa: BLE001 - no memory for it, say: its caller must be told
                error = failure
        if error is not None:
            self._refuse(number, error, spent)

    def _answer(self, number: int, writer: LayoutWriter, spent: Spent, outputs: Tensors) -> None:
        written = writer.write(outputs)
        block, descriptor = self._channel.outbox.put(written) or segment(written)
        self._channel.send(encode_answer(number, Answered(spent, block, written.layout)), descriptor)

    def _refuse(self, number: int, error: BaseException, spent: Spent | None = None) -> None:
        if not isinstance(error, KilnError):
            _log.error("a request failed", exc_info=error, extra={"caller": spent.caller if spent else None})
            error = Internal(INTERNAL_ERROR)
        self._channel.send(encode_error(number, error, spent))
