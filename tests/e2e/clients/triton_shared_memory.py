"""tritonclient with tensors in shared memory: ``http|grpc ADDRESS IMAGES.npy``, the answer as JSON on stdout.

What the server refuses is reported as ``{"refused": text}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

_CLASSES = 10
_KEY = f"/kiln_{os.getpid()}"


def ask(triton: Any, client: Any, images: Any, memory: Any) -> dict[str, Any]:
    """The images are at the start of `memory`; the probabilities come after them."""
    size, result_size = images.nbytes, len(images) * _CLASSES * 4
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    client.register_system_shared_memory("digits", _KEY, size + result_size)
    image = triton.InferInput("image", list(images.shape), "FP32")
    image.set_shared_memory("digits", size)
    output = triton.InferRequestedOutput("output_0")
    output.set_shared_memory("digits", result_size, offset=size)
    client.infer("digits", [image], outputs=[output])
    there = shm.get_contents_as_numpy(memory, np.float32, [len(images), _CLASSES], offset=size)
    inline = client.infer("digits", [image]).as_numpy("output_0")  # in shared memory, out in the answer
    report = {"probabilities": there.tolist(), "inline": inline.tolist(), "regions": regions(client)}
    client.unregister_system_shared_memory("digits")
    report["left"] = regions(client)
    return report


def regions(client: Any) -> list[str]:
    status = client.get_system_shared_memory_status()
    return [each["name"] for each in status] if isinstance(status, list) else list(status.regions)


def main(protocol: str, address: str, images_path: str) -> None:
    triton = importlib.import_module(f"tritonclient.{protocol}")
    images = np.load(images_path)
    memory: Any = shm.create_shared_memory_region("digits", _KEY, images.nbytes + len(images) * _CLASSES * 4)
    try:
        shm.set_shared_memory_region(memory, [images])
        with triton.InferenceServerClient(address) as client:
            try:
                report = ask(triton, client, images, memory)
            except InferenceServerException as error:
                report = {"refused": str(error)}
    finally:
        shm.destroy_shared_memory_region(memory)
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
