"""Sequences of different lengths through all dialects, before real Keras models that mask and that do not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode

from service.batching.queue import Lane, Limits
from service.predictor import ModelRef
from service.registry.config import ModelConfig
from service.registry.lifecycle import State
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions
from service.tensors import DEFAULT_SIGNATURE, DataType, Tensors
from tests.fakes import FakeModel
from tests.integration.conftest import start_kiln
from tests.integration.dialects import Dialects, Question, Refused
from tests.integration.load import entered, queued
from tests.integration.planning_here import lane_of

pytestmark = pytest.mark.usefixtures("placed")

TYPES = {"tags": DataType.FP32, "topic": DataType.FP32}


class Tagger(FakeModel):
    """A Keras model from tokens to a tag for each, and a topic for all; every run is kept, and can be held up."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__({DEFAULT_SIGNATURE: loaded.signatures[DEFAULT_SIGNATURE]})
        self.loaded = loaded

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        self.batches.append(inputs)
        self.entered.release()
        assert self.released.wait(30), "nobody unblocked the model"
        return self.loaded.run(lane, inputs)

    def alone(self, *tokens: int) -> Tensors:
        """What is answered to one row that nothing was done to."""
        inputs = {"tokens": np.array([tokens], np.int32)}
        return self.loaded.run(lane_of(self.loaded.signatures[DEFAULT_SIGNATURE], inputs), inputs)


def save_tagger(path: Path, *, mask: bool) -> Path:
    import keras

    keras.utils.set_random_seed(1)
    tokens = keras.layers.Input((None,), dtype="int32", name="tokens")
    words = keras.layers.Embedding(50, 8, mask_zero=mask)(tokens)
    each = keras.layers.Bidirectional(keras.layers.LSTM(4, return_sequences=True))(words)
    outputs = {"tags": keras.layers.Dense(3)(each), "topic": keras.layers.Dense(2)(keras.layers.LSTM(4)(words))}
    keras.Model(tokens, outputs).export(str(path), format="tf_saved_model", verbose=False)
    return path


