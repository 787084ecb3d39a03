"""``ModelStreamInfer`` on the real server: order, fusing, errors that end one message only, cancelling, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc import StatusCode

from service.errors import Overloaded
from service.rpc import open_inference, open_inference_stream
from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc.handlers import CallLimits, GenericHandlers
from tests.integration.conftest import MAX_MESSAGE_BYTES, Kiln
from tests.integration.load import batcher_of, busy, entered, queued
from tests.integration.rpc import OIP, infer_request


@pytest_asyncio.fixture
async def channel(kiln: Kiln) -> AsyncIterator[Any]:
    """A connection to the server, for messages of any size."""
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}", options) as channel:
        yield channel


def start(channel: Any, timeout_s: float | None = None) -> Any:
    return channel.stream_stream(f"/{OIP}/ModelStreamInfer")(timeout=timeout_s)


def message(value: float, request_id: str = "", **keys: Any) -> oip.ModelInferRequest:
    request = infer_request(id=request_id, **keys)
    request.raw_input_contents[0] = np.full(3, value, np.float32).tobytes()
    return request


async def send(call: Any, *requests: oip.ModelInferRequest) -> None:
    for request in requests:
        await call.write(request.SerializeToString())


async def receive(call: Any) -> oip.ModelStreamInferResponse:
    return oip.ModelStreamInferResponse.FromString(await call.read())


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def value_of(response: oip.ModelStreamInferResponse) -> float:
    assert response.error_message == ""
    values = np.frombuffer(response.infer_response.raw_output_contents[0], np.float32)
    assert (values == values[0]).all()
    return float(values[0])


async def test_answers_come_in_order_and_the_stream_ends(channel: Any):
    """Each with its id; after the last, the status is OK."""
    call = start(channel)
    await send(call, *(message(number, str(number)) for number in range(200)))
    await call.done_writing()
    responses = [await receive(call) for _ in range(200)]
    assert [value_of(response) for response in responses] == [2 * number for number in range(200)]
    assert [response.infer_response.id for response in responses] == [str(number) for number in range(200)]
    assert (responses[0].infer_response.model_name, responses[0].infer_response.model_version) == ("double", "1")
    assert not responses[0].infer_response.parameters
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is StatusCode.OK


async def test_messages_of_a_stream_are_fused(kiln: Kiln, channel: Any):
    """One device call carries several messages that wait behind another."""
    call = start(channel)
    kiln.model.block()
    await send(call, message(1))
    await entered(kiln)
    await send(call, *(message(number) for number in (2, 3, 4, 5)))
    await queued(kiln, 4)
    kiln.model.unblock()
    assert [value_of(await receive(call)) for _ in range(5)] == [2, 4, 6, 8, 10]
    assert [batch["x"][:, 0].tolist() for batch in kiln.model.batches] == [[1], [2, 3, 4, 5]]


async def test_typed_contents_are_answered_typed(channel: Any):
    """As in a call of its own."""
    for rows in (1, 20):
        request = infer_request()
        del request.raw_input_contents[:]
        request.inputs[0].shape[0] = rows
        request.inputs[0].contents.fp32_contents.extend([1.0] * (3 * rows))
        call = start(channel)
        await send(call, request)
        response = (await receive(call)).infer_response
        assert list(response.outputs[0].contents.fp32_contents) == [2.0] * (3 * rows)


async def test_a_message_at_fault_gets_its_error_and_the_stream_goes_on(kiln: Kiln, channel: Any):
    """With its id, where it could be read."""
    good, wrong = message(1, "good"), message(1, "wrong")
    wrong.inputs[0].datatype = "FP64"
    final = message(1, "final")
    final.parameters["triton_enable_empty_final_response"].int64_param = 1
    large = message(1, "large")
    large.raw_input_contents[0] = bytes(MAX_MESSAGE_BYTES + 1)
    kiln.model.poison = 13
    call = start(channel)
    await send(call, message(1, "gone", model="no"), wrong, final, large, message(13, "poison"), good)
    await call.write(b"\xff")
    await send(call, message(2, "last"))
    responses = [await receive(call) for _ in range(8)]
    ids = ["gone", "wrong", "final", "", "poison", "good", "", "last"]
    assert [response.infer_response.id for response in responses] == ids
    texts = [
        "Servable not found for request: Latest(no)",
        "input 'x': expected datatype FP32, got 'FP64'",
        "parameter triton_enable_empty_final_response: true or false expected, got 1",
        f"bytes, over the limit of {MAX_MESSAGE_BYTES}",
        "the model failed: ValueError: poisoned",
        "",
        "the request cannot be parsed as inference.ModelInferRequest",
        "",
    ]
    for response, text in zip(responses, texts, strict=True):
        assert text in response.error_message
        assert bool(text) == bool(response.error_message)
        assert bool(text) != bool(response.infer_response.outputs)
    assert [value_of(responses[5]), value_of(responses[7])] == [2, 4]


async def test_an_error_that_nobody_foresaw_is_one_messages(
    kiln: Kiln, channel: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The log has it, the caller a text without it."""

    def broken(*_: Any) -> bytes:
        raise ZeroDivisionError("secret")

    call = start(channel)
    with monkeypatch.context() as patch:
        patch.setattr(open_inference, "encode_infer", broken)
        await send(call, message(1, "7"))
        response = await receive(call)
    assert response.error_message == "an internal error occurred; the server's log has it"
    assert response.infer_response.id == "7"
    assert "secret" in caplog.text
    await send(call, message(1))
    assert value_of(await receive(call)) == 2


