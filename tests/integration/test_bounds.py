"""The bounds that a server is started with hold in each dialect, in its own form of refusal."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest_asyncio
from grpc import StatusCode

from service.bounds import Bounds
from service.rpc._generated.kiln.tensorflow import example_pb2
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from tests.fakes import FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln, start_kiln
from tests.integration.rpc import INFER, PREDICT, PREDICTION, Caller, infer_request, predict_request


@pytest_asyncio.fixture
async def kiln() -> AsyncIterator[Kiln]:
    """A server whose requests have up to two elements a tensor."""
    kiln = await start_kiln({"double": FakeModel()}, bounds=Bounds(max_tensor_elements=2))
    yield kiln
    await kiln.stop(5.0, 0.0)


async def test_rest_refuses_with_400(kiln: Kiln):
    """The text has the input, the limit and what came; nothing reaches the model."""
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    for path, body in (
        ("/v1/models/double:predict", {"instances": [[1, 2, 3]]}),
        ("/v1/models/double:predict", {"inputs": {"x": [[1, 2, 3]]}}),
        ("/v2/models/double/infer", {"inputs": [tensor]}),
    ):
        answer = await Client(kiln.app).post(path, body)
        assert answer.status == 400
        assert answer.error.startswith("input 'x': at most 2 elements expected (max_tensor_elements), got ")
    assert kiln.model.batches == []


async def test_classify_is_bounded_in_both_dialects(kiln: Kiln):
    """Its features are, as inputs are, and so is a context that is merged into many examples."""
    many = {"context": {"x": [1.0, 2.0, 3.0]}, "examples": [{}] * 9}
    context = "'context': 1 features of 13 bytes in each of 9 examples are too many (max_tensor_elements)"
    one = {"examples": [{"x": [1.0, 2.0, 3.0]}]}
    feature = "input 'x': at most 2 elements expected (max_tensor_elements), got shape [1, 3]"
    example = example_pb2.Example()
    example.features.feature["x"].float_list.value.extend([1, 2, 3])
    merged = tfs.Input()
    merged.example_list_with_context.context.CopyFrom(example)
    merged.example_list_with_context.examples.extend([example_pb2.Example()] * 9)
    alone = tfs.Input(example_list={"examples": [example]})
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        for body, message, text in ((many, merged, context), (one, alone, feature)):
            answer = await Client(kiln.app).post("/v1/models/double:classify", body)
            assert (answer.status, answer.error) == (400, text)
            request = tfs.ClassificationRequest(model_spec=tfs.ModelSpec(name="double"), input=message)
            refused = await Caller(channel).refusal(f"{PREDICTION}/Classify", request)
            assert refused == (StatusCode.INVALID_ARGUMENT, text)
    assert kiln.model.batches == []


async def test_grpc_refuses_with_invalid_argument(kiln: Kiln):
    """The same text."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        for method, request in ((INFER, infer_request()), (PREDICT, predict_request())):
            code, text = await Caller(channel).refusal(method, request)
            assert code is StatusCode.INVALID_ARGUMENT
            assert text == "input 'x': at most 2 elements expected (max_tensor_elements), got shape [1, 3]"
    assert kiln.model.batches == []
