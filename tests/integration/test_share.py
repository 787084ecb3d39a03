"""Two models that are hot at once: what each gets of the device, with real threads and real work."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.batching.queue import Lane, Limits
from service.registry.config import ModelConfig
from service.tensors import Tensors
from tests.fakes import DOUBLE, FakeModel, rows
from tests.integration.asgi import Client
from tests.integration.conftest import Kiln, start_kiln
from tests.integration.load import batcher_of

_ROUNDS_PER_MS = 2000
"""About what a core does; the tests hold for others too."""


class SlowModel(FakeModel):
    """Each batch is work for one core, without the interpreter's lock, of about so many ms, whatever its rows."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(self.ms * _ROUNDS_PER_MS))
        return super().run(lane, inputs)


@asynccontextmanager
async def serving(models: dict[str, FakeModel], **configs: ModelConfig) -> AsyncIterator[Kiln]:
    kiln = await start_kiln(models, Limits(8, 4096, 1 << 24), configs=configs)
    try:
        yield kiln
    finally:
        await kiln.registry.stop(10.0)
        await kiln.rpc.stop(0.5)


async def served(kiln: Kiln, *names: str, seconds: float) -> list[int]:
    """Rows that each answers within that time while the queues of all are never empty."""
    asking = [asyncio.create_task(_ask_on(kiln, name)) for name in names for _ in range(24)]
    before = [batcher_of(kiln, name).rows_served for name in names]
    done, _ = await asyncio.wait(asking, timeout=seconds)
    assert not done
    after = [batcher_of(kiln, name).rows_served for name in names]
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    return [b - a for a, b in zip(before, after, strict=True)]


async def _ask_on(kiln: Kiln, name: str) -> None:
    while True:
        await batcher_of(kiln, name).submit(DOUBLE, rows(1.0, 2.0), None)


async def device_s(kiln: Kiln) -> dict[str, float]:
    """Seconds of the device by model, as the metrics tell them."""
    page = (await Client(kiln.app).get("/metrics")).body.decode()
    lines = [line for line in page.splitlines() if line.startswith("kiln_device_seconds_total{")]
    return {line.split('model="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def test_rows_are_served_by_weight():
    """Weight 3 beside weight 1: three times the rows, of models that cost the same."""
    models: dict[str, FakeModel] = {"double": SlowModel(5), "other": SlowModel(5)}
    async with serving(models, double=ModelConfig(weight=3)) as kiln:
        double, other = await served(kiln, "double", "other", seconds=2.0)
        assert double / other == pytest.approx(3.0, rel=0.25)
        used = await device_s(kiln)
        assert used["double"] / used["other"] == pytest.approx(3.0, rel=0.25)


async def test_by_default_the_device_is_shared_equally_whatever_the_batches():
    """One whose batches take five times as long gets as much of the device, and far fewer rows."""
    models: dict[str, FakeModel] = {"double": SlowModel(4), "large": SlowModel(20)}
    async with serving(models) as kiln:
        double, large = await served(kiln, "double", "large", seconds=2.0)
        used = await device_s(kiln)
        assert used["double"] / used["large"] == pytest.approx(1.0, rel=0.25)
        assert double / large > 2.5


async def test_a_weight_is_changed_without_a_reload():
    """By the config that a client sends: from equal shares to four to one, with the same version loaded."""
    models: dict[str, FakeModel] = {"double": SlowModel(5), "other": SlowModel(5)}
    async with serving(models) as kiln:
        double, other = await served(kiln, "double", "other", seconds=1.0)
        assert double / other == pytest.approx(1.0, rel=0.25)
        batcher = batcher_of(kiln)
        await kiln.registry.configure({"double": ModelConfig(weight=4), "other": ModelConfig()})
        double, other = await served(kiln, "double", "other", seconds=2.0)
        assert double / other == pytest.approx(4.0, rel=0.25)
        assert batcher_of(kiln) is batcher


async def test_one_alone_gets_everything():
    """A hundredth of the other's weight costs it nothing while that is idle."""
    models: dict[str, FakeModel] = {"double": SlowModel(5), "other": SlowModel(5)}
    async with serving(models, double=ModelConfig(weight=0.01)) as kiln:
        start = time.monotonic()
        await served(kiln, "double", seconds=1.0)
        assert (await device_s(kiln))["double"] >= 0.3 * (time.monotonic() - start)
