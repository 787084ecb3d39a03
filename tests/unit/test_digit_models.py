"""The example models' own data and metrics: what can be told of them without TensorFlow."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MODELS = Path(__file__).parents[2] / "models"
NAMES = ("digits", "digit-gan", "digit-image", "embedder", "motion", "shapes")


def training(name: str) -> Any:
    """``train.py`` of a model, as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name.replace('-', '_')}", MODELS / name / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_held_out_rows_are_always_the_same(name: str):
    """Two calls give the same rows, as many of each input as of the truth."""
    train = training(name)
    (inputs, truth), (again, truth_again) = train.held_out(), train.held_out()
    np.testing.assert_array_equal(truth, truth_again)
    for key, rows in inputs.items():
        assert len(rows) == len(truth) >= 50
        np.testing.assert_array_equal(rows, again[key])


def test_held_out_digits_are_in_no_training_row():
    """No image is in both parts."""
    data = training("digits").data
    known, test = ({image.tobytes() for image in part.images} for part in data.load_splits())
    assert len(known) > 1400
    assert known.isdisjoint(test)


def test_the_judge_of_drawn_digits_reads_real_ones():
    """In NumPy it is as good as the model that it stands for."""
    digits, judge = training("digits"), training("digit-gan").Judge()
    inputs, truth = digits.held_out()
    assert digits.score({"output_0": judge.logits(inputs["image"])}, truth) >= digits.GOAL


def test_clips_move_as_their_label_says():
    """The ink's middle moves by more than 1.5 pixels in the named direction, and not across it."""
    motion = training("motion")
    image = np.full((len(motion.DIRECTIONS), 8, 8, 1), 16, np.float32)
    clips = motion.render(image, np.arange(len(motion.DIRECTIONS)), np.random.default_rng(1))[..., 0]
    weights = clips / clips.sum(axis=(2, 3), keepdims=True)
    places = np.arange(motion.SIZE)
    down, right = (np.diff((weights.sum(axis=axis) @ places)[:, [0, -1]])[:, 0] for axis in (3, 2))
    for name, moved_down, moved_right in zip(motion.DIRECTIONS, down, right, strict=True):
        for moved, ahead, back in ((moved_down, "down", "up"), (moved_right, "right", "left")):
            sign = (ahead in name.split("-")) - (back in name.split("-"))
            assert moved * sign > 1.5 if sign else abs(moved) < 0.3, (name, moved_down, moved_right)


@pytest.mark.parametrize("seed", range(5))
def test_drawn_files_are_png_or_jpeg_of_both_kinds(seed: int):
    """Each of the files begins as one of the two does."""
    train = training("digit-image")
    images = np.zeros((30, 8, 8, 1), np.float32)
    files = train.files_of(images, 1, seed)
    kinds = [(file.startswith(train.PNG), file.startswith(train.JPEG)) for file in files]
    assert set(kinds) == {(True, False), (False, True)}
