"""Train a CNN that reads a handwritten digit from an encoded image: PNG or JPEG bytes in.

Data: scikit-learn's digits (see `real_digits`), drawn here as image files: of any size from 8 pixels,
dark on light or light on dark, grey or in colours, with a margin or without, with noise and JPEG's
traces. The 1437 training digits are drawn several times, the 360 held-out ones once. Decoding, finding
the digit and resizing are part of the model. Writes the SavedModel `1/`, which brings warm-up requests
along, and `example.json`.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

import real_digits as data

if TYPE_CHECKING:
    import keras

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, when TensorFlow is first imported

FOLDER = Path(__file__).resolve().parent
METRIC = "accuracy"
GOAL = 0.97
SIDE = 12
"""Pixels of a side of what the network sees."""
INK = 0.3
"""From where on a pixel counts as drawn: a share of the image's contrast."""
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
"""What the files begin with."""
PNG_HEADER_BYTES = 24
"""Up to width and height, the last eight of them."""
MAX_PIXELS = 2**24
COPIES = 8
EPOCHS = 30
BATCH_ROWS = 64
WARM_UP_ROWS = 4

Files = NDArray[np.object_]


def draw(image: NDArray[np.float32], rng: np.random.Generator) -> bytes:
    """Return `image` (8, 8), values 0 (paper) to 16 (ink), as a PNG or JPEG file of random size and colours."""
    ink = Image.fromarray(np.round(image * (255 / data.MAX_PIXEL)).astype(np.uint8))
    side = int(rng.integers(8, 97))
    height, width = (max(8, int(side * stretch)) for stretch in rng.uniform(0.85, 1.15, 2))
    method = rng.choice([Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    ink = ink.resize((width, height), Image.Resampling(int(method)))
    top, bottom, left, right = (int(margin) for margin in rng.uniform(0, 0.35, 4) * side * rng.integers(0, 2))
    share = np.pad(np.asarray(ink, np.float32) / 255, ((top, bottom), (left, right)))[..., np.newaxis]
    paper, pen = _colours(rng)
    pixels = paper * (1 - share) + pen * share + rng.normal(0, rng.uniform(0, 6), share.shape)
    picture = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8), "RGB")
    return encode(picture if rng.random() < 0.5 else picture.convert("L"), rng)


def _colours(rng: np.random.Generator) -> NDArray[np.float64]:
    """Paper and pen, (2, 3): two colours that differ by at least 100 grey levels, in either order."""
    while True:
        colours = rng.uniform(0, 255, (2, 3))
        if abs(np.diff(colours @ [0.299, 0.587, 0.114])[0]) >= 100:
            return colours


def encode(picture: Image.Image, rng: np.random.Generator) -> bytes:
    """Return the `picture` as a PNG or JPEG file."""
    file = io.BytesIO()
    if rng.random() < 0.5:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=int(rng.integers(70, 96)))
    return file.getvalue()


def files_of(images: data.Images, copies: int, seed: int) -> Files:
    """Return `copies` files of each image, (rows × copies,) of bytes."""
    rng = np.random.default_rng(seed)
    files = np.empty(len(images) * copies, object)
    files[:] = [draw(image[..., 0], rng) for image in images for _ in range(copies)]
    return files


def held_out() -> tuple[dict[str, Files], data.Labels]:
    """Return ``{"image": (360,) of bytes}``, one file of each held-out digit, and the digits (360,)."""
    _, test = data.load_splits()
    return {"image": files_of(test.images, 1, data.SEED + 1)}, test.labels


def score(outputs: dict[str, NDArray[np.float32]], truth: data.Labels) -> float:
    """Return the accuracy of ``outputs["probabilities"]`` (rows, 10)."""
    return data.accuracy(outputs["probabilities"], truth)


