"""The use case before a small fake engine: what is held, refused, submitted and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from service.batching.queue import Spent
from service.errors import (
    Code,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    KilnError,
    NotFound,
    Overloaded,
    Unavailable,
)
from service.metrics import Metrics
from service.predictor import Decoded, ModelRef, Predictor, choose_signature, validate
from service.tensors import DataType, Signature, Tensors, TensorSpec
from tests.fakes import DOUBLE, rows

REF = ModelRef("double")


class FakeEngine:
    """One version of one model, itself the handle; fails where it is told to."""

    model, version = "double", 7
    signatures: Mapping[str, Signature] = {"serving_default": DOUBLE}

    def __init__(self) -> None:
        self.held = 0
        self.submitted: list[Tensors] = []
        self.priorities: list[int] = []
        self.failures: dict[str, BaseException] = {}
        """What `check`, `acquire`, `submit` or the answer raises."""

    def _fail_at(self, step: str) -> None:
        if step in self.failures:
            raise self.failures[step]

    def check(self, ref: ModelRef) -> None:
        assert ref == REF
        self._fail_at("check")

    def is_coming(self, ref: ModelRef) -> bool:
        return False

    async def wait(self, ref: ModelRef, deadline: float | None) -> None:
        raise AssertionError

    def acquire(self, ref: ModelRef) -> FakeEngine:
        self._fail_at("acquire")
        self.held += 1
        return self

    def release(self) -> None:
        self.held -= 1

    def submit(
        self,
        signature: Signature,
        inputs: Tensors,
        deadline: float | None,
        spent: Spent | None = None,
        priority: int = 0,
    ) -> asyncio.Future[Tensors]:
        self._fail_at("submit")
        self.priorities.append(priority)
        assert self.held == 1
        self.submitted.append(inputs)
        answer: asyncio.Future[Tensors] = asyncio.get_running_loop().create_future()
        if "answer" in self.failures:
            answer.set_exception(self.failures["answer"])
        else:
            answer.set_result({"y": inputs["x"] * 2})
        return answer


class Setup:
    """A predictor, its engine and its metrics."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.metrics = Metrics()
        self.predictor = Predictor(cast("Any", self.engine), self.metrics)

    async def ask(self, deadline: float | None = None, **decoded: Any) -> Any:
        with self.predictor.request(REF, "rest-v2") as request:
            assert self.value("kiln_requests_in_flight") == 1
            return await request.predict(
                deadline, lambda signatures: Decoded(signatures["serving_default"], **{"inputs": rows(1), **decoded})
            )

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)

    def check_counted(self, code: str, *, model: str = "double", version: str = "7") -> None:
        """Exactly one request was counted, with this outcome; its time only where a version took it."""
        labels = {"model": model, "version": version, "protocol": "rest-v2"}
        assert self.value("kiln_requests_total", code=code, **labels) == 1
        families = {family.name: family for family in self.metrics.registry.collect()}
        assert sum(sample.value for sample in families["kiln_requests"].samples) == 1
        assert self.value("kiln_request_duration_seconds_count", **labels) == (1 if version else 0)
        assert self.value("kiln_requests_in_flight") == 0


@pytest.fixture
def setup() -> Setup:
    """A predictor among fakes."""
    return Setup()


async def test_a_priority_reaches_the_batcher(setup: Setup):
    """Alone, and with other signatures of one version; 0 where none is stated."""
    await setup.ask(priority=1)
    with setup.predictor.request(REF, "grpc-tfs") as request:
        await request.predict_all(None, [lambda signatures: Decoded(DOUBLE, rows(1))])
    assert setup.engine.priorities == [1, 0]


async def test_a_request_is_answered_and_counted(setup: Setup):
    """Valid inputs are submitted; the outputs come back with who made them, and the version is given back."""
    answer = await setup.ask()
    assert (answer.model, answer.version, answer.signature) == ("double", 7, DOUBLE)
    assert answer.outputs["y"].tolist() == [[2, 2, 2]]
    assert setup.engine.held == 0
    setup.check_counted("ok")


