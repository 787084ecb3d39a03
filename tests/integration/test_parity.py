"""The same question in each of the four dialects, and on a stream, has the same answer, or the same refusal."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from grpc import StatusCode

from service.batching.queue import Limits
from service.errors import Code
from service.rest.codes import HTTP_STATUS
from service.rpc.codes import GRPC_STATUS
from service.tensors import DataType, Signature, Tensors, TensorSpec
from tests.integration.conftest import MAX_MESSAGE_BYTES
from tests.integration.dialects import Answer, Dialects, Question, Refused, serving
from tests.integration.load import entered, queued
from tests.integration.rpc import INFER, PREDICT, infer_request, predict_request
from tests.signatures import assert_same, many, one

pytestmark = pytest.mark.usefixtures("placed")
LATE = "the deadline passed after … ms in the queue"
ALL = frozenset({"rest-tfs", "rest-v2", "grpc-tfs", "grpc-v2"})
FP32 = np.float32
ROW = {"x": np.array([[1, 2, 3]], FP32)}
PAIR = many(a=DataType.INT32, b=DataType.BYTES)
A, B = np.array([1, -2], np.int32), np.array([b"p", b"\xff"], object)
MIXED = Signature(
    "serving_default",
    (
        TensorSpec("image", DataType.UINT8, (None, 2, 2, 1)),
        TensorSpec("mask", DataType.BOOL, (None, 2)),
        TensorSpec("weight", DataType.BF16, (None,)),
        TensorSpec("any", DataType.FP64, (None, None)),
    ),
    tuple(
        TensorSpec(name, dtype, None if name == "y_any" else (None, *shape))
        for name, dtype, shape in (
            ("y_image", DataType.UINT8, (2, 2, 1)),
            ("y_mask", DataType.BOOL, (2,)),
            ("y_weight", DataType.BF16, ()),
            ("y_any", DataType.FP64, (None,)),
        )
    ),
)


def sample(dtype: DataType, shape: tuple[int, ...]) -> Any:
    """Distinct elements, whose doubles the type can hold."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    if dtype is DataType.BYTES:
        texts = [f"{number}".encode() + b"\xe9" * (number % 2) for number in numbers.flat]
        array = np.empty(len(texts), object)
        array[:] = texts
        return array.reshape(shape)
    if dtype is DataType.BOOL:
        return numbers % 3 == 0
    return (numbers * (0.5 if dtype.is_float else 1)).astype(dtype.numpy)


def doubled(array: Any) -> Any:
    return array if array.dtype.kind == "b" else array + array


def extremes(dtype: DataType) -> Any:
    """One row of what the type can just hold, and whose doubles it can too (integers wrap around)."""
    values: list[Any]
    if dtype is DataType.BYTES:
        values = [b"", b"\x00", b"\xff\xfe", "é".encode(), b'"\\\n', b'{"b64": "eA=="}', b"long" * 1000]
    elif dtype is DataType.BOOL:
        values = [True, False]
    elif dtype.is_float:
        limits = ml_dtypes.finfo(dtype.numpy)
        values = [limits.max / 2, limits.min / 2, limits.smallest_subnormal, -0.0, np.nan, np.inf, -np.inf]
    else:
        values = [np.iinfo(dtype.numpy).min, np.iinfo(dtype.numpy).max, 0]
    return np.array([values], object).astype(dtype.numpy)


async def ask_all(dialects: Dialects, question: Question) -> dict[str, Answer]:
    """The answer to `question` each way that there is."""
    return {name: await way(question) for name, way in dialects.ways(question).items()}


def dialects_of(answers: dict[str, Answer]) -> set[str]:
    return {way.partition(",")[0] for way in answers}


def check_answers(answers: dict[str, Answer], signature: Signature, inputs: Tensors) -> None:
    """Each is the doubles of `inputs`, in type, shape and value."""
    assert dialects_of(answers) == ALL
    for way, answer in answers.items():
        assert not isinstance(answer, Refused), (way, answer)
        for source, target in zip(signature.inputs, signature.outputs, strict=True):
            assert_same(answer[target.name], doubled(inputs[source.name]))


