"""What every execution plan is."""

from __future__ import annotations

from typing import Protocol

from service.tensors import Signature, Tensors


class Plan(Protocol):
    """One way to run one signature."""

    name: str

    def bucket_rows(self, rows: int) -> int:
        """How many rows the plan wants to be given for `rows` rows; the surplus is padding."""

    def run(self, inputs: Tensors) -> Tensors:
        """Outputs by name. Batched: ``(rows, …)`` in and out. Raises `KilnError`."""

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
