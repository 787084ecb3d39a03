"""Image files ↔ rows of tensors, through Pillow.

What a file claims costs nothing until it is decoded: sizes are held against the bounds before that.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from service.bounds import Bounds
from service.errors import InvalidArgument
from service.meaning import CHANNELS, InputMeaning, Layout, OutputMeaning, image_layout
from service.tensors import Array, DataType, TensorSpec

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 2**26
"""Of all images of a request together: a PNG of 64 kB can have as many."""
_DATA_URI = "data:image/png;base64,"


@dataclass
class Budget:
    """What the images of one request may still come to, in pixels as they lie in their files."""

    bounds: Bounds
    pixels: int = MAX_PIXELS

    def spend(self, image: Image.Image, name: str) -> None:
        """Take an image's pixels off; `InvalidArgument` if they are too many."""
        count = image.width * image.height
        if count > self.pixels:
            raise InvalidArgument(
                f"field {name!r}: images of at most {MAX_PIXELS} pixels in a request expected, "
                f"got one of {image.width} × {image.height}"
            )
        self.pixels -= count


def checked_file(data: bytes, name: str, budget: Budget) -> bytes:
    """`data`, which is passed on as it is, once it is known to be an image that can be decoded.

    Raises:
        InvalidArgument: it is not.
    """
    _decoded(data, name, budget)
    return data


def image_row(data: bytes, spec: TensorSpec, meaning: InputMeaning, rows: int, budget: Budget) -> Array:
    """An image file as one row of `spec`; `rows` is how many the request has.

    Upright by its EXIF orientation, transparency over white, then the mode and size of `meaning`;
    each value is ``pixel × scale + offset``.

    Raises:
        InvalidArgument: it is no PNG or JPEG, cut off, animated, or too large.
    """
    layout = image_layout(meaning, spec.row_sizes)
    image = _decoded(data, spec.name, budget)
    height, width = layout.size or (image.height, image.width)
    channels = CHANNELS[layout.mode]
    budget.bounds.check_shape((rows, height, width, channels), spec)
    image = _in_mode(image, layout.mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if meaning.invert:
        image = ImageChops.invert(image)
    pixels = np.asarray(image, np.float32).reshape(height, width, channels)
    return _laid_out(_cast(pixels * np.float32(meaning.scale) + np.float32(meaning.offset), spec), layout, spec)


def _decoded(data: bytes, name: str, budget: Budget) -> Image.Image:
    """The first picture of a file, upright."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the budget is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            budget.spend(image, name)
            if image.format == "PNG" and getattr(image, "is_animated", False):
                raise InvalidArgument(f"field {name!r}: a still image expected, got an animated one")
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InvalidArgument(
            f"field {name!r}: a PNG or JPEG image expected, got {len(data)} bytes that begin with {data[:8]!r}"
        ) from None
    except InvalidArgument:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever comes of a broken file
        raise InvalidArgument(f"field {name!r}: a whole PNG or JPEG image expected: {error}") from None


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """With 8 bits for each of the channels of `mode`; what is transparent shows white where `mode` has no alpha."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if mode != "RGBA" and (image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _cast(values: Array, spec: TensorSpec) -> Array:
    if spec.dtype.is_integer:
        limits = np.iinfo(spec.dtype.numpy)
        values = np.clip(np.rint(values.astype(np.float64)), limits.min, limits.max)
    return values.astype(spec.dtype.numpy)


def _laid_out(values: Array, layout: Layout, spec: TensorSpec) -> Array:
    """``(height, width, channels)`` as a row of the tensor."""
    if layout.order == "CHW":
        values = values.transpose(2, 0, 1)
    elif layout.order == "HW":
        values = values[..., 0]
    elif layout.order == "flat":
        values = values.reshape(-1)
    is_fixed_batch = spec.row_sizes is not None and len(spec.row_sizes) == 4
    return values[np.newaxis] if is_fixed_batch else values


def picture(row: Array, meaning: OutputMeaning, sizes: tuple[int | None, ...] | None) -> Image.Image:
    """One row of an image output: each pixel is ``value × scale + offset``, rounded and clipped to 0…255."""
    layout = image_layout(meaning, sizes)
    channels = CHANNELS[layout.mode]
    values = np.asarray(row, np.float64)
    if layout.order == "flat":
        assert layout.size is not None
        values = values.reshape(*layout.size, channels)
    elif layout.order == "HW":
        values = values[..., np.newaxis]
    elif values.ndim == 4:
        values = values[0]
    if layout.order == "CHW":
        values = values.transpose(1, 2, 0)
    pixels = np.nan_to_num(values * meaning.scale + meaning.offset, nan=0.0, posinf=255.0, neginf=0.0)
    pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
    if meaning.invert:
        pixels = 255 - pixels
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """All pictures side by side, the first on the left."""
    if len(pictures) == 1:
        return pictures[0]
    height = max(each.height for each in pictures)
    whole = Image.new(pictures[0].mode, (sum(each.width for each in pictures), height))
    left = 0
    for each in pictures:
        whole.paste(each, (left, 0))
        left += each.width
    return whole


def png(image: Image.Image) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def data_uri(image: Image.Image) -> str:
    """A picture as text that a browser shows."""
    return _DATA_URI + base64.b64encode(png(image)).decode()


def is_file_tensor(spec: TensorSpec) -> bool:
    """Whether image files are passed on as they are, for the model decodes them."""
    return spec.dtype is DataType.BYTES
