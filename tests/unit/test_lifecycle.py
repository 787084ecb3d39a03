"""The states of a model version and the handles that keep it loaded."""

from __future__ import annotations

import itertools

import pytest

from service.errors import Unavailable
from service.registry.lifecycle import Lifecycle, State, VersionStatus

PATH = (State.LOADING, State.WARMING, State.READY, State.DRAINING, State.UNLOADED)
STEPS = {*itertools.pairwise((State.NEW, *PATH)), *((state, State.FAILED) for state in (State.NEW, *PATH[:-1]))}
"""All that may happen."""


def lifecycle(state: State = State.NEW, seen: list[VersionStatus] | None = None) -> Lifecycle:
    """One that has gone the plain way to `state`."""
    made = Lifecycle("digits", 3, (seen if seen is not None else []).append)
    for step in PATH[: PATH.index(state) + 1] if state in PATH else ():
        made.advance(step)
    if state is State.FAILED:
        made.advance(State.FAILED, "because")
    return made


@pytest.mark.parametrize(("start", "end"), list(itertools.product(State, State)))
def test_states_go_one_way(start: State, end: State):
    """Each state leads to the next one or to FAILED, the last two nowhere; any other step is a fault."""
    one = lifecycle(start)
    if (start, end) in STEPS:
        one.advance(end)
        assert one.state is end
    else:
        with pytest.raises(RuntimeError, match=f"v3 {start.value}, 0 handles> cannot become {end.value}"):
            one.advance(end)
        assert one.state is start


def test_every_change_is_told():
    """The observer sees each state once, in order, and the reason of a failure with it."""
    seen: list[VersionStatus] = []
    one = lifecycle(State.READY, seen)
    one.advance(State.FAILED, "the device is gone")
    assert [status.state for status in seen] == [State.LOADING, State.WARMING, State.READY, State.FAILED]
    assert seen[-1] == one.status == VersionStatus("digits", 3, State.FAILED, "the device is gone")
    assert seen[0].reason == ""


def test_a_ready_version_counts_its_handles():
    """Each request holds the version once, until it gives it back."""
    one = lifecycle(State.READY)
    one.acquire()
    one.acquire()
    assert (one.handles, repr(one)) == (2, "<digits v3 READY, 2 handles>")
    one.release()
    assert one.handles == 1


@pytest.mark.parametrize("state", [state for state in State if state is not State.READY])
def test_only_a_ready_version_can_be_held(state: State):
    """Any other state refuses with its name, and the reason where there is one."""
    one = lifecycle(state)
    why = ": because" if state is State.FAILED else ""
    with pytest.raises(Unavailable) as refused:
        one.acquire()
    assert str(refused.value) == f"model 'digits' version 3 is {state.value}, not READY{why}"
    assert one.handles == 0


def test_an_unused_version_is_idle_at_once():
    """Draining a version that nobody holds calls `on_idle` right away."""
    calls: list[int] = []
    one = lifecycle(State.READY)
    one.drain(lambda: calls.append(1))
    assert (one.state, calls) == (State.DRAINING, [1])


def test_a_draining_version_waits_for_its_last_handle_and_takes_no_more():
    """`on_idle` is called once, with the last handle; until then new requests are refused."""
    calls: list[int] = []
    one = lifecycle(State.READY)
    one.acquire()
    one.acquire()
    one.drain(lambda: calls.append(1))
    with pytest.raises(Unavailable):
        one.acquire()
    one.release()
    assert calls == []
    one.release()
    assert calls == [1]
    with pytest.raises(RuntimeError, match="cannot become DRAINING"):
        one.drain(lambda: calls.append(2))
    assert calls == [1]


def test_a_handle_given_back_to_a_ready_version_ends_nothing():
    """A version in use that becomes unused is not idle in the sense of draining."""
    calls: list[int] = []
    one = lifecycle(State.READY)
    one.acquire()
    one.release()
    assert one.state is State.READY
    one.drain(lambda: calls.append(1))
    assert calls == [1]
