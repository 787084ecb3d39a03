"""The rules of the batcher, in the order of CONTRIBUTING.md."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.batcher import Batcher
from service.batching.queue import Entry, Limits, Spent
from service.errors import DeadlineExceeded, Internal, InvalidArgument, Overloaded, Unavailable
from service.metrics import Metrics
from service.predictor import Decoded, ModelRef, Predictor
from service.tensors import DataType, Signature, Tensors, TensorSpec
from tests.fakes import DOUBLE, rows
from tests.unit.bench import LIMITS, Bench, firsts

ANY_WIDTH = Signature(
    "any_width",
    (TensorSpec("x", DataType.FP32, (None, None)),),
    (TensorSpec("y", DataType.FP32, (None, None)),),
)
UNBATCHED = Signature(
    "unbatched",
    (TensorSpec("x", DataType.FP32, (2, 3)),),
    (TensorSpec("y", DataType.FP32, (2, 3)),),
)


# Rule 1


async def test_rows_are_counted_not_requests():
    """Rule 1: requests fill a batch by their rows, in the order of their arrival."""
    bench = Bench()
    answers = [bench.submit(1, 2, 3), bench.submit(4, 5), bench.submit(6)]
    await bench.run_all()
    assert bench.ran() == [[1, 2, 3], [4, 5, 6]]
    assert [firsts(await answer) for answer in answers] == [[2, 4, 6], [8, 10], [12]]
    assert bench.observer.runs == [3, 3]


async def test_an_oversize_request_is_split_before_it_queues():
    """Rule 1: more rows than a batch may have go into several, and come back as one answer in order."""
    bench = Bench()
    answer = bench.submit(*range(10))
    await bench.run_all()
    assert bench.ran() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert firsts(await answer) == [2 * n for n in range(10)]


async def test_an_oversize_request_is_refused_where_splitting_is_off():
    """Rule 1: with splitting off, a request over the limit is refused with both numbers, and nothing queues."""
    bench = Bench(split_oversize=False)
    with pytest.raises(InvalidArgument, match="at most 4 rows per request are taken, got 5"):
        bench.submit(*range(5))
    assert len(bench.batcher.queue) == 0
    full = bench.submit(*range(4))
    await bench.run_all()
    assert firsts(await full) == [0, 2, 4, 6]


@pytest.mark.parametrize("limits", [Limits(4, 16, 1 << 20), Limits(64, 16, 1 << 20), Limits(4, 64, 200)])
async def test_rows_that_no_queue_can_hold_are_refused_for_good(limits: Limits):
    """Rule 1: what is more than the queue can ever hold is the caller's fault, not worth a retry."""
    bench = Bench(limits)
    with pytest.raises(InvalidArgument, match=r"17 rows \(204 bytes\) in one request, but the queue holds"):
        bench.submit(*range(17))
    assert bench.observer.drops == {}


# Rule 2


async def test_one_queue_has_a_lane_for_each_signature_and_trailing_shape():
    """Rule 2: rows that do not concatenate wait in lanes of their own, those that do share a batch."""
    bench = Bench()
    wide, narrow = np.ones((1, 5), np.float32), np.ones((1, 2), np.float32)
    answers = [bench.submit(signature=ANY_WIDTH, inputs={"x": x}) for x in (wide, narrow, wide)]
    answers.append(bench.submit(7))
    await bench.run_all()
    assert [batch["x"].shape for batch in bench.model.batches] == [(2, 5), (1, 2), (1, 3)]
    assert [(await answer)["y"].shape for answer in answers] == [(1, 5), (1, 2), (1, 5), (1, 3)]


async def test_a_signature_without_rows_runs_alone():
    """Rule 2: requests of a signature that has no batch dimension are never fused, and count as one row."""
    bench = Bench()
    answers = [bench.submit(signature=UNBATCHED, inputs={"x": np.full((2, 3), n, np.float32)}) for n in (1, 2)]
    await bench.run_all()
    assert [batch["x"].shape for batch in bench.model.batches] == [(2, 3), (2, 3)]
    assert [(await answer)["y"][0, 0] for answer in answers] == [2, 4]
    assert bench.observer.runs == [1, 1]


