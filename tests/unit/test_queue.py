"""The queue of a model version: a plain object, tested with times and replies that are made up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.batching.queue import BatchQueue, Entry, Lane, Limits
from service.errors import InvalidArgument, Overloaded
from tests.fakes import DOUBLE, FakeReply

LIMITS = Limits(max_batch_rows=4, max_queue_rows=10, max_queue_bytes=100)
WAIT = Limits(4, 10, 100, batch_wait_s=5.0)
LANES = {
    "a": Lane(DOUBLE, ((3,),), conforms=True, fuses=True),
    "b": Lane(DOUBLE, ((4,),), conforms=False, fuses=True),
    "alone": Lane(DOUBLE, ((2, 3),), conforms=True, fuses=False),
}


def entry(
    lane: str = "a", rows: int = 1, *, at: float = 0.0, deadline: float | None = None, size_bytes: int = 1
) -> Entry:
    payload = {"x": np.zeros((rows, 1), np.float32)}
    return Entry(LANES[lane], payload, rows, size_bytes, at, deadline, FakeReply())


def queue_of(*entries: Entry, limits: Limits = LIMITS) -> BatchQueue:
    queue = BatchQueue(limits)
    for each in entries:
        queue.offer([each])
    return queue


def test_an_empty_queue_yields_nothing():
    """There is nothing to take, no time to look, no deadline and no full batch in an empty queue."""
    queue = BatchQueue(LIMITS)
    taken = queue.take(0.0)
    assert (taken.entries, taken.expired, taken.cancelled) == ([], [], 0)
    assert queue.next_look() is None
    assert queue.earliest_deadline() is None
    assert not queue.has_full_batch()
    assert repr(queue) == "<BatchQueue 0 entries, 0 rows in 0 lanes>"


def test_the_lane_that_waited_longest_comes_first_and_in_order():
    """`take` empties the oldest lane up to a batch, without reaching past an entry that does not fit."""
    old = [entry("b", 2, at=1), entry("b", 1, at=3), entry("b", 3, at=4), entry("b", 1, at=5)]
    young = [entry("a", 1, at=2)]
    queue = queue_of(*young, *old)
    assert queue.take(9).entries == old[:2]
    assert queue.take(9).entries == young
    assert queue.take(9).entries == old[2:]
    assert (len(queue), queue.rows, queue.size_bytes) == (0, 0, 0)


def test_entries_that_do_not_fuse_are_taken_one_by_one():
    """In a lane without fusing each entry is a full batch of its own."""
    entries = [entry("alone"), entry("alone")]
    queue = queue_of(*entries, limits=Limits(1, 10, 100))
    assert queue.has_full_batch()
    assert [queue.take(0).entries for _ in range(2)] == [entries[:1], entries[1:]]


@pytest.mark.parametrize(
    ("rows", "size_bytes", "text"),
    [
        (4, 1, r"7 rows \(1 bytes\) wait, 4 rows \(1 bytes\) came, the limit is 10 rows \(100 bytes\)"),
        (1, 100, r"7 rows \(1 bytes\) wait, 1 rows \(100 bytes\) came, the limit is 10 rows \(100 bytes\)"),
    ],
    ids=["rows", "bytes"],
)
def test_what_finds_no_room_is_refused_as_a_whole(rows: int, size_bytes: int, text: str):
    """An offer over either limit raises `Overloaded` with the numbers, and changes nothing."""
    queue = queue_of(entry(rows=7))
    newcomer = entry(rows=rows, size_bytes=size_bytes)
    assert not queue.has_room([newcomer])
    with pytest.raises(Overloaded, match=text):
        queue.offer([newcomer])
    assert (len(queue), queue.rows, queue.size_bytes) == (1, 7, 1)


@pytest.mark.parametrize(("rows", "size_bytes"), [(11, 1), (1, 101)])
def test_what_can_never_fit_is_no_overload(rows: int, size_bytes: int):
    """An offer larger than the whole queue is the caller's fault: coming back later cannot help."""
    with pytest.raises(InvalidArgument, match="in one request, but the queue holds 10 rows"):
        BatchQueue(LIMITS).offer([entry(rows=rows, size_bytes=size_bytes)])


def test_exactly_full_is_not_too_much():
    """Entries may fill the queue to its limits, both of them."""
    queue = queue_of(entry(rows=5, size_bytes=50))
    last = [entry(rows=5, size_bytes=50)]
    assert queue.has_room(last)
    queue.offer(last)
    assert (queue.rows, queue.size_bytes) == (10, 100)