def check_refusals(
    answers: dict[str, Answer], code: Code, texts: str | dict[str, str], dialects: frozenset[str] = ALL
) -> None:
    """Each is refused with the status of `code` in its protocol and with its text of `texts`; all `dialects` are there.

    `texts` is the text that all share, or texts by the beginnings of the ways that have one of their own.
    """
    assert dialects_of(answers) == dialects
    own = {"": texts} if isinstance(texts, str) else texts
    for way, answer in answers.items():
        assert isinstance(answer, Refused), way
        if answer.status is not None:  # a message of a stream has a text only
            assert answer.status == (HTTP_STATUS if way.startswith("rest") else GRPC_STATUS)[code], (way, answer)
        text = re.sub(r"after \d+ ms", "after … ms", answer.text)
        assert text == own[max((start for start in own if way.startswith(start)), key=len)], way


@pytest.mark.parametrize("dtype", DataType)
@pytest.mark.parametrize("shape", [(1, 3), (4, 3)])
async def test_every_type(dtype: DataType, shape: tuple[int, int]):
    """One row and several, of every type."""
    signature = one(dtype)
    inputs = {"x": sample(dtype, shape)}
    async with serving(signature) as dialects:
        check_answers(await ask_all(dialects, Question(inputs, types={"y": dtype})), signature, inputs)


@pytest.mark.parametrize("dtype", DataType)
async def test_every_extreme(dtype: DataType):
    """The least and the greatest of every type; not-a-number, infinities, signed zero; strings of any bytes."""
    inputs = {"x": extremes(dtype)}
    signature = one(dtype, inputs["x"].shape)
    async with serving(signature) as dialects:
        check_answers(await ask_all(dialects, Question(inputs, types={"y": dtype})), signature, inputs)


@pytest.mark.parametrize(
    ("signature", "inputs"),
    [
        (one(shape=(None,)), {"x": sample(DataType.FP32, (3,))}),
        (one(shape=(None, 2, 2, 1)), {"x": sample(DataType.FP32, (2, 2, 2, 1))}),
        (one(shape=(None, None)), {"x": sample(DataType.FP32, (2, 5))}),
        (one(shape=None), {"x": sample(DataType.FP32, (1, 2, 3))}),
        (one(shape=()), {"x": sample(DataType.FP32, ())}),
        (one(shape=(2, 3)), {"x": sample(DataType.FP32, (2, 3))}),
        (one(), {"x": sample(DataType.FP32, (20, 3))}),
        (one(), {"x": np.array([[np.nan, np.inf, -np.inf]], FP32)}),
        (one(DataType.FP64), {"x": np.array([[0.1, -1e300, 5e-324]])}),
        (one(DataType.INT64), {"x": np.array([[2**62 - 1, -(2**62), 0]])}),
        (PAIR, {"a": A, "b": B}),
        (
            MIXED,
            {
                "image": sample(DataType.UINT8, (2, 2, 2, 1)),
                "mask": sample(DataType.BOOL, (2, 2)),
                "weight": sample(DataType.BF16, (2,)),
                "any": sample(DataType.FP64, (2, 4)),
            },
        ),
    ],
    ids=lambda value: value.describe() if isinstance(value, Signature) else "",
)
async def test_every_shape(signature: Signature, inputs: Tensors):
    """Vectors, images, open sizes, scalars, no batch dimension, more rows than a batch has, several inputs."""
    types = {spec.name: spec.dtype for spec in signature.outputs}
    async with serving(signature) as dialects:
        check_answers(await ask_all(dialects, Question(inputs, types=types)), signature, inputs)


async def test_a_version_and_a_signature_may_be_named():
    """Either by each dialect's own means."""
    signatures = one(), one(DataType.INT8, name="other")
    async with serving(*signatures) as dialects:
        question = Question({"x": sample(DataType.INT8, (2, 3))}, "m", 1, "other", types={"y": DataType.INT8})
        check_answers(await ask_all(dialects, question), signatures[1], question.inputs)


@pytest.mark.parametrize("version", [0, 1])
async def test_version_0_is_the_default_one(version: int):
    """Where the model has no version 0: it has version 1 only, or is asked for that."""
    async with serving(one()) as dialects:
        question = Question(ROW, version=version, types={"y": DataType.FP32})
        check_answers(await ask_all(dialects, question), one(), ROW)


