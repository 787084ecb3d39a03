"""Which requests are followed to their end, and who is told of them."""

from __future__ import annotations

import logging
import random
from typing import Any, cast

import numpy as np
import pytest

from service.errors import Code, InvalidArgument, NotFound
from service.following.followed import Followed, Following
from service.logs import fields_of
from service.metrics import Metrics
from service.predictor import Decoded, ModelRef, Predictor
from service.trace_context import NOBODY, Caller
from service.trace_context import caller as current
from tests.fakes import DOUBLE, rows
from tests.unit.test_predictor import FakeEngine

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Follower:
    """Keeps what it is told."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.told: list[Followed] = []

    def tell(self, followed: Followed) -> None:
        self.told.append(followed)


def followed(following: Following, caller: Caller = NOBODY) -> Followed:
    begun = following.begin(caller)
    assert begun is not None
    return begun


def test_nobody_follows_unless_asked():
    """Without anyone who wants to know there is nothing to begin."""
    assert not Following().is_needed
    assert Following().begin(NOBODY) is None
    assert Following().trace_share is None


@pytest.mark.parametrize(
    ("share", "sampled", "is_traced"), [(0.0, True, True), (1.0, False, False), (0.0, None, False), (1.0, None, True)]
)
def test_the_callers_trace_decides_else_chance(share: float, sampled: bool | None, is_traced: bool):
    """A ``traceparent`` says whether its request is traced, whatever the share; of the others the share is."""
    caller = NOBODY if sampled is None else Caller(TRACE, SPAN, sampled)
    begun = Following(Follower(share)).begin(caller)
    assert (begun is not None) == is_traced
    if begun is not None and sampled:
        assert begun.ids is not None
        assert (begun.trace_id, begun.ids.parent_id) == (TRACE, int(SPAN, 16))


@pytest.mark.parametrize(("share", "in_a_row"), [(0.01, 8), (0.1, 1)])
def test_a_share_of_the_requests_is_traced_whoever_asks(share: float, in_a_row: int):
    """Chance begins with it, whether those before were passed by or not; a small share is traced a few in a row."""
    random.seed(5)
    following = Following(Follower(share))
    count = int(8000 / share)
    traced = [not following.passes_by() and following.begin(NOBODY) is not None for _ in range(count)]
    assert sum(traced) == pytest.approx(share * count, rel=0.1)
    gaps = np.diff(np.flatnonzero(traced))
    if in_a_row > 1:
        assert (gaps == 1).mean() == pytest.approx(1 - 1 / in_a_row, abs=0.01)
        gaps = gaps[gaps > 1]
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.15)  # as chance has it, not regularly
    assert following.begin(Caller(TRACE, SPAN, True)) is not None


@pytest.mark.parametrize(("share", "passes"), [(0.0, True), (1.0, False)])
def test_none_or_all_are_passed_by(share: float, passes: bool):
    """With nothing but traces to make; whoever logs or keeps requests looks at each."""
    assert Following(Follower(share)).passes_by() is passes
    assert not Following(Follower(share), access=lambda followed: None).passes_by()
    assert not Following(keep=Follower(0.0)).passes_by()


def test_the_share_is_kept_to():
    """Of many requests so many are followed as the share says."""
    random.seed(7)
    following = Following(keep=Follower(0.1))
    assert 800 < sum(following.begin(NOBODY) is not None for _ in range(10_000)) < 1200


def test_each_is_told_of_what_it_wants():
    """A trace of what is traced, the request log of what was answered, the access log of everything."""
    trace, keep, lines = Follower(0.0), Follower(1.0), list[Followed]()
    following = Following(trace, keep, lines.append)
    plain, failed, traced = followed(following), followed(following), followed(following, Caller(TRACE, SPAN, True))
    failed.code = Code.NOT_FOUND
    for each in (plain, failed, traced):
        following.end(each)
    assert trace.told == [traced]
    assert keep.told == [plain, traced]
    assert lines == [plain, failed, traced]


def test_a_request_is_of_the_trace_that_it_came_with():
    """Also where Kiln does not record it; with no trace there is no id."""
    following = Following(access=lambda followed: None)
    assert followed(following, Caller(TRACE, SPAN, False)).trace_id == TRACE
    assert followed(following).trace_id == ""


class Setup:
    """A predictor among fakes, all of whose requests are followed."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.metrics = Metrics()
        self.keep = Follower(1.0)
        self.trace = Follower(1.0)
        self.lines: list[Followed] = []
        following = Following(self.trace, self.keep, self.lines.append)
        self.predictor = Predictor(cast("Any", self.engine), self.metrics, following)

    async def ask(self) -> None:
        with self.predictor.request(ModelRef("double"), "rest-v2") as request:
            await request.predict(None, lambda signatures: Decoded(signatures["serving_default"], rows(1, 2)))


