"""The digits that several example models are trained on: scikit-learn's, always split the same way.

They are 1797 images of 8×8 pixels from UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin
and C. Kaynak, 1998, CC BY 4.0). Needs neither TensorFlow nor Keras.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SEED = 7
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.15
MAX_PIXEL = 16
MIN_EXAMPLE_PROBABILITY = 0.99

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


class Split(NamedTuple):
    """One part of the data: `images` (rows, 8, 8, 1), raw values 0 (paper) to 16 (ink), and `labels` (rows,)."""

    images: Images
    labels: Labels


def load_splits() -> tuple[Split, Split]:
    """Return the 1437 training rows and the 360 held-out ones, every class in the same proportion in both."""
    digits = load_digits()
    images = digits.images.astype(np.float32)[..., np.newaxis]
    return _split(Split(images, digits.target.astype(np.int64)), TEST_SHARE)


def validation_splits() -> tuple[Split, Split]:
    """Return the training rows without, and those with, which settings are chosen by (15 % of them)."""
    return _split(load_splits()[0], VALIDATION_SHARE)


def _split(data: Split, share: float) -> tuple[Split, Split]:
    first_images, second_images, first_labels, second_labels = train_test_split(
        data.images, data.labels, test_size=share, stratify=data.labels, random_state=SEED
    )
    return Split(first_images, first_labels), Split(second_images, second_labels)


def accuracy(scores: NDArray[np.floating], labels: Labels) -> float:
    """Return the share of rows whose largest score, probability or logit, is the label's.

    Args:
        scores: (rows, classes).
        labels: (rows,).
    """
    return float(np.mean(scores.argmax(axis=1) == labels))


def example_row(probabilities: NDArray[np.floating], labels: Labels) -> int:
    """Return the first row that is classified rightly with at least `MIN_EXAMPLE_PROBABILITY`.

    Args:
        probabilities: (rows, classes).
        labels: (rows,).

    Raises:
        ValueError: no row is classified that clearly.
    """
    of_label = probabilities[np.arange(len(labels)), labels]
    clear = np.flatnonzero(of_label >= MIN_EXAMPLE_PROBABILITY)
    if clear.size == 0:
        raise ValueError(f"no held-out row reaches a probability of {MIN_EXAMPLE_PROBABILITY}")
    return int(clear[0])


def write_json(body: object, path: Path) -> None:
    """Write an example request to `path`, on one line."""
    path.write_text(json.dumps(body) + "\n", encoding="utf-8")


def report(metric: str, value: float, goal: float) -> None:
    """Print what a model has reached.

    Raises:
        SystemExit: it is below `goal`; the files on disk stay as they were.
    """
    print(f"{metric} {value:.4f} (goal {goal})")
    if value < goal:
        raise SystemExit(f"not saved: the {metric} is below {goal}")
