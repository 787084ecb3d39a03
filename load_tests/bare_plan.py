"""Rows/s of a model's chosen plans without any server: what efficiency is measured against.

``python -m load_tests.bare_plan MODEL_FOLDER CACHE_DIR`` prints the best bucket as one JSON line; then, for every
line on its stdin, the rows/s of that bucket now.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from service.batching.queue import Lane
from service.predictor import choose_signature
from service.registry.importer import import_model
from service.registry.repository import open_models
from service.runtime.model import LoadedModel, RuntimeOptions
from service.tensors import trailing_shapes

_MAX_ROWS = 64
_SECONDS_PER_BUCKET = 0.6
_SECONDS_NOW = 1.2


class Bare:
    """The default signature of a loaded model, run without a server."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._signature = choose_signature(model.signatures)
        self.plans = model.warm_up()[self._signature.name].plans

    def rows_per_s(self, bucket: int, seconds: float) -> float:
        """By the median time of its runs."""
        inputs = {
            s.name: np.random.default_rng(bucket).random((bucket, *(d or 1 for d in (s.shape or ())[1:])), np.float32)
            for s in self._signature.inputs
        }
        lane = Lane(self._signature, trailing_shapes(self._signature, inputs), conforms=True, fuses=True)
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
    path = import_model(source, cache_dir=Path(sys.argv[2]), timeout_s=600)
    bare = Bare(LoadedModel(path, RuntimeOptions(_MAX_ROWS)))
    rates = {bucket: bare.rows_per_s(bucket, _SECONDS_PER_BUCKET) for bucket in bare.plans}
    best = max(rates, key=lambda bucket: rates[bucket])
    found = {"rows_per_s": rates[best], "best_bucket_rows": best, "plan": bare.plans[best].name}
    print(json.dumps({"model": source.model, **found}), flush=True)
    for _ in sys.stdin:
        print(bare.rows_per_s(best, _SECONDS_NOW), flush=True)


if __name__ == "__main__":
    main()