async def test_what_is_known_of_an_answered_request():
    """Who was asked, in what, what came, how long it took; and its trace is the example of its latency."""
    setup = Setup()
    await setup.ask()
    (told,) = setup.keep.told
    assert (told.model, told.version, told.protocol, told.code, told.rows) == ("double", 7, "rest-v2", None, 2)
    (asked,) = told.asked
    assert asked.signature == DOUBLE
    assert asked.inputs["x"].tolist() == rows(1, 2)["x"].tolist()
    assert asked.outputs is not None
    assert asked.outputs["y"].tolist() == rows(2, 4)["x"].tolist()
    assert told.decode_s is not None
    assert told.answered is not None
    assert told.started < told.answered < told.ended
    assert told.trace_id in setup.metrics.page("application/openmetrics-text")[0].decode()


async def test_lines_of_the_log_lead_to_a_trace_that_kiln_began(caplog: pytest.LogCaptureFixture):
    """Where no ``traceparent`` came, what is logged of a request has the trace that it is recorded in."""
    setup = Setup()
    with caplog.at_level("INFO", "kiln"), setup.predictor.request(ModelRef("double"), "rest-v2") as request:
        logging.getLogger("kiln").info("something")
        await request.predict(None, lambda signatures: Decoded(signatures["serving_default"], rows(1, 2)))
        told = fields_of(caplog.records[-1])
    (followed,) = setup.trace.told
    assert told == {"trace_id": followed.trace_id}
    assert [asked.spent.caller for asked in followed.asked] == [Caller(followed.trace_id)]


@pytest.mark.parametrize("step", ["check", "submit", "answer"])
async def test_what_is_known_of_a_failed_request(step: str):
    """Its code, wherever it failed; it is not kept, for nothing is to be warmed up with it."""
    setup = Setup()
    setup.engine.failures[step] = InvalidArgument("no")
    with pytest.raises(InvalidArgument):
        await setup.ask()
    (told,) = setup.lines
    assert setup.trace.told == [told]
    assert setup.keep.told == []
    assert told.code is Code.INVALID_ARGUMENT
    assert told.rows == (0 if step == "check" else 2)


def test_a_request_that_cannot_be_begun_is_counted_once():
    """Under no model, and told of; an error of one that was begun is not counted again."""
    setup = Setup()
    error = NotFound("versions are integers")
    setup.predictor.refused("grpc-v2", error)
    setup.predictor.refused("grpc-v2", error)
    labels = {"model": "", "version": "", "protocol": "grpc-v2", "code": "not_found"}
    assert setup.metrics.registry.get_sample_value("kiln_requests_total", labels) == 1
    (told,) = setup.lines
    assert (told.model, told.code, told.ended - told.started) == ("", Code.NOT_FOUND, 0)
    assert setup.predictor.trace_share == 1.0


def test_without_followers_a_refusal_is_only_counted():
    """There is nobody to tell."""
    metrics = Metrics()
    predictor = Predictor(cast("Any", FakeEngine()), metrics, Following())
    predictor.refused("rest-tfs", NotFound("no"))
    assert predictor.trace_share is None
    labels = {"model": "", "version": "", "protocol": "rest-tfs", "code": "not_found"}
    assert metrics.registry.get_sample_value("kiln_requests_total", labels) == 1


def test_a_request_that_is_passed_by_is_not_begun(monkeypatch: pytest.MonkeyPatch):
    """Only one with a trace or an id of its own is looked at closer."""
    following = Following(Follower(0.0))
    predictor = Predictor(cast("Any", FakeEngine()), Metrics(), following)
    begun: list[Caller] = []
    monkeypatch.setattr(following, "begin", begun.append)
    with predictor.request(ModelRef("double"), "rest-v2"):
        assert begun == []
    token = current.set(Caller(TRACE, SPAN, True))
    try:
        with predictor.request(ModelRef("double"), "rest-v2"):
            assert begun == [Caller(TRACE, SPAN, True)]
    finally:
        current.reset(token)


def test_a_refusal_that_nobody_follows():
    """It is counted, and its caller's trace is not made longer."""
    trace = Follower(0.0)
    predictor = Predictor(cast("Any", FakeEngine()), Metrics(), Following(trace))
    predictor.refused("rest-tfs", NotFound("no"))
    with pytest.raises(NotFound), predictor.request(ModelRef("double"), "rest-v2"):
        raise NotFound("no")
    assert trace.told == []
