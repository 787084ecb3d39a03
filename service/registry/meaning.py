"""What a version's inputs and outputs mean: from ``model.yaml`` beside its files, to its signatures."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import yaml
from pydantic import BaseModel, ValidationError

from service.errors import ModelLoadError
from service.meaning import (
    MEANING_FILE,
    InputMeaning,
    ModelMeaning,
    OutputMeaning,
    image_layout,
    input_kind,
    input_meaning,
    output_kind,
)
from service.registry.repository import version_number
from service.tensors import DataType, Signature, TensorSpec

_MAX_BYTES = 2**18
_MAX_DEPTH = 32
_log = logging.getLogger("kiln.registry")


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are truths (as YAML 1.2 has it): yes and no are values of many a column."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith((":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))


def read_meaning(path: Path) -> ModelMeaning | None:
    """From the folder of the version's file or SavedModel `path`, else from the model's; None if neither has one.

    The lines of a ``labels_file`` are taken into the labels.

    Raises:
        ModelLoadError: the file, or one that it names, is broken; the text names the field.
    """
    folder = path if path.is_dir() else path.parent
    folders = (folder, folder.parent) if version_number(folder.name) is not None else (folder,)
    file = next((each / MEANING_FILE for each in folders if (each / MEANING_FILE).is_file()), None)
    if file is None:
        return None
    try:
        meaning = ModelMeaning.model_validate(_parsed(_read(file, folders[-1])))
    except ValidationError as error:
        raise ModelLoadError(f"{MEANING_FILE}: {_first(error)}") from None
    outputs = {name: _with_labels(name, each, file.parent, folders[-1]) for name, each in meaning.outputs.items()}
    return meaning.model_copy(update={"outputs": outputs})


def _read(file: Path, root: Path) -> str:
    """The text of a file that no link leads out of the model's folder, `root`."""
    try:
        if not file.resolve().is_relative_to(root.resolve()):
            raise ModelLoadError(f"{MEANING_FILE}: {file.name} leads out of the model's folder")
        if file.stat().st_size > _MAX_BYTES:
            raise ModelLoadError(f"{MEANING_FILE}: at most {_MAX_BYTES} bytes expected in {file.name}")
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{MEANING_FILE}: {file.name} cannot be read: {error}") from error


def _parsed(text: str) -> Any:
    """The document as plain JSON values, without objects."""
    try:
        _check_events(yaml.parse(text, _Loader))
        document = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
        return {} if document is None else orjson.loads(orjson.dumps(document))
    except yaml.YAMLError as error:
        raise ModelLoadError(f"{MEANING_FILE}: no YAML: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{MEANING_FILE}: names and plain values expected: {error}") from None


def _check_events(events: Iterable[yaml.Event]) -> None:
    """Raise `ModelLoadError` for what a few bytes make long: aliases, and nesting, which costs by its square."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
            raise ModelLoadError(f"{MEANING_FILE}: no aliases (*name), and at most {_MAX_DEPTH} levels expected")


def _first(error: ValidationError) -> str:
    """Where the first thing wrong is, what was expected, and what came."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the top"
    if first["type"] == "extra_forbidden":
        tensors: dict[str, type[BaseModel]] = {"inputs": InputMeaning, "outputs": OutputMeaning}
        of = tensors.get(str(first["loc"][0]), ModelMeaning)
        return f"{place}: unknown field: one of {', '.join(of.model_fields)} expected"
    return f"{place}: {first['msg']}, got {str(first['input'])[:60]!r}"


def _with_labels(name: str, output: OutputMeaning, folder: Path, root: Path) -> OutputMeaning:
    if output.labels_file is None:
        return output
    if output.labels:
        raise ModelLoadError(f"{MEANING_FILE}: outputs.{name}: one of labels and labels_file expected, got both")
    labels = tuple(_read(folder / output.labels_file, root).splitlines())
    return output.model_copy(update={"labels": labels})


def explained(
    signatures: Mapping[str, Signature], read: Callable[[], ModelMeaning | None], what: str
) -> tuple[dict[str, Signature], str]:
    """`signatures` with their meaning, and what is wrong with it, if anything is: then they are as they were.

    A broken file is logged; it must not keep the model from being served. `what` is the version in the log.
    """
    try:
        meaning = read()
        return (dict(signatures) if meaning is None else with_meaning(signatures, meaning)), ""
    except ModelLoadError as error:
        _log.error("%s: %s: it is left out", what, error)
        return dict(signatures), str(error)


