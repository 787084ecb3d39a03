"""TensorFlow Serving's ``--batching_parameters_file`` as settings of ours (pure).

Source: `BatchingParameters` in TensorFlow Serving's ``session_bundle_config.proto``, in protobuf's text format: a
number stands bare or in a wrapper, ``max_batch_size { value: 32 }``; a list as a field that comes again, or in ``[]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_TOKEN = re.compile(r"""\s+|\#[^\n]*|(?P<text>"[^"\n]*"|'[^'\n]*')|(?P<word>[\w.+-]+)|(?P<mark>[][{}<>:,;])""")
_TRUE, _FALSE = ("true", "True", "t", "1"), ("false", "False", "f", "0")
_OPEN = {"{": "}", "<": ">"}
_CLOSING = ("", *"]}>:,;")


class BatchingFileError(ValueError):
    """The text is no batching parameters, or they say what Kiln does not do; names the field and what came."""


def batching_settings(text: str) -> dict[str, Any]:
    """The settings that a batching parameters file stands for, by name.

    Raises:
        BatchingFileError: a field is unknown, of the wrong type, given twice, or cannot be followed.
    """
    given: dict[str, Any] = {}
    tokens = _Tokens(text)
    while (name := tokens.next_field()) is not None:
        read = _FIELDS.get(name)
        if read is None:
            raise BatchingFileError(f"{name}: there is no such batching parameter; known are {', '.join(_FIELDS)}")
        values = [read(name, value) for value in tokens.values(name)]
        if name == "allowed_batch_sizes":
            given.setdefault(name, []).extend(values)
        elif name in given or len(values) != 1:
            raise BatchingFileError(f"{name}: one value expected, got several")
        else:
            given[name] = values[0]
    return _as_settings(given)


def _as_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    batch_rows = given.get("max_execution_batch_size", given.get("max_batch_size"))
    sizes = given.get("allowed_batch_sizes")
    if sizes and sizes != sorted(set(sizes)):
        raise BatchingFileError(f"allowed_batch_sizes: each larger than the one before expected, got {sizes}")
    if sizes and batch_rows is not None and sizes[-1] != batch_rows:
        raise BatchingFileError(
            f"allowed_batch_sizes: the last one must be the largest batch, {batch_rows}, got {sizes}"
        )
    if sizes:
        settings["buckets"] = tuple(sizes)
        batch_rows = sizes[-1]
    if batch_rows is not None:
        settings["max_batch_rows"] = batch_rows
    if "batch_timeout_micros" in given:
        settings["batch_wait_ms"] = given["batch_timeout_micros"] / 1e3
    if "max_enqueued_batches" in given:
        settings["max_queue_rows"] = given["max_enqueued_batches"] * (batch_rows or _BATCH_ROWS)
    if "enable_large_batch_splitting" in given:
        settings["oversize"] = "split" if given["enable_large_batch_splitting"] else "refuse"
    return settings


_BATCH_ROWS = 1000
"""TensorFlow Serving's own batch size, by which its queue counts where the file gives none."""


class _Tokens:
    """The words and marks of a text, without white space and comments."""

    def __init__(self, text: str) -> None:
        self._tokens = self._split(text)
        self._ahead = next(self._tokens, "")

    @staticmethod
    def _split(text: str) -> Iterator[str]:
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                line = text.count("\n", 0, at) + 1
                raise BatchingFileError(f"line {line}: a field expected, got {text[at : at + 20]!r}")
            at = match.end()
            if match.lastgroup is not None:
                yield match.group()

    def _next(self) -> str:
        token, self._ahead = self._ahead, next(self._tokens, "")
        return token

    def next_field(self) -> str | None:
        """The name of the next field; None at the end."""
        while self._ahead and self._ahead in ",;":
            self._next()
        return self._next() or None

    def values(self, name: str) -> list[str]:
        """The words of one field's value or list of values, each out of its wrapper."""
        if self._ahead == ":":
            self._next()
        elif self._ahead not in _OPEN:
            raise BatchingFileError(f"{name}: ':' or '{{' expected, got {self._ahead or 'the end'!r}")
        if self._ahead != "[":
            return [self._value(name)]
        found = []
        self._next()
        while self._ahead != "]":
            found.append(self._value(name))
            if self._ahead == ",":
                self._next()
        self._next()
        return found

    def _value(self, name: str) -> str:
        token = self._next()
        if token in _OPEN:
            inner = self._next()
            if inner != "value" or self._next() != ":":
                raise BatchingFileError(f"{name}: 'value: …' expected in the wrapper, got {inner or 'the end'!r}")
            value, end = self._next(), self._next()
            if end != _OPEN[token]:
                raise BatchingFileError(f"{name}: {_OPEN[token]!r} expected after {value!r}, got {end or 'the end'!r}")
            return value
        if token in _CLOSING:
            raise BatchingFileError(f"{name}: a value expected, got {token or 'the end'!r}")
        return token


def _whole(least: int) -> Callable[[str, str], int]:
    def read(name: str, value: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", value) or int(value) < least:
            raise BatchingFileError(f"{name}: a whole number of at least {least} expected, got {value}")
        return int(value)

    return read


def _flag(name: str, value: str) -> bool:
    if value not in _TRUE + _FALSE:
        raise BatchingFileError(f"{name}: true or false expected, got {value}")
    return value in _TRUE


def _no_padding(name: str, value: str) -> bool:
    if _flag(name, value):
        raise BatchingFileError(f"{name}: Kiln fuses only inputs of the same length, got {value}")
    return False


def _text(name: str, value: str) -> str:
    if value[:1] not in ("'", '"'):
        raise BatchingFileError(f"{name}: a string in quotes expected, got {value}")
    return value[1:-1]


_FIELDS: dict[str, Callable[[str, str], Any]] = {
    "max_batch_size": _whole(1),
    "batch_timeout_micros": _whole(0),
    "max_enqueued_batches": _whole(1),
    "num_batch_threads": _whole(1),
    "thread_pool_name": _text,
    "allowed_batch_sizes": _whole(1),
    "pad_variable_length_inputs": _no_padding,
    "enable_large_batch_splitting": _flag,
    "max_execution_batch_size": _whole(1),
}
"""What reads the value of each field. Threads have no counterpart: how many batches run at once is measured."""
