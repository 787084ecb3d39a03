"""Outputs → what people read, pure: JSON by the outputs' meanings, CSV, plain text, a PNG."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from service.errors import Internal, NotAcceptable
from service.meaning import OutputMeaning, output_kind, output_meaning
from service.predictor import Prediction
from service.rest.door_body_codec import CSV_TYPE, JSON_TYPE, TEXT_TYPE
from service.rest.door_images import data_uri, picture, png, sheet
from service.rest.json_codec import jsonable
from service.tensors import Array, DataType, Signature, TensorSpec

PNG_TYPE = "image/png"
Answer = dict[str, Array]
"""One record's part of each output, by name."""


@dataclass(frozen=True)
class Told:
    """One output, with what it means."""

    spec: TensorSpec
    meaning: OutputMeaning
    kind: str

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes: those of ``model.yaml``, else those of ``labels.txt``."""
        return self.meaning.labels or self.spec.labels


def outputs_of(signature: Signature) -> list[Told]:
    """The outputs of a signature, and how each is told."""
    outputs = []
    for spec in signature.outputs:
        meaning = output_meaning(signature.meaning, spec.name)
        has_labels = bool(meaning.labels or (spec.labels and _last(spec) == len(spec.labels)))
        is_text = spec.dtype is DataType.BYTES
        kind = output_kind(meaning, is_text=is_text, has_labels=has_labels, sizes=spec.row_sizes)
        outputs.append(Told(spec, meaning, kind))
    return outputs


def _last(spec: TensorSpec) -> int | None:
    return spec.row_sizes[-1] if spec.row_sizes else None


def answer_types(signature: Signature) -> list[str]:
    """The media types in which that signature can answer; the first is the default."""
    kinds = [output.kind for output in outputs_of(signature)]
    if "image" in kinds:
        return [JSON_TYPE, PNG_TYPE]
    return [JSON_TYPE, CSV_TYPE, TEXT_TYPE]


def choose_type(accept: str | None, types: Sequence[str]) -> str:
    """The one of `types` that an ``Accept`` header prefers; of those alike to it the first.

    Source of the rules: RFC 9110, 12.5.1: the most specific range that fits a type gives its weight.

    Raises:
        NotAcceptable: it takes none of them.
    """
    ranges = _ranges(accept or "*/*")
    best = max(types, key=lambda name: _weight(name, ranges))  # the first of the best
    if _weight(best, ranges) <= 0:
        raise NotAcceptable(f"header Accept: one of {', '.join(types)} expected, got {(accept or '')[:200]!r}")
    return best


@lru_cache(maxsize=64)
def _ranges(accept: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    weight = float(parameter[2:])
                except ValueError:
                    weight = 0.0
        if name:
            weights[name] = weight if math.isfinite(weight) else 0.0
    return weights or {"*/*": 1.0}


def _weight(name: str, ranges: Mapping[str, float]) -> float:
    for each in (name, name.partition("/")[0] + "/*", "*/*"):
        if each in ranges:
            return ranges[each]
    return 0.0


def answers_of(predictions: Sequence[Prediction], count: int) -> list[Answer]:
    """The outputs cut into one answer for each of `count` records.

    Raises:
        Internal: there are not so many.
    """
    answers = [answer for prediction in predictions for answer in _cut(prediction)]
    if len(answers) != count:
        raise Internal(f"{count} answers expected, the model gave {len(answers)}")
    return answers


def _plain(array: Array) -> Array:
    """With values of bfloat16 as float32, which JSON's writer knows."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _cut(prediction: Prediction) -> Iterator[Answer]:
    signature, outputs = prediction.signature, prediction.outputs
    plain = {name: _plain(array) for name, array in outputs.items()}
    if signature.batched:
        rows = min((len(array) for array in plain.values()), default=0)
        ragged = {name: list(map(_plain, each)) for name in outputs if (each := prediction.rows_of(name)) is not None}
        for row in range(rows):
            yield {name: ragged[name][row] if name in ragged else array[row, ...] for name, array in plain.items()}
        return
    has_row = {spec.name: spec.is_batched for spec in signature.outputs}
    yield {name: array[0, ...] if has_row[name] and array.shape[:1] == (1,) else array for name, array in plain.items()}


def encode_answers(answers: Sequence[Answer], signature: Signature, media: str, *, is_list: bool) -> bytes:
    """The body of the answer, in one of the signature's `answer_types`."""
    outputs = outputs_of(signature)
    if media == PNG_TYPE:
        output = next(each for each in outputs if each.kind == "image")
        pictures = [picture(answer[output.spec.name], output.meaning, output.spec.row_sizes) for answer in answers]
        return png(sheet(pictures))
    if media == CSV_TYPE:
        return _csv(answers, outputs)
    if media == TEXT_TYPE:
        return "".join(_line(answer, outputs) + "\n" for answer in answers).encode()
    told = [{each.spec.name: _json(answer[each.spec.name], each) for each in outputs} for answer in answers]
    return orjson.dumps(told if is_list else told[0], option=orjson.OPT_SERIALIZE_NUMPY)


