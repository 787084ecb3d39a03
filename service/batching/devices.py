"""The thin loop around `Share`: whose turn it is on the devices that the models of one server share.

All of it runs on the event loop's thread, as the batchers do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from service.batching.share import Hold, Member, Share


class Place:
    """One version's place on its device; see `Devices.join`."""

    def __init__(self, device: Device, member: Member) -> None:
        self._device = device
        self._member = member
        self.is_waiting = False
        """Whether it was held up, and will be called when it is its turn."""

    def may_begin(self) -> bool:
        """Whether a batch may begin now. If not, `turn` is called when it may."""
        if self._device.share.may_begin(self._member):
            self.is_waiting = False
            return True
        self.is_waiting = True
        self._device.watch()
        return False

    @property
    def is_contended(self) -> bool:
        """Whether another model waits for the device, or runs on it."""
        share, tenant = self._device.share, self._member.tenant
        return len(share.waiting) > tenant.waiting or len(share.holds) > tenant.holds

    def begin(self) -> Hold:
        """A batch has been handed to the runner."""
        return self._device.share.begin(self._member, self._device.clock())

    def end(self, hold: Hold, seconds: float) -> float:
        """It has ended, however, after `seconds`; those of the device that it took."""
        self._device.share.end(hold, seconds)
        self._device.free()
        return seconds * hold.part

    def charge(self, seconds: float) -> float:
        """A batch ran on the event loop, where it waited for nobody; the seconds of the device that it took."""
        self._device.share.charge(self._member, seconds)
        return seconds * self._member.part

    def widen(self, parallel: int) -> None:
        """Its plans run so many batches at once from now on."""
        self._member.part = 1.0 / parallel

    def leave(self) -> None:
        """It is unloaded: nobody is held up by what still runs."""
        self.is_waiting = False
        self._device.drop(self._member)

    def called(self) -> None:
        """Its turn has come."""
        self.is_waiting = False
        self._member.turn()


class Device:
    """What several models share: their turns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.share = Share()
        self.clock = clock
        self._places: dict[Member, Place] = {}
        self._is_planned = False
        self._watch: asyncio.TimerHandle | None = None

    def add(self, member: Member) -> Place:
        """The place of `member`."""
        place = self._places[member] = Place(self, member)
        return place

    def drop(self, member: Member) -> None:
        """It is gone, and what it held is free."""
        self.share.leave(member)
        del self._places[member]
        self.free()

    def free(self) -> None:
        """Something has ended: who waits is called once the one that it was of has asked for its next batch."""
        if self.share.waiting and not self._is_planned:
            self._is_planned = True
            asyncio.get_running_loop().call_soon(self._call)

    def watch(self) -> None:
        """Look again when a run is overdue: one that hangs must not hold up the others."""
        if self._watch is None and (at := self.share.next_overdue()) is not None:
            self._watch = asyncio.get_running_loop().call_later(max(at - self.clock(), 0.0), self._on_overdue)

    def _on_overdue(self) -> None:
        self._watch = None
        if self.share.waiting:
            self.share.give_up(self.clock())
            self._call()
            if self.share.waiting:
                self.watch()

    def _call(self) -> None:
        self._is_planned = False
        while (member := self.share.next_turn()) is not None:
            self._places[member].called()


class Devices:
    """All devices of one server, by what the versions say that they run on; versions join when they are loaded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._devices: dict[tuple[str, ...], Device] = {}
        self._weights: dict[str, float] = {}

    def join(self, devices: Iterable[str], model: str, parallel: int, turn: Callable[[], None]) -> Place:
        """A place for a version of `model` that runs `parallel` batches at once on `devices`; it is to `leave`.

        `turn` is called on the event loop when a batch that had to wait may begin.
        """
        key = tuple(sorted(set(devices)))
        device = self._devices.get(key)
        if device is None:
            device = self._devices[key] = Device(self._clock)
        return device.add(device.share.join(model, self._weights.get(model, 1.0), 1.0 / parallel, turn))

    def weigh(self, model: str, weight: float) -> None:
        """From now on `model` gets its share by this weight, whether it is loaded yet or not."""
        if weight == self._weights.get(model, 1.0):
            return
        self._weights[model] = weight
        for device in self._devices.values():
            tenant = device.share.tenants.get(model)
            if tenant is not None:
                tenant.weight = weight
