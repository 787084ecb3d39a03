"""Image files to rows and back: modes, sizes, orders; files that are broken, large or animated."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from service.bounds import Bounds
from service.errors import InvalidArgument
from service.meaning import InputMeaning, OutputMeaning
from service.rest.door_images import Budget, checked_file, data_uri, image_row, picture, png, sheet
from service.tensors import Array, DataType, TensorSpec


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def row(data: bytes, shape: Any, dtype: DataType = DataType.FP32, rows: int = 1, **said: Any) -> Array:
    spec = TensorSpec("x", dtype, shape)
    return image_row(data, spec, InputMeaning.model_validate({"kind": "image", **said}), rows, Budget(Bounds()))


GREY = file_of(Image.fromarray(np.array([[0, 51], [102, 255]], np.uint8)))
COLOUR = file_of(Image.new("RGB", (2, 1), (10, 20, 30)))


def test_each_value_is_a_pixel_times_scale_plus_offset():
    """In the type of the tensor; whole numbers are rounded and clipped."""
    assert row(GREY, (None, 2, 2, 1))[..., 0].tolist() == [[0, 51], [102, 255]]
    assert row(GREY, (None, 2, 2), scale=2, offset=1).tolist() == [[1, 103], [205, 511]]
    assert row(GREY, (None, 2, 2), invert=True).tolist() == [[255, 204], [153, 0]]
    whole = row(GREY, (None, 2, 2), DataType.UINT8, scale=2, offset=-0.6)
    assert whole.dtype == np.uint8
    assert whole.tolist() == [[0, 101], [203, 255]]


def test_the_order_is_that_of_the_tensor():
    """Channels last, first, or all in a line; with or without a fixed row."""
    assert row(COLOUR, (None, 1, 2, 3)).tolist() == [[[10, 20, 30], [10, 20, 30]]]
    assert row(COLOUR, (None, 3, 1, 2)).tolist() == [[[10, 10]], [[20, 20]], [[30, 30]]]
    assert row(COLOUR, (None, 6), size=[1, 2]).tolist() == [10, 20, 30] * 2
    assert row(COLOUR, (1, 1, 2, 3)).shape == (1, 1, 2, 3)
    assert row(COLOUR, (None, None, None, 3)).shape == (1, 2, 3)


def test_mode_and_size_are_those_of_the_model():
    """Whatever those of the file are."""
    assert row(GREY, (None, 4, 6, 3)).shape == (4, 6, 3)
    assert row(COLOUR, (None, 1, 2, 1)).tolist() == [[[18], [18]]]
    assert row(COLOUR, (None, 1, 2, 4))[0, 0].tolist() == [10, 20, 30, 255]


def test_what_is_transparent_is_white():
    """Ink on nothing is dark on light; where the model takes an alpha it gets it."""
    clear = file_of(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))
    assert row(clear, (None, 1, 1, 3)).tolist() == [[[255, 255, 255]]]
    assert row(clear, (None, 1, 1, 4)).tolist() == [[[0, 0, 0, 0]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert row(file_of(palette, transparency=0), (None, 1, 1)).tolist() == [[255]]
    assert row(file_of(palette), (None, 1, 1)).tolist() == [[0]]


def test_sixteen_bits_are_scaled_to_eight():
    """Not clipped."""
    deep = file_of(Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16)))
    assert row(deep, (None, 1, 3)).tolist() == [[0, 128, 255]]


def test_a_photograph_is_upright():
    """As its EXIF orientation says."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image = Image.fromarray(np.array([[0] * 16, [255] * 16] * 1, np.uint8).repeat(8, axis=0))
    turned = row(file_of(image, "JPEG", exif=exif), (None, None, None, 1))
    assert turned.shape == (16, 16, 1)
    assert turned[:, 0].min() > 200
    assert turned[:, -1].max() < 50


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "a PNG or JPEG image expected, got 0 bytes"),
        (b"GIF89a nothing", "a PNG or JPEG image expected, got 14 bytes that begin with b'GIF89a n'"),
        (file_of(Image.new("L", (4, 4)), "GIF"), "a PNG or JPEG image expected"),
        (file_of(Image.effect_noise((64, 64), 9))[:-900], "a whole PNG or JPEG image expected"),
        (file_of(Image.effect_noise((64, 64), 9), "JPEG")[:-900], "a whole PNG or JPEG image expected"),
        (
            file_of(Image.new("L", (4, 4)), save_all=True, append_images=[Image.new("L", (4, 4), 9)]),
            "a still image expected, got an animated one",
        ),
    ],
)
def test_files_that_are_refused(data: bytes, reason: str):
    """With the field's name; also where the model would decode them itself."""
    with pytest.raises(InvalidArgument, match=f"field 'x': {reason}"):
        row(data, (None, 4, 4))
    with pytest.raises(InvalidArgument, match=f"field 'x': {reason}"):
        checked_file(data, "x", Budget(Bounds()))


