"""What the batcher makes of failures: of the model, of a batch, of the memory."""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import pytest

from service.batching import batcher as module
from service.errors import DeadlineExceeded, Internal, InvalidArgument
from tests.unit.bench import TWO_D, Bench, firsts


@pytest.mark.parametrize("busy", [False, True])
async def test_a_batch_that_cannot_be_assembled_fails_alone(busy: bool, monkeypatch: pytest.MonkeyPatch):
    """Where there is no memory for a batch its callers are told, and those behind them are answered."""
    bench = Bench()
    first = [bench.submit(0)] if busy else []
    await bench.turn()

    def bucket_rows(lane: object, rows: int) -> int:
        raise MemoryError("no room")

    monkeypatch.setattr(bench.model, "bucket_rows", bucket_rows)
    answers = [bench.submit(1, 2), bench.submit(3, 4)]
    await bench.turn()
    monkeypatch.undo()
    later = bench.submit(5)
    await bench.run_all()
    for answer in answers:
        with pytest.raises(Internal, match="the model failed: MemoryError: no room"):
            await answer
    assert firsts(await later) == [10]
    await asyncio.gather(*first)


async def test_an_error_with_a_code_is_passed_on_as_it_is():
    """A model that knows whose fault it is keeps its code and its words."""
    bench = Bench()
    bench.model.poison, bench.model.error = 1, InvalidArgument("the model refused the input: too bright")
    answer = bench.submit(1)
    await bench.run_all()
    with pytest.raises(InvalidArgument, match="refused the input: too bright"):
        await answer


async def test_an_unforeseen_error_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture):
    """What nobody foresaw is `Internal` to the caller, and whole in the log."""
    bench = Bench()
    bench.model.poison = 1
    answer = bench.submit(1)
    with caplog.at_level(logging.ERROR, "kiln.batcher"):
        await bench.run_all()
    with pytest.raises(Internal, match="the model failed: ValueError: poisoned"):
        await answer
    assert "ValueError: poisoned" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("shape", "kind", "text"),
    [
        ((1, 4), InvalidArgument, r"input 'x': \[2, 2\] expected, got \[4\]: reshape each row\?"),
        ((1, 2, 2), Internal, "the model failed: ValueError: poisoned"),
    ],
    ids=["another shape", "the declared shape"],
)
async def test_a_graph_that_refuses_another_shape_is_explained_by_the_shape(
    shape: tuple[int, ...], kind: type[Exception], text: str
):
    """Where the graph was let try a shape it does not declare and failed, the shape is the reason given."""
    bench = Bench()
    bench.model.poison = 1
    answer = bench.submit(signature=TWO_D, inputs={"x": np.ones(shape, np.float32)})
    await bench.run_all()
    with pytest.raises(kind, match=text):
        await answer


async def test_lanes_are_remembered_only_up_to_a_bound(monkeypatch: pytest.MonkeyPatch):
    """Callers choose the shapes, so what is remembered of them is bounded; requests do not notice."""
    monkeypatch.setattr(module, "_MAX_LANES", 2)
    bench = Bench()
    answers = [
        bench.submit(signature=TWO_D, inputs={"x": np.ones((1, width), np.float32)}) for width in (1, 2, 3, 1, 2, 3)
    ]
    assert len(bench.batcher._lanes) <= 2
    await bench.run_all()
    assert [batch["x"].shape for batch in bench.model.batches] == [(2, 1), (2, 2), (2, 3)]
    await asyncio.gather(*answers)


async def test_a_failed_batch_is_not_run_again_for_those_who_left_or_are_late():
    """Rule 7: before a half is run again, cancelled and expired requests are taken out of it."""
    bench = Bench()
    bench.model.poison = 0
    answers = [bench.submit(n, deadline=deadline) for n, deadline in enumerate((None, None, None, 105))]
    await bench.turn()
    answers[2].cancel()
    bench.clock.advance(6)
    await bench.run_all()
    assert bench.ran() == [[0, 1, 2, 3], [0, 1], [0], [1]]
    with pytest.raises(DeadlineExceeded):
        await answers[3]
    assert firsts(await answers[1]) == [2]
    assert bench.observer.drops == {"cancelled": 1, "expired": 1}
    with pytest.raises(Internal):
        await answers[0]


async def test_a_scalar_where_rows_are_due_is_internal(monkeypatch: pytest.MonkeyPatch):
    """Rule 8: an output without rows at all is a miscount, too."""
    bench = Bench()
    monkeypatch.setattr(bench.model, "run", lambda lane, inputs: {"y": np.float32(1)})
    answer = bench.submit(1)
    await bench.run_all()
    with pytest.raises(Internal, match="given 1 rows and answered a scalar"):
        await answer
