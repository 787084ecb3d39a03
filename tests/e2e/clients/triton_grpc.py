"""tritonclient over gRPC: ``ADDRESS IMAGES.npy``, the answer as JSON on stdout."""

from __future__ import annotations

import json
import sys

import numpy as np
import tritonclient.grpc as triton


def main(address: str, images_path: str) -> None:
    images = np.load(images_path)
    with triton.InferenceServerClient(address) as client:
        image = triton.InferInput("image", list(images.shape), "FP32")
        image.set_data_from_numpy(images)
        answer = client.infer("digits", [image], request_id="seven")
        metadata = client.get_model_metadata("digits")
        report = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready() and client.is_model_ready("digits"),
            "id": answer.get_response().id,
            "inputs": [part.name for part in metadata.inputs],
            "versions": list(metadata.versions),
            "probabilities": answer.as_numpy("output_0").tolist(),
        }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
