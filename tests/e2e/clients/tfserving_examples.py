"""TensorFlow Serving's own stubs with examples: ``ADDRESS IMAGES.npy``, the answers as JSON on stdout.

The server has the model of `save_examples_model.py` as ``parsed``, and ``digits``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import classification_pb2, inference_pb2, prediction_service_pb2_grpc, regression_pb2

_TIMEOUT_S = 30
_CLASSIFY, _REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"


def example(**features: Any) -> Any:
    lists = {name: tf.train.FloatList(value=np.ravel(values)) for name, values in features.items()}
    return tf.train.Example(
        features=tf.train.Features(feature={name: tf.train.Feature(float_list=each) for name, each in lists.items()})
    )


def fill(source: Any) -> None:
    """Two examples, of which the second overrides the context."""
    examples = source.example_list_with_context
    examples.context.CopyFrom(example(bias=10.0))
    examples.examples.extend([example(x=[1.0, 0.0]), example(x=[0.0, 1.0], bias=0.5)])


def classes(result: Any) -> list[Any]:
    return [[[each.label, each.score] for each in row.classes] for row in result.classifications]


def main(address: str, images_path: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        classify = classification_pb2.ClassificationRequest()
        classify.model_spec.name = "parsed"
        fill(classify.input)
        regress = regression_pb2.RegressionRequest()
        regress.model_spec.name = "parsed"
        regress.model_spec.signature_name = "regress"
        fill(regress.input)
        both = inference_pb2.MultiInferenceRequest()
        both.tasks.add(method_name=_REGRESS).model_spec.CopyFrom(regress.model_spec)
        both.tasks.add(method_name=_CLASSIFY).model_spec.name = "parsed"
        fill(both.input)
        digits = classification_pb2.ClassificationRequest()
        digits.model_spec.name = "digits"
        digits.input.example_list.examples.extend(example(image=image) for image in np.load(images_path))

        classified = stub.Classify(classify, timeout=_TIMEOUT_S)
        regressed = stub.Regress(regress, timeout=_TIMEOUT_S)
        first, second = stub.MultiInference(both, timeout=_TIMEOUT_S).results
        answer = stub.Classify(digits, timeout=_TIMEOUT_S)
    report = {
        "classes": classes(classified.result),
        "values": [each.value for each in regressed.result.regressions],
        "signatures": [classified.model_spec.signature_name, regressed.model_spec.signature_name],
        "both": [
            [each.value for each in first.regression_result.regressions],
            classes(second.classification_result),
        ],
        "probabilities": [[score for _, score in row] for row in classes(answer.result)],
        "labels": [label for label, _ in classes(answer.result)[0]],
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
