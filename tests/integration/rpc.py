"""A caller of the gRPC server that sends raw bytes, and good requests for the model ``double``."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from service.tensors import DataType

OIP, PREDICTION, MODEL = (
    "inference.GRPCInferenceService",
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
)
INFER, PREDICT = f"{OIP}/ModelInfer", f"{PREDICTION}/Predict"
HEALTH, REFLECTION = "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"


class Caller:
    """Sends bytes to methods."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def start(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        data = request if isinstance(request, bytes) else request.SerializeToString()
        return self.channel.unary_unary(f"/{method}")(data, timeout=timeout_s)

    async def ask(self, method: str, request: Any, kind: Any) -> Any:
        return kind.FromString(await self.start(method, request))

    async def refusal(self, method: str, request: Any, timeout_s: float | None = None) -> tuple[StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.start(method, request, timeout_s)
        return refused.value.code(), refused.value.details() or ""


def infer_request(model: str = "double", version: str = "", **keys: Any) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model, model_version=version, **keys)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    request.raw_input_contents.append(np.array([1, 2, 3], np.float32).tobytes())
    return request


def predict_request(**spec: Any) -> tfs.PredictRequest:
    request = tfs.PredictRequest(model_spec=tfs.ModelSpec(**({"name": "double"} | spec)))
    tensor = request.inputs["x"]
    tensor.dtype = DataType.FP32.number  # type: ignore[assignment]
    for size in (1, 3):
        tensor.tensor_shape.dim.add(size=size)
    tensor.float_val.extend([1, 2, 3])
    return request
