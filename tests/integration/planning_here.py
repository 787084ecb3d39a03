"""Planning in this process, which has TensorFlow already, in place of a child; and models that are planned so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.batching.queue import Lane
from service.runtime import model as runtime_model
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.plan_record import PlanCache
from service.runtime.planning import Planning, PlanningOptions, plan_model
from service.runtime.records import ModelRecord
from service.runtime.savedmodel import SavedModel
from service.tensors import DEFAULT_SIGNATURE, Signature, Tensors, concatenate, split, trailing_shapes


class Here(Planning):
    """What the child does, done here."""

    def run(self, tell: Callable[[str], None] = lambda line: None) -> ModelRecord | None:
        request = self._request
        model = SavedModel(Path(request.path), request.device, allow_operations=request.allow_operations)
        try:
            record = plan_model(model, request, self._samples, tell)
        finally:
            model.close()
        cache = PlanCache(Path(request.cache))
        cache.keep(request.key, record, request.about)
        return cache.find(request.key)


@pytest.fixture
def planning_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LoadedModel.plan` needs no child."""
    monkeypatch.setattr(runtime_model, "Planning", Here)


@contextmanager
def loaded(path: Path, plan_dir: Path | None, planning: PlanningOptions, **options: Any) -> Iterator[LoadedModel]:
    """The model, warm, and closed at the end."""
    model = LoadedModel(path, RuntimeOptions(planning, plan_dir=plan_dir, **options))
    try:
        model.warm_up()
        yield model
    finally:
        model.close()


def lane_of(signature: Signature, inputs: Tensors) -> Lane:
    """The lane that the batcher puts `inputs` into."""
    conforms = all(spec.admits(inputs[spec.name].shape) for spec in signature.inputs)
    return Lane(signature, trailing_shapes(signature, inputs), conforms, signature.batched)


def ask(model: LoadedModel, inputs: Tensors, name: str = DEFAULT_SIGNATURE) -> Tensors:
    """The answer to a batch as the batcher has it run: padded to the plan's rows, and cut again."""
    signature = model.signatures[name]
    lane = lane_of(signature, inputs)
    if not lane.fuses:
        return model.run(lane, inputs)
    rows = len(next(iter(inputs.values())))
    given = model.bucket_rows(lane, rows)
    return split(model.run(lane, concatenate([inputs], given)), [rows])[0]