@pytest.fixture(scope="module", params=[True, False], ids=["masks", "does not mask"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    """A model that masks what is padded, and one that does not."""
    path = save_tagger(tmp_path_factory.mktemp("tagger") / "tagger", mask=request.param)
    model = LoadedModel(path, RuntimeOptions(PlanningOptions(8)))
    model.warm_up()
    yield model
    model.close()


masks = pytest.mark.parametrize("loaded", [True], indirect=True, ids=["masks"])
does_not = pytest.mark.parametrize("loaded", [False], indirect=True, ids=["does not mask"])


@contextlib.asynccontextmanager
async def serving(loaded: LoadedModel, padding: Any) -> AsyncIterator[tuple[Dialects, Tagger]]:
    model = Tagger(loaded)
    configs = {"m": ModelConfig(padding=padding)}
    kiln = await start_kiln({"m": model}, Limits(8, 4096, 1 << 20), configs=configs)
    model.batches.clear()
    while model.entered.acquire(blocking=False):
        pass
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
            yield Dialects(kiln, channel), model
    finally:
        model.unblock()
        await kiln.stop(5.0, 0.0)


def question(*tokens: int) -> Question:
    return Question({"tokens": np.array([tokens], np.int32)}, types=TYPES)


def assert_alike(got: Tensors, wanted: Tensors) -> None:
    for name, array in wanted.items():
        assert got[name].shape == array.shape, name
        np.testing.assert_allclose(got[name], array, 1e-4, 1e-5)


@masks
@pytest.mark.parametrize("side", ["right", "left"])
async def test_different_lengths_of_all_dialects_share_one_run(loaded: LoadedModel, side: str):
    """What waits is padded to one bucket and run together; each answer is that of its request alone, unpadded."""
    async with serving(loaded, {"lengths": [2, 8, 16], "side": side}) as (dialects, model):
        ways = list(dialects.ways(question(1)).values())
        asked = [range(7, 7 + 3 + n % 6) for n in range(len(ways))]
        model.block()
        first = asyncio.ensure_future(dialects.grpc_v2_raw(question(1)))
        await entered(dialects.kiln)
        rest = [asyncio.ensure_future(way(question(*tokens))) for way, tokens in zip(ways[:8], asked, strict=False)]
        await queued(dialects.kiln, 8, "m")
        model.unblock()
        answers = await asyncio.gather(first, *rest)
        for tokens, answer in zip([[1], *asked], answers, strict=False):
            assert not isinstance(answer, Refused), answer
            assert_alike(answer, model.alone(*tokens))
        assert [batch["tokens"].shape for batch in model.batches] == [(1, 2), (8, 8)]
        (statistics,) = dialects.kiln.registry.statistics(ModelRef("m"))
        assert [(size.rows, size.compute_infer.count) for size in statistics.statistics.batches] == [(1, 1), (8, 1)]
        for way, tokens in zip(ways, asked, strict=True):
            answer = await way(question(*tokens))
            assert not isinstance(answer, Refused), answer
            assert_alike(answer, model.alone(*tokens))


@masks
@pytest.mark.parametrize("side", ["right", "left"])
async def test_rows_of_one_request_may_differ_in_length(loaded: LoadedModel, side: str):
    """In each form of TensorFlow Serving's JSON, and as records; outputs that follow come back ragged."""
    sentences: list[list[int]] = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    async with serving(loaded, {"side": side}) as (dialects, model):
        wanted = [model.alone(*tokens) for tokens in sentences]
        named = [{"tokens": tokens} for tokens in sentences]
        for body in ({"instances": sentences}, {"instances": named}):
            rows = (await dialects.rest.post("/v1/models/m:predict", body)).json["predictions"]
            for row, want in zip(rows, wanted, strict=True):
                assert_alike({name: np.array([value], np.float32) for name, value in row.items()}, want)
        columns = (await dialects.rest.post("/v1/models/m:predict", {"inputs": {"tokens": sentences}})).json["outputs"]
        records = (await dialects.rest.post("/predict/m", named)).json
        for place, want in enumerate(wanted):
            for name in TYPES:
                assert_alike({name: np.array([columns[name][place]])}, {name: want[name]})
                assert_alike({name: np.array([records[place][name]])}, {name: want[name]})
        assert {batch["tokens"].shape for batch in model.batches} == {(3, 8)}
        short = await dialects.rest.post("/v1/models/m:predict", {"instances": [[1, 2], [3, 50]]})
        assert short.status == 400


@masks
async def test_a_sequence_over_the_last_bucket_is_refused_in_all_dialects(loaded: LoadedModel):
    """With input, length and limit; nothing of it is run."""
    async with serving(loaded, {"lengths": [4]}) as (dialects, model):
        for name, way in dialects.ways(question(1)).items():
            refused = await way(question(*range(1, 6)))
            assert isinstance(refused, Refused), name
            assert refused.status in (400, StatusCode.INVALID_ARGUMENT, None)
            assert "input 'tokens': a length of at most 4 expected on axis 1 (padding.lengths), got 5" in refused.text
        assert model.batches == []
    async with serving(loaded, {"lengths": [4], "longer": "exact"}) as (dialects, model):
        answer = await dialects.rest_v2_json(question(*range(1, 6)))
        assert not isinstance(answer, Refused)
        assert_alike(answer, model.alone(*range(1, 6)))
        assert model.batches[0]["tokens"].shape == (1, 5)


@masks
async def test_without_padding_rows_have_one_length(loaded: LoadedModel):
    """As ever: ragged rows are refused."""
    async with serving(loaded, None) as (dialects, model):
        refused = await dialects.rest.post("/v1/models/m:predict", {"instances": [[1, 2], [3]]})
        assert refused.status == 400
        assert "input 'tokens' is ragged" in refused.error
        assert model.batches == []


@does_not
async def test_a_model_whose_answers_padding_changes_is_not_loaded(loaded: LoadedModel):
    """The reason is its status."""
    async with serving(loaded, True) as (dialects, _):
        (status,) = dialects.kiln.registry.statuses(ModelRef("m"))
        assert status.state is State.FAILED
        assert "padding: signature 'serving_default': rows of length 12 and 4, padded to 16: output" in status.reason
        assert "padding.check: false" in status.reason


@does_not
async def test_it_is_loaded_where_the_config_lets_it_be(loaded: LoadedModel, caplog: pytest.LogCaptureFixture):
    """The log and its status tell by how much the answers differ."""
    with caplog.at_level(logging.WARNING):
        async with serving(loaded, {"check": False}) as (dialects, _):
            (status,) = dialects.kiln.registry.statuses(ModelRef("m"))
            assert status.state is State.READY
            assert "padding changes answers" in status.left_out
            assert "differs by up to" in status.left_out
            assert any("m v1: padding changes answers" in message for message in caplog.messages)
            answer = await dialects.grpc_tfs_content(question(1, 2, 3))
            assert not isinstance(answer, Refused)
            assert answer["tags"].shape == (1, 3, 3)


@masks
async def test_a_config_that_does_not_fit_fails_the_load(loaded: LoadedModel):
    """The status names the field."""
    async with serving(loaded, {"inputs": {"words": {"axis": 1}}}) as (dialects, _):
        (status,) = dialects.kiln.registry.statuses(ModelRef("m"))
        assert status.reason == "padding.inputs: one of tokens expected, got 'words'"
