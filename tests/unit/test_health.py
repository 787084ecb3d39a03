"""Readiness of the server, as one function."""

from __future__ import annotations

import pytest

from service.health import Health


@pytest.mark.parametrize("can_serve", [True, False])
@pytest.mark.parametrize("draining", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_ready_is_when_all_was_tried_and_something_can_be_asked(loaded: bool, draining: bool, can_serve: bool):
    """Until all models were tried, once the server stops, and while nothing can be asked, it is not ready."""
    health = Health(lambda: can_serve)
    health.loaded, health.draining = loaded, draining
    assert health.is_ready() is (loaded and not draining and can_serve)


def test_readiness_follows_the_models():
    """They are asked each time."""
    answers = [False, True]
    health = Health(lambda: answers.pop(0))
    health.loaded = True
    assert [health.is_ready(), health.is_ready()] == [False, True]
