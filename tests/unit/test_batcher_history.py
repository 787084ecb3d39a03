"""The batcher under any history of requests, departures, failures and time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.queue import Limits
from service.errors import KilnError, Overloaded
from service.tensors import Tensors
from tests.unit.bench import Bench, firsts

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 9), st.sampled_from([None, 1.0, 5.0])),
        st.tuples(st.just("poison"), st.integers(1, 3), st.none()),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.none()),
        st.tuples(st.just("advance"), st.sampled_from([0.5, 2.0]), st.none()),
        st.tuples(st.just("miscount"), st.integers(0, 1), st.none()),
        st.tuples(st.just("run"), st.none(), st.none()),
    ),
    max_size=25,
)
POISON = -1.0


@dataclass(frozen=True)
class Asked:
    """A request: its numbers, and where its answer comes."""

    numbers: list[float]
    answer: asyncio.Future[Tensors]

    def check(self) -> None:
        """It ended: left, with its own rows, or with a reason why not."""
        assert self.answer.done()
        if self.answer.cancelled():
            return
        error = self.answer.exception()
        if error is None:
            assert POISON not in self.numbers
            assert firsts(self.answer.result()) == [2 * number for number in self.numbers]
        else:
            assert isinstance(error, KilnError)


async def _take_step(bench: Bench, asked: list[Asked], step: str, value: Any, ttl_s: float | None) -> None:
    if step in ("submit", "poison"):
        first = len(asked)
        numbers = [POISON] * value if step == "poison" else [first + n / 16 for n in range(value)]
        try:
            asked.append(Asked(numbers, bench.submit(*numbers, deadline=ttl_s and bench.clock.now + ttl_s)))
        except Overloaded:
            return
    elif step == "cancel" and asked:
        asked[value % len(asked)].answer.cancel()
    elif step == "advance":
        await bench.advance(value)
    elif step == "miscount":
        bench.model.surplus_rows = value
    elif step == "run" and bench.runner.jobs:
        await bench.run()


async def _stop(bench: Bench, finish: bool) -> None:
    """Stop with time enough to finish, or with none."""
    stopping = asyncio.create_task(bench.batcher.stop(10.0 if finish else 0.0))
    if finish:
        await bench.run_all()
        await bench.advance(1.0)
        await bench.run_all()
    await bench.turn()
    assert stopping.done()
    assert await stopping or not finish
    await bench.run_all()
    assert bench.runner.closed


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, finish=st.booleans(), wait_s=st.sampled_from([0.0, 1.0]))
def test_every_entry_is_resolved_exactly_once_whatever_happens(steps: list[Any], finish: bool, wait_s: float):
    """Rule 6: after any history and a stop, every caller has its own rows or a reason why not."""

    async def history() -> None:
        bench = Bench(Limits(4, 16, 1 << 20, wait_s))
        bench.model.poison = POISON
        asked: list[Asked] = []
        for step, value, ttl_s in steps:
            await _take_step(bench, asked, step, value, ttl_s)
        await _stop(bench, finish)
        for each in asked:
            each.check()

    asyncio.run(history())
