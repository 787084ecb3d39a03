"""Callers of every dialect share the device's batches, and each gets its own rows back."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from service.batching.queue import Limits
from service.tensors import DataType
from tests.integration.dialects import Question, Refused, serving
from tests.integration.load import entered, queued
from tests.signatures import one

TYPES = {"y": DataType.FP32}


def question(*values: float) -> Question:
    return Question({"x": np.array([[value] * 3 for value in values], np.float32)}, types=TYPES)


async def test_one_device_call_carries_rows_of_rest_and_grpc():
    """What waits behind a running batch is run as one, whichever way it came."""
    async with serving(one()) as dialects:
        model = dialects.kiln.model
        model.block()
        running = asyncio.ensure_future(dialects.grpc_v2_raw(question(1)))
        await entered(dialects.kiln)
        ways = (
            dialects.rest_tfs_rows,
            dialects.grpc_tfs_lists,
            dialects.rest_v2_binary,
            dialects.grpc_v2_typed,
        )
        waiting = []
        for number, way in enumerate(ways, start=1):
            waiting.append(asyncio.ensure_future(way(question(10 * number))))
            await queued(dialects.kiln, number, "m")
        model.unblock()
        first, *answers = await asyncio.gather(running, *waiting)
        assert not isinstance(first, Refused)
        assert first["y"].tolist() == [[2, 2, 2]]
        assert [batch["x"][:, 0].tolist() for batch in model.batches] == [[1], [10, 20, 30, 40]]
        for number, answer in enumerate(answers, start=1):
            assert not isinstance(answer, Refused)
            assert answer["y"].tolist() == [[20 * number] * 3]


@pytest.mark.parametrize("rows", [1, 3])
async def test_each_of_many_mixed_callers_gets_its_own_answer(rows: int):
    """64 at once in every dialect, fused as it comes, with a batch that they do not divide."""
    async with serving(one(), limits=Limits(8, 4096, 1 << 20)) as dialects:
        ways = list(dialects.ways(question(1)).values())
        questions = [question(*(100 * number + row for row in range(rows))) for number in range(64)]
        model = dialects.kiln.model
        model.block()
        calls = [asyncio.ensure_future(ways[n % len(ways)](each)) for n, each in enumerate(questions[:20])]
        await entered(dialects.kiln)
        calls += [asyncio.ensure_future(ways[n % len(ways)](each)) for n, each in enumerate(questions[20:])]
        model.unblock()
        for asked, answer in zip(questions, await asyncio.gather(*calls), strict=True):
            assert not isinstance(answer, Refused), answer
            np.testing.assert_array_equal(answer["y"], 2 * asked.inputs["x"])
        sizes = [len(batch["x"]) for batch in model.batches]
        assert sum(sizes) == 64 * rows
        assert max(sizes) <= 8
        assert len(sizes) < 64
