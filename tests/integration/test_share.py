"""Two models that are hot at once: what each gets of the device, with real threads and real work."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
        self.longest_s = 0.0

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        start = time.perf_counter()
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(self.ms * _ROUNDS_PER_MS))
        self.longest_s = max(self.longest_s, time.perf_counter() - start)
        return super().run(lane, inputs)


@asynccontextmanager
async def serving(models: dict[str, SlowModel], **configs: ModelConfig) -> AsyncIterator[Kiln]:
    kiln = await start_kiln(dict(models), Limits(8, 4096, 1 << 24), configs=configs)
    try:
        yield kiln
    finally:
        await kiln.stop(10.0, 0.5)


async def keep_busy(kiln: Kiln, *names: str, seconds: float) -> None:
    """For so long the queues of all of these are never empty."""
    asking = [asyncio.create_task(_ask_on(kiln, name)) for name in names for _ in range(24)]
    done, _ = await asyncio.wait(asking, timeout=seconds)
    assert not done
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def _ask_on(kiln: Kiln, name: str) -> None:
    while True:
        await batcher_of(kiln, name).submit(DOUBLE, rows(1.0, 2.0), None)


async def device_s(kiln: Kiln) -> dict[str, float]:
    """Seconds of the device by model, as the metrics tell them."""
    page = (await Client(kiln.app).get("/metrics")).body.decode()
    lines = [line for line in page.splitlines() if line.startswith("kiln_device_seconds_total{")]
    return {line.split('model="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


async def apart_s(kiln: Kiln, models: dict[str, SlowModel], weights: dict[str, float], *, seconds: float) -> float:
    """How far apart two that are hot end up, in seconds of the device over weight, but for one batch of each."""
    before = await device_s(kiln)
    await keep_busy(kiln, *models, seconds=seconds)
    after = await device_s(kiln)
    one, other = ((after[name] - before[name]) / weights[name] for name in models)
    return abs(one - other) - 2 * sum(model.longest_s / weights[name] for name, model in models.items())


async def test_the_device_is_shared_by_weight():
    """Weight 3 beside weight 1: three times the seconds, so three times the rows of models that cost the same."""
    models = {"double": SlowModel(5), "other": SlowModel(5)}
    async with serving(models, double=ModelConfig(weight=3)) as kiln:
        assert await apart_s(kiln, models, {"double": 3, "other": 1}, seconds=2.0) <= 0.05
        double, other = (batcher_of(kiln, name).rows_served for name in models)
        assert double > 1.5 * other


async def test_by_default_the_device_is_shared_equally_whatever_the_batches():
    """One whose batches take five times as long gets as much of the device, and far fewer rows."""
    models = {"double": SlowModel(4), "large": SlowModel(20)}
    async with serving(models) as kiln:
        assert await apart_s(kiln, models, {"double": 1, "large": 1}, seconds=2.0) <= 0.05
        double, large = (batcher_of(kiln, name).rows_served for name in models)
        assert double > 2 * large


async def test_a_weight_is_changed_without_a_reload():
    """By the config that a client sends: from equal shares to four to one, with the same version loaded."""
    models = {"double": SlowModel(5), "other": SlowModel(5)}
    async with serving(models) as kiln:
        assert await apart_s(kiln, models, {"double": 1, "other": 1}, seconds=1.0) <= 0.05
        batcher = batcher_of(kiln)
        await kiln.registry.configure({"double": ModelConfig(weight=4), "other": ModelConfig()})
        assert await apart_s(kiln, models, {"double": 4, "other": 1}, seconds=2.0) <= 0.05
        assert batcher_of(kiln) is batcher


async def test_one_alone_gets_everything():
    """A hundredth of the other's weight costs it nothing while that is idle."""
    models = {"double": SlowModel(5), "other": SlowModel(5)}
    async with serving(models, double=ModelConfig(weight=0.01)) as kiln:
        start = time.monotonic()
        await keep_busy(kiln, "double", seconds=1.0)
        assert (await device_s(kiln))["double"] >= 0.3 * (time.monotonic() - start)
