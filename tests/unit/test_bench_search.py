"""The search for the highest rate that holds a goal, against made-up servers."""

from __future__ import annotations

import math
import random

import pytest

from service.bench.search import Search


def found(search: Search, limit: float, flips: float = 0.0, seed: int = 1) -> list[float]:
    """Run `search` against a server that holds up to `limit`; a share of `flips` of what holds fails by chance."""
    noise = random.Random(seed)
    tried: list[float] = []
    while (rate := search.next_rate()) is not None:
        tried.append(rate)
        search.tell(held=rate <= limit and noise.random() >= flips)
    return tried


@pytest.mark.parametrize("start", [1.0, 90.0, 5000.0])
@pytest.mark.parametrize("limit", [4.0, 100.0, 777.0, 50_000.0])
def test_the_boundary_is_found_from_wherever_one_begins(start: float, limit: float):
    """To 5 % below, whether the first rate is far below or far above it."""
    search = Search(start, least=4.0)
    tried = found(search, limit)
    assert limit / 1.05 <= search.low <= limit < search.high
    assert len(tried) == search.trials < 40
    assert search.is_done
    assert search.progress == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_one_stall_is_no_limit(seed: int):
    """Where one trial of twenty fails by chance the answer is still right, for a rate fails when it failed twice."""
    search = Search(100.0, least=4.0)
    found(search, 1000.0, flips=0.05, seed=seed)
    assert 700.0 < search.low <= 1000.0


def test_a_rate_that_held_after_all_has_held():
    """A failure is forgotten when the same rate holds in its second trial."""
    search = Search(100.0, least=1.0)
    search.tell(held=False)
    assert search.next_rate() == 100.0
    search.tell(held=True)
    assert (search.low, search.high, search.next_rate()) == (100.0, math.inf, 200.0)


def test_what_is_out_of_reach_ends():
    """At the lowest rate, tried twice, and with nothing that held."""
    search = Search(1000.0, least=4.0)
    tried = found(search, 0.0)
    assert (search.low, search.high, tried[-1]) == (0.0, 4.0, 4.0)
    assert len(tried) == 10  # 1000, 250, 62.5, 15.6, 4, each twice


def test_what_has_no_limit_ends():
    """At the highest rate that is tried."""
    search = Search(10.0, least=1.0, most=1000.0)
    tried = found(search, math.inf)
    assert (search.low, search.high, tried[-1]) == (1000.0, math.inf, 1000.0)


@pytest.mark.parametrize("seed", range(10))
def test_the_search_never_goes_on_for_ever(seed: int):
    """Not even with answers at random."""
    noise = random.Random(seed)
    search = Search(50.0, least=1.0, tolerance=1e-9, most_trials=25)
    progress = [0.0]
    while search.next_rate() is not None:
        search.tell(held=noise.random() < 0.5)
        progress.append(search.progress)
    assert search.trials <= 25
    assert all(0.0 <= share <= 1.0 for share in progress)
    assert progress[-1] == 1.0


def test_the_search_ends_with_what_it_has_when_trials_run_out():
    """However fine the answer is wanted."""
    search = Search(50.0, least=1.0, tolerance=1e-12, most_trials=25)
    assert len(found(search, 333.3)) == 25
    assert search.low == pytest.approx(333.3, rel=0.05)


def test_the_first_rate_lies_within_bounds():
    """A start of nothing is the lowest rate, one beyond all is the highest."""
    assert Search(0.0, least=4.0).next_rate() == 4.0
    assert Search(1e12, least=4.0, most=100.0).next_rate() == 100.0
