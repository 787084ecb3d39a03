"""Train a CNN on video: in which of eight directions does a handwritten digit move?

Data: clips rendered here from scikit-learn's real digits (see `real_digits`): 8 frames of 16×16 pixels in
which one digit moves evenly, at 0.4 to 1 pixel a frame, over noise. The held-out clips show the 360
held-out digits, two clips of each, which no training clip shows. Writes `1/model.keras` and
`example.json` beside this script.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1]))

import real_digits as data

if TYPE_CHECKING:
    import keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

FOLDER = Path(__file__).resolve().parent
METRIC = "accuracy"
GOAL = 0.95
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
FRAMES, SIZE, DIGIT = 8, 16, 8
MIN_SPEED, MAX_SPEED = 0.4, 1.0
NOISE = 0.5
TRAIN_CLIPS, TEST_CLIPS = 4, 2
"""Clips of each digit."""
EPOCHS = 20
BATCH_ROWS = 64

Clips = NDArray[np.float32]


def render(images: data.Images, directions: data.Labels, rng: np.random.Generator) -> Clips:
    """Return clips (rows, 8, 16, 16, 1), values 0 (paper) to 16 (ink), rounded to a quarter.

    Args:
        images: (rows, 8, 8, 1), the digits that move.
        directions: (rows,), indices into `DIRECTIONS`.
        rng: where the digits start, how fast they are, and the noise.
    """
    angles = directions * (2 * np.pi / len(DIRECTIONS))
    heading = np.stack([np.sin(angles), np.cos(angles)], axis=1)  # down and right
    path = heading * rng.uniform(MIN_SPEED, MAX_SPEED, (len(images), 1)) * (FRAMES - 1)
    room = SIZE - DIGIT - np.abs(path)
    start = np.maximum(-path, 0) + rng.random(path.shape) * room
    clips = np.zeros((len(images), FRAMES, SIZE, SIZE, 1), np.float32)
    for row, image in enumerate(images):
        for frame in range(FRAMES):
            y, x = start[row] + path[row] * (frame / (FRAMES - 1))
            clips[row, frame, ..., 0] = _place(image[..., 0], y, x)
    clips += rng.normal(0, NOISE, clips.shape).astype(np.float32)
    return np.clip(np.round(clips * 4) / 4, 0, data.MAX_PIXEL)


def _place(image: NDArray[np.float32], y: float, x: float) -> NDArray[np.float32]:
    """`image` (8, 8) on a frame (16, 16) with its corner at (`y`, `x`): between pixels it is spread over both."""
    frame = np.zeros((SIZE + 1, SIZE + 1), np.float32)
    top, left = int(y), int(x)
    for down, y_share in ((0, 1 - (y - top)), (1, y - top)):
        for right, x_share in ((0, 1 - (x - left)), (1, x - left)):
            frame[top + down : top + down + DIGIT, left + right : left + right + DIGIT] += y_share * x_share * image
    return frame[:SIZE, :SIZE]


def clips_of(images: data.Images, copies: int, seed: int) -> tuple[Clips, data.Labels]:
    """Return `copies` clips of each of the `images` in random directions, and the directions' indices."""
    rng = np.random.default_rng(seed)
    images = np.repeat(images, copies, axis=0)
    directions = rng.integers(0, len(DIRECTIONS), len(images))
    return render(images, directions, rng), directions


def held_out() -> tuple[dict[str, Clips], data.Labels]:
    """Return ``{"clip": (720, 8, 16, 16, 1)}`` and the indices of the directions (720,)."""
    _, test = data.load_splits()
    clips, directions = clips_of(test.images, TEST_CLIPS, seed=data.SEED + 1)
    return {"clip": clips}, directions


def score(outputs: dict[str, NDArray[np.float32]], truth: data.Labels) -> float:
    """Return the accuracy of ``outputs["direction"]`` (rows, 8)."""
    return data.accuracy(outputs["direction"], truth)


def build() -> keras.Model:
    """Return the untrained network: `clip` (rows, 8, 16, 16, 1) float32 to `direction` (rows, 8) float32.

    The first convolution sees all frames at once, as its channels (early fusion: Karpathy et al., 2014).
    """
    import keras

    clip = keras.Input(shape=(FRAMES, SIZE, SIZE, 1), dtype="float32", name="clip")
    x = keras.layers.Rescaling(1 / data.MAX_PIXEL, name="scale")(clip)
    x = keras.layers.Permute((2, 3, 4, 1), name="time_last")(x)
    x = keras.layers.Reshape((SIZE, SIZE, FRAMES), name="time_as_channels")(x)
    for number, (filters, stride) in enumerate(((32, 2), (32, 1), (48, 2)), start=1):
        x = keras.layers.Conv2D(filters, 3, stride, padding="same", use_bias=False, name=f"moves_{number}")(x)
        x = keras.layers.BatchNormalization(name=f"moves_{number}_norm")(x)
        x = keras.layers.ReLU(name=f"moves_{number}_relu")(x)
    x = keras.layers.GlobalAveragePooling2D(name="everywhere")(x)
    direction = keras.layers.Dense(len(DIRECTIONS), activation="softmax", name="direction")(x)
    return keras.Model(clip, direction, name="motion")


def train(model: keras.Model, clips: Clips, directions: data.Labels) -> None:
    """Train `model` in place for a fixed number of epochs."""
    import keras

    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=keras.losses.SparseCategoricalCrossentropy())
    model.fit(clips, directions, batch_size=BATCH_ROWS, epochs=EPOCHS, verbose=0)


def main() -> None:
    """Train, measure on the held-out clips, and write the model and the example request."""
    import keras

    keras.utils.set_random_seed(data.SEED)
    model = build()
    train(model, *clips_of(data.load_splits()[0].images, TRAIN_CLIPS, seed=data.SEED))
    inputs, truth = held_out()
    outputs = {"direction": model.predict(inputs["clip"], verbose=0)}
    data.report(METRIC, score(outputs, truth), GOAL)
    (FOLDER / "1").mkdir(exist_ok=True)
    named = keras.Model(model.inputs, {"direction": model.outputs[0]}, name=model.name)  # and without the optimizer
    named.save(FOLDER / "1" / "model.keras")
    row = data.example_row(outputs["direction"], truth)
    print(f"example: {DIRECTIONS[truth[row]]}, with probability {outputs['direction'][row, truth[row]]:.4f}")
    data.write_json({"instances": [inputs["clip"][row].tolist()]}, FOLDER / "example.json")


if __name__ == "__main__":
    main()