@pytest.mark.parametrize(
    ("rows_per_s", "retry_s"), [(0.0, 1.0), (5.0, 2.0), (0.01, 60.0)], ids=["not measured", "measured", "capped"]
)
def test_the_time_to_retry_follows_the_measured_rate(rows_per_s: float, retry_s: float):
    """`Overloaded` says how long the rows waiting take at the measured rate: a minute at most."""
    queue = queue_of(entry(rows=10))
    with pytest.raises(Overloaded) as refused:
        queue.offer([entry()], rows_per_s)
    assert refused.value.retry_after_s == retry_s


def test_take_drops_the_cancelled_and_sets_the_expired_apart():
    """Entries that must not run cost a batch no room; a deadline passes at its very moment."""
    gone, late, good, more = entry(rows=4), entry(rows=1, deadline=7), entry(rows=3), entry(rows=1)
    queue = BatchQueue(LIMITS)
    queue.offer([gone, late, good, more])
    gone.reply.set_result(None)
    taken = queue.take(7)
    assert (taken.entries, taken.expired, taken.cancelled) == ([good, more], [late], 1)
    assert (len(queue), queue.rows) == (0, 0)


def test_take_goes_on_to_the_next_lane_when_all_of_one_is_dropped():
    """A lane of which nobody is left does not end the look for work."""
    late, good = entry("a", at=1, deadline=5), entry("b", at=2)
    taken = queue_of(late, good).take(6)
    assert (taken.entries, taken.expired) == ([good], [late])


def test_sweep_removes_from_all_lanes_what_must_not_run():
    """A sweep takes the cancelled and the expired from anywhere, keeps order, and gives the room back."""
    kept = [entry("a"), entry("a")]
    gone, late = entry("a"), entry("b", deadline=1)
    queue = queue_of(kept[0], gone, kept[1], late)
    gone.reply.set_result(None)
    swept = queue.sweep(1)
    assert (swept.expired, swept.cancelled) == ([late], 1)
    assert (queue.rows, queue.size_bytes) == (2, 2)
    assert queue.take(1).entries == kept
    assert queue.next_look() is None


def test_clear_hands_over_everything():
    """`clear` returns all entries and leaves the queue as it began."""
    entries = [entry("a"), entry("b", 3)]
    queue = queue_of(*entries)
    assert queue.clear() == entries
    assert (len(queue), queue.rows, queue.size_bytes) == (0, 0, 0)


def test_a_lane_is_due_when_its_wait_is_over_or_it_is_full():
    """With a batch wait a lane is looked at when its first entry has waited, or at once when full."""
    queue = queue_of(entry(at=1), limits=WAIT)
    assert queue.next_look() == 6
    assert queue.take(5.9).entries == []
    queue.offer([entry(rows=3, at=2)])
    assert queue.next_look() == 1
    assert len(queue.take(2).entries) == 2


def test_a_full_lane_is_taken_before_an_older_one_that_still_waits():
    """With a batch wait, of the lanes that are due the oldest is taken, not of all."""
    older, full = entry("a", at=1), entry("b", 4, at=2)
    queue = queue_of(older, full, limits=WAIT)
    assert queue.take(2).entries == [full]
    assert queue.take(5).entries == []
    assert queue.take(6).entries == [older]


@pytest.mark.parametrize(
    ("entries", "is_full"),
    [
        ([entry(rows=3)], False),
        ([entry(rows=3), entry(rows=1)], True),
        ([entry("a", 2, at=1), entry("b", 4, at=2)], False),
        ([entry("a", 2, at=3), entry("b", 4, at=2)], True),
    ],
    ids=["too few", "enough", "not of the lane that is next", "of the lane that is next"],
)
def test_a_batch_is_full_when_no_row_more_would_fit(entries: list[Entry], is_full: bool):
    """Whether to assemble ahead depends on the rows of the lane that would be taken."""
    assert queue_of(*entries).has_full_batch() is is_full


def test_a_signatures_batches_may_be_smaller_than_the_limit():
    """Where a plan answers no more rows a second by fusing more, batches have as many rows as that and no more."""
    queue = BatchQueue(LIMITS)
    queue.set_most_rows(DOUBLE.name, 2)
    waiting = [entry(rows=1), entry(rows=1), entry(rows=1), entry(rows=4), entry(rows=1)]
    for each in waiting:
        queue.offer([each])
    taken = [queue.take(0.0).entries for _ in range(4)]
    assert taken == [waiting[:2], waiting[2:3], waiting[3:4], waiting[4:]]