@pytest.mark.parametrize(
    ("error", "model"),
    [
        (NotFound("no such model"), ""),
        (Unavailable("loading"), "double"),
        (InvalidArgument("Unrecognized servable version label: best"), "double"),
    ],
)
async def test_a_model_that_cannot_be_asked_is_refused_on_entry(setup: Setup, error: KilnError, model: str):
    """The refusal comes before any body is read; a name that no model has makes no series of its own."""
    setup.engine.failures["check"] = error
    with pytest.raises(type(error)), setup.predictor.request(REF, "rest-v2"):
        pytest.fail("the request was let in")
    setup.check_counted(error.code.value, model=model, version="")


@pytest.mark.parametrize("step", ["submit", "answer"])
@pytest.mark.parametrize("error", [Overloaded("full"), DeadlineExceeded("late"), Internal("broken")])
async def test_whatever_fails_gives_the_version_back(setup: Setup, step: str, error: KilnError):
    """A full queue or a failed run is raised as it is, counted by its code, and holds nothing."""
    setup.engine.failures[step] = error
    with pytest.raises(type(error)):
        await setup.ask()
    assert setup.engine.held == 0
    setup.check_counted(error.code.value)


async def test_a_version_that_went_since_entry_is_counted_without_one(setup: Setup):
    """Between entry and predict a version can drain: the request is then nobody's."""
    setup.engine.failures["acquire"] = Unavailable("draining")
    with pytest.raises(Unavailable):
        await setup.ask()
    setup.check_counted("unavailable", version="")


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("a bug"), "internal"), (asyncio.CancelledError(), "cancelled")]
)
async def test_what_nobody_foresaw_is_counted_too(setup: Setup, error: BaseException, code: str):
    """A bug counts as internal, a caller who went away as cancelled."""
    setup.engine.failures["submit"] = error
    with pytest.raises(type(error)):
        await setup.ask()
    assert setup.engine.held == 0
    setup.check_counted(code)


async def test_a_failing_decoder_is_the_outcome_of_its_request(setup: Setup):
    """What a decoder raises ends the request; the version is held while it decodes, and then given back."""

    def decode(signatures: Mapping[str, Signature]) -> Decoded:
        assert setup.engine.held == 1
        raise InvalidArgument("malformed")

    with pytest.raises(InvalidArgument), setup.predictor.request(REF, "rest-v2") as request:
        await request.predict(None, decode)
    assert setup.engine.held == 0
    setup.check_counted("invalid_argument")


@pytest.mark.parametrize(("ahead_s", "is_late"), [(60.0, False), (-60.0, True)])
async def test_a_deadline_that_passed_is_not_queued(setup: Setup, ahead_s: float, is_late: bool):
    """A request that is late already does not reach the queue."""
    deadline = time.monotonic() + ahead_s
    if is_late:
        with pytest.raises(DeadlineExceeded, match="before the request was queued"):
            await setup.ask(deadline)
        assert setup.engine.submitted == []
        setup.check_counted("deadline_exceeded")
    else:
        await setup.ask(deadline)
        setup.check_counted("ok")


async def test_nothing_invalid_is_submitted(setup: Setup):
    """Inputs that do not fit the signature are refused before they reach the queue."""
    with pytest.raises(InvalidArgument):
        await setup.ask(inputs={"x": np.ones((1, 4), np.float32)})
    assert setup.engine.submitted == []
    setup.check_counted("invalid_argument")


# Validation


def signature(*, takes_other_shapes: bool = False) -> Signature:
    return Signature(
        "serving_default",
        (TensorSpec("a", DataType.FP32, (None, 3)), TensorSpec("b", DataType.INT32, (None,))),
        (TensorSpec("y", DataType.FP32, (None,)),),
        takes_other_shapes=takes_other_shapes,
    )


A, B = np.zeros((2, 3), np.float32), np.zeros(2, np.int32)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"a": A}, "input 'b' is missing"),
        ({"a": A, "b": B, "c": B}, "unknown input 'c'"),
        ({"a": A[:, :2], "b": B}, r"input 'a': \[3\] expected, got \[2\]"),
        ({"a": A, "b": B.astype(np.int64)}, "input 'b': expected datatype INT32, got int64"),
        ({"a": A, "b": B[:1]}, "inputs differ in rows: 'a' has 2, 'b' has 1"),
        ({"a": A[:0], "b": B[:0]}, "at least one row is expected"),
    ],
)
def test_inputs_must_fit_the_signature(inputs: Tensors, text: str):
    """Names, shapes, types and rows are each refused with the input's name."""
    with pytest.raises(InvalidArgument, match=text):
        validate(Decoded(signature(), inputs))