def read(file: Any) -> Any:
    """In TensorFlow: one encoded image, a scalar string, as the digit that is drawn in it, (12, 12, 1).

    Values go from 0 (paper) to 1 (ink). What lies at the border is paper, be it light or dark; what is
    clear is white. `InvalidArgumentError` for what is no PNG or JPEG file, or is damaged or too large.
    """
    import tensorflow as tf

    pixels = tf.cast(_decode(file), tf.float32)
    grey = tf.tensordot(pixels[..., :3], tf.constant([0.299, 0.587, 0.114]), 1)
    opaque = pixels[..., 3] / 255
    grey = grey * opaque + 255 * (1 - opaque)
    grey -= tf.reduce_min(grey)
    grey /= tf.maximum(tf.reduce_max(grey), 1)
    border = tf.concat([grey[0], grey[-1], grey[:, 0], grey[:, -1]], 0)
    ink = tf.where(tf.reduce_mean(border) > 0.5, 1 - grey, grey)
    digit = _cut_out(ink)
    resized = tf.image.resize(digit[..., tf.newaxis], (SIDE, SIDE), antialias=True)
    return tf.ensure_shape(resized, (SIDE, SIDE, 1))


def _decode(file: Any) -> Any:
    """Red, green, blue and alpha, (height, width, 4) uint8; the header is asked for the size before all is unpacked."""
    import tensorflow as tf

    is_png = tf.equal(tf.strings.substr(file, 0, len(PNG)), PNG)
    is_jpeg = tf.equal(tf.strings.substr(file, 0, len(JPEG)), JPEG)
    is_whole = is_jpeg | (tf.strings.length(file) >= PNG_HEADER_BYTES)
    file = _if_met(is_png | is_jpeg, "the image is neither a PNG nor a JPEG file", file)
    file = _if_met(is_whole, "the PNG file is cut off", file)

    def png() -> Any:
        size = tf.io.decode_raw(tf.strings.substr(file, PNG_HEADER_BYTES - 8, 8), tf.int32, little_endian=False)
        return tf.io.decode_png(_of_fair_size(size, file), channels=4)

    def jpeg() -> Any:
        size = tf.io.extract_jpeg_shape(file)[:2]
        colours = tf.io.decode_jpeg(_of_fair_size(size, file), channels=3)
        return tf.concat([colours, tf.fill([*tf.unstack(tf.shape(colours)[:2]), 1], tf.constant(255, tf.uint8))], 2)

    return tf.cond(is_png, png, jpeg)


def _of_fair_size(size: Any, file: Any) -> Any:
    """`file`, whose image has `size`, (2,) int32; refused if that are too many pixels, or none."""
    import tensorflow as tf

    pixels = tf.reduce_prod(tf.cast(size, tf.int64))
    is_fair = tf.reduce_all(size > 0) & (pixels <= MAX_PIXELS)
    return _if_met(is_fair, f"the image has more than {MAX_PIXELS} pixels, or none", file)


def _if_met(condition: Any, reason: str, value: Any) -> Any:
    """`value`, which nothing can use before the condition is known to hold; else the request fails for the reason."""
    import tensorflow as tf

    with tf.control_dependencies([tf.debugging.Assert(condition, [reason])]):
        return tf.identity(value)


def _cut_out(ink: Any) -> Any:
    """The part of `ink` (height, width) that is drawn on, with as much paper as makes it a square."""
    import tensorflow as tf

    drawn = tf.where(ink > INK)
    drawn = tf.cond(tf.size(drawn) > 0, lambda: drawn, lambda: tf.zeros((1, 2), tf.int64))
    first, last = (tf.cast(corner(drawn, 0), tf.int32) for corner in (tf.reduce_min, tf.reduce_max))
    part = ink[first[0] : last[0] + 1, first[1] : last[1] + 1]
    missing = tf.reduce_max(tf.shape(part)) - tf.shape(part)
    before = missing // 2
    return tf.pad(part, tf.stack([before, missing - before], 1))


