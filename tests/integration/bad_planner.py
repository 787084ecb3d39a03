"""A child that plans as `service.runtime.planning` does, but for some plans that it makes wrong or cannot survive.

``python -m tests.integration.bad_planner [FAULT=PLAN …]``; faults are those of `FAULTS`.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from service.runtime import planning
from service.runtime.base import Run
from service.runtime.candidates import Workshop
from service.tensors import Signature, Tensors


def crash(run: Run, rows: int) -> Run:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("it is dead")


def abort(run: Run, rows: int) -> Run:
    os.abort()


def _off_where(is_wrong: Callable[[Tensors], bool]) -> Callable[[Run, int], Run]:
    def off(run: Run, rows: int) -> Run:
        def wrong(inputs: Tensors) -> Tensors:
            outputs = run(inputs)
            return {name: array + np.float32(0.25) for name, array in outputs.items()} if is_wrong(inputs) else outputs

        return wrong

    return off


def off_in_one_bucket(run: Run, rows: int) -> Run:
    return off(run, rows) if rows == 4 else run


def off_at_second_run(run: Run, rows: int) -> Run:
    runs: list[Tensors] = []

    def is_second(inputs: Tensors) -> bool:
        runs.append(inputs)
        return len(runs) == 2

    return _off_where(is_second)(run, rows)


off = _off_where(lambda inputs: True)
off_when_large = _off_where(lambda inputs: any(np.abs(array).max() > 100 for array in inputs.values()))
off_when_zero = _off_where(lambda inputs: not any(array.any() for array in inputs.values()))
FAULTS: dict[str, Callable[[Run, int], Run]] = {
    f.__name__: f for f in (crash, abort, off_in_one_bucket, off_at_second_run)
} | {"off": off, "off_when_large": off_when_large, "off_when_zero": off_when_zero}


def spoil(faults: dict[str, str]) -> None:
    """Have plans, by name, prepare with a fault."""
    build = Workshop.build

    def spoiled(self: Workshop, name: str, signature: Signature) -> Any:
        plan: Any = build(self, name, signature)
        if name in faults:
            prepare, fault = plan.prepare, FAULTS[faults[name]]
            plan.prepare = lambda rows: fault(prepare(rows), rows)
        return plan

    Workshop.build = spoiled  # type: ignore[method-assign]


def main(arguments: list[str]) -> int:
    spoil({plan: fault for fault, _, plan in (argument.partition("=") for argument in arguments)})
    return planning.main()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
