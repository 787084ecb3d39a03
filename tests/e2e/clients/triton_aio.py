"""tritonclient's coroutines: ``http|grpc ADDRESS IMAGES.npy``, what was seen as JSON on stdout.

The server loads models by request: ``digits`` is loaded, asked in every form, and unloaded.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np


async def main(protocol: str, address: str, images_path: str) -> None:
    images = np.load(images_path)
    triton = importlib.import_module(f"tritonclient.{protocol}")
    aio = importlib.import_module(f"tritonclient.{protocol}.aio")
    as_json: dict[str, Any] = {} if protocol == "http" else {"as_json": True}
    async with aio.InferenceServerClient(address) as client:
        seen: dict[str, Any] = {"live": await client.is_server_live(), "ready": await client.is_server_ready()}
        await client.load_model("digits")
        seen["model ready"] = await client.is_model_ready("digits")
        seen["loaded"] = await _states(client, as_json)
        seen["inputs"] = [part["name"] for part in (await client.get_model_metadata("digits", **as_json))["inputs"]]
        config = await client.get_model_config("digits", **as_json)
        seen["max_batch_size"] = config.get("config", config)["max_batch_size"]
        forms = [True, False] if protocol == "http" else [True]
        for form in forms:
            asked = [_input(triton, protocol, row[None], is_binary=form) for row in images]
            outputs = [_output(triton, protocol, is_binary=form)]
            answers = await asyncio.gather(*(client.infer("digits", [one], outputs=outputs) for one in asked))
            seen.setdefault("answers", []).append([answer.as_numpy("output_0")[0].tolist() for answer in answers])
        if protocol == "grpc":
            seen["answers"].append(await _streamed(triton, client, images))
        statistics = (await client.get_inference_statistics("digits", **as_json))["model_stats"][0]
        seen["requests"] = int(statistics["inference_stats"]["success"]["count"])
        await client.unload_model("digits")
        seen["left"] = await _states(client, as_json)
        try:
            await client.infer("digits", [_input(triton, protocol, images, is_binary=True)])
        except Exception as error:  # noqa: BLE001 - each protocol has its own kind
            seen["refused"] = str(error)
    json.dump(seen, sys.stdout)


def _input(triton: Any, protocol: str, images: Any, *, is_binary: bool) -> Any:
    image = triton.InferInput("image", list(images.shape), "FP32")
    image.set_data_from_numpy(images, **({"binary_data": is_binary} if protocol == "http" else {}))
    return image


def _output(triton: Any, protocol: str, *, is_binary: bool) -> Any:
    return triton.InferRequestedOutput("output_0", **({"binary_data": is_binary} if protocol == "http" else {}))


async def _streamed(triton: Any, client: Any, images: Any) -> list[Any]:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for row in images:
            yield {"model_name": "digits", "inputs": [_input(triton, "grpc", row[None], is_binary=True)]}

    answers = []
    async for result, error in client.stream_infer(requests()):
        assert error is None, error
        answers.append(result.as_numpy("output_0")[0].tolist())
    return answers


async def _states(client: Any, as_json: dict[str, Any]) -> list[list[str]]:
    index = await client.get_model_repository_index(**as_json)
    models = index.get("models", []) if as_json else index
    return [[model["name"], model["version"], model["state"]] for model in models]


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
