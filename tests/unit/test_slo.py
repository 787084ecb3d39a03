"""The rules of batching to a goal, with times that are made up."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.queue import BatchQueue, Entry, Lane, Limits, level_of
from service.batching.slo import SloPolicy
from service.errors import Overloaded
from tests.fakes import DOUBLE, FakeReply

LIMITS = Limits(max_batch_rows=8, max_queue_rows=1000, max_queue_bytes=1 << 20)
LANE = Lane(DOUBLE, ((3,),), conforms=True, fuses=True)
OTHER = Lane(DOUBLE, ((4,),), conforms=False, fuses=True)
ALONE = Lane(DOUBLE, ((2, 3),), conforms=True, fuses=False)


def measured(lane: Lane, rows: int) -> float:
    """10 ms for a row, 17 ms for eight."""
    return 0.009 + 0.001 * rows


def policy(slo_s: float = 0.1, most_rows: int = 8, parallel: int = 1) -> SloPolicy:
    return SloPolicy(slo_s, measured, lambda signature: most_rows, parallel=parallel)


def entry(rows: int = 1, *, at: float = 0.0, deadline: float | None = None, level: int = 1, lane: Lane = LANE) -> Entry:
    return Entry(lane, {"x": np.zeros((rows, 1), np.float32)}, rows, 1, at, deadline, FakeReply(), level=level)


def fill(queue: BatchQueue, *, at: float = 0.0, level: int = 1, lane: Lane = LANE) -> int:
    """Offer single rows until one is refused; how many were let in."""
    for count in range(1000):
        try:
            queue.offer([entry(at=at, level=level, lane=lane)])
        except Overloaded:
            return count
    raise AssertionError("nothing was refused")


# Refused early


def test_with_nothing_ahead_a_request_is_let_in_whatever_the_goal():
    """A goal that the model can never keep does not close it: each request that finds the runner free is run."""
    queue = BatchQueue(LIMITS, policy(slo_s=0.001))
    queue.offer([entry()])
    assert len(queue.take(0.0).entries) == 1


def test_what_cannot_be_in_time_is_refused_at_once_and_told_when_to_come_back():
    """As many are let in as can be answered within the goal, by the time that batches take."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    rules.begun(LANE, 8, 0.0)
    # 90 ms of the goal are the batcher's: 17 for what runs, 51 for three batches, 9 for their spread, 13 for a last row
    assert fill(queue) == 25
    with pytest.raises(Overloaded, match=r"answered within 100 ms: by the time .* it would be \d+ ms late") as refused:
        queue.offer([entry()])
    assert 0 < refused.value.retry_after_s < 0.02
    assert len(queue) == 25
    assert queue.rows == 25


def test_room_comes_back_as_batches_end():
    """What has been run is ahead of nobody."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    run = rules.begun(LANE, 8, 0.0)
    assert fill(queue) == 25
    rules.ended(run, 0.017)
    assert len(queue.take(0.017).entries) == 8
    rules.begun(LANE, 8, 0.017)
    assert fill(queue, at=0.017) == 8


def test_a_deadline_of_its_own_counts_where_it_is_nearer():
    """With it a request is refused that would be let in without, and the text says how long it had."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    rules.begun(LANE, 8, 0.0)
    with pytest.raises(Overloaded, match="answered within 20 ms"):
        queue.offer([entry(deadline=0.02)])
    queue.offer([entry(deadline=0.05)])


def test_a_deadline_that_no_run_can_keep_is_refused_even_with_nothing_ahead():
    """But not for longer than a second: only a run can correct a curve that is wrong."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    for at in (0.0, 0.5, 0.99):
        with pytest.raises(Overloaded):
            queue.offer([entry(at=at, deadline=at + 0.005)])
    queue.offer([entry(at=1.0, deadline=1.005)])
    assert queue.take(1.0).entries
    rules.ended(rules.begun(LANE, 1, 1.0), 1.002)
    with pytest.raises(Overloaded):
        queue.offer([entry(at=1.5, deadline=1.505)])
    queue.offer([entry(at=1.5, deadline=1.6)])


def test_a_request_of_many_rows_counts_with_all_its_batches():
    """Split into five batches it needs more than the goal where something is ahead, and four do not."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    queue.offer([entry()])
    with pytest.raises(Overloaded):
        queue.offer([entry(8) for _ in range(5)])
    assert queue.rows == 1
    queue.offer([entry(8) for _ in range(3)])
    assert queue.rows == 25


