"""The budget of memory: what fits, who goes, and the numbers of a refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.registry.memory import Evict, Fits, MemoryBudget, Refuse, Resident, size_text

MIB = 2**20


def budget(limit: int = 100, **held: int) -> MemoryBudget:
    """A budget of `limit` MiB on the CPU; each of `held` is a model, whose version 1 holds so many MiB of it."""
    made = MemoryBudget({"CPU": limit * MIB})
    for model, size in held.items():
        made.reserve(model, 1, {"CPU": size * MIB})
    return made


def resident(model: str, last_used: float, *, idle: bool = True, on_demand: bool = True) -> Resident:
    return Resident(model, 1, last_used, idle, on_demand)


def decide(budget: MemoryBudget, need: int, *residents: Resident) -> Fits | Evict | Refuse:
    """For a version that needs so many MiB of the CPU's memory."""
    return budget.decide("new", 1, {"CPU": need * MIB}, residents)


@pytest.mark.parametrize(("need", "fits"), [(0, True), (60, True), (61, False)])
def test_what_is_free_may_be_taken_to_the_last_byte(need: int, fits: bool):
    """A version fits if its need is no more than what the others leave of the budget."""
    assert (decide(budget(a=40), need) == Fits()) is fits


def test_a_reservation_is_replaced_and_released():
    """What a version holds is what was said last; after its release it holds nothing."""
    memory = budget(a=40, b=10)
    memory.reserve("a", 1, {"CPU": 70 * MIB})
    assert memory.used_bytes("CPU") == 80 * MIB
    assert memory.held_bytes("a", 1) == {"CPU": 70 * MIB}
    assert repr(memory) == f"<MemoryBudget CPU {80 * MIB}/{100 * MIB}>"
    for _ in range(2):
        memory.release("a", 1)
    assert (memory.used_bytes("CPU"), memory.held_bytes("a", 1)) == (10 * MIB, {})


def test_what_a_version_held_before_is_no_obstacle_to_itself():
    """A version that is loaded again needs no room beside its former self, and does not evict itself."""
    memory = budget(new=80)
    assert decide(memory, 90, resident("new", 1)) == Fits()
    assert isinstance(decide(memory, 101, resident("new", 1)), Refuse)


def test_versions_are_told_apart():
    """Two versions of a model count each for itself."""
    memory = budget(a=40)
    memory.reserve("a", 2, {"CPU": 50 * MIB})
    assert isinstance(memory.decide("a", 3, {"CPU": 11 * MIB}, ()), Refuse)
    assert memory.decide("a", 3, {"CPU": 41 * MIB}, [Resident("a", 2, 0, True, True)]) == Evict((("a", 2),))


def test_the_least_recently_used_goes_first():
    """Of those that may go, they go in the order of their last use, and no more than are needed."""
    memory = budget(a=30, b=30, c=30)
    residents = [resident("a", 3), resident("b", 1), resident("c", 2)]
    assert decide(memory, 40, *residents) == Evict((("b", 1),))
    assert decide(memory, 70, *residents) == Evict((("b", 1), ("c", 1)))
    assert decide(memory, 100, *residents) == Evict((("b", 1), ("c", 1), ("a", 1)))


def test_a_small_one_does_not_go_in_vain():
    """Where a larger one has to go anyway, those that its going makes needless stay."""
    residents = [resident("small", 1), resident("large", 2)]
    assert decide(budget(small=10, large=80), 60, *residents) == Evict((("large", 1),))


@pytest.mark.parametrize(
    ("idle", "on_demand", "state"), [(False, True, "in use"), (True, False, "not on demand")], ids=["busy", "fixed"]
)
def test_only_the_idle_and_on_demand_go(idle: bool, on_demand: bool, state: str):
    """A version that is in use or is not marked on_demand stays, and the refusal says so."""
    decision = decide(budget(a=80), 30, resident("a", 1, idle=idle, on_demand=on_demand))
    assert decision == Refuse(
        "it needs 30.0 MiB of CPU memory, but 20.0 MiB of the budget of 100.0 MiB are free; "
        f"held by a v1 (80.0 MiB, {state})"
    )