def with_meaning(signatures: Mapping[str, Signature], meaning: ModelMeaning) -> dict[str, Signature]:
    """`signatures` that know what their inputs and outputs mean; outputs get the labels of their classes.

    Raises:
        ModelLoadError: it speaks of what there is not, or of another kind of tensor.
    """
    _check_names("signature", {meaning.signature} - {""}, signatures)
    _check_names("input", meaning.inputs, {spec.name for each in signatures.values() for spec in each.inputs})
    _check_names("output", meaning.outputs, {spec.name for each in signatures.values() for spec in each.outputs})
    told = {name: _told(signature, meaning) for name, signature in signatures.items()}
    known = {spec.name for each in signatures.values() for spec in each.inputs}
    columns = {column for each in meaning.inputs.values() for column in each.columns}
    _check_names("field of the example", meaning.example or {}, known | columns)
    return told


def _check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ModelLoadError(f"{MEANING_FILE}: unknown {what} {unknown[0]!r}: there are {', '.join(sorted(known))}")


def _told(signature: Signature, meaning: ModelMeaning) -> Signature:
    for spec in signature.inputs:
        try:
            _check_input(spec, input_meaning(meaning, spec.name))
        except ValueError as error:
            raise ModelLoadError(f"{MEANING_FILE}: inputs.{spec.name}: {error}") from None
    outputs = []
    for spec in signature.outputs:
        each = meaning.outputs.get(spec.name)
        if each is not None:
            try:
                _check_output(spec, each)
            except ValueError as error:
                raise ModelLoadError(f"{MEANING_FILE}: outputs.{spec.name}: {error}") from None
            if each.labels and (spec.row_sizes or ())[-1:] == (len(each.labels),):
                spec = replace(spec, labels=each.labels)  # noqa: PLW2901
        outputs.append(spec)
    return replace(signature, outputs=tuple(outputs), meaning=meaning)


def _check_input(spec: TensorSpec, meaning: InputMeaning) -> None:
    """Raise `ValueError` for what cannot be said of such a tensor."""
    is_text = spec.dtype is DataType.BYTES
    kind = input_kind(meaning, is_text=is_text, sizes=spec.row_sizes)
    _check_kind(kind, spec)
    if kind == "image" and not is_text:
        image_layout(meaning, spec.row_sizes)
    takes = {DataType.BYTES: (str,), DataType.BOOL: (bool,)}.get(spec.dtype, (int, float))
    for value in meaning.values:
        if not isinstance(value, takes) or (isinstance(value, bool) and bool not in takes):
            raise ValueError(f"values of type {spec.dtype.value} expected, got {value!r}")
    if is_text and (meaning.min is not None or meaning.max is not None):
        raise ValueError("min and max go with numbers")
    if meaning.min is not None and meaning.max is not None and meaning.min > meaning.max:
        raise ValueError(f"min of at most max expected, got {meaning.min:g} and {meaning.max:g}")
    if len(set(meaning.columns)) != len(meaning.columns):
        raise ValueError(f"columns of different names expected, got {', '.join(meaning.columns)}")
    if meaning.columns and (spec.row_sizes is None or spec.row_sizes not in ((len(meaning.columns),), (None,))):
        raise ValueError(
            f"columns name the elements of a vector: {spec.row_sizes} expected, got {len(meaning.columns)}"
        )


def _check_output(spec: TensorSpec, meaning: OutputMeaning) -> None:
    """Raise `ValueError` for what cannot be said of such a tensor."""
    sizes = spec.row_sizes
    kind = output_kind(meaning, is_text=spec.dtype is DataType.BYTES, has_labels=bool(meaning.labels), sizes=sizes)
    _check_kind(kind, spec)
    if kind == "image":
        image_layout(meaning, sizes)
    if kind != "labels" or not meaning.labels or spec.dtype.is_integer:
        return
    last = sizes[-1] if sizes else 1
    if sizes is not None and last is not None and last != len(meaning.labels) and (last, len(meaning.labels)) != (1, 2):
        wanted = "2 labels (of one column, the probability of the second)" if last == 1 else f"{last} labels"
        raise ValueError(f"{wanted} expected, got {len(meaning.labels)}")


def _check_kind(kind: str, spec: TensorSpec) -> None:
    is_text = spec.dtype is DataType.BYTES
    if is_text and kind in ("number", "series", "labels"):
        raise ValueError(f"kind {kind} is of numbers, and this is BYTES")
    if not is_text and kind == "text":
        raise ValueError(f"kind text is of BYTES, and this is {spec.dtype.value}")
