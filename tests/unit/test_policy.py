"""Which versions should be there, and the one next step towards that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.registry.lifecycle import State
from service.registry.policy import Latest, Load, Unload, next_action, wanted

STATES = st.dictionaries(st.integers(1, 6), st.sampled_from(State), max_size=5)
SETTLED = (State.READY, State.FAILED, State.UNLOADED)


@pytest.mark.parametrize(
    ("versions", "count", "chosen"),
    [([], 1, set()), ([2, 10, 9], 1, {10}), ([2, 10, 9], 2, {9, 10}), ([2], 3, {2})],
)
def test_the_highest_versions_are_wanted(versions: list[int], count: int, chosen: set[int]):
    """`Latest` wants the `count` highest numbers, by value, or all where there are fewer."""
    assert wanted(versions, Latest(count)) == chosen


@pytest.mark.parametrize(
    ("want", "states", "action"),
    [
        ({2}, {}, Load(2)),
        ({2}, {2: State.NEW, 1: State.READY}, Load(2)),
        ({2, 3}, {2: State.NEW, 3: State.NEW}, Load(3)),
        ({2}, {2: State.LOADING, 1: State.READY}, None),
        ({2}, {2: State.WARMING, 1: State.READY}, None),
        ({2}, {2: State.READY, 1: State.READY, 0: State.READY}, Unload(0)),
        ({2}, {2: State.READY, 1: State.DRAINING, 0: State.READY}, None),
        ({2}, {2: State.FAILED, 1: State.READY}, None),
        ({2}, {2: State.READY, 1: State.UNLOADED}, None),
        (set(), {1: State.READY}, Unload(1)),
    ],
)
def test_one_step_at_a_time_and_availability_first(
    want: set[int], states: dict[int, State], action: Load | Unload | None
):
    """Missing versions are loaded, the highest first; surplus ones go only when all that is wanted is READY."""
    assert next_action(want, states) == action


@given(want=st.sets(st.integers(1, 6), max_size=3), states=STATES)
def test_a_version_is_never_let_go_before_its_successor_is_ready(want: set[int], states: dict[int, State]):
    """Whatever the states, nothing wanted is unloaded, and nothing at all while something wanted is not READY."""
    action = next_action(want, states)
    if isinstance(action, Unload):
        assert action.version not in want
        assert all(states[version] is State.READY for version in want)
    elif isinstance(action, Load):
        assert action.version in want
        assert states.get(action.version, State.NEW) is State.NEW


@given(want=st.sets(st.integers(1, 6), max_size=3), fails=st.sets(st.integers(1, 6)), ready=st.sets(st.integers(1, 6)))
def test_step_by_step_everything_settles(want: set[int], fails: set[int], ready: set[int]):
    """Taking the steps one by one comes to an end with all that can be loaded READY."""
    states: dict[int, State] = dict.fromkeys(ready, State.READY)
    for _ in range(20):
        action = next_action(want, states)
        if action is None:
            break
        if isinstance(action, Load):
            states[action.version] = State.FAILED if action.version in fails else State.READY
        else:
            states[action.version] = State.UNLOADED
    else:
        pytest.fail("no end in sight")
    assert all(states[version] in SETTLED for version in want)
    if all(states[version] is State.READY for version in want):
        assert {version for version, state in states.items() if state is State.READY} == want
    else:
        assert ready <= {version for version, state in states.items() if state is State.READY}
