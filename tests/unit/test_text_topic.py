"""How the example `text-topic` cuts explanations into texts."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.e2e.process import MODELS


@pytest.fixture(scope="module")
def trainer():
    spec = importlib.util.spec_from_file_location("text_topic_train", MODELS / "text-topic" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its NamedTuple looks for its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_a_line_below_another_is_joined_to_it(trainer: ModuleType):
    """Marks are dropped, introductions too; a lead that has lines below it is a text itself, without its colon."""
    text = "This class includes:\r\n- growing of cereals:\r\n  . wheat\r\n  . rye\r\n- growing of peas\r\n  . dry peas"
    assert list(trainer.read_lines(text)) == [
        "growing of cereals",
        "growing of cereals: wheat",
        "growing of cereals: rye",
        "growing of peas",
        "growing of peas: dry peas",
    ]


def test_an_explanation_without_marks_has_no_lines(trainer: ModuleType):
    assert list(trainer.read_lines("All forms of growing.\n\n.")) == []


def test_texts_are_the_same_whatever_their_case_and_marks(trainer: ModuleType):
    assert trainer.words_of(" Growing of rice; (other)_than\twild ") == "growing of rice other than wild"
    assert trainer.words_of("- . -") == ""
