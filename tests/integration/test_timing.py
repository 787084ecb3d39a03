"""What a caller is told of its request's time, and gets back of its ids, over REST and gRPC."""

from __future__ import annotations

import re
from typing import Any

import grpc
import numpy as np
import pytest

from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln
from tests.integration.rpc import Caller, infer_request, predict_request

TIMING = re.compile(r"queue;dur=\d+\.\d{3}, batch;dur=\d+\.\d{3}, compute;dur=\d+\.\d{3}, rows;desc=(\d+)")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
TENSOR = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": ROWS}


def rows_told(text: str | None) -> int:
    match = TIMING.fullmatch(text or "")
    assert match is not None, text
    return int(match[1])


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/models/double:predict", {"instances": ROWS}), ("/v2/models/double/infer", {"inputs": [TENSOR]})],
)
async def test_rest_tells_where_the_time_went(kiln: Kiln, path: str, body: Any):
    """In ``Server-Timing``, with the rows of the batch."""
    response = await Client(kiln.app).post(path, body)
    assert response.status == 200
    assert rows_told(response.headers["server-timing"]) == 2


async def test_grpc_tells_where_the_time_went(caller: Caller):
    """In the trailing metadata, of the first such request and of those that are known by then."""
    for _ in range(2):
        call = caller.start("inference.GRPCInferenceService/ModelInfer", infer_request())
        await call
        assert rows_told(dict(await call.trailing_metadata())["server-timing"]) == 1


@pytest.mark.parametrize(
    ("path", "status"), [("/v2/models/double/infer", 200), ("/v2/models/nothing/infer", 404), ("/v2/health/live", 200)]
)
async def test_rest_gives_ids_back(kiln: Kiln, path: str, status: int):
    """With answers, errors, and what FastAPI answers; a trace that is none is not passed on."""
    client = Client(kiln.app)
    method = "POST" if path.endswith("infer") else "GET"
    response = await client.ask(method, path, {"inputs": [TENSOR]}, traceparent=TRACE, x_request_id="r-1")
    assert response.status == status
    assert (response.headers["traceparent"], response.headers["x-request-id"]) == (TRACE, "r-1")
    response = await client.ask(method, path, {"inputs": [TENSOR]}, traceparent=TRACE.replace("4", "G"))
    assert "traceparent" not in response.headers
    assert "x-request-id" not in response.headers


@pytest.mark.parametrize("model", ["double", "nothing"])
async def test_grpc_gives_ids_back(kiln: Kiln, transport: str, model: str):
    """With answers and errors."""
    async with kiln.channel(transport) as channel:
        sent = (("traceparent", TRACE), ("x-request-id", "r-1"), ("other", "value"))
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        call = method(infer_request(model).SerializeToString(), metadata=sent)
        try:
            await call
            trailers = dict(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            trailers = dict(error.trailing_metadata())
        assert (trailers["traceparent"], trailers["x-request-id"]) == (TRACE, "r-1")
        assert "other" not in trailers


async def test_known_predict_requests_get_their_own_answers(caller: Caller):
    """TensorFlow Serving's, with raw content, the first and those that are known by then; a list of values too."""
    for value in (1.0, 2.0, 3.0):
        request = predict_request()
        for raw in (True, False):
            request.inputs["x"].ClearField("float_val")
            if raw:
                request.inputs["x"].tensor_content = np.full(3, value, np.float32).tobytes()
            else:
                request.inputs["x"].ClearField("tensor_content")
                request.inputs["x"].float_val.append(value)
            call = caller.start("tensorflow.serving.PredictionService/Predict", request)
            response = tfs.PredictResponse.FromString(await call)
            assert response.outputs["y"].tensor_content == np.full(3, 2 * value, np.float32).tobytes()
            assert response.model_spec.name == "double"
            assert rows_told(dict(await call.trailing_metadata())["server-timing"]) == 1


async def test_what_is_known_of_a_request_is_not_taken_for_another(caller: Caller, kiln: Kiln):
    """Of requests that differ in their tensor only, each gets its own answer, also where the size is the same."""
    for value in (1.0, 2.0, 3.0):
        request = infer_request()
        request.raw_input_contents[0] = np.full(3, value, np.float32).tobytes()
        for outputs in ((), ("y",)):
            del request.outputs[:]
            for name in outputs:
                request.outputs.add(name=name)
            answer = await caller.start("inference.GRPCInferenceService/ModelInfer", request)
            assert np.full(3, 2 * value, np.float32).tobytes() in answer
    assert kiln.model.batches