async def test_a_final_response_is_marked_where_that_is_asked_for(channel: Any):
    """Each request has one answer, so that is the final one too."""
    request = message(1, "7")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    call = start(channel)
    await send(call, request, message(2))
    first, second = await receive(call), await receive(call)
    assert first.infer_response.parameters["triton_final_response"].bool_param
    assert first.infer_response.id == "7"
    assert value_of(first) == 2
    assert not second.infer_response.parameters


async def test_no_more_than_so_many_are_under_way(kiln: Kiln, channel: Any, monkeypatch: pytest.MonkeyPatch):
    """The rest is not read, so that the client is held up."""
    monkeypatch.setattr(open_inference_stream, "_MOST_IN_FLIGHT", 4)
    async with busy(kiln):
        call = start(channel)
        writing = asyncio.ensure_future(send(call, *(message(number) for number in range(10))))
        await queued(kiln, 4)
        for _ in range(100):
            await asyncio.sleep(0)
        assert batcher_of(kiln).queue.rows == 4
        kiln.model.unblock()
        assert [value_of(await receive(call)) for _ in range(10)] == [2 * number for number in range(10)]
        await writing


async def test_a_cancelled_stream_cancels_what_is_under_way(kiln: Kiln, channel: Any):
    """What waits is taken out of the queue, unrun."""
    call = start(channel)
    async with busy(kiln):
        await send(call, message(2), message(3))
        await queued(kiln, 2)
        replies = [entry.reply for lane in batcher_of(kiln).queue._lanes.values() for entry in lane]
        call.cancel()
        async with asyncio.timeout(10):
            while not all(reply.done() for reply in replies):
                await asyncio.sleep(0)
    assert [batch["x"][:, 0].tolist() for batch in kiln.model.batches] == [[1]]


async def test_the_deadline_of_the_stream_is_that_of_its_messages(kiln: Kiln, channel: Any):
    """They are failed unrun, as in calls of their own, whether or not the client still hears of it."""
    async with busy(kiln):
        call = start(channel, timeout_s=0.3)
        await send(call, message(2))
        await queued(kiln, 1)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await read_all(call)
        assert late.value.code() is StatusCode.DEADLINE_EXCEEDED
        await queued(kiln, 0)
    assert len(kiln.model.batches) == 1


async def test_a_message_has_its_own_timeout(kiln: Kiln, channel: Any):
    """In µs; the others on the stream go on."""
    short = message(2, "short")
    short.parameters["timeout"].int64_param = 1000
    async with busy(kiln):
        call = start(channel)
        await send(call, short, message(3, "long"))
        response = await receive(call)
        assert response.infer_response.id == "short"
        assert "the deadline passed" in response.error_message
    assert value_of(await receive(call)) == 6


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Overloaded("too much", 2.0), StatusCode.RESOURCE_EXHAUSTED, "too much"),
        (ZeroDivisionError("secret"), StatusCode.INTERNAL, "an internal error occurred; the server's log has it"),
    ],
)
async def test_a_handler_that_raises_ends_its_stream(error: Exception, code: StatusCode, text: str):
    """With the error's status, after the answers before it; whatever nobody foresaw is told without its text."""

    async def stream(messages: AsyncIterator[bytes], bounds: CallLimits) -> AsyncGenerator[bytes, None]:
        yield b"first"
        raise error

    server = grpc.aio.server()
    handlers = GenericHandlers(
        {}, {"/a/Stream": stream}, lambda path, error: None, request_timeout_s=1.0, max_message_bytes=1024
    )
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream("/a/Stream")()
        assert await call.read() == b"first"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert (refused.value.code(), refused.value.details()) == (code, text)
        assert dict(await call.trailing_metadata()) == ({"retry-after": "2"} if isinstance(error, Overloaded) else {})
    await server.stop(0.0)