class OneVersion:
    """An engine, and the handle it gives out, before one batcher."""

    model, version = "double", 1
    signatures: Mapping[str, Signature] = {"serving_default": DOUBLE}

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    def check(self, ref: ModelRef) -> None: ...
    def release(self) -> None: ...

    def acquire(self, ref: ModelRef) -> OneVersion:
        return self

    def submit(
        self,
        signature: Signature,
        inputs: Tensors,
        deadline: float | None,
        spent: Spent | None = None,
        priority: int = 0,
    ) -> Awaitable[Tensors]:
        return self.batcher.submit(signature, inputs, deadline, spent, priority)


async def test_rest_and_grpc_share_the_queue():
    """Rule 2: a request over REST and one over gRPC are just two callers, fused into one batch."""
    bench = Bench()
    engine: Any = OneVersion(bench.batcher)
    predictor = Predictor(engine, Metrics())

    async def ask(protocol: str, value: float) -> list[float]:
        with predictor.request(ModelRef("double"), protocol) as request:
            answer = await request.predict(None, lambda _: Decoded(DOUBLE, rows(value)))
        return firsts(answer.outputs)

    calls = [asyncio.create_task(ask("rest-tfs", 1)), asyncio.create_task(ask("grpc-v2", 2))]
    await bench.run_all()
    assert bench.ran() == [[1, 2]]
    assert [await call for call in calls] == [[2], [4]]


# Rule 3


@pytest.mark.parametrize("limits", [Limits(4, 8, 1 << 20), Limits(4, 100, 8 * 12)], ids=["rows", "bytes"])
async def test_a_full_queue_refuses_at_once(limits: Limits):
    """Rule 3: a request that finds no room gets `Overloaded` from `submit` itself, and is counted."""
    bench = Bench(limits)
    answers = [bench.submit(*range(4)) for _ in range(2)]
    with pytest.raises(Overloaded, match=r"is full: 8 rows \(96 bytes\) wait, 1 rows \(12 bytes\) came") as refused:
        bench.submit(1)
    assert refused.value.retry_after_s == 1.0
    assert bench.observer.drops == {"overloaded": 1}
    await bench.run_all()
    await asyncio.gather(*answers)


@pytest.mark.parametrize("still_full", [False, True])
async def test_a_full_queue_is_swept_first(still_full: bool):
    """Rule 3: those who left or are late make room; they are told even if the newcomer is refused all the same."""
    bench = Bench(Limits(4, 8, 1 << 20))
    late, gone, rest = bench.submit(1, deadline=105), bench.submit(2), bench.submit(*range(4))
    gone.cancel()
    bench.clock.advance(6)  # the timer for the deadline has had no turn yet
    if still_full:
        with pytest.raises(Overloaded):
            bench.submit(*range(5))
        assert bench.observer.drops == {"cancelled": 1, "expired": 1, "overloaded": 1}
    else:
        bench.submit(*range(4))
        assert bench.observer.drops == {"cancelled": 1, "expired": 1}
    await bench.run_all()
    with pytest.raises(DeadlineExceeded):
        await late
    assert firsts(await rest) == [0, 2, 4, 6]


# Rule 4


async def test_an_entry_holds_all_there_is_to_know_of_a_request():
    """Rule 4: payload, rows, size, times and the reply travel together."""
    fields = [field.name for field in dataclasses.fields(Entry)]
    assert fields == [
        "lane",
        "payload",
        "rows",
        "size_bytes",
        "enqueued",
        "deadline",
        "reply",
        "spent",
        "level",
        "rank",
    ]
    bench = Bench()
    answer = bench.submit(1, 2, deadline=130)
    (entry,) = bench.batcher.queue.clear()
    assert (entry.rows, entry.size_bytes, entry.enqueued, entry.deadline) == (2, 24, 100, 130)
    assert entry.reply is answer


