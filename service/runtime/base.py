"""What every execution plan is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from service.tensors import Signature, Tensors

PlanName = Literal["auto", "signature", "frozen", "xla", "openvino", "litert"]
"""What may be asked for: the best that was measured, or one of a kind."""
Precision = Literal["f32", "bf16", "int8"]
Run = Callable[[Tensors], Tensors]
"""Outputs by name from inputs by name. Batched: ``(rows, …)`` in and out. Raises `KilnError`."""


class Plan(Protocol):
    """One way to run one signature."""

    name: str
    pads: bool
    """Whether what was prepared for a bucket takes exactly its rows; else it takes any number."""

    def prepare(self, rows: int) -> Run:
        """What runs batches of `rows` rows, compiled; several threads may call it at once.

        Raises:
            PlanUnavailable: the signature cannot be compiled for that.
        """

    def close(self) -> None:
        """Give back what the plan holds."""


class PlanUnavailable(Exception):
    """A plan cannot run this signature here; the text says why. Told, never fatal."""


def buckets_up_to(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that are measured and warmed up: powers of two, and `max_rows` itself."""
    buckets = []
    size = 1
    while size < max_rows:
        buckets.append(size)
        size *= 2
    return (*buckets, max_rows)


def bucket_for(buckets: tuple[int, ...], rows: int) -> int:
    """The smallest bucket that holds `rows`; `rows` itself where none does."""
    return next((bucket for bucket in buckets if bucket >= rows), rows)


def signatures_line(signatures: dict[str, Signature]) -> str:
    """One line for the log: the signatures without repeats of the same function."""
    texts: dict[str, list[str]] = {}
    for name, signature in signatures.items():
        texts.setdefault(signature.describe(), []).append(name)
    return "; ".join(f"{'/'.join(sorted(names))}: {text}" for text, names in texts.items())
