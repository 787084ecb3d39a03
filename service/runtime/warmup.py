"""Warm-up with the requests that a model brings along.

Source: TensorFlow Serving's ``SavedModel Warmup``: the file ``assets.extra/tf_serving_warmup_requests``
is a TFRecord file of at most 1000 ``PredictionLog`` messages. Here it may also be their JSON, one a line,
as the request log writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from service.errors import KilnError, ModelLoadError, Unimplemented
from service.tensors import Signature, Tensors, concatenate, split, trailing_shapes

_log = logging.getLogger("kiln.warmup")
WARM_UP_FILE = Path("assets.extra", "tf_serving_warmup_requests")
"""Where it lies in a SavedModel's folder."""
MAX_RECORDS = 1000
_LENGTH_BYTES, _HEADER_BYTES, _FOOTER_BYTES = 8, 12, 4
"""Of a TFRecord: length and its checksum before the data, the data's checksum behind."""

DecodeRecord = Callable[[bytes, Mapping[str, Signature]], Iterable[tuple[Signature, Tensors]]]
"""A record as the signatures that it names and their inputs; `Unimplemented` for a kind that is not replayed."""


def replay(
    path: Path,
    signatures: Mapping[str, Signature],
    *,
    decode: DecodeRecord,
    run: Callable[[Signature, Tensors], object],
    keep_rows: int,
) -> dict[str, Tensors]:
    """Run every record of the warm-up file at `path`.

    Returns:
        Inputs that were seen, by signature: up to `keep_rows` rows ``(rows, …)`` of one shape, or
        for a signature without rows one record's; only those that fit what the signature declares.

    Raises:
        ModelLoadError: the file is broken, or the model refuses a record; the text says which.
    """
    seen: dict[str, Tensors] = {}
    for number, record in enumerate(records(path), start=1):
        try:
            asked = decode(record, signatures)
            for signature, inputs in asked:
                run(signature, inputs)
        except Unimplemented as error:
            _log.warning("warm-up record %d is skipped: %s", number, error)
        except KilnError as error:
            raise ModelLoadError(f"warm-up record {number} failed: {error}") from error
        else:
            for signature, inputs in asked:
                _keep(seen, signature, inputs, keep_rows)
    return seen


def records(path: Path) -> Iterator[bytes]:
    """The data of each record of a TFRecord file, or of one that has a record of JSON on each line.

    Raises:
        ModelLoadError: it is cut off, a checksum is wrong, or there are more than `MAX_RECORDS`.
    """
    lines = _lines(path)
    count = _count(path) if lines is None else len(lines)
    if count > MAX_RECORDS:
        raise ModelLoadError(f"{path.name}: at most {MAX_RECORDS} records expected, got {count}")
    if lines is not None:
        yield from lines
        return
    import tensorflow as tf

    try:
        yield from tf.compat.v1.io.tf_record_iterator(str(path))
    except tf.errors.OpError as error:
        raise ModelLoadError(f"{path.name} is broken: {error.message}") from error


def _lines(path: Path) -> list[bytes] | None:
    """The lines of a file of JSON; None where it is none, for as the length of a record its beginning is too large."""
    try:
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            if not start.startswith(b"{") or int.from_bytes(start, "little") < path.stat().st_size:
                return None
            return [line for line in (start + file.read()).splitlines() if line]
    except OSError as error:
        raise ModelLoadError(f"{path.name} cannot be read: {error}") from None


def _count(path: Path) -> int:
    """How many records there are, by their lengths.

    TensorFlow believes a length, and ends the process where there is no memory for it.
    """
    count = 0
    try:
        end = path.stat().st_size
        with path.open("rb") as file:
            while file.tell() < end:
                length = int.from_bytes(file.read(_HEADER_BYTES)[:_LENGTH_BYTES], "little")
                if file.tell() + length + _FOOTER_BYTES > end:
                    raise ModelLoadError(f"{path.name} is broken: record {count + 1} goes past its end")
                file.seek(length + _FOOTER_BYTES, 1)
                count += 1
    except OSError as error:
        raise ModelLoadError(f"{path.name} cannot be read: {error}") from None
    return count


def _keep(seen: dict[str, Tensors], signature: Signature, inputs: Tensors, keep_rows: int) -> None:
    """Add the inputs of a record to those that were seen, where they fit."""
    if not all(spec.admits(inputs[spec.name].shape) for spec in signature.inputs):
        return
    before = seen.get(signature.name)
    if not signature.batched:
        seen.setdefault(signature.name, inputs)
        return
    if before is None:
        fused = inputs
    elif trailing_shapes(signature, before) == trailing_shapes(signature, inputs):
        fused = concatenate([before, inputs])
    else:
        return
    seen[signature.name] = split(fused, [min(keep_rows, len(next(iter(fused.values()))))])[0]
