"""Triton's extensions by tritonclient: ``http|grpc ADDRESS IMAGES.npy``, what was seen as JSON on stdout."""

from __future__ import annotations

import importlib
import json
import queue
import sys
from typing import Any

import numpy as np


def main(protocol: str, address: str, images_path: str) -> None:
    images = np.load(images_path)
    triton = importlib.import_module(f"tritonclient.{protocol}")
    client = triton.InferenceServerClient(address)
    as_json: dict[str, Any] = {} if protocol == "http" else {"as_json": True}
    image = triton.InferInput("image", list(images.shape), "FP32")
    image.set_data_from_numpy(images)
    classes = triton.InferRequestedOutput("output_0", class_count=3)
    answer = client.infer("digits", [image], outputs=[classes], priority=1, timeout=20_000_000)
    seen: dict[str, Any] = {"classes": [[text.decode() for text in row] for row in answer.as_numpy("output_0")]}
    seen["refused"] = _refusal(lambda: client.infer("digits", [image], timeout=-1))
    seen["late"] = _refusal(lambda: client.infer("digits", [image], timeout=1))
    seen["statistics"] = client.get_inference_statistics("digits", **as_json)["model_stats"][0]
    seen["all statistics"] = len(client.get_inference_statistics(**as_json)["model_stats"])
    config = client.get_model_config("digits", "1", **as_json)
    seen["config"] = config.get("config", config)
    seen["log"] = client.update_log_settings({"log_verbose_level": 1}, **as_json)
    client.update_log_settings({"log_verbose_level": 0})
    seen["log after"] = client.get_log_settings(**as_json)
    seen["log refused"] = _refusal(lambda: client.update_log_settings({"log_file": "/x"}))
    seen["trace"] = client.update_trace_settings(settings={"trace_level": "OFF"}, **as_json)
    seen["model trace"] = client.get_trace_settings("digits", **as_json)
    seen["trace refused"] = _refusal(lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}))
    if protocol == "grpc":
        seen["stream"] = _stream(triton, client, images)
    client.close()
    json.dump(seen, sys.stdout)


def _refusal(ask: Any) -> str:
    try:
        ask()
    except Exception as error:  # noqa: BLE001 - each protocol has its own kind
        return str(error)
    return ""


def _stream(triton: Any, client: Any, images: Any) -> list[Any]:
    """Each image as a message of its own, one wrong one among them: ids, classes, errors as they came."""
    came: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: came.put((result, error)))
    for number, pixels in enumerate(images):
        image = triton.InferInput("image", [1, 8, 8, 1], "FP32")
        image.set_data_from_numpy(pixels[None])
        name = "nothing" if number == 1 else "digits"
        client.async_stream_infer(
            name, [image], request_id=str(number), enable_empty_final_response=number == 2, timeout=20_000_000
        )
    seen: list[Any] = []
    for _ in images:
        result, error = came.get(timeout=30)
        if error is not None:
            seen.append(str(error))
            continue
        response = result.get_response()
        is_final = response.parameters["triton_final_response"].bool_param
        seen.append([response.id, int(result.as_numpy("output_0").argmax()), is_final])
    client.stop_stream()
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
