"""Answers in the order of the messages, several at once, bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc.open_inference_stream import _wrapped
from service.rpc.stream import in_order


class Stream:
    """Messages that a test sends, and answers that it gives when it likes."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.read = 0
        self.answers: dict[bytes, asyncio.Future[bytes]] = {}

    def send(self, *messages: bytes | Exception | None) -> None:
        """None ends the stream; an exception breaks it."""
        for message in messages:
            self.sent.put_nowait(message)

    async def messages(self) -> AsyncIterator[bytes]:
        while (message := await self.sent.get()) is not None:
            if isinstance(message, Exception):
                raise message
            self.read += 1
            yield message

    async def answer(self, message: bytes) -> bytes:
        self.answers[message] = asyncio.get_running_loop().create_future()
        return await self.answers[message]

    async def begun(self, count: int) -> None:
        """Wait until so many are being answered; no more are, however long the loop turns."""
        async with asyncio.timeout(5):
            while len(self.answers) < count:
                await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(self.answers) == self.read == count


async def test_answers_come_in_the_order_of_the_messages():
    """Whichever is ready first; and the end comes after the last."""
    stream = Stream()
    stream.send(b"a", b"b", b"c", None)
    answers = in_order(stream.messages(), stream.answer, most=8)
    first = asyncio.ensure_future(anext(answers))
    await stream.begun(3)
    stream.answers[b"c"].set_result(b"C")
    stream.answers[b"b"].set_result(b"B")
    await asyncio.sleep(0)
    assert not first.done()
    stream.answers[b"a"].set_result(b"A")
    assert [await first, *[answer async for answer in answers]] == [b"A", b"B", b"C"]


async def test_an_empty_stream_has_no_answers():
    """It just ends."""
    stream = Stream()
    stream.send(None)
    assert [answer async for answer in in_order(stream.messages(), stream.answer, most=1)] == []


async def test_no_more_are_read_than_may_be_under_way():
    """An answer that waits for one before it, or to be taken, keeps its place."""
    stream = Stream()
    stream.send(b"a", b"b", b"c", b"d", None)
    answers = in_order(stream.messages(), stream.answer, most=2)
    first = asyncio.ensure_future(anext(answers))
    await stream.begun(2)
    stream.answers[b"b"].set_result(b"B")
    await stream.begun(2)
    stream.answers[b"a"].set_result(b"A")
    assert await first == b"A"
    await stream.begun(2)
    assert await anext(answers) == b"B"
    third = asyncio.ensure_future(anext(answers))
    await stream.begun(4)
    stream.answers[b"c"].set_result(b"C")
    stream.answers[b"d"].set_result(b"D")
    assert [await third, *[answer async for answer in answers]] == [b"C", b"D"]


@pytest.mark.parametrize("way", ["cancelled", "closed"])
async def test_what_is_under_way_ends_with_its_stream(way: str):
    """Whether its taker is cancelled, or closes it between two answers."""
    stream = Stream()
    stream.send(b"a", b"b", b"c")
    answers = in_order(stream.messages(), stream.answer, most=8)
    first = asyncio.ensure_future(anext(answers))
    await stream.begun(3)
    if way == "closed":
        stream.answers[b"a"].set_result(b"A")
        await first
        await answers.aclose()
    else:
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert stream.answers[b"a"].cancelled()
    assert stream.answers[b"b"].cancelled()
    assert stream.answers[b"c"].cancelled()
    assert len(asyncio.all_tasks()) == 1


async def test_a_stream_that_breaks_gives_the_answers_before():
    """Then it raises what reading raised."""
    stream = Stream()
    stream.send(b"a", ValueError("broken"))
    answers = in_order(stream.messages(), stream.answer, most=8)
    first = asyncio.ensure_future(anext(answers))
    await stream.begun(1)
    stream.answers[b"a"].set_result(b"A")
    assert await first == b"A"
    with pytest.raises(ValueError, match="broken"):
        await anext(answers)


@pytest.mark.parametrize("size", [0, 1, 119, 120, 121, 16_370, 16_376, 3_000_000])
def test_an_answer_is_wrapped_whatever_its_size(size: int):
    """The prefix that tells its length is one to four bytes long."""
    answer = pb.ModelInferResponse(id="7" if size else "", raw_output_contents=[bytes(size)] if size else [])
    wrapped = _wrapped(answer.SerializeToString())
    assert wrapped == pb.ModelStreamInferResponse(infer_response=answer).SerializeToString()
