"""The fair share of a device among the models that are hot on it: a plain object without clock, lock or loop.

Start-time fair queueing (Goyal, Vin, Cheng: SIGCOMM 1996). Each model has a virtual time, which its batches move on
by the seconds of the device that they take over its weight; of the models that wait, the one that is least far goes
first. A model that was idle comes back at the device's virtual time, so that it neither hoards nor starves.

A device is full when what runs on it takes all of it; a batch takes the part that its plan leaves to one of those
that it runs at once. While any of it is free somebody who waits is let in, and a model that is alone is never held up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

_FULL = 1.0 - 1e-9
_LONGEST_HOLD_S = 1.0
_MOST_LATE = 3.0
"""A run that takes that long, and so many times what is usual, holds up nobody any more: it may hang."""
_MOST_AHEAD_S = 0.1
"""So far a model gets ahead by batches that wait for nobody: they must not be held against it for ever."""


@dataclass(eq=False, slots=True)
class Tenant:
    """One model on the device, whatever versions of it there are; `members` are its versions here."""

    weight: float = 1.0
    virtual_s: float = 0.0
    used: float = 0.0
    holds: int = 0
    waiting: int = 0
    members: int = 0


@dataclass(eq=False, slots=True)
class Member:
    """One version: each of its batches takes `part` of the device, and `turn` is what to call when it is its turn."""

    tenant: Tenant
    part: float
    turn: Callable[[], None]
    usual_s: float = 0.0
    """What its latest batch took."""


@dataclass(eq=False, slots=True)
class Hold:
    """A batch on the device, since `since`, charged beforehand as `charged_s`; it `counts` until it is given up.

    Neither does it count nor is it charged for longer than `limit_s`.
    """

    member: Member
    part: float
    since: float
    charged_s: float
    limit_s: float
    counts: bool = True


@dataclass(eq=False)
class Share:
    """One device; all seconds are of the device and all times of the caller's clock."""

    used: float = 0.0
    """How much of it is taken: 1 is all."""
    virtual_s: float = 0.0
    """The virtual time at which its latest batch began."""
    tenants: dict[str, Tenant] = field(default_factory=dict)
    waiting: dict[Member, None] = field(default_factory=dict)
    holds: dict[Hold, None] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Share {self.used:.2f} used, {len(self.holds)} running, {len(self.waiting)} waiting>"

    def join(self, model: str, weight: float, part: float, turn: Callable[[], None]) -> Member:
        """A version of `model` is there from now on; `weight` is that of its model."""
        tenant = self.tenants.get(model)
        if tenant is None:
            tenant = self.tenants[model] = Tenant(virtual_s=self.virtual_s)
        tenant.weight = weight
        tenant.members += 1
        return Member(tenant, part, turn)

    def leave(self, member: Member) -> None:
        """It is gone: what it holds is given up, and it waits no more."""
        self.withdraw(member)
        for hold in [hold for hold in self.holds if hold.member is member]:
            self._let_go(hold)
        tenant = member.tenant
        tenant.members -= 1
        if not tenant.members:
            self.tenants = {name: other for name, other in self.tenants.items() if other is not tenant}

    def may_begin(self, member: Member) -> bool:
        """Whether it may begin a batch now; if not it waits for its turn.

        Where nobody else runs or waits, how much it runs at once is its own affair.
        """
        tenant = member.tenant
        if not self.waiting and self.used == tenant.used:
            return True
        self._wake(tenant)
        if self._is_first(tenant) and (self.used < _FULL or self._is_alone(tenant)):
            self.withdraw(member)
            return True
        if member not in self.waiting:
            self.waiting[member] = None
            tenant.waiting += 1
        return False

    def withdraw(self, member: Member) -> None:
        """It does not wait any more."""
        if member in self.waiting:
            del self.waiting[member]
            member.tenant.waiting -= 1

    def begin(self, member: Member, now: float) -> Hold:
        """A batch of `member` runs from `now` on; to be given to `end`."""
        tenant = member.tenant
        self._wake(tenant)
        self.virtual_s = max(self.virtual_s, tenant.virtual_s)
        limit_s = max(_LONGEST_HOLD_S, _MOST_LATE * member.usual_s)
        hold = Hold(member, member.part, now, member.usual_s, limit_s)
        tenant.virtual_s += hold.charged_s * hold.part / tenant.weight
        tenant.holds += 1
        tenant.used += hold.part
        self.used += hold.part
        self.holds[hold] = None
        return hold

    def end(self, hold: Hold, seconds: float) -> None:
        """That batch has ended, after `seconds` in its plan."""
        member = hold.member
        member.usual_s = seconds
        charged_s = min(seconds, hold.limit_s)
        member.tenant.virtual_s += (charged_s - hold.charged_s) * hold.part / member.tenant.weight
        self._let_go(hold)

    def charge(self, member: Member, seconds: float) -> None:
        """A batch of it ran where it waited for nobody."""
        tenant = member.tenant
        self._wake(tenant)
        if tenant.virtual_s < self.virtual_s + _MOST_AHEAD_S:
            ahead_s = tenant.virtual_s + seconds * member.part / tenant.weight
            tenant.virtual_s = min(ahead_s, self.virtual_s + _MOST_AHEAD_S)

    def next_turn(self) -> Member | None:
        """Who may begin a batch now, and waits no more; it asks again if it comes to nothing."""
        if not self.waiting:
            return None
        member = min(self.waiting, key=lambda each: each.tenant.virtual_s)
        if self.used >= _FULL and not self._is_alone(member.tenant):
            return None
        self.withdraw(member)
        return member

    def next_overdue(self) -> float | None:
        """When the next of the runs will have taken so long that nobody is held up for it any more."""
        return min((hold.since + hold.limit_s for hold in self.holds), default=None)

    def give_up(self, now: float) -> None:
        """Hold up nobody for the runs that are overdue."""
        for hold in [hold for hold in self.holds if hold.since + hold.limit_s <= now]:
            self._let_go(hold)

    def _let_go(self, hold: Hold) -> None:
        if not hold.counts:
            return
        hold.counts = False
        del self.holds[hold]
        tenant = hold.member.tenant
        tenant.holds -= 1
        tenant.used = tenant.used - hold.part if tenant.holds else 0.0  # exactly, whatever was rounded
        self.used = self.used - hold.part if self.holds else 0.0

    def _wake(self, tenant: Tenant) -> None:
        """Bring one that was idle up to the present."""
        if not tenant.holds and not tenant.waiting and tenant.virtual_s < self.virtual_s:
            tenant.virtual_s = self.virtual_s

    def _is_first(self, tenant: Tenant) -> bool:
        return all(other.tenant is tenant or other.tenant.virtual_s >= tenant.virtual_s for other in self.waiting)

    def _is_alone(self, tenant: Tenant) -> bool:
        """Whether nobody else runs or waits."""
        return len(self.holds) == tenant.holds and len(self.waiting) == tenant.waiting