async def test_outputs_may_be_chosen():
    """In the order in which they are wanted, where the dialect can say which."""
    async with serving(PAIR) as dialects:
        inputs = {"a": A, "b": B}
        for outputs in (("out_b",), ("out_a",), ("out_b", "out_a")):
            answers = await ask_all(dialects, Question(inputs, outputs=outputs))
            assert dialects_of(answers) == ALL - {"rest-tfs"}
            for way, answer in answers.items():
                assert not isinstance(answer, Refused), (way, answer)
                assert {*answer} == {*outputs}
                for name in outputs:
                    assert_same(answer[name], doubled(inputs[name[-1]]))


def types(wanted: DataType, got: DataType, rest_tfs: str) -> dict[str, str]:
    """What is said of a wrong type, by each dialect's names of it; TensorFlow Serving's JSON has values alone."""
    start = "input 'x': expected datatype"
    return {
        "rest-tfs": f"input 'x': {rest_tfs}",
        "rest-v2": f'{start} {wanted.value}, got "{got.value}"',
        "grpc-tfs": f"{start} {wanted.tensorflow}, got {got.tensorflow}",
        "grpc-v2": f"{start} {wanted.value}, got '{got.value}'",
    }


def rows_too(text: str) -> dict[str, str]:
    """`text`, which is about each row where there are rows."""
    return {"": text, "rest-tfs, rows": f"element 0 of 'instances': {text}"}


ONES = np.ones((1, 3), FP32)
WRONG_INPUTS: dict[str, tuple[Signature, Tensors, str | dict[str, str]]] = {
    "strings for numbers": (
        one(),
        {"x": np.array([[b"a", b"b", b"c"]], object)},
        types(DataType.FP32, DataType.BYTES, 'FP32 expected at [0][0], got "a"'),
    ),
    "floats for integers": (
        one(DataType.INT32),
        {"x": np.array([[1.5, 2, 3]], FP32)},
        types(DataType.INT32, DataType.FP32, "INT32 expected at [0][0], got 1.5"),
    ),
    "numbers for strings": (
        one(DataType.BYTES),
        {"x": ONES},
        types(DataType.BYTES, DataType.FP32, "BYTES expected at [0][0], got 1.0"),
    ),
    "numbers for booleans": (
        one(DataType.BOOL),
        {"x": np.ones((1, 3), np.int64)},
        types(DataType.BOOL, DataType.INT64, "BOOL expected at [0][0], got 1"),
    ),
    "out of range": (
        one(DataType.UINT8),
        {"x": np.full((1, 3), -1, np.int32)},
        types(DataType.UINT8, DataType.INT32, "a number does not fit UINT8"),
    ),
    "a wrong size": (one(), {"x": np.ones((1, 4), FP32)}, "input 'x': [3] expected, got [4]"),
    "no batch dimension": (
        one(),
        {"x": np.ones(3, FP32)},
        "input 'x': [-1, 3] expected, got [3]: add a batch dimension?",
    ),
    "a dimension too many": (
        one(),
        {"x": np.ones((1, 3, 1), FP32)},
        "input 'x': [3] expected, got [3, 1]: drop the last axis?",
    ),
    "an empty batch": (
        one(),
        {"x": np.ones((0, 3), FP32)},
        {
            "": "input 'x': at least one row is expected, got an empty batch",
            "rest-tfs, columns": "input 'x': [3] expected, got []",  # an empty list has one dimension
            "rest-tfs, rows": "'instances' has no rows: at least one is expected, got an empty batch",
        },
    ),
    "a wrong name": (one(), {"z": ONES}, rows_too("unknown input 'z': signature 'serving_default' takes x")),
    "an input too many": (
        one(),
        {"x": ONES, "z": ONES},
        rows_too("unknown input 'z': signature 'serving_default' takes x"),
    ),
    "a missing input": (
        PAIR,
        {"a": A},
        rows_too("input 'b' is missing: signature 'serving_default' takes a, b; received a"),
    ),
    "inputs that differ in rows": (PAIR, {"a": A, "b": B[:1]}, "inputs differ in rows: 'a' has 2, 'b' has 1"),
}
"""What is served, what is asked, and the text, or texts by the ways that have their own."""