def test_what_waits_in_other_lanes_is_ahead_too():
    """One runner works for all lanes of a version."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    rules.begun(LANE, 8, 0.0)
    assert fill(queue, lane=OTHER) == 25
    assert fill(queue) == 0


def test_runners_side_by_side_take_their_share():
    """Two of them let in more than one, and are both busy before anything waits for them."""
    rules = policy(parallel=2)
    queue = BatchQueue(LIMITS, rules)
    rules.begun(LANE, 8, 0.0)
    queue.offer([entry(deadline=0.02)])  # the other runner is free
    queue.take(0.0)
    rules.begun(LANE, 1, 0.0)
    assert fill(queue) > 40


def test_a_run_that_is_overdue_is_not_thought_to_end_at_once():
    """It is expected to take as long again as it is late, so a stall is felt before it ends."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    run = rules.begun(LANE, 8, 0.0)
    assert fill(queue, at=0.1) == 0
    rules.ended(run, 0.12)
    queue.offer([entry(at=0.12)])


def test_the_batch_assembled_ahead_begins_when_the_one_before_it_ends():
    """Its time runs from then, and it is not learned as slow for having waited."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    first, ahead = rules.begun(LANE, 8, 0.0), rules.begun(LANE, 8, 0.001)
    assert (first.ends, ahead.starts, ahead.ends) == pytest.approx((0.017, 0.017, 0.034))
    rules.ended(first, 0.02)
    assert (ahead.starts, ahead.ends) == pytest.approx((0.02, 0.037))
    rules.ended(ahead, 0.037)
    queue.offer([entry(at=0.037)])
    assert rules.begun(LANE, 8, 0.04).ends == pytest.approx(0.057, abs=0.001)


def test_a_run_that_began_under_another_goal_is_let_end():
    """It is not this policy's, and teaches it nothing."""
    run = policy().begun(LANE, 8, 0.0)
    rules = policy()
    rules.ended(run, 5.0)
    assert rules.begun(LANE, 8, 5.0).ends == pytest.approx(5.017)


def test_a_failed_run_teaches_nothing():
    """A model that raises at once is not fast."""
    rules = policy()
    for number in range(50):
        rules.ended(rules.begun(LANE, 8, float(number)), float(number), ran=False)
    assert rules.begun(LANE, 8, 60.0).ends == pytest.approx(60.017)


# The size of batches


@pytest.mark.parametrize(("slo_s", "rows"), [(0.2, 32), (0.1, 16), (0.05, 8), (0.02, 1)])
def test_two_batches_fit_into_the_goal(slo_s: float, rows: int):
    """So that a request can wait for one and run in the next; a goal below that leaves single rows."""
    rules = policy(slo_s, most_rows=64)
    lane = [entry() for _ in range(200)]
    for each in lane:
        rules.joined(each)
    assert rules.choose(lane, 0.0) == (0, rows)


def test_sizes_follow_what_runs_take():
    """Where batches turn out slower than measured, they are made smaller."""
    rules = policy(0.1)
    for number in range(100):
        rules.ended(rules.begun(LANE, 8, number * 1.0), number + 0.068)
    lane = [entry(at=200.0) for _ in range(20)]
    for each in lane:
        rules.joined(each)
    assert rules.choose(lane, 200.0)[1] < 8


