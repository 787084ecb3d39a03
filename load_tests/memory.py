"""Load and unload a model of 100 MB many times; print resident memory as the table of README.md.

``python -m load_tests.memory [--rounds 30] [--plan signature] [--constants]``
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import numpy as np

from service.runtime.base import PlanName
from service.runtime.devices import load_tensorflow
from service.runtime.memory import resident_bytes
from service.runtime.model import LoadedModel, RuntimeOptions
from service.runtime.planning import PlanningOptions

_WIDTH = 2560
_LAYERS = 4
"""Four square matrices of float32: 105 MB."""
_MAX_BATCH_ROWS = 2
_MIB = 2**20


def write_model(path: Path, constants: bool) -> None:  # noqa: FBT001 - handed to a process by position
    """A chain of matrix products, whose matrices are variables or constants of the graph."""
    tf = load_tensorflow()
    rng = np.random.default_rng(1)
    matrices = [rng.standard_normal((_WIDTH, _WIDTH), np.float32) / _WIDTH for _ in range(_LAYERS)]
    module = tf.Module()
    module.weights = matrices if constants else [tf.Variable(matrix) for matrix in matrices]

    def chain(x: Any) -> dict[str, Any]:
        for weight in module.weights:
            x = tf.matmul(x, weight)
        return {"y": x}

    signature = tf.function(chain).get_concrete_function(x=tf.TensorSpec((None, _WIDTH), tf.float32, "x"))
    tf.saved_model.save(module, str(path), signatures=signature)


def load_and_unload(path: Path, rounds: int, plan: PlanName) -> Iterator[tuple[int, int]]:
    """Resident MiB while the model is loaded and warm, and after its unload, for each round."""
    for _ in range(rounds):
        model = LoadedModel(
            path, RuntimeOptions(PlanningOptions(_MAX_BATCH_ROWS, plan), plan_dir=path.parent / "plans")
        )
        model.warm_up()
        model.plan()
        loaded = resident_bytes()[0] // _MIB
        model.close()
        yield loaded, resident_bytes()[0] // _MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--plan", choices=get_args(PlanName), default="signature")
    parser.add_argument("--constants", action="store_true", help="weights are constants of the graph, not variables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        writer = get_context("spawn").Process(target=write_model, args=(path, options.constants))
        writer.start()  # what writing leaves in memory would be in every row
        writer.join()
        print("| round | loaded, MiB | unloaded, MiB |")
        print("|---|---|---|")
        for number, (loaded, unloaded) in enumerate(load_and_unload(path, options.rounds, options.plan), 1):
            print(f"| {number} | {loaded} | {unloaded} |", flush=True)


if __name__ == "__main__":
    main()