async def test_a_caller_who_left_does_not_cost_an_entry_behind_it_its_answer():
    """Rule 4: with one member of a running batch cancelled, each of the others gets its own rows."""
    bench = Bench()
    answers = [bench.submit(n) for n in range(4)]
    await bench.turn()
    answers[1].cancel()
    await bench.run_all()
    assert [firsts(await answers[n]) for n in (0, 2, 3)] == [[0], [4], [6]]
    assert answers[1].cancelled()


# Rule 5


async def test_take_skips_the_cancelled_and_fails_the_expired_before_the_run():
    """Rule 5: neither reaches the model; both are counted, and the late one is told how long it waited."""
    bench = Bench()
    first = bench.submit(0)
    await bench.turn()
    late, gone, good = bench.submit(1, deadline=103), bench.submit(2), bench.submit(3)
    gone.cancel()
    bench.clock.advance(3)
    await bench.run_all()
    assert bench.ran() == [[0], [3]]
    with pytest.raises(DeadlineExceeded, match="passed after 3000 ms in the queue"):
        await late
    assert bench.observer.drops == {"cancelled": 1, "expired": 1}
    assert bench.observer.waits == [0, 3]
    assert [firsts(await answer) for answer in (first, good)] == [[0], [6]]


async def test_a_deadline_that_passes_during_the_run_takes_no_answer_away():
    """Rule 5: once taken, a request is answered, however late."""
    bench = Bench()
    answer = bench.submit(1, deadline=101)
    await bench.turn()
    await bench.advance(10)
    await bench.run_all()
    assert firsts(await answer) == [2]
    assert bench.observer.drops == {}


# Rule 6


async def test_each_waiter_has_an_exception_of_its_own():
    """Rule 6: what fails many is the same words in different objects."""
    bench = Bench()
    shared = Internal("the device is gone")
    bench.model.poison, bench.model.error = 1, shared
    answers = [bench.submit(1) for _ in range(4)]
    await bench.run_all()
    errors = await asyncio.gather(*answers, return_exceptions=True)
    assert [str(error) for error in errors] == [str(shared)] * 4
    assert len({id(error) for error in (*errors, shared)}) == 5


# Rule 7


@pytest.mark.parametrize("bad", range(4))
async def test_one_bad_row_fails_alone(bad: int):
    """Rule 7: a batch that fails is run again in halves until only the request at fault is left."""
    bench = Bench()
    bench.model.poison = bad
    answers = [bench.submit(n) for n in range(4)]
    await bench.run_all()
    errors = await asyncio.gather(*answers, return_exceptions=True)
    assert isinstance(errors[bad], Internal)
    assert str(errors[bad]) == "the model failed: ValueError: poisoned"
    assert [firsts(e) for e in errors if not isinstance(e, BaseException)] == [[2 * n] for n in range(4) if n != bad]
    assert bench.observer.failures == 3  # the four, the two, the one
    assert bench.observer.runs == [2, 1]


# Rule 8


async def test_a_miscounted_result_is_internal_and_never_misrouted():
    """Rule 8: outputs with another number of rows than were given reach nobody."""
    bench = Bench()
    bench.model.surplus_rows = 1
    answers = [bench.submit(n) for n in range(2)]
    await bench.run_all()
    for error in await asyncio.gather(*answers, return_exceptions=True):
        assert isinstance(error, Internal)
        assert str(error) == "output 'y': the model was given 1 rows and answered 2"


# Rule 9


async def test_a_free_runner_takes_what_is_there_at_once():
    """Rule 9: one row does not wait for company: it runs on the next turn of the loop."""
    bench = Bench()
    answer = bench.submit(1)
    await bench.turn()
    assert len(bench.runner.jobs) == 1
    await bench.run()
    assert firsts(await answer) == [2]
    assert bench.observer.waits == [0]


async def test_what_gathers_while_the_runner_is_busy_is_work_for_its_next_run():
    """Rule 9: batches grow because the runner is busy; when it is free it takes all that came."""
    bench = Bench()
    answers = [bench.submit(0)]
    await bench.turn()
    answers += [bench.submit(n) for n in (1, 2, 3)]
    await bench.turn()
    assert len(bench.runner.jobs) == 1
    await bench.run_all()
    assert bench.ran() == [[0], [1, 2, 3]]
    await asyncio.gather(*answers)


