"""A SavedModel that parses ``tf.Example`` messages, with a classify and a regress signature: ``FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tensorflow as tf

_METHODS = {"serving_default": "tensorflow/serving/classify", "regress": "tensorflow/serving/regress"}
_INPUT = [tf.TensorSpec([None], tf.string, "inputs")]


class Weights(tf.Module):  # type: ignore[misc]
    """Two features by three classes; ``bias`` is a feature of its own, 0 where it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = tf.Variable([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    def scores(self, inputs: Any) -> Any:
        features = {"x": tf.io.FixedLenFeature([2], tf.float32), "bias": tf.io.FixedLenFeature([], tf.float32, 0.0)}
        parsed = tf.io.parse_example(inputs, features)
        return parsed["x"] @ self.weights + parsed["bias"][:, None]

    @tf.function(input_signature=_INPUT)  # type: ignore[untyped-decorator]
    def classify(self, inputs: Any) -> Any:
        scores = self.scores(inputs)
        return {"scores": scores, "classes": tf.broadcast_to(tf.constant([["a", "b", "c"]]), tf.shape(scores))}

    @tf.function(input_signature=_INPUT)  # type: ignore[untyped-decorator]
    def regress(self, inputs: Any) -> Any:
        return {"outputs": tf.reduce_sum(self.scores(inputs), 1, keepdims=True)}


def main(folder: str) -> None:
    module = Weights()
    signatures = {"serving_default": module.classify, "regress": module.regress}
    tf.saved_model.save(module, folder, signatures=signatures)
    from tensorflow.core.protobuf import saved_model_pb2

    # TensorFlow 2 writes every signature with the method of predict
    path = Path(folder, "saved_model.pb")
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for name, method in _METHODS.items():
        saved.meta_graphs[0].signature_def[name].method_name = method
    path.write_bytes(saved.SerializeToString())


if __name__ == "__main__":
    main(*sys.argv[1:])
