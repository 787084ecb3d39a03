"""Whether a loaded model's answers stay what they are when its inputs are padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.batching.queue import Lane
from service.errors import InvalidArgument, ModelLoadError
from service.registry.config import ModelConfig
from service.registry.padding import padding_problem, with_padding
from service.runtime.records import SignatureRecord
from service.tensors import DataType, Signature, Tensors, TensorSpec
from tests.fakes import FakeModel
from tests.signatures import one, only

TOKENS = one(DataType.INT32, (None, None))
SUMS = Signature("serving_default", TOKENS.inputs, (TensorSpec("y", DataType.FP32, (None, 1)),))


class Sums(FakeModel):
    """The mean of a row's numbers, of which zeros count only without `mask`; takes numbers up to `highest`."""

    def __init__(self, *, mask: bool, highest: int = 1 << 30) -> None:
        super().__init__(only(SUMS))
        self.mask = mask
        self.highest = highest

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        x = inputs["x"]
        self.batches.append(inputs)
        if x.max() > self.highest:
            raise InvalidArgument("there is no such token")
        count = (x != 0).sum(1, keepdims=True) if self.mask else x.shape[1]
        return {"y": (x.sum(1, keepdims=True) / np.maximum(count, 1)).astype(np.float32)}


def problem(model: FakeModel, said: Any, **config: Any) -> str:
    given = ModelConfig(padding=said, **config)
    model.signatures = with_padding(model.signatures, given)
    return padding_problem(model, given)


def test_a_model_that_masks_is_served():
    """Its answers are the same padded or not, in the first bucket and in the last."""
    model = Sums(mask=True)
    assert problem(model, {"lengths": [1, 8, 16, 32]}) == ""
    assert {array["x"].shape[1] for array in model.batches if len(array["x"]) == 2} == {8, 32}
    assert problem(Sums(mask=True), True) == ""


def test_a_model_that_does_not_mask_is_refused():
    """With the lengths, the output, the largest difference and the way out."""
    with pytest.raises(ModelLoadError) as refused:
        problem(Sums(mask=False), True)
    text = str(refused.value)
    assert "padding: signature 'serving_default': rows of length 12 and 4, padded to 16: output 'y' differs by" in text
    assert "Mask what is padded in the model (mask_zero, Masking), or let it be with padding.check: false" in text


def test_without_the_check_it_is_told_of():
    """And served."""
    assert problem(Sums(mask=False), {"check": False}).startswith(
        "padding changes answers: signature 'serving_default'"
    )


def test_the_tolerance_is_the_configs():
    """What is near enough for its plans is near enough here."""
    assert problem(Sums(mask=False), True, atol=1e6) == ""
    assert problem(Sums(mask=False), True, precision="bf16", precision_atol=1e6) == ""


def test_numbers_are_drawn_that_the_model_takes():
    """An embedding of eleven tokens has no twelfth; plans that are known say how many there are."""
    model = Sums(mask=True, highest=10)
    assert problem(model, True) == ""
    assert 1 < max(array["x"].max() for array in model.batches[-2:]) <= 10
    known = Sums(mask=True, highest=10)
    known.plans = {"serving_default": SignatureRecord({}, ranges={"x": (0, 7)})}
    assert problem(known, True) == ""
    assert max(array["x"].max() for array in known.batches) <= 7


def test_a_model_that_takes_nothing_that_is_drawn_is_not_trusted():
    """Nobody can tell whether padding changes its answers."""
    with pytest.raises(ModelLoadError, match=r"it takes none of the rows that were drawn to check it \(there is no"):
        problem(Sums(mask=True, highest=-1), True)


class Halves(FakeModel):
    """Every second number."""

    def run(self, lane: Lane, inputs: Tensors) -> Tensors:
        return {"y": inputs["x"][:, ::2]}


def test_an_output_whose_length_is_another_is_refused():
    """It follows the length, but not one to one, so it cannot be cut back."""
    with pytest.raises(ModelLoadError, match="output 'y': 16 expected on axis 1, the padded length of 'x'"):
        problem(Halves(only(TOKENS)), True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_outputs_that_are_said_to_stay_as_they_are_may_be_longer(side: str):
    """`outputs: {}` cuts nothing back: what is no padding has to be the same."""
    assert problem(FakeModel(only(TOKENS)), {"outputs": {}, "side": side}) == ""


def test_an_output_that_follows_but_is_not_known_to_is_refused():
    """Unless the config says so, an answer must not be longer than without padding."""

    class Longer(FakeModel):
        def run(self, lane: Lane, inputs: Tensors) -> Tensors:
            return {"y": inputs["x"][:, :, None].astype(np.float32)}

    signature = Signature("serving_default", TOKENS.inputs, (TensorSpec("y", DataType.FP32, (None, 1)),))
    with pytest.raises(ModelLoadError, match=r"output 'y' is float32 \(1, 16, 1\), not float32 \(1, (12|4), 1\)"):
        problem(Longer(only(signature)), True)


def test_inputs_that_are_not_padded_are_given_with_each_row():
    """Beside those that are."""
    signature = Signature(
        "serving_default",
        (TensorSpec("x", DataType.FP32, (None, None)), TensorSpec("scale", DataType.FP32, (None,))),
        (TensorSpec("y", DataType.FP32, (None, None)), TensorSpec("z", DataType.FP32, (None,))),
    )
    assert problem(FakeModel(only(signature)), {"lengths": [2]}) == ""
    assert problem(FakeModel(only(signature)), None) == ""
    both = {"serving_default": signature, "fixed": one(name="fixed")}
    assert problem(FakeModel(both), {"lengths": [1]}) == ""