# Rule 10


@pytest.mark.parametrize("before", [False, True], ids=["comes during the run", "waits before the run"])
async def test_exactly_one_full_batch_is_assembled_ahead(before: bool):
    """Rule 10: while the runner runs, the next batch is handed over if it is full, and no third."""
    bench = Bench()
    answers = [bench.submit(*range(4))]
    if not before:
        await bench.turn()
    answers += [bench.submit(*range(4)) for _ in range(3)]
    await bench.turn()
    assert len(bench.runner.jobs) == 2
    assert bench.batcher.queue.rows == 8
    assert repr(bench.batcher) == "<Batcher <BatchQueue 2 entries, 8 rows in 1 lanes>, 2 running, 0 to retry>"
    await bench.run()
    assert len(bench.runner.jobs) == 2
    await bench.run_all()
    await asyncio.gather(*answers)


async def test_a_batch_that_could_still_grow_is_not_assembled_ahead():
    """Rule 10: as long as a row more would fit, waiting for the runner can only make it larger."""
    bench = Bench()
    first, second = bench.submit(0), bench.submit(1, 2, 3)
    await bench.turn()
    third = bench.submit(4, 5, 6)
    await bench.turn()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (1, 3)
    fourth = bench.submit(7)
    await bench.turn()
    assert (len(bench.runner.jobs), bench.batcher.queue.rows) == (2, 0)
    await bench.run_all()
    await asyncio.gather(first, second, third, fourth)


# Rule 11


async def test_stop_refuses_new_and_finishes_what_was_taken():
    """Rule 11: from the stop on nothing is accepted; what was, is answered within the drain time."""
    bench = Bench()
    answers = [bench.submit(*range(4)) for _ in range(3)]
    stopping = asyncio.create_task(bench.batcher.stop(10.0))
    await bench.turn()
    with pytest.raises(Unavailable, match="the model is stopping"):
        bench.submit(1)
    await bench.run_all()
    assert await stopping
    assert all([firsts(await answer) == [0, 2, 4, 6] for answer in answers])
    assert bench.runner.closed


async def test_stop_gives_up_what_is_not_finished_in_time():
    """Rule 11: after the drain time, running and waiting requests alike are told that the server stopped."""
    bench = Bench()
    running, ahead, waiting = (bench.submit(*range(4)) for _ in range(3))
    stopping = asyncio.create_task(bench.batcher.stop(2.0))
    await bench.turn()
    await bench.advance(1.9)
    assert not stopping.done()
    await bench.advance(0.2)
    assert await stopping is False
    for answer in (running, ahead, waiting):
        with pytest.raises(Unavailable, match="stopped before this request was finished"):
            await answer
    await bench.run_all()  # what the thread still ran ends up nowhere
    assert (len(bench.batcher.queue), bench.runner.closed) == (0, True)


# Rule 12


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 11), min_size=1, max_size=6), bucket=st.sampled_from([None, 4, 8]))
def test_batched_answers_equal_unbatched_ones(sizes: list[int], bucket: int | None):
    """Rule 12: fused, split, padded or alone, a row's answer is the same."""
    numbers = iter(np.random.default_rng(1).normal(size=sum(sizes)))
    requests = [[float(np.float32(next(numbers))) for _ in range(size)] for size in sizes]

    async def answers(together: bool) -> list[list[float]]:
        bench = Bench(Limits(4, 100, 1 << 20) if together else LIMITS)
        bench.model.bucket = bucket if together else None
        results = []
        if together:
            futures = [bench.submit(*request) for request in requests]
            await bench.run_all()
            return [firsts(await future) for future in futures]
        for request in requests:
            alone = [bench.submit(number) for number in request]
            await bench.run_all()
            results.append([number for future in alone for number in firsts(await future)])
        return results

    assert asyncio.run(answers(together=True)) == asyncio.run(answers(together=False))
