"""Fixtures that several folders of tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """What a test has the log tell is over with it: others look for what the log tells unasked."""
    before = {name: logging.getLogger(name).level for name in ("", "kiln", "kiln.access")}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
