"""Rows/s of a model's chosen plans without any server: what efficiency is measured against.

``python -m load_tests.bare_plan MODEL_FOLDER CACHE_DIR PLAN`` prints the best bucket as one JSON line; then, for every
line on its stdin, the rows/s of that bucket now, with as many batches at once as the server runs.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np

from service.batching.queue import Lane
from service.predictor import choose_signature
from service.registry.importer import import_model
from service.registry.repository import open_models
from service.runtime.base import PlanName
from service.runtime.measuring import rows_per_s
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions
from service.runtime.xla import keep_programs_in
from service.tensors import trailing_shapes

_MAX_ROWS = 64
_SECONDS_PER_BUCKET = 0.6
_SECONDS_NOW = 1.2


class Bare:
    """The default signature of a loaded model, run without a server."""

    def __init__(self, model: LoadedModel) -> None:
        model.warm_up()
        model.plan()
        self._model = model
        self._signature = choose_signature(model.signatures)
        self.record = model.plans[self._signature.name]

    def rows_per_s(self, bucket: int, seconds: float) -> float:
        """By the median time of its runs; with several streams by all that they ran."""
        inputs = {
            s.name: np.random.default_rng(bucket).random((bucket, *(d or 1 for d in (s.shape or ())[1:])), np.float32)
            for s in self._signature.inputs
        }
        lane = Lane(self._signature, trailing_shapes(self._signature, inputs), conforms=True, fuses=True)
        if self._model.parallel > 1:
            return rows_per_s(lambda: self._model.run(lane, inputs), bucket, self._model.parallel)
        times = []
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            start = time.perf_counter()
            self._model.run(lane, inputs)
            times.append(time.perf_counter() - start)
        return bucket / float(np.median(times))


def main() -> None:
    """Load as the server does; measure once, and again at every line."""
    source = open_models(Path(sys.argv[1])).sources[-1]
    cache_dir, plan = Path(sys.argv[2]), cast(PlanName, sys.argv[3])
    keep_programs_in(cache_dir / "plans" / "xla")
    path = import_model(source, cache_dir=cache_dir, timeout_s=600)
    bare = Bare(LoadedModel(path, RuntimeOptions(PlanningOptions(_MAX_ROWS, plan), plan_dir=cache_dir / "plans")))
    rates = {bucket: bare.rows_per_s(bucket, _SECONDS_PER_BUCKET) for bucket in bare.record.chosen}
    best = max(rates, key=lambda bucket: rates[bucket])
    found = {
        "rows_per_s": rates[best],
        "rows_per_s_alone": rates[min(rates)],
        "best_bucket_rows": best,
        "plan": bare.record.names[best],
    }
    print(json.dumps({"model": source.model, **found}), flush=True)
    for _ in sys.stdin:
        print(bare.rows_per_s(best, _SECONDS_NOW), flush=True)


if __name__ == "__main__":
    main()