@pytest.mark.parametrize("case", WRONG_INPUTS)
async def test_wrong_inputs(case: str):
    """Refused in every dialect, unrun, by a text that names the input."""
    signature, inputs, texts = WRONG_INPUTS[case]
    async with serving(signature) as dialects:
        check_refusals(await ask_all(dialects, Question(inputs)), Code.INVALID_ARGUMENT, texts)
        assert dialects.kiln.model.batches == []


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"model": "no"}, Code.NOT_FOUND, "Servable not found for request: Latest(no); loaded are m"),
        ({"model": "no", "version": 0}, Code.NOT_FOUND, "Servable not found for request: Latest(no); loaded are m"),
        (
            {"model": "no", "version": 2},
            Code.NOT_FOUND,
            "Servable not found for request: Specific(no, 2); loaded are m",
        ),
        (
            {"version": 9},
            Code.NOT_FOUND,
            "Servable not found for request: Specific(m, 9); model 'm' has version 1",
        ),
        (
            {"signature": "no"},
            Code.FAILED_PRECONDITION,
            'Serving signature name: "no" not found in signature def; this model has serving_default',
        ),
    ],
)
async def test_what_is_not_there(changes: dict[str, Any], code: Code, text: str):
    """Models and versions are not found; a signature that is not there is a failed precondition."""
    async with serving(one()) as dialects:
        check_refusals(await ask_all(dialects, replace(Question(ROW), **changes)), code, text)
        assert dialects.kiln.model.batches == []


async def test_an_output_that_is_not_there():
    """Invalid, where the dialect can ask for it."""
    async with serving(one()) as dialects:
        answers = await ask_all(dialects, Question(ROW, outputs=("no",)))
        where = {"": "", "grpc-tfs": " in output_filter"}
        texts = {way: f"unknown output 'no'{text}: signature 'serving_default' gives y" for way, text in where.items()}
        check_refusals(answers, Code.INVALID_ARGUMENT, texts, ALL - {"rest-tfs"})


async def test_a_request_over_the_limit():
    """Too large in REST, an invalid argument in gRPC; the text has both sizes."""
    rows = MAX_MESSAGE_BYTES // 12 + 1
    async with serving(one()) as dialects:
        answers = await ask_all(dialects, Question({"x": np.zeros((rows, 3), FP32)}))
        sizes = re.compile(rf"the (body|message) has (\d+) bytes, over the limit of {MAX_MESSAGE_BYTES}")
        told = {way: sizes.fullmatch(answer.text) for way, answer in answers.items() if isinstance(answer, Refused)}
        texts = {}
        for way, match in told.items():
            assert match, way
            assert match[1] == ("body" if way.startswith("rest") else "message")
            assert int(match[2]) > MAX_MESSAGE_BYTES
            texts[way] = match[0]
        check_refusals(answers, Code.TOO_LARGE, texts)


async def test_a_request_over_the_batch_where_none_is_split():
    """The text has both numbers of rows."""
    async with serving(one(), split_oversize=False) as dialects:
        answers = await ask_all(dialects, Question({"x": np.zeros((9, 3), FP32)}))
        check_refusals(answers, Code.INVALID_ARGUMENT, "at most 8 rows per request are taken, got 9")


async def test_ragged_data():
    """Lists of different lengths where the dialect has lists, else another number of elements than the shape has."""
    async with serving(one()) as dialects:
        rest, rpc = dialects.rest, dialects.rpc
        ragged = [[1, 2, 3], [4, 5]]
        tensor = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": ragged}
        for path, body in (
            ("/v1/models/m:predict", {"instances": ragged}),
            ("/v1/models/m:predict", {"inputs": ragged}),
            ("/v1/models/m:predict", {"instances": [{"x": row} for row in ragged]}),
            ("/v2/models/m/infer", {"inputs": [tensor]}),
        ):
            response = await rest.post(path, body)
            assert response.status == HTTP_STATUS[Code.INVALID_ARGUMENT]
            assert response.error == "input 'x' is ragged: 3 elements expected at [1], got 2 elements"
        infer = infer_request("m")
        infer.inputs[0].shape[0] = 2
        predict = predict_request(name="m")
        predict.inputs["x"].float_val.append(4)
        for method, request in ((INFER, infer), (PREDICT, predict)):
            status, text = await rpc.refusal(method, request)
            assert status is GRPC_STATUS[Code.INVALID_ARGUMENT]
            assert text.startswith("input 'x': ")