def _json(row: Array, output: Told) -> Any:
    """One output of one record; a number of a known unit is an object with both."""
    if output.kind == "image":
        return data_uri(picture(row, output.meaning, output.spec.row_sizes))
    if output.kind == "labels":
        return _nested_classes(row, output)
    value = _values(row, output)
    if not output.meaning.unit:
        return value
    return {"values" if output.kind in ("series", "tensor") else "value": value, "unit": output.meaning.unit}


def _values(row: Array, output: Told) -> Any:
    """A number, a text, or lists of them, rounded if so said."""
    if output.kind in ("number", "text") and row.size == 1:
        row = row.reshape(())
    if output.kind == "series" and row.ndim > 1:
        row = row.reshape(row.shape[0], -1) if row.size != max(row.shape) else row.reshape(-1)
    decimals = output.meaning.decimals
    if decimals is not None and row.dtype.kind == "f":
        row = np.round(row.astype(np.float64), decimals)
        if decimals == 0 and np.isfinite(row).all() and np.abs(row).max(initial=0) < 2**53:
            row = row.astype(np.int64)
    if row.dtype.kind in "OSU":
        return jsonable(row)
    return np.ascontiguousarray(row) if row.ndim else row[()]


def _nested_classes(row: Array, output: Told) -> Any:
    """The classes of the last dimension, best first, for each place in the others."""
    if _is_index(row, output):
        return _class(int(row.reshape(-1)[0]), None, output.labels)
    if row.ndim > 1:
        return [_nested_classes(each, output) for each in row]
    probabilities = _probabilities(row.reshape(-1).astype(np.float64), output)
    keys = np.where(np.isnan(probabilities), np.inf, -probabilities)
    order = np.argsort(keys, kind="stable")[: output.meaning.top_k]
    return [_class(int(index), float(probabilities[index]), output.labels) for index in order]


def _is_index(row: Array, output: Told) -> bool:
    """Whether the output is the number of a class rather than what each scores."""
    return row.dtype.kind in "iu" and row.size == 1 and len(output.labels) != 1


def _class(index: int, probability: float | None, labels: Sequence[str]) -> dict[str, Any]:
    label = labels[index] if 0 <= index < len(labels) else str(index)
    if probability is None:
        return {"label": label, "id": index}
    return {"label": label, "id": index, "probability": float(f"{probability:.7g}")}


def _probabilities(scores: Array, output: Told) -> Array:
    """``(classes,)`` scores as probabilities; a single one is that of the second of two classes."""
    is_pair = len(scores) == 1 and len(output.labels) in (0, 2)
    if output.meaning.logits:
        scores = _sigmoid(scores) if len(scores) == 1 else _softmax(scores)
    return np.array([1.0 - scores[0], scores[0]]) if is_pair else scores


def _sigmoid(scores: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -scores))


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(initial=-np.inf))
    return np.asarray(powers / powers.sum())


def _csv(answers: Sequence[Answer], outputs: Sequence[Told]) -> bytes:
    """A header, and a line for each record: the best class of labels, each element of a vector."""
    rows = [[cell for each in outputs for cell in _cells(answer[each.spec.name], each)] for answer in answers]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    header = [name for name, _ in rows[0]]
    if any([name for name, _ in row] != header for row in rows):
        raise NotAcceptable("header Accept: the answers differ in shape, so they are no table: use application/json")
    writer.writerow(header)
    writer.writerows([value for _, value in row] for row in rows)
    return file.getvalue().encode()


def _cells(row: Array, output: Told) -> list[tuple[str, Any]]:
    """Names and values of the columns that one output takes."""
    name = output.spec.name
    if output.kind == "labels":
        classes = _nested_classes(row, output)
        best = classes if isinstance(classes, dict) else classes[0] if classes else {}
        if isinstance(best, list):
            raise NotAcceptable(f"header Accept: output {name!r} is no column: use application/json")
        cells = [(name, best.get("label"))]
        return [*cells, (f"{name}_probability", best["probability"])] if "probability" in best else cells
    values = _values(row, output)
    if isinstance(values, np.ndarray):
        return [(name + "".join(f"[{at}]" for at in place), _shortest(each)) for place, each in np.ndenumerate(values)]
    if isinstance(values, list):
        return [(f"{name}[{place}]", _shortest(each)) for place, each in enumerate(values)]
    return [(name, _shortest(values))]


def _shortest(value: Any) -> Any:
    """A value in the fewest digits that tell it from its neighbours, and as JSON names it."""
    if isinstance(value, str | int):
        return value if not isinstance(value, bool) else str(value).lower()
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return "" if text == "null" else text


def _line(answer: Answer, outputs: Sequence[Told]) -> str:
    """One record as a line of text; the outputs by name, if there are several."""
    texts = {}
    for output in outputs:
        cells = _cells(answer[output.spec.name], output)
        shown = cells[:1] if output.kind == "labels" else cells
        text = " ".join(str(value) for _, value in shown)
        texts[output.spec.name] = f"{text} {output.meaning.unit}" if output.meaning.unit else text
    if len(texts) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{name}: {text}" for name, text in texts.items())
