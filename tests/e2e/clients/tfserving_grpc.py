"""TensorFlow Serving's own stubs: ``ADDRESS IMAGES.npy``, the answers as JSON on stdout."""

from __future__ import annotations

import json
import sys

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

_TIMEOUT_S = 30


def main(address: str, images_path: str) -> None:
    images = np.load(images_path)
    with grpc.insecure_channel(address) as channel:
        prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "digits"
        request.inputs["image"].CopyFrom(tf.make_tensor_proto(images))
        answer = prediction.Predict(request, timeout=_TIMEOUT_S)

        metadata_request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        metadata_request.model_spec.name = "digits"
        metadata = prediction.GetModelMetadata(metadata_request, timeout=_TIMEOUT_S)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        is_unpacked = metadata.metadata["signature_def"].Unpack(signatures)

        status_request = get_model_status_pb2.GetModelStatusRequest()
        status_request.model_spec.name = "digits"
        service = model_service_pb2_grpc.ModelServiceStub(channel)
        status = service.GetModelStatus(status_request, timeout=_TIMEOUT_S).model_version_status
    states = get_model_status_pb2.ModelVersionStatus.State
    report = {
        "states": {str(version.version): states.Name(version.state) for version in status},
        "inputs": list(signatures.signature_def["serving_default"].inputs) if is_unpacked else None,
        "versions": [str(answer.model_spec.version.value)],
        "probabilities": tf.make_ndarray(answer.outputs["output_0"]).tolist(),
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