async def _with_a_busy_model(dialects: Dialects, queued_rows: int, asked: Question) -> dict[str, Answer]:
    """Ask while the model is blocked by one row and `queued_rows` wait behind it."""
    model = dialects.kiln.model
    model.block()
    blocking: list[Awaitable[Answer]] = [asyncio.ensure_future(dialects.grpc_v2_raw(Question(ROW)))]
    await entered(dialects.kiln)
    waiting = Question({"x": np.zeros((max(queued_rows, 1), 3), FP32)})
    if queued_rows:
        blocking.append(asyncio.ensure_future(dialects.grpc_v2_raw(waiting)))
        await queued(dialects.kiln, queued_rows, "m")
    answers = await ask_all(dialects, asked)
    model.unblock()
    assert not any(isinstance(answer, Refused) for answer in await asyncio.gather(*blocking))
    return answers


async def test_a_full_queue():
    """Overloaded, in the same words, whoever asks."""
    async with serving(one(), limits=Limits(8, 4, 1 << 20)) as dialects:
        answers = await _with_a_busy_model(dialects, 4, Question(ROW))
        text = (
            "The batch scheduling queue to which this task was submitted is full: 4 rows (48 bytes) wait, "
            "1 rows (12 bytes) came, the limit is 4 rows (1048576 bytes)"
        )
        check_refusals(answers, Code.OVERLOADED, text)


async def test_a_deadline_of_the_call_that_passes():
    """In the queue, and the model never sees it; over gRPC the caller's own side may be the first to tell it."""
    async with serving(one()) as dialects:
        answers = await _with_a_busy_model(dialects, 0, Question(ROW, timeout_s=0.03))
        for way, answer in answers.items():
            is_refused = isinstance(answer, Refused) and answer.status is StatusCode.DEADLINE_EXCEEDED
            if is_refused and "Deadline Exceeded" in str(answer):  # grpcio's own words, before the server's came
                answers[way] = Refused(StatusCode.DEADLINE_EXCEEDED, LATE)
        check_refusals(answers, Code.DEADLINE_EXCEEDED, LATE)
        assert len(dialects.kiln.model.batches) == 1


async def test_a_deadline_of_the_request_that_passes():
    """The Open Inference Protocol's parameter ``timeout`` means the same, and is told by the server everywhere."""
    async with serving(one()) as dialects:
        answers = await _with_a_busy_model(dialects, 0, Question(ROW, hint_s=0.03))
        check_refusals(answers, Code.DEADLINE_EXCEEDED, LATE, frozenset({"rest-v2", "grpc-v2"}))
        assert len(dialects.kiln.model.batches) == 1


async def test_a_deadline_that_is_far():
    """Does not hold up an answer, whichever way it is stated."""
    async with serving(one()) as dialects:
        for question in (Question(ROW, timeout_s=20.0), Question(ROW, hint_s=20.0)):
            for way, answer in (await ask_all(dialects, replace(question, types={"y": DataType.FP32}))).items():
                assert not isinstance(answer, Refused), (way, answer)
                assert_same(answer["y"], ROW["x"] * 2)


async def test_a_model_that_fails():
    """Internal, with what it said."""
    async with serving(one()) as dialects:
        dialects.kiln.model.poison = 2.0
        check_refusals(await ask_all(dialects, Question(ROW)), Code.INTERNAL, "the model failed: ValueError: poisoned")


async def test_a_server_that_stops():
    """Unavailable, so that clients go elsewhere."""
    async with serving(one()) as dialects:
        await dialects.kiln.registry.stop(1.0)
        text = "the server is stopping and takes no new requests"
        check_refusals(await ask_all(dialects, Question(ROW)), Code.UNAVAILABLE, text)
