"""The integers that a model takes: plans are trusted with those on which the signature plan was seen to answer.

TensorFlow refuses an index that an embedding does not have; XLA takes the nearest one, OpenVINO another. What lies
outside is left to the signature plan, which refuses it in its own words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from service.errors import KilnError
from service.runtime.base import Run
from service.tensors import Signature, Tensors

Ranges = Mapping[str, tuple[int, int]]
"""Lowest and highest integer, by input."""
_LONGEST_S = 0.2
_MUCH_LONGER = 20.0


def proved_ranges(signature: Signature, run: Run, usual: Tensors) -> dict[str, tuple[int, int]]:
    """For each integer input that does not take all of its type, the range that `run` was seen to take.

    `usual` are inputs that it takes, with numbers near 0. The numbers are doubled until one is refused, or takes much
    longer than the usual ones (a number of steps, say), and the bound is then found by halving.
    """
    start = time.perf_counter()
    run(usual)
    patience_s = max(_LONGEST_S, _MUCH_LONGER * (time.perf_counter() - start))
    found: dict[str, tuple[int, int]] = {}
    for spec in signature.inputs:
        array = usual[spec.name]
        if array.dtype.kind not in "iu":
            continue
        takes = _trial(run, usual, spec.name, patience_s)
        info = np.iinfo(array.dtype)
        lowest, highest = (
            _bound(takes, int(array.min()) if array.size else 0, info.min),
            _bound(takes, int(array.max()) if array.size else 0, info.max),
        )
        if (lowest, highest) != (info.min, info.max):
            found[spec.name] = (lowest, highest)
    return found


def outside(ranges: Ranges, inputs: Tensors) -> bool:
    """Whether an input has integers beyond its range."""
    for name, (lowest, highest) in ranges.items():
        array = inputs[name]
        if array.size and (int(array.min()) < lowest or int(array.max()) > highest):
            return True
    return False


def _trial(run: Run, usual: Tensors, name: str, patience_s: float) -> Callable[[int], bool]:
    """Whether `run` takes an input full of one number, in good time."""
    is_slow = False

    def takes(number: int) -> bool:
        nonlocal is_slow
        if is_slow:
            return False
        start = time.perf_counter()
        try:
            run({**usual, name: np.full_like(usual[name], number)})
        except KilnError:
            return False
        is_slow = time.perf_counter() - start > patience_s
        return not is_slow

    return takes


def _bound(takes: Callable[[int], bool], known: int, limit: int) -> int:
    """The number furthest from `known` towards `limit` that is taken, all between being taken for alike."""
    sign = 1 if limit > known else -1
    good, step = known, 1
    while good != limit:
        number = good + sign * step
        number = min(number, limit) if sign > 0 else max(number, limit)
        if not takes(number):
            break
        good, step = number, step * 2
    else:
        return good
    bad = number
    while abs(bad - good) > 1:
        middle = (good + bad) // 2
        if takes(middle):
            good = middle
        else:
            bad = middle
    return good