def test_a_file_that_the_model_decodes_is_passed_on():
    """As it is."""
    assert checked_file(GREY, "x", Budget(Bounds())) is GREY


def test_pixels_of_a_request_are_bounded(monkeypatch: pytest.MonkeyPatch):
    """Before they are decoded, over all its images together."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    budget = Budget(Bounds(), pixels=3)
    with pytest.raises(InvalidArgument, match=r"at most 67108864 pixels in a request expected, got one of 2 × 2"):
        checked_file(GREY, "x", budget)


def test_elements_of_a_request_are_bounded():
    """A tiny file may stand for a large tensor, in each of many rows."""
    with pytest.raises(InvalidArgument, match="max_tensor_elements"):
        row(GREY, (None, 512, 512, 3), rows=2**10)


def test_a_bomb_is_refused_by_its_claim():
    """A PNG of a few bytes that claims more pixels than Pillow or the budget allows."""
    claims = bytearray(file_of(Image.new("L", (1, 1))))
    claims[16:24] = (60000).to_bytes(4, "big") * 2
    with pytest.raises(InvalidArgument, match=r"field 'x': .*(pixels|image)"):
        row(bytes(claims), (None, 4, 4))


@given(
    pixels=npst.arrays(np.uint8, npst.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=6)),
    inverted=st.booleans(),
)
def test_out_and_in_again_is_the_same(pixels: Array, inverted: bool):
    """A picture that was made of a row gives that row."""
    pixels = pixels[..., :1] if pixels.shape[2] == 2 else pixels
    pixels = pixels[..., :4]
    said: dict[str, Any] = {"kind": "image", "scale": 2.0, "offset": 1.0, "invert": inverted}
    shape = (None, *pixels.shape)
    values = row(png(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)), shape, **said)
    back = picture((values - 1) / 2, OutputMeaning.model_validate({"kind": "image", "invert": inverted}), shape[1:])
    assert np.array_equal(np.asarray(back).reshape(pixels.shape), pixels)


def test_pictures_of_every_order():
    """Values are scaled, rounded and clipped; what is no number is black."""
    meaning = OutputMeaning(kind="image", scale=255)
    values = np.array([[-1.0, 0.5], [2.0, np.nan]], np.float32)
    expected = [[0, 128], [255, 0]]
    assert np.asarray(picture(values, meaning, (2, 2))).tolist() == expected
    assert np.asarray(picture(values[..., None], meaning, (2, 2, 1))).tolist() == expected
    assert np.asarray(picture(values[None], meaning, (1, 2, 2))).tolist() == expected
    assert np.asarray(picture(values[None, ..., None], meaning, (1, 2, 2, 1))).tolist() == expected
    flat = meaning.model_copy(update={"size": (2, 2)})
    assert np.asarray(picture(values.reshape(-1), flat, (4,))).tolist() == expected
    colours = np.zeros((3, 1, 2))
    assert np.asarray(picture(colours, meaning, (3, 1, 2))).shape == (1, 2, 3)


def test_a_sheet_is_side_by_side():
    """The first on the left; lower ones on top."""
    whole = np.asarray(sheet([Image.new("L", (1, 2), 10), Image.new("L", (2, 1), 20)]))
    assert whole.tolist() == [[10, 20, 20], [10, 0, 0]]
    one = Image.new("L", (1, 1))
    assert sheet([one]) is one


def test_a_picture_as_text():
    """A data URI."""
    kind, _, text = data_uri(Image.new("L", (1, 1), 7)).partition(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(text))).getpixel((0, 0)) == 7
