"""The fair share of a device: the plain object, moved by a clock of the test's own."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.share import Hold, Member, Share


@dataclass
class Hot:
    """A model that always has a batch of `seconds` to run, from `since` on, and what it has had of the device."""

    name: str
    weight: float
    seconds: float
    since: float = 0.0
    had_s: float = 0.0


class Simulation:
    """Models on one device, each with one version that runs one batch at a time and takes all of it."""

    def __init__(self, *models: Hot) -> None:
        self.share = Share()
        self.now = 0.0
        self.idle_s = 0.0
        self.running: list[tuple[float, int, Member, Hold]] = []
        self.models: dict[Member, Hot] = {}
        for model in models:
            self.models[self.share.join(model.name, model.weight, 1.0, lambda: None)] = model

    def run(self, until: float) -> None:
        """Let every model ask as soon as it can, as the batchers do, until that time."""
        arrivals = sorted(self.models, key=lambda member: self.models[member].since)
        while self.now < until:
            while arrivals and self.models[arrivals[0]].since <= self.now:
                self._ask(arrivals.pop(0))
            if not self.running:
                if not arrivals:
                    return
                self.idle_s += self.models[arrivals[0]].since - self.now
                self.now = self.models[arrivals[0]].since
                continue
            if arrivals and self.models[arrivals[0]].since < self.running[0][0]:
                self.now = self.models[arrivals[0]].since
                continue
            self.now, _, member, hold = heapq.heappop(self.running)
            model = self.models[member]
            model.had_s += model.seconds
            self.share.end(hold, model.seconds)
            self._ask(member)
            while (turn := self.share.next_turn()) is not None:
                self._ask(turn)

    def _ask(self, member: Member) -> None:
        if self.share.may_begin(member):
            end = self.now + self.models[member].seconds
            heapq.heappush(self.running, (end, id(member), member, self.share.begin(member, self.now)))


lengths = st.floats(0.001, 0.5)
weights = st.sampled_from([0.25, 1.0, 2.0, 3.0, 10.0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(weights, lengths), min_size=2, max_size=5))
def test_hot_models_get_the_device_by_their_weights(models: list[tuple[float, float]]):
    """However long their batches are: over its weight no model has had more than another but for one batch of each."""
    hot = [Hot(str(n), weight, seconds) for n, (weight, seconds) in enumerate(models)]
    simulation = Simulation(*hot)
    simulation.run(100.0)
    longest = max(model.seconds for model in hot)
    for one in hot:
        for other in hot:
            apart = one.had_s / one.weight - other.had_s / other.weight
            assert abs(apart) <= 2 * longest / min(one.weight, other.weight) + 1e-6
    assert sum(model.had_s for model in hot) == pytest.approx(simulation.now, abs=longest)


def test_one_that_comes_back_gets_its_share_of_the_present():
    """It is not given what it left to others, and does not wait for its turn behind what they have had."""
    early, late = Hot("early", 1, 0.01), Hot("late", 1, 0.01, since=50.0)
    simulation = Simulation(early, late)
    simulation.run(60.0)
    assert early.had_s == pytest.approx(55.0, abs=0.1)
    assert late.had_s == pytest.approx(5.0, abs=0.1)


def test_a_changed_weight_holds_from_now_on():
    """What was had before is neither taken back nor made up for."""
    one, other = Hot("one", 1, 0.01), Hot("other", 1, 0.01)
    simulation = Simulation(one, other)
    simulation.run(10.0)
    assert one.had_s == pytest.approx(5.0, abs=0.1)
    simulation.share.tenants["one"].weight = 3.0
    before_s = simulation.now
    simulation.run(before_s + 20.0)
    assert one.had_s == pytest.approx(5.0 + 15.0, abs=0.2)


def nobody() -> None:
    """What a version that is never called has for `turn`."""


def test_one_alone_runs_as_much_at_once_as_it_likes():
    """A batch that is assembled ahead, too; and the device is empty again in the end, whatever was rounded."""
    share = Share()
    alone = share.join("alone", 1.0, 1 / 3, nobody)
    holds = []
    for _ in range(5):
        assert share.may_begin(alone)
        holds.append(share.begin(alone, 0.0))
    for hold in holds:
        share.end(hold, 0.1)
    assert repr(share) == "<Share 0.00 used, 0 running, 0 waiting>"
    assert share.used == alone.tenant.used == 0.0


def test_versions_of_one_model_share_its_part():
    """Two versions beside another model get half of the device together, not two thirds."""
    a1, a2, b = Hot("a", 1, 0.01), Hot("a", 1, 0.01), Hot("b", 1, 0.01)
    simulation = Simulation(a1, a2, b)
    simulation.run(12.0)
    assert a1.had_s + a2.had_s == pytest.approx(6.0, abs=0.1)
    assert b.had_s == pytest.approx(6.0, abs=0.1)


def test_a_free_part_is_given_to_whoever_waits():
    """A batch that takes all of the device does not wait for one that leaves half of it."""
    share = Share()
    half, whole, third = (share.join(name, 1.0, part, nobody) for name, part in (("h", 0.5), ("w", 1.0), ("t", 1.0)))
    assert share.may_begin(half)
    share.begin(half, 0.0)
    assert share.may_begin(whole)
    hold = share.begin(whole, 0.0)
    assert not share.may_begin(third)
    assert share.next_turn() is None
    share.end(hold, 0.1)
    assert share.next_turn() is third


def test_a_run_that_hangs_holds_up_nobody_for_ever_and_is_not_charged_for_ever():
    """After a second, or three times what is usual, others begin; when it ends it owes that much at most."""
    share = Share()
    hangs, other = share.join("hangs", 1.0, 1.0, nobody), share.join("other", 1.0, 1.0, nobody)
    hold = share.begin(hangs, 100.0)
    assert not share.may_begin(other)
    assert share.next_overdue() == 101.0
    share.give_up(100.9)
    assert share.next_turn() is None
    share.give_up(101.0)
    assert share.next_turn() is other
    assert share.may_begin(other)
    share.end(hold, 3600.0)
    assert hangs.tenant.virtual_s == 1.0
    assert share.used == 0.0
    slow = share.begin(hangs, 200.0)
    assert slow.limit_s == 3 * 3600.0


def test_one_that_leaves_takes_with_it_what_it_holds_and_waits_for():
    """Neither its runs nor its wait hold up the others, and a run that ends later changes nothing."""
    share = Share()
    goes, waits, stays = (share.join(name, 1.0, 1.0, nobody) for name in ("goes", "waits", "stays"))
    hold = share.begin(goes, 0.0)
    assert not share.may_begin(waits)
    assert not share.may_begin(stays)
    share.leave(waits)
    share.leave(goes)
    assert share.next_turn() is stays
    share.end(hold, 1.0)
    assert list(share.tenants) == ["stays"]
    assert repr(share) == "<Share 0.00 used, 0 running, 0 waiting>"
    assert share.next_overdue() is None


def test_batches_that_wait_for_nobody_are_charged_but_not_for_ever():
    """A model of tiny batches, once it has a large one, waits its turn, but not for all that it had while alone."""
    share = Share()
    tiny, other = share.join("tiny", 1.0, 1.0, nobody), share.join("other", 1.0, 1.0, nobody)
    share.charge(tiny, 0.01)
    assert tiny.tenant.virtual_s == 0.01
    for _ in range(1000):
        share.charge(tiny, 0.01)
    assert tiny.tenant.virtual_s == pytest.approx(0.1)
    share.begin(other, 0.0)
    assert not share.may_begin(tiny)


def test_a_second_version_of_a_model_takes_its_weight():
    """And the model is there until the last of its versions has left."""
    share = Share()
    first, second = share.join("m", 2.0, 1.0, nobody), share.join("m", 3.0, 1.0, nobody)
    assert first.tenant is second.tenant
    assert first.tenant.weight == 3.0
    share.leave(first)
    assert list(share.tenants) == ["m"]
    share.leave(second)
    assert not share.tenants