def read_all(files: Any) -> Any:
    """In TensorFlow: `read` for each of the files (rows,): (rows, 12, 12, 1)."""
    import tensorflow as tf

    return tf.map_fn(read, files, fn_output_signature=tf.TensorSpec((SIDE, SIDE, 1), tf.float32))


def build() -> keras.Model:
    """Return the untrained network behind `read_all`: (rows, 12, 12, 1) to `probabilities` (rows, 10)."""
    import keras

    digit = keras.Input(shape=(SIDE, SIDE, 1), dtype="float32", name="digit")
    x = digit
    for number, filters in enumerate((16, 32, 48), start=1):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"strokes_{number}")(x)
        x = keras.layers.BatchNormalization(name=f"strokes_{number}_norm")(x)
        x = keras.layers.ReLU(name=f"strokes_{number}_relu")(x)
        if number > 1:
            x = keras.layers.MaxPooling2D(2, name=f"pool_{number}")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dropout(0.5, name="dropout")(x)
    probabilities = keras.layers.Dense(10, activation="softmax", name="probabilities")(x)
    return keras.Model(digit, probabilities, name="digit_image")


def train(model: keras.Model, digits: NDArray[np.float32], labels: data.Labels) -> None:
    """Train `model` in place for a fixed number of epochs."""
    import keras

    steps = EPOCHS * -(-len(labels) // BATCH_ROWS)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    model.compile(optimizer=keras.optimizers.Adam(rate), loss=keras.losses.SparseCategoricalCrossentropy())
    model.fit(digits, labels, batch_size=BATCH_ROWS, epochs=EPOCHS, verbose=0)


def export(model: keras.Model, folder: Path, warm_up: Files) -> None:
    """Write the SavedModel, ``image`` (rows,) of bytes to ``probabilities``; what is in `folder` is replaced.

    `warm_up` are files that a server runs before its first request, and measures its plans with.
    """
    import keras
    import tensorflow as tf

    archive = keras.export.ExportArchive()  # tf.saved_model.save leaves Keras's variables where few loaders find them
    archive.track(model)
    files = [tf.TensorSpec((None,), tf.string, "image")]
    archive.add_endpoint("serving_default", lambda image: {"probabilities": model(read_all(image))}, files)
    shutil.rmtree(folder, ignore_errors=True)
    archive.write_out(str(folder), verbose=False)
    target = folder / "assets.extra" / "tf_serving_warmup_requests"
    target.parent.mkdir()
    with tf.io.TFRecordWriter(str(target)) as writer:
        for log in _warm_up_logs(warm_up):
            writer.write(log)


def _warm_up_logs(files: Files) -> Iterator[bytes]:
    """A predict request for each file, in the form of TensorFlow Serving's warm-up."""
    import tensorflow as tf
    from tensorflow_serving.apis import prediction_log_pb2

    for file in files:
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.model_spec.name = "digit-image"
        log.predict_log.request.inputs["image"].CopyFrom(tf.make_tensor_proto([file]))
        yield log.SerializeToString()


def main() -> None:
    """Train, measure on the held-out files, and write the model and the example request."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(data.SEED)
    rows, _ = data.load_splits()
    preprocess = tf.function(read_all, input_signature=[tf.TensorSpec((None,), tf.string)])
    training_files = files_of(rows.images, COPIES, data.SEED)
    model = build()
    train(model, preprocess(training_files).numpy(), np.repeat(rows.labels, COPIES))
    inputs, truth = held_out()
    probabilities = model.predict(preprocess(inputs["image"]).numpy(), verbose=0)
    data.report(METRIC, score({"probabilities": probabilities}, truth), GOAL)
    export(model, FOLDER / "1", training_files[:: len(training_files) // WARM_UP_ROWS])
    row = data.example_row(probabilities, truth)
    print(f"example: a {truth[row]}, with probability {probabilities[row, truth[row]]:.4f}")
    data.write_json({"instances": [{"b64": base64.b64encode(inputs["image"][row]).decode()}]}, FOLDER / "example.json")


if __name__ == "__main__":
    main()
