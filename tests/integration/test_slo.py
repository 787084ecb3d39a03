"""A latency goal and priorities, as callers of REST and gRPC see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from grpc import StatusCode

from service.batching.queue import Limits
from service.registry.config import ModelConfig
from service.rpc._generated.inference import open_inference_pb2 as oip
from tests.fakes import DOUBLE, FakeModel, rows
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln, start_kiln
from tests.integration.load import batcher_of, busy, queued
from tests.integration.rpc import INFER, PREDICT, Caller, infer_request, predict_request


@pytest_asyncio.fixture
async def kiln() -> AsyncIterator[Kiln]:
    """``double`` with a goal of 1.5 s, whose batches are expected to take one second each."""
    model = FakeModel()
    model.seconds = 1.0
    kiln = await start_kiln({"double": model}, Limits(1, 64, 1 << 20), configs={"double": ModelConfig(slo_ms=1500)})
    yield kiln
    model.unblock()
    await kiln.stop(5.0, 0.5)


def request(value: float, **parameters: int) -> dict[str, object]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [value] * 3}
    return {"inputs": [tensor], "parameters": parameters}


async def test_what_cannot_be_in_time_is_refused_in_every_dialect(kiln: Kiln, caller: Caller):
    """429 with Retry-After and RESOURCE_EXHAUSTED, at once, while the one that runs is answered."""
    client = Client(kiln.app)
    async with busy(kiln):
        for path, body in (
            ("/v2/models/double/infer", request(1)),
            ("/v1/models/double:predict", {"instances": [[1, 2, 3]]}),
        ):
            refused = await client.post(path, body)
            assert refused.status == 429
            assert "answered within 1500 ms" in refused.error
            assert refused.headers["retry-after"] == "1"
        for method, message in ((INFER, infer_request()), (PREDICT, predict_request())):
            code, text = await caller.refusal(method, message)
            assert code is StatusCode.RESOURCE_EXHAUSTED
            assert "answered within 1500 ms" in text
    assert (await client.post("/v2/models/double/infer", request(1))).status == 200


async def test_a_timeout_that_no_run_can_keep_is_refused(kiln: Kiln, caller: Caller):
    """Before it runs, even where nothing is ahead of it."""
    refused = await Client(kiln.app).post("/v2/models/double/infer", request(1, timeout=500_000))
    assert refused.status == 429
    assert "answered within 500 ms" in refused.error
    message = infer_request()
    message.parameters["timeout"].int64_param = 500_000
    assert (await caller.refusal(INFER, message))[0] is StatusCode.RESOURCE_EXHAUSTED
    assert kiln.model.batches == []


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize("protocol", ["rest", "grpc"])
async def test_a_priority_goes_before_what_came_earlier(kiln: Kiln, caller: Caller, protocol: str):
    """1 before none, none before 3."""
    kiln.registry._models["double"].versions[0].hold_to(None)
    client = Client(kiln.app)

    async def ask(value: float, priority: int) -> None:
        if protocol == "rest":
            answer = await client.post("/v2/models/double/infer", request(value, priority=priority))
            assert answer.json["outputs"][0]["data"] == [2 * value] * 3
            return
        message = oip.ModelInferRequest(model_name="double")
        tensor = message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
        tensor.contents.fp32_contents.extend([value] * 3)
        message.parameters["priority"].int64_param = priority
        await caller.ask(INFER, message, oip.ModelInferResponse)

    async with busy(kiln):
        ahead = asyncio.ensure_future(batcher_of(kiln).submit(DOUBLE, rows(7), None))
        await queued(kiln, 0)  # assembled ahead: what comes after it waits
        calls = []
        for number, (value, priority) in enumerate(((2, 3), (3, 0), (4, 1))):
            calls.append(asyncio.create_task(ask(value, priority)))
            await queued(kiln, number + 1)
    await asyncio.gather(ahead, *calls)
    ran = [float(batch["x"][0, 0]) for batch in kiln.model.batches]
    assert [value for value in ran if value in {2.0, 3.0, 4.0}] == [4.0, 3.0, 2.0]
