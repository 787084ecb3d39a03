"""tritonclient over HTTP: ``ADDRESS IMAGES.npy json|binary [gzip]``, the answer as JSON on stdout."""

from __future__ import annotations

import json
import sys

import numpy as np
import tritonclient.http as triton


def main(address: str, images_path: str, form: str, compression: str | None = None) -> None:
    images = np.load(images_path)
    is_binary = form == "binary"
    with triton.InferenceServerClient(address) as client:
        image = triton.InferInput("image", list(images.shape), "FP32")
        image.set_data_from_numpy(images, binary_data=is_binary)
        output = triton.InferRequestedOutput("output_0", binary_data=is_binary)
        answer = client.infer(
            "digits",
            [image],
            outputs=[output],
            request_id="seven",
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        report = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready() and client.is_model_ready("digits"),
            "id": answer.get_response()["id"],
            "inputs": [part["name"] for part in client.get_model_metadata("digits")["inputs"]],
            "versions": client.get_model_metadata("digits")["versions"],
            "probabilities": answer.as_numpy("output_0").tolist(),
        }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
