"""The fields of a record: a signature's inputs with what they mean, and what bodies they may come in; pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from service.errors import UnsupportedType
from service.meaning import InputMeaning, input_kind, input_meaning, is_one_value
from service.predictor import choose_signature
from service.rest.door_body_codec import (
    CSV_TYPE,
    IMAGE_TYPES,
    JSON_TYPE,
    MULTIPART,
    OCTETS,
    TEXT_TYPE,
    URLENCODED,
    Columns,
)
from service.tensors import DataType, Signature, TensorSpec


@dataclass(frozen=True)
class FieldSpec:
    """One field of a record: an input with what it means."""

    spec: TensorSpec
    meaning: InputMeaning
    kind: str

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        if self.kind == "image":
            return "an image (a PNG or JPEG file, in JSON as base64 or a data URI)"
        what = {"BYTES": "a text", "BOOL": "true or false"}.get(self.spec.dtype.value, "a number")
        if self.spec.dtype.is_integer:
            what = "a whole number"
        if is_one_value(self.spec.row_sizes):
            return what
        sizes = "any shape" if self.spec.row_sizes is None else f"shape {shown(self.spec.row_sizes)}"
        return f"{what} for each element of {sizes}"


def asked_signature(signatures: Mapping[str, Signature], name: str = "") -> Signature:
    """The signature of that name; for no name that of ``model.yaml``, else as `choose_signature`."""
    meaning = next((signature.meaning for signature in signatures.values()), None)
    return choose_signature(signatures, name or (meaning.signature if meaning else ""))


def fields_of(signature: Signature) -> list[FieldSpec]:
    """The fields that a record of that signature has."""
    fields = []
    for spec in signature.inputs:
        meaning = input_meaning(signature.meaning, spec.name)
        kind = input_kind(meaning, is_text=spec.dtype is DataType.BYTES, sizes=spec.row_sizes)
        fields.append(FieldSpec(spec, meaning, kind))
    return fields


def columns_of(signature: Signature) -> Columns:
    """What the columns of a CSV may be called.

    Those of a line without a header are in the order in which ``model.yaml`` tells the inputs, if it
    tells them all; a signature has none of its own, but that of its only input's elements.
    """
    by_name = {field.name: field for field in fields_of(signature)}
    told = [name for name in signature.meaning.inputs if name in by_name] if signature.meaning else []
    cells = {name: _cells(field) for name, field in by_name.items()}
    known = frozenset(by_name) | {cell for each in cells.values() for cell in each}
    names = told if len(told) == len(by_name) else list(by_name)[: len(by_name) == 1]
    has_order = bool(names) and all(cells[name] for name in names)
    return Columns(known, tuple(cell for name in names for cell in cells[name]) if has_order else ())


def _cells(field: FieldSpec) -> tuple[str, ...]:
    """The columns that a field takes; none where its elements are not counted."""
    sizes = field.spec.row_sizes
    if field.meaning.columns or field.kind == "image" or is_one_value(sizes):
        return field.meaning.columns or (field.name,)
    if sizes is None or None in sizes:
        return ()
    return tuple(f"{field.name}[{index}]" for index in range(math.prod(size for size in sizes if size is not None)))


def body_types(signature: Signature) -> list[str]:
    """The media types of which a body for that signature may be."""
    types = [JSON_TYPE, CSV_TYPE, MULTIPART, URLENCODED]
    fields = fields_of(signature)
    if len(fields) == 1 and fields[0].spec.dtype is DataType.BYTES and is_one_value(fields[0].spec.row_sizes):
        types += [TEXT_TYPE] if fields[0].kind == "text" else []
        types += [*IMAGE_TYPES, OCTETS] if fields[0].kind == "image" or fields[0].meaning.kind is None else []
    elif len(fields) == 1 and fields[0].kind == "image":
        types += [*IMAGE_TYPES, OCTETS]
    return types


def check_type(name: str, signature: Signature) -> None:
    """Raise `UnsupportedType` where no body of that media type can be meant for the signature."""
    types = body_types(signature)
    if name not in types:
        fields = ", ".join(f"{field.name} ({field.kind})" for field in fields_of(signature))
        raise UnsupportedType(
            f"header Content-Type: one of {', '.join(types)} expected for the fields {fields}, got {name}"
        )


def shown(sizes: Iterable[int | None]) -> str:
    """A shape, with -1 for what is open."""
    return "[" + ", ".join("-1" if size is None else str(size) for size in sizes) + "]"
