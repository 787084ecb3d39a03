"""OpenVINO Model Server's client: ``http|grpc ADDRESS IMAGES.npy``, the answers as JSON on stdout.

None of its calls names a version, and so each sends version 0.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import ovmsclient


def main(protocol: str, address: str, images_path: str) -> None:
    images = np.load(images_path)
    client: Any = (ovmsclient.make_http_client if protocol == "http" else ovmsclient.make_grpc_client)(address)
    status = client.get_model_status("digits")
    report: dict[str, Any] = {
        "probabilities": client.predict({"image": images}, "digits").tolist(),
        "version 1": client.predict({"image": images}, "digits", 1).tolist(),
        "states": {str(version): told["state"] for version, told in status.items()},
        "inputs": _inputs(client.get_model_metadata("digits")),
        "refused": [
            _refusal(lambda: client.predict({"image": images}, "nothing")),
            _refusal(lambda: client.predict({"image": images}, "digits", 7)),
            _refusal(lambda: client.predict({"image": images[0]}, "digits")),
        ],
    }
    sys.stdout.write(json.dumps(report))


def _inputs(metadata: dict[str, Any]) -> list[str]:
    if "metadata" in metadata:  # over HTTP it is handed on as it came
        metadata = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
    return list(metadata["inputs"])


def _refusal(ask: Any) -> list[str]:
    try:
        ask()
    except ovmsclient.tfs_compat.base.errors.ModelServerError as error:
        return [type(error).__name__, str(error)]
    return []


if __name__ == "__main__":
    main(*sys.argv[1:])
