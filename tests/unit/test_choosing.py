"""Which plan is chosen from what was measured: for each bucket, in pieces, without TensorFlow, and how many rows."""

from __future__ import annotations

import pytest

from service.runtime.planner import best_rows, choose, choose_cold
from service.runtime.records import Chosen
from tests.unit.plan_fakes import measured

OWN = measured("signature", 1, 1.0)


def names(*cells: object, **options: object) -> dict[int, str]:
    return {rows: cell.plan for rows, cell in choose(cells, **options).items()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "plan"), [(0.96, "fast"), (0.98, "signature"), (1.0, "signature"), (2.0, "signature")]
)
def test_a_change_has_to_be_worth_it(seconds: float, plan: str) -> None:
    """The signature plan stays unless another is faster by 3 %."""
    assert names(OWN, measured("fast", 1, seconds)) == {1: plan}


def test_forced_any_other_plan_is_taken() -> None:
    """The best of those that were forced, though all be slower."""
    assert names(OWN, measured("slow", 1, 3.0), measured("slower", 1, 4.0), forced=True) == {1: "slow"}
    assert names(OWN, forced=True) == {1: "signature"}


@pytest.mark.parametrize(("seconds", "plan"), [(0.48, "modest"), (0.52, "modest"), (0.53, "greedy")])
def test_of_plans_that_are_alike_the_one_with_less_cpu_time_is_chosen(seconds: float, plan: str) -> None:
    """Within a twentieth of the fastest what counts is how much is left for everything else."""
    assert names(OWN, measured("greedy", 1, 0.5, 1.0), measured("modest", 1, seconds, 0.6)) == {1: plan}


def test_a_short_plan_whose_threads_spin_is_not_taken() -> None:
    """50 µs on all cores that burn 400 µs are no gain beside a server; on longer batches that may be work."""
    own = measured("signature", 1, 100e-6)
    spinning, calm = measured("spinning", 1, 50e-6, 400e-6), measured("calm", 1, 60e-6)
    assert names(own, spinning, calm, cores=2) == {1: "calm"}
    assert names(own, spinning, cores=2) == {1: "signature"}
    assert names(own, spinning, cores=2, forced=True) == {1: "spinning"}
    longer = [measured("signature", 1, 0.1), measured("spinning", 1, 0.05, 0.4)]
    assert names(*longer, cores=2) == {1: "spinning"}


def test_a_large_batch_is_run_in_pieces_where_that_is_faster() -> None:
    """Where rows one at a time are fastest a bucket is cut, by the plan of the piece; the cost is that of all."""
    cells = [measured("signature", n, 0.1 * n) for n in (1, 4, 8)]
    cells += [measured("conv", 1, 0.01, 0.02), measured("conv", 4, 0.08), measured("conv", 8, 0.16)]
    chosen = choose(cells)
    assert {rows: (cell.plan, cell.piece_rows) for rows, cell in chosen.items()} == dict.fromkeys(
        (1, 4, 8), ("conv", 1)
    )
    assert chosen[8].seconds == pytest.approx(0.08, rel=0.01)
    assert chosen[8].cpu_s == pytest.approx(0.16)


def test_pieces_are_whole_buckets_of_the_best_size() -> None:
    """A bucket takes the pieces that are fastest together; cutting and joining costs too."""
    cells = [measured("signature", 1, 0.010), measured("signature", 2, 0.012), measured("signature", 6, 0.1)]
    cell = choose(cells)[6]
    assert (cell.plan, cell.piece_rows) == ("signature", 2)
    assert [cell.seconds, cell.cpu_s] == pytest.approx([3 * 0.012, 3 * 0.012], rel=0.01)
    short = [measured("signature", n, n * 10e-6) for n in (1, 2)]
    assert choose(short)[2].piece_rows == 2


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({1: 1.0, 2: 1.5, 4: 2.0}, 4),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),
        ({1: 1.0, 2: 1.97, 4: 5.0}, 1),
        ({1: 1.0, 2: 1.5, 4: 9.0}, 2),
    ],
)
def test_the_best_batch_gives_the_most_rows_a_second(seconds: dict[int, float], rows: int) -> None:
    """Where more rows gain less than 2 % the smaller batch, which waits for less, is best."""
    assert best_rows({n: Chosen("p", n, taken) for n, taken in seconds.items()}) == rows


def is_cold(plan: str) -> bool:
    return plan.startswith("cold")


def test_cold_plans_are_the_fastest_that_need_no_tensorflow() -> None:
    """By bucket; where one was not measured, the largest smaller one in pieces."""
    cells = [OWN, measured("cold-a", 1, 0.5), measured("cold-b", 1, 0.4), measured("cold-a", 4, 0.8, 1.6)]
    chosen = choose_cold(cells, (1, 2, 4, 8), is_cold)
    assert chosen == {
        1: Chosen("cold-b", 1, 0.4, 0.4),
        2: Chosen("cold-b", 1, 0.8, 0.8),
        4: Chosen("cold-a", 4, 0.8, 1.6),
        8: Chosen("cold-a", 4, 1.6, 3.2),
    }


@pytest.mark.parametrize("cells", [[], [OWN], [OWN, measured("cold", 2, 0.1)]])
def test_without_a_plan_for_the_smallest_bucket_nothing_starts_cold(cells: list[object]) -> None:
    """A request of one row must be answered by one of them."""
    assert choose_cold(cells, (1, 2), is_cold) == {}  # type: ignore[arg-type]
