"""Strings by tritonclient: ``http|grpc ADDRESS``, what a model that parses examples answers, as JSON on stdout."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np
import tensorflow as tf

_ROWS = [(1.0, 0.0), (0.0, 1.0)]


def main(protocol: str, address: str) -> None:
    triton = importlib.import_module(f"tritonclient.{protocol}")
    texts = np.array([_example(row) for row in _ROWS], object)
    seen: list[Any] = []
    client = triton.InferenceServerClient(address)
    for is_binary in (True, False) if protocol == "http" else (True,):
        examples = triton.InferInput("inputs", [len(texts)], "BYTES")
        examples.set_data_from_numpy(texts)  # as binary: no JSON can carry them
        keys = {"binary_data": is_binary} if protocol == "http" else {}
        outputs = [triton.InferRequestedOutput(name, **keys) for name in ("classes", "scores")]
        answer = client.infer("parsed", [examples], outputs=outputs)
        classes = [[_text(item) for item in row] for row in answer.as_numpy("classes")]
        seen.append([classes, answer.as_numpy("scores").tolist()])
    client.close()
    json.dump(seen, sys.stdout)


def _example(values: tuple[float, ...]) -> bytes:
    """Bytes that are no text, all in all."""
    feature = tf.train.Feature(float_list=tf.train.FloatList(value=values))
    note = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"\xff\xfe"]))
    features = tf.train.Features(feature={"x": feature, "note": note})
    return bytes(tf.train.Example(features=features).SerializeToString())


def _text(item: Any) -> str:
    return item.decode() if isinstance(item, bytes) else str(item)


if __name__ == "__main__":
    main(*sys.argv[1:])