def test_a_batch_is_full_with_the_most_rows_of_its_signature():
    """So that it is assembled ahead, and does not wait for more."""
    queue = BatchQueue(WAIT)
    queue.set_most_rows(DOUBLE.name, 2)
    queue.offer([entry(at=1)])
    assert (queue.has_full_batch(), queue.take(2.0).entries) == (False, [])
    queue.offer([entry(at=1)])
    assert queue.has_full_batch()
    assert queue.next_look() == 1.0
    assert len(queue.take(2.0).entries) == 2


def test_no_batch_is_larger_than_the_limit():
    """Whatever a plan would like best; and another signature's bound is not this one's."""
    queue = BatchQueue(LIMITS)
    queue.set_most_rows(DOUBLE.name, 100)
    queue.set_most_rows("other", 1)
    for _ in range(6):
        queue.offer([entry()])
    assert queue.has_full_batch()
    assert len(queue.take(0.0).entries) == 4
    assert not queue.has_full_batch()
    assert len(queue.take(0.0).entries) == 2


def test_the_earliest_deadline_is_that_of_all_lanes():
    """The first deadline among all entries, wherever they wait; those without one do not count."""
    queue = queue_of(entry("a"), entry("a", deadline=9), entry("b", deadline=4))
    assert queue.earliest_deadline() == 4


class QueueHistory(RuleBasedStateMachine):
    """Any history of a queue: nothing is lost or doubled, the bounds hold, lanes keep their order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.queue = BatchQueue(LIMITS)
        self.waiting: list[Entry] = []
        """What must still be in the queue, in order of arrival."""

    @rule(
        lane=st.sampled_from(sorted(LANES)),
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        size_bytes=st.integers(0, 40),
        ttl=st.none() | st.integers(0, 5),
    )
    def offer(self, lane: str, sizes: list[int], size_bytes: int, ttl: int | None):
        deadline = None if ttl is None else self.now + ttl
        entries = [entry(lane, rows, at=self.now, deadline=deadline, size_bytes=size_bytes) for rows in sizes]
        before = (len(self.queue), self.queue.rows, self.queue.size_bytes)
        try:
            self.queue.offer(entries)
        except (Overloaded, InvalidArgument):
            assert (len(self.queue), self.queue.rows, self.queue.size_bytes) == before
        else:
            self.waiting += entries

    @rule(seconds=st.integers(1, 3))
    def pass_time(self, seconds: int):
        self.now += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject):
        data.draw(st.sampled_from(self.waiting)).reply.set_result(None)

    @rule()
    def take(self):
        taken = self.queue.take(self.now)
        batch = taken.entries
        assert len({each.lane.key for each in batch}) <= 1
        assert sum(each.rows for each in batch) <= LIMITS.max_batch_rows
        assert all(each.lane.fuses for each in batch) or len(batch) == 1
        assert not any(self._is_dead(each) for each in batch)
        self._left(batch, taken.expired, taken.cancelled)
        if batch:
            in_lane = [each for each in self.waiting if each.lane.key == batch[0].lane.key]
            assert all(each.enqueued >= batch[-1].enqueued for each in in_lane)
        else:
            assert self.waiting == []

    @rule()
    def sweep(self):
        swept = self.queue.sweep(self.now)
        self._left([], swept.expired, swept.cancelled)
        assert not any(self._is_dead(each) for each in self.waiting)

    @rule()
    def clear(self):
        assert sorted(map(id, self.queue.clear())) == sorted(map(id, self.waiting))
        self.waiting = []

    @invariant()
    def bounds_hold_and_the_sums_are_right(self):
        assert self.queue.rows == sum(each.rows for each in self.waiting) <= LIMITS.max_queue_rows
        assert self.queue.size_bytes == sum(each.size_bytes for each in self.waiting) <= LIMITS.max_queue_bytes
        assert len(self.queue) == len(self.waiting)

    def _is_dead(self, each: Entry) -> bool:
        return each.reply.done() or (each.deadline is not None and each.deadline <= self.now)

    def _left(self, batch: list[Entry], expired: list[Entry], cancelled: int) -> None:
        """Strike what left the queue off, in the order in which it came; what was cancelled is only counted."""
        for each in (*batch, *expired):
            assert sum(each is other for other in self.waiting) == 1
            self.waiting.remove(each)
        assert all(each.deadline is not None and each.deadline <= self.now for each in expired)
        inside = {id(each) for lane in self.queue._lanes.values() for each in lane}
        gone = [each for each in self.waiting if id(each) not in inside]
        assert len(gone) == cancelled
        assert all(each.reply.done() for each in gone)
        self.waiting = [each for each in self.waiting if id(each) in inside]


TestQueueHistory = QueueHistory.TestCase
TestQueueHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
