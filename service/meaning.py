"""What a model's inputs and outputs mean to people: the schema of ``model.yaml``, pure.

It knows tensors by type and shape alone, for they carry it: see `service.tensors.Signature.meaning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr

MEANING_FILE = "model.yaml"
CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
"""Of a pixel, by Pillow's mode."""
Sizes = tuple[int | None, ...]
"""The shape of one row; None for a size that is open."""
Mode = Literal["L", "RGB", "RGBA"]
Side = Annotated[StrictInt, Field(ge=1, le=16384)]


def _text(value: Any) -> Any:
    """A label may be written as a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Image(_Strict):
    """How pixels (0 to 255) and the numbers of a tensor correspond; `size` is (height, width)."""

    mode: Mode | None = None
    size: tuple[Side, Side] | None = None
    scale: FiniteFloat = 1.0
    offset: FiniteFloat = 0.0
    invert: bool = False


class InputMeaning(_Image):
    """One input: what may be given, and in which unit.

    `columns` names the elements of a vector, which are then fields of their own. For an image each
    value is ``pixel × scale + offset``.
    """

    kind: Literal["number", "text", "tensor", "series", "image"] | None = None
    description: str = ""
    unit: str = ""
    values: tuple[StrictBool | StrictInt | FiniteFloat | StrictStr, ...] = ()
    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    columns: tuple[Annotated[StrictStr, BeforeValidator(_text)], ...] = ()


class OutputMeaning(_Image):
    """One output: how it is told.

    `labels` are the names of its classes, the best `top_k` of which are told (None: all). For an
    image each pixel is ``value × scale + offset``, rounded and clipped.
    """

    kind: Literal["labels", "number", "text", "tensor", "series", "image"] | None = None
    description: str = ""
    unit: str = ""
    labels: tuple[Annotated[StrictStr, BeforeValidator(_text)], ...] = ()
    labels_file: str | None = None
    logits: bool = False
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    decimals: Annotated[StrictInt, Field(ge=0, le=17)] | None = None


class ModelMeaning(_Strict):
    """All that ``model.yaml`` says; names are those of the signatures' inputs and outputs."""

    description: str = ""
    signature: str = ""
    inputs: dict[str, InputMeaning] = {}
    outputs: dict[str, OutputMeaning] = {}
    example: dict[str, Any] | None = None


NO_MEANING = ModelMeaning()
_NO_INPUT = InputMeaning()
_NO_OUTPUT = OutputMeaning()


def input_meaning(model: ModelMeaning | None, name: str) -> InputMeaning:
    """What is said of an input; nothing, if nothing is."""
    return (model or NO_MEANING).inputs.get(name, _NO_INPUT)


def output_meaning(model: ModelMeaning | None, name: str) -> OutputMeaning:
    """What is said of an output; nothing, if nothing is."""
    return (model or NO_MEANING).outputs.get(name, _NO_OUTPUT)


def is_one_value(sizes: Sizes | None) -> bool:
    """Whether a row is a single value: ``()`` or ``(1,)``."""
    return sizes in ((), (1,))


def input_kind(meaning: InputMeaning, *, is_text: bool, sizes: Sizes | None) -> str:
    """The kind of an input: as said, else by its tensor."""
    if meaning.kind is not None:
        return meaning.kind
    if not is_one_value(sizes):
        return "tensor"
    return "text" if is_text else "number"


def output_kind(meaning: OutputMeaning, *, is_text: bool, has_labels: bool, sizes: Sizes | None) -> str:
    """The kind of an output: as said, else by its tensor and whether its classes have names."""
    if meaning.kind is not None:
        return meaning.kind
    if has_labels or meaning.logits:
        return "labels"
    if not is_one_value(sizes):
        return "tensor"
    return "text" if is_text else "number"


class Layout(NamedTuple):
    """How an image lies in a row of a tensor: `order` is ``HW``, ``HWC``, ``CHW`` or ``flat``.

    `size` is (height, width), None where any will do.
    """

    mode: str
    size: tuple[int, int] | None
    order: str


def image_layout(meaning: InputMeaning | OutputMeaning, sizes: Sizes | None) -> Layout:
    """The layout of an image in rows of that shape; a leading 1 of a fixed batch does not count.

    Raises:
        ValueError: mode, size and shape do not agree, or do not tell enough.
    """
    if sizes is not None and len(sizes) == 4 and sizes[0] == 1:
        sizes = sizes[1:]
    if sizes is None:
        return Layout(meaning.mode or "RGB", meaning.size, "HWC")
    if len(sizes) == 2:
        return _checked(meaning, Layout(meaning.mode or "L", None, "HW"), sizes)
    if len(sizes) == 3:
        return _of_three(meaning, sizes)
    if len(sizes) == 1 and meaning.size is not None:
        return _of_flat(meaning, meaning.size, sizes[0])
    raise ValueError(f"an image lies in 2 or 3 dimensions, or in 1 if 'size' is given; the shape of a row is {sizes}")


def _of_three(meaning: InputMeaning | OutputMeaning, sizes: Sizes) -> Layout:
    by_count = {count: mode for mode, count in CHANNELS.items()}
    for order, count, rest in (("HWC", sizes[2], sizes[:2]), ("CHW", sizes[0], sizes[1:])):
        mode = meaning.mode or by_count.get(count or 3)
        if mode is not None and count in (None, CHANNELS[mode]):
            return _checked(meaning, Layout(mode, None, order), rest)
    raise ValueError(f"mode {meaning.mode or 'L, RGB or RGBA'} does not fit rows of shape {sizes}")


def _of_flat(meaning: InputMeaning | OutputMeaning, size: tuple[int, int], count: int | None) -> Layout:
    area = size[0] * size[1]
    for mode, channels in CHANNELS.items():
        if meaning.mode in (None, mode) and count in (None, area * channels):
            return Layout(mode, size, "flat")
    raise ValueError(f"an image of size {size} and mode {meaning.mode or 'L, RGB or RGBA'} has not {count} elements")


def _checked(meaning: InputMeaning | OutputMeaning, layout: Layout, sides: Sequence[int | None]) -> Layout:
    """`layout` with its size, where what is said fits the tensor's sides."""
    height, width = sides
    if layout.order == "HW" and layout.mode != "L":
        raise ValueError(f"mode {layout.mode} has channels, and the shape of a row has none")
    if meaning.size is not None:
        if not all(side in (None, said) for side, said in zip(sides, meaning.size, strict=True)):
            raise ValueError(f"size {list(meaning.size)} expected to be that of the tensor, {list(sides)}")
        return layout._replace(size=meaning.size)
    if height is None or width is None:
        if height is not None or width is not None:
            raise ValueError(f"'size' is needed where one of height and width is open: {list(sides)}")
        return layout
    return layout._replace(size=(height, width))