@pytest.mark.parametrize(
    ("strict", "takes_others", "passes"), [(True, True, False), (False, False, False), (False, True, True)]
)
def test_other_shapes_go_to_the_graph_only_where_both_allow_it(strict: bool, takes_others: bool, passes: bool):
    """A lenient dialect may try a shape that the signature does not declare, if the graph can be let try."""
    decoded = Decoded(signature(takes_other_shapes=takes_others), {"a": A[:, :2], "b": B}, strict_shapes=strict)
    if passes:
        validate(decoded)
    else:
        with pytest.raises(InvalidArgument, match="expected, got"):
            validate(decoded)


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (["serving_default", "train"], "", "serving_default"),
        (["serving_default", "train"], "train", "train"),
        (["serve"], "", "serve"),
    ],
)
def test_a_signature_is_chosen_by_name_or_by_being_the_only_one(names: list[str], asked: str, chosen: str):
    """Without a name it is serving_default, or the only signature that there is."""
    signatures = {name: Signature(name, (), ()) for name in names}
    assert choose_signature(signatures, asked).name == chosen


@pytest.mark.parametrize(
    ("names", "asked", "text"),
    [
        (["serve", "train"], "", '"serving_default" not found in signature def; this model has serve, train'),
        (["serve"], "eval", '"eval" not found in signature def; this model has serve'),
        ([], "", '"serving_default" not found in signature def; this model has none'),
    ],
)
def test_a_signature_that_is_not_there_is_a_failed_precondition(names: list[str], asked: str, text: str):
    """The refusal uses TensorFlow Serving's words and names the signatures that there are."""
    with pytest.raises(FailedPrecondition) as refused:
        choose_signature({name: Signature(name, (), ()) for name in names}, asked)
    assert str(refused.value) == f"Serving signature name: {text}"
    assert refused.value.code is Code.FAILED_PRECONDITION


# Several signatures of one version


def decoded_as(value: float, signatures: Mapping[str, Signature]) -> Decoded:
    return Decoded(signatures["serving_default"], rows(value))


async def ask_all(setup: Setup, *values: float, deadline: float | None = None) -> list[Any]:
    with setup.predictor.request(REF, "rest-v2") as request:
        return await request.predict_all(
            deadline,
            [partial(decoded_as, value) for value in values],
        )


async def test_several_are_one_request_on_one_version(setup: Setup):
    """Held once, counted once, answered in order."""
    answers = await ask_all(setup, 1, 2)
    assert [answer.outputs["y"][0, 0] for answer in answers] == [2, 4]
    assert {(answer.model, answer.version) for answer in answers} == {("double", 7)}
    assert setup.engine.held == 0
    setup.check_counted("ok")


@pytest.mark.parametrize("step", ["submit", "answer"])
async def test_one_that_fails_fails_them_all(setup: Setup, step: str):
    """Once all have ended; the version is given back."""
    setup.engine.failures[step] = Overloaded("full")
    with pytest.raises(Overloaded):
        await ask_all(setup, 1, 2)
    assert setup.engine.held == 0
    setup.check_counted("overloaded")


async def test_all_are_checked_before_any_is_queued(setup: Setup):
    """The second is wrong, so the first is not run either."""
    with setup.predictor.request(REF, "rest-v2") as request, pytest.raises(InvalidArgument):
        await request.predict_all(
            None,
            [
                partial(decoded_as, 1),
                lambda signatures: Decoded(signatures["serving_default"], {}),
            ],
        )
    assert setup.engine.submitted == []
    assert setup.engine.held == 0


async def test_several_past_their_deadline_are_not_queued(setup: Setup):
    """As one alone."""
    with pytest.raises(DeadlineExceeded):
        await ask_all(setup, 1, 2, deadline=time.monotonic() - 1)
    assert setup.engine.submitted == []
    setup.check_counted("deadline_exceeded")
