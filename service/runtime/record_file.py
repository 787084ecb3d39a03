"""TFRecord files, by TensorFlow's own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_FRAME_BYTES = 16
"""Of each record: its length and the checksums of length and data."""


class TfRecordFile:
    """A `RecordFile` of TFRecords."""

    def __init__(self, path: Path) -> None:
        import tensorflow as tf

        self._failure: type[Exception] = tf.errors.OpError
        try:
            self._writer: Any = tf.io.TFRecordWriter(str(path))
        except self._failure as error:
            raise OSError(str(error)) from None

    def write(self, record: bytes) -> int:
        try:
            self._writer.write(record)
            self._writer.flush()
        except self._failure as error:
            raise OSError(str(error)) from None
        return len(record) + _FRAME_BYTES

    def close(self) -> None:
        try:
            self._writer.close()
        except self._failure as error:
            raise OSError(str(error)) from None
