"""Names of classes: from ``labels.txt`` beside a version's files, to the outputs that have so many classes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from service.errors import ModelLoadError
from service.registry.repository import version_number
from service.tensors import Signature, TensorSpec

LABELS_FILE = "labels.txt"
_log = logging.getLogger("kiln.registry")


def read_labels(path: Path) -> tuple[str, ...]:
    """A name per line, from the folder of the version's file or SavedModel `path`, else from the model's.

    No file: no names.

    Raises:
        ModelLoadError: the file is no text.
    """
    folder = path if path.is_dir() else path.parent
    folders = (folder, folder.parent) if version_number(folder.name) is not None else (folder,)
    for each in folders:
        if (file := each / LABELS_FILE).is_file():
            try:
                return tuple(file.read_text("utf-8").splitlines())
            except (OSError, UnicodeDecodeError) as error:
                raise ModelLoadError(f"{LABELS_FILE} cannot be read: {error}") from error
    return ()


def labelled(signatures: Mapping[str, Signature], labels: tuple[str, ...], what: str) -> dict[str, Signature]:
    """`signatures` with `labels` on each output of so many classes; a warning about `what` if there is none."""
    if not labels:
        return dict(signatures)
    named = {name: _labelled(signature, labels) for name, signature in signatures.items()}
    if not any(spec.labels for signature in named.values() for spec in signature.outputs):
        _log.warning("%s: the %d lines of %s fit none of its outputs: left out", what, len(labels), LABELS_FILE)
    return named


def _labelled(signature: Signature, labels: tuple[str, ...]) -> Signature:
    outputs = tuple(replace(s, labels=labels) if _classes(s) == len(labels) else s for s in signature.outputs)
    return replace(signature, outputs=outputs)


def _classes(spec: TensorSpec) -> int | None:
    """Elements of a row, where they are known."""
    sizes = (spec.shape or ())[int(spec.is_batched) :]
    known = [size for size in sizes if size is not None]
    return math.prod(known) if sizes and len(known) == len(sizes) else None