def test_a_batch_is_short_enough_for_the_first_to_be_in_time():
    """With 15 ms left four rows are taken and not eight."""
    rules = SloPolicy(0.1, lambda lane, rows: 0.002 * rows, lambda signature: 8)
    queue = BatchQueue(LIMITS, rules)
    for each in [entry(at=-0.078), *(entry(at=-0.01) for _ in range(7))]:
        queue.offer([each])
    taken = queue.take(0.0)
    assert (len(taken.entries), taken.late) == (4, [])


def test_a_lane_that_does_not_fuse_runs_one_by_one():
    """Each is a batch of its own."""
    queue = BatchQueue(LIMITS, policy())
    queue.offer([entry(lane=ALONE)])
    queue.offer([entry(lane=ALONE)])
    assert [len(queue.take(0.0).entries) for _ in range(2)] == [1, 1]


def test_nothing_waits_for_a_fuller_batch():
    """At low load no delay is added."""
    queue = BatchQueue(LIMITS, policy())
    queue.offer([entry(at=3.0)])
    assert queue.next_look() == 3.0
    assert len(queue.take(3.0).entries) == 1


# Too late


def test_of_what_waits_the_hopeless_is_dropped_first():
    """Those who can no longer be in time make room for those who can, and are handed back to be refused."""
    queue = BatchQueue(LIMITS, policy())
    old, young = [entry(at=0.0) for _ in range(2)], [entry(at=0.08) for _ in range(2)]
    for each in [*old, *young]:
        queue.offer([each])
    taken = queue.take(0.085)
    assert (taken.late, taken.entries) == (old, young)
    assert queue.rows == 0


def test_where_all_are_hopeless_they_are_run():
    """After a stall with nobody behind, a late answer is worth more than none."""
    queue = BatchQueue(LIMITS, policy())
    late = [entry(at=0.0) for _ in range(3)]
    for each in late:
        queue.offer([each])
    taken = queue.take(5.0)
    assert (taken.late, taken.entries) == ([], late)


def test_in_a_flood_the_hopeless_are_dropped_even_if_all_are():
    """Where more comes than can be run, the next will be in time at once; and the queue is kept short besides."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    now, waiting = 0.0, 0
    for _ in range(40):
        waiting = fill(queue, at=now)
        taken = queue.take(now)
        run = rules.begun(LANE, len(taken.entries), now)
        for _ in range(50):
            with contextlib.suppress(Overloaded):
                queue.offer([entry(at=now)])
        now += 0.017
        rules.ended(run, now)
    assert waiting < 20
    waiting = len(queue)
    taken = queue.take(now + 1.0)
    assert (len(taken.late), taken.entries, len(queue)) == (waiting, [], 0)
    queue.offer([entry(at=now + 1.0)])
    assert len(queue.take(now + 1.0).entries) == 1


def test_a_caller_who_left_is_cancelled_and_not_late():
    """And one whose own deadline has passed is expired."""
    queue = BatchQueue(LIMITS, policy())
    gone, expired, hopeless, good = entry(), entry(deadline=0.05), entry(at=0.001), entry(at=0.08)
    for each in (gone, expired, hopeless, good):
        queue.offer([each])
    gone.reply.cancel()  # type: ignore[attr-defined]
    taken = queue.take(0.085)
    assert (taken.cancelled, taken.expired, taken.late, taken.entries) == (1, [expired], [hopeless], [good])


# Order


def test_the_earlier_deadline_goes_first():
    """Not the earlier arrival."""
    queue = BatchQueue(replace(LIMITS, max_batch_rows=1), policy(most_rows=1))
    patient, urgent = entry(at=0.0), entry(at=0.001, deadline=0.06)
    queue.offer([patient])
    queue.offer([urgent])
    assert queue.take(0.002).entries == [urgent]


@pytest.mark.parametrize("rules", [None, policy(most_rows=1)], ids=["no goal", "goal"])
def test_a_higher_level_goes_first_but_not_for_ever(rules: SloPolicy | None):
    """What waits for longer than the head start goes before newcomers of any level."""
    queue = BatchQueue(replace(LIMITS, max_batch_rows=1), rules)
    head_start = 1.0 if rules is None else 0.025
    normal = entry(at=0.0)
    low = entry(at=0.0, level=2)
    soon, later = entry(at=head_start / 2, level=0), entry(at=head_start * 1.5, level=0)
    for each in (low, normal, soon):
        queue.offer([each])
    assert queue.take(head_start / 2).entries == [soon]
    queue.offer([later])
    assert [queue.take(head_start * 2).entries for _ in range(3)] == [[normal], [later], [low]]


def test_levels_of_priorities():
    """1 goes first, 0 and 2 are the same, and whatever is more goes last."""
    assert [level_of(priority) for priority in (0, 1, 2, 3, 4, 2**63 - 1)] == [1, 0, 1, 2, 2, 2]


def test_a_higher_level_does_not_wait_for_what_goes_after_it():
    """It is let in where a request of a lower level is refused."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    rules.begun(LANE, 8, 0.0)
    assert fill(queue) == 25
    queue.offer([entry(level=0)])
    assert len(queue) == 26


