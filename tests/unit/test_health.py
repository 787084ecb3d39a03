"""Readiness of the server, as one function of its models' states."""

from __future__ import annotations

import pytest

from service.health import Health
from service.registry.lifecycle import State, VersionStatus


def health(*states: State) -> Health:
    made = Health(lambda: [VersionStatus("m", n, state) for n, state in enumerate(states)])
    made.loaded = True
    return made


@pytest.mark.parametrize(
    ("states", "is_ready"),
    [
        ([], False),
        ([State.READY], True),
        ([State.READY, State.FAILED], True),
        ([State.READY, State.DRAINING, State.UNLOADED], True),
        ([State.FAILED], False),
        ([State.DRAINING], False),
        ([State.READY, State.NEW], False),
        ([State.READY, State.LOADING], False),
        ([State.READY, State.WARMING], False),
    ],
)
def test_ready_is_when_all_have_settled_and_one_can_be_asked(states: list[State], is_ready: bool):
    """A model that failed does not keep the others from serving; one that still loads does."""
    assert health(*states).is_ready() is is_ready


@pytest.mark.parametrize(("loaded", "draining"), [(False, False), (True, True), (False, True)])
def test_neither_before_loading_nor_while_draining(loaded: bool, draining: bool):
    """Until all models were tried, and once the server stops, it is not ready, whatever the states say."""
    one = health(State.READY)
    one.loaded, one.draining = loaded, draining
    assert not one.is_ready()


def test_readiness_follows_the_states():
    """The states are asked each time."""
    states = [State.LOADING]
    one = Health(lambda: [VersionStatus("m", 1, state) for state in states])
    one.loaded = True
    assert not one.is_ready()
    states[0] = State.READY
    assert one.is_ready()
