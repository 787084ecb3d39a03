"""The same question in each of the four dialects has the same numbers, or the statuses that correspond."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

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


async def ask_all(dialects: Dialects, question: Question) -> dict[str, Answer]:
    """The answer to `question` each way that there is."""
    return {name: await way(question) for name, way in dialects.ways(question).items()}


def check_answers(answers: dict[str, Answer], signature: Signature, inputs: Tensors) -> None:
    """Each is the doubles of `inputs`, in type, shape and value."""
    assert {way.partition(",")[0] for way in answers} == {"rest-tfs", "rest-v2", "grpc-tfs", "grpc-v2"}
    for way, answer in answers.items():
        assert not isinstance(answer, Refused), (way, answer)
        for source, target in zip(signature.inputs, signature.outputs, strict=True):
            assert_same(answer[target.name], doubled(inputs[source.name]))


def check_refusals(answers: dict[str, Answer], code: Code) -> None:
    """Each is refused with the status of `code` in its protocol, and all of the four dialects are there."""
    assert {way.partition(",")[0] for way in answers} == {"rest-tfs", "rest-v2", "grpc-tfs", "grpc-v2"}
    for way, answer in answers.items():
        assert isinstance(answer, Refused), way
        assert answer.status == (HTTP_STATUS if way.startswith("rest") else GRPC_STATUS)[code], (way, answer)
        assert answer.text, way


@pytest.mark.parametrize("dtype", DataType)
@pytest.mark.parametrize("shape", [(1, 3), (4, 3)])
async def test_every_type(dtype: DataType, shape: tuple[int, int]):
    """One row and several, of every type."""
    signature = one(dtype)
    inputs = {"x": sample(dtype, shape)}
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


@pytest.mark.parametrize(
    ("signature", "inputs"),
    [
        pytest.param(one(), {"x": np.array([[b"a", b"b", b"c"]], object)}, id="strings for numbers"),
        pytest.param(one(DataType.INT32), {"x": np.array([[1.5, 2, 3]], FP32)}, id="floats for integers"),
        pytest.param(one(DataType.BYTES), {"x": np.ones((1, 3), FP32)}, id="numbers for strings"),
        pytest.param(one(DataType.BOOL), {"x": np.ones((1, 3), np.int64)}, id="numbers for booleans"),
        pytest.param(one(DataType.UINT8), {"x": np.full((1, 3), -1, np.int32)}, id="out of range"),
        pytest.param(one(), {"x": np.ones((1, 4), FP32)}, id="a wrong size"),
        pytest.param(one(), {"x": np.ones(3, FP32)}, id="no batch dimension"),
        pytest.param(one(), {"x": np.ones((1, 3, 1), FP32)}, id="a dimension too many"),
        pytest.param(one(), {"x": np.ones((0, 3), FP32)}, id="an empty batch"),
        pytest.param(one(), {"z": np.ones((1, 3), FP32)}, id="a wrong name"),
        pytest.param(one(), {"x": np.ones((1, 3), FP32), "z": np.ones((1, 3), FP32)}, id="an input too many"),
        pytest.param(PAIR, {"a": A}, id="a missing input"),
        pytest.param(PAIR, {"a": A, "b": B[:1]}, id="inputs that differ in rows"),
    ],
)
async def test_wrong_inputs(signature: Signature, inputs: Tensors):
    """Refused in every dialect, unrun, by a text that names the input."""
    async with serving(signature) as dialects:
        answers = await ask_all(dialects, Question(inputs))
        check_refusals(answers, Code.INVALID_ARGUMENT)
        names = {*inputs, *signature.input_by_name}
        for way, answer in answers.items():
            assert isinstance(answer, Refused)
            assert any(f"'{name}'" in answer.text for name in names) or "'instances' has no rows" in answer.text, way
        assert dialects.kiln.model.batches == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "no"}, Code.NOT_FOUND),
        ({"version": 9}, Code.NOT_FOUND),
        ({"signature": "no"}, Code.FAILED_PRECONDITION),
    ],
)
async def test_what_is_not_there(changes: dict[str, Any], code: Code):
    """Models and versions are not found; a signature that is not there is a failed precondition."""
    async with serving(one()) as dialects:
        check_refusals(await ask_all(dialects, replace(Question(ROW), **changes)), code)


async def test_a_request_over_the_limit():
    """Too large in REST, an invalid argument in gRPC."""
    rows = MAX_MESSAGE_BYTES // 12 + 1
    async with serving(one()) as dialects:
        check_refusals(await ask_all(dialects, Question({"x": np.zeros((rows, 3), FP32)})), Code.TOO_LARGE)


async def test_a_request_over_the_batch_where_none_is_split():
    """The text has both numbers of rows."""
    async with serving(one(), split_oversize=False) as dialects:
        answers = await ask_all(dialects, Question({"x": np.zeros((9, 3), FP32)}))
        check_refusals(answers, Code.INVALID_ARGUMENT)
        texts = {answer.text for answer in answers.values() if isinstance(answer, Refused)}
        assert texts == {"at most 8 rows per request are taken, got 9"}


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
        check_refusals(answers, Code.OVERLOADED)
        texts = {answer.text for answer in answers.values() if isinstance(answer, Refused)}
        assert texts == {
            "The batch scheduling queue to which this task was submitted is full: 4 rows (48 bytes) wait, "
            "1 rows (12 bytes) came, the limit is 4 rows (1048576 bytes)"
        }


async def test_a_deadline_that_passes():
    """In the queue, which the model never sees."""
    async with serving(one()) as dialects:
        check_refusals(await _with_a_busy_model(dialects, 0, Question(ROW, timeout_s=0.03)), Code.DEADLINE_EXCEEDED)
        assert len(dialects.kiln.model.batches) == 1


async def test_a_model_that_fails():
    """Internal, with what it said."""
    async with serving(one()) as dialects:
        dialects.kiln.model.poison = 2.0
        check_refusals(await ask_all(dialects, Question(ROW)), Code.INTERNAL)


async def test_a_server_that_stops():
    """Unavailable, so that clients go elsewhere."""
    async with serving(one()) as dialects:
        await dialects.kiln.registry.stop(1.0)
        check_refusals(await ask_all(dialects, Question(ROW)), Code.UNAVAILABLE)