def test_no_level_is_refused_for_ever():
    """While a higher level fills the queue, each eighth of the others is tried again on its terms."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    now, admitted = 0.0, 0
    run = rules.begun(LANE, 8, now)
    for _ in range(40):
        for _ in range(16):
            for level in (0, 2):
                try:
                    queue.offer([entry(at=now, level=level)])
                    admitted += level == 2
                except Overloaded:
                    pass
        now = run.ends
        rules.ended(run, now)
        taken = queue.take(now)
        run = rules.begun(LANE, sum(each.rows for each in taken.entries), now)
    assert admitted >= 10


def test_a_goal_that_comes_later_knows_what_waits():
    """The rows that waited are ahead of the next, and are counted out again as they leave."""
    queue = BatchQueue(LIMITS)
    for _ in range(25):
        queue.offer([entry()])
    rules = policy()
    queue.follow(rules)
    rules.begun(LANE, 8, 0.0)
    with pytest.raises(Overloaded):
        queue.offer([entry()])
    assert len(queue.clear()) == 25
    queue.follow(None)
    queue.offer([entry()])


def test_lanes_that_nobody_waits_in_are_forgotten():
    """Callers choose the shapes, so there is a bound to them."""
    rules = policy()
    for width in range(3000):
        lane = Lane(DOUBLE, ((width,),), conforms=False, fuses=True)
        rules.ended(rules.begun(lane, 1, float(width)), width + 0.01)
    assert len(rules._loads) <= 1024


@given(
    st.lists(
        st.tuples(st.floats(0, 0.02), st.integers(1, 8), st.integers(0, 2), st.floats(0.5, 1.0)),
        min_size=1,
        max_size=80,
    )
)
def test_what_is_let_in_is_in_time(arrivals: list[tuple[float, int, int, float]]):
    """Where batches take what the curve says at most, nothing of one level that was let in ends after its goal."""
    rules = policy()
    queue = BatchQueue(LIMITS, rules)
    now, run = 0.0, None
    running: list[Entry] = []
    ends = float("inf")
    level = arrivals[0][2]
    ended: list[tuple[float, float]] = []
    pending = [(gap, rows, share) for gap, rows, _, share in arrivals]
    arrival = pending[0][0]
    while pending or len(queue) or running:
        if pending and arrival <= ends:
            now = arrival
            _, rows, share = pending.pop(0)
            with contextlib.suppress(Overloaded):
                queue.offer([entry(rows, at=now, level=level)])
            arrival = now + pending[0][0] if pending else float("inf")
        else:
            now = ends
            ended += [(each.enqueued, now) for each in running]
            assert run is not None
            rules.ended(run, now)
            running, ends = [], float("inf")
        if not running and len(queue):
            running = queue.take(now).entries
            if running:
                total = sum(each.rows for each in running)
                run = rules.begun(LANE, total, now)
                ends = now + measured(LANE, total) * share
    assert all(end - start <= 0.1 for start, end in ended)
