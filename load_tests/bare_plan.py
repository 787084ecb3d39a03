"""Rows/s of a model's chosen plans without any server: what efficiency is measured against.

``python -m load_tests.bare_plan MODEL_FILE CACHE_DIR`` prints one JSON line.
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


def measure(model: LoadedModel) -> dict[str, object]:
    """The bucket with the most rows/s, by the median time of its runs."""
    signature = choose_signature(model.signatures)
    choice = model.warm_up()[signature.name]
    best: dict[str, object] = {"rows_per_s": 0.0}
    for bucket, plan in choice.plans.items():
        inputs = {
            s.name: np.random.default_rng(bucket).random((bucket, *(d or 1 for d in (s.shape or ())[1:])), np.float32)
            for s in signature.inputs
        }
        lane = Lane(signature, trailing_shapes(signature, inputs), conforms=True, fuses=True)
        times = []
        stop = time.perf_counter() + _SECONDS_PER_BUCKET
        while time.perf_counter() < stop:
            start = time.perf_counter()
            model.run(lane, inputs)
            times.append(time.perf_counter() - start)
        rows_per_s = bucket / float(np.median(times))
        if rows_per_s > float(str(best["rows_per_s"])):
            best = {"rows_per_s": rows_per_s, "best_bucket_rows": bucket, "plan": plan.name}
    return best


def main() -> None:
    """Load as the server does, measure, print."""
    source = open_models(Path(sys.argv[1])).sources[-1]
    path = import_model(source, cache_dir=Path(sys.argv[2]), timeout_s=600)
    print(json.dumps({"model": source.model, **measure(LoadedModel(path, RuntimeOptions(_MAX_ROWS)))}))


if __name__ == "__main__":
    main()