def test_a_refusal_has_everyone_who_holds_memory_the_largest_first():
    """The text tells of each holder how much it is, also of one that is only being loaded."""
    decision = decide(budget(a=10, b=50, c=0), 99, resident("a", 1))
    assert isinstance(decision, Refuse)
    assert decision.reason.endswith("; held by b v1 (50.0 MiB, not ready), a v1 (10.0 MiB, idle)")


def test_what_never_fits_evicts_nobody():
    """A version larger than the whole budget is refused at once, and leaves the others in peace."""
    assert decide(budget(), 200) == Refuse(
        "it needs 200.0 MiB of CPU memory, but 100.0 MiB of the budget of 100.0 MiB are free"
    )
    assert isinstance(decide(budget(a=10), 200, resident("a", 1)), Refuse)


def test_a_budget_that_is_overdrawn_has_nothing_free():
    """What was measured may be more than was granted; the refusal then says that nothing is free."""
    decision = decide(budget(a=150), 1)
    assert isinstance(decision, Refuse)
    assert "but 0 bytes of the budget" in decision.reason


def test_each_memory_has_a_budget_of_its_own():
    """A version on several devices needs room on all of them; who is on none of the short ones stays."""
    memory = MemoryBudget({"CPU": 100, "GPU:0": 100, "GPU:1": 100})
    memory.reserve("cpu", 1, {"CPU": 90})
    memory.reserve("first", 1, {"CPU": 1, "GPU:0": 90})
    memory.reserve("second", 1, {"GPU:1": 90})
    residents = [resident("cpu", 1), resident("first", 2), resident("second", 3)]
    needs = {"CPU": 5, "GPU:0": 50, "GPU:1": 50}
    assert memory.decide("new", 1, needs, residents) == Evict((("first", 1), ("second", 1)))
    refused = memory.decide("new", 1, needs, residents[:2])
    assert isinstance(refused, Refuse)
    assert refused.reason.startswith("it needs 50 bytes of GPU:0 memory")


def test_a_memory_without_a_limit_is_not_watched():
    """Where no budget is known, as for a TPU, everything fits."""
    assert budget().decide("new", 1, {"TPU:0": 10**15}, ()) == Fits()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 * MIB, "5.0 MiB"), (3 * 2**30, "3.0 GiB")],
)
def test_sizes_are_told_in_units(size: int, text: str):
    """A size is written for people."""
    assert size_text(size) == text


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), st.booleans(), st.booleans()), max_size=8),
    st.integers(0, 200),
)
def test_an_eviction_is_enough_and_none_of_it_needless(loaded: list[tuple[int, int, bool, bool]], need: int):
    """Whatever is loaded: after an eviction it fits, with any one of the evicted back it does not."""
    memory = MemoryBudget({"CPU": 100})
    residents = [Resident("m", n, used, idle, wanted) for n, (_, used, idle, wanted) in enumerate(loaded)]
    for number, (size, *_) in enumerate(loaded):
        memory.reserve("m", number, {"CPU": size})
    decision = memory.decide("new", 1, {"CPU": need}, residents)
    may_go = {("m", r.version) for r in residents if r.is_idle and r.on_demand}
    staying = sum(size for n, (size, *_) in enumerate(loaded) if ("m", n) not in may_go)
    free = 100 - sum(size for size, *_ in loaded)
    if isinstance(decision, Fits):
        assert need <= free
    elif isinstance(decision, Refuse):
        assert staying + need > 100
    else:
        assert set(decision.versions) <= may_go
        freed = [loaded[number][0] for _, number in decision.versions]
        assert need <= free + sum(freed)
        assert all(need > free + sum(freed) - size for size in freed)
