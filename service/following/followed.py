"""Requests that are followed to their end: traced, told of in the access log, or kept with their payload.

Whether a request is followed is decided once, when it begins. Nothing is made for one that is not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from service.batching.queue import Spent
from service.errors import Code
from service.tensors import Signature, Tensors, count_rows
from service.trace_context import Caller

_IN_A_ROW, _SMALL_SHARE = 8, 0.05
"""Of a small share so many requests are traced one after another: that takes about half of what as many alone do, whose
code and data have long left the caches, and shows who was in a batch together."""


class SpanIds(NamedTuple):
    """Where the span of a request is, or will be: its trace, itself, and the span that asked, 0 for none."""

    trace_id: int
    span_id: int
    parent_id: int


@dataclass(slots=True)
class Asked:
    """One question to a version, of which most requests have one: inputs, ``(rows, …)``, and outputs once answered."""

    signature: Signature
    inputs: Tensors
    spent: Spent
    outputs: Tensors | None = None


@dataclass(slots=True)
class Followed:
    """One request that somebody wants to know of; the rest of it is there once it has ended.

    `caller` has the trace that Kiln begins where it came with none.
    `started`, `answered` and `ended` are in seconds of `time.monotonic`; `code` is None for success.
    """

    caller: Caller
    ids: SpanIds | None
    is_kept: bool
    asked: list[Asked] = field(default_factory=list)
    protocol: str = ""
    model: str = ""
    version: int | None = None
    code: Code | None = None
    started: float = 0.0
    ended: float = 0.0
    decode_s: float | None = None
    answered: float | None = None

    @property
    def trace_id(self) -> str:
        """Of the trace that Kiln records it in, else of its caller's own; 32 hexadecimal digits or empty."""
        return f"{self.ids.trace_id:032x}" if self.ids else self.caller.trace_id

    @property
    def rows(self) -> int:
        """Over all that it asked."""
        return sum(count_rows(asked.signature, asked.inputs) for asked in self.asked)

    def asks(self, signature: Signature, inputs: Tensors) -> Asked:
        """Note what it asks a version; the batcher fills in what is spent on it."""
        asked = Asked(signature, inputs, Spent(caller=self.caller, span=self.ids))
        self.asked.append(asked)
        return asked


Tell = Callable[[Followed], None]
"""Is told of a followed request once it has ended."""


class Follower(Protocol):
    """What follows a `share` of all requests; see `service.following.tracing` and `service.following.request_log`."""

    share: float

    def tell(self, followed: Followed) -> None:
        """A request that it wanted has ended; costs no more than putting something in a queue."""


class Following:
    """Decides which requests are followed, and whom to tell of them."""

    def __init__(self, trace: Follower | None = None, keep: Follower | None = None, access: Tell | None = None) -> None:
        self._trace = trace
        self._keep = keep
        self._access = access
        self._gap = 0.0 if trace is None else _gap(trace.share)
        """Requests until the next one without a trace of its own that is traced, itself included."""
        self._more = 0
        """Requests that are traced right after that one."""
        self._may_pass = trace is not None and keep is None and access is None

    def passes_by(self) -> bool:
        """Whether a request without a trace of its own is one that nobody wants to know of; else it is to `begin`.

        Nearly all are, where a small share is traced and nothing else: this is the least that can be asked of each.
        """
        if self._may_pass and self._gap > 1:
            self._gap -= 1
            return True
        return False

    @property
    def is_needed(self) -> bool:
        """Whether anything follows requests at all."""
        return any((self._trace, self._keep, self._access))

    @property
    def trace_share(self) -> float | None:
        """The share of requests without a trace of their own that are traced; None where none is."""
        return None if self._trace is None else self._trace.share

    def begin(self, caller: Caller) -> Followed | None:
        """None for a request that nobody wants to know of.

        A caller's ``traceparent`` decides whether it is traced; without one, chance.
        """
        is_traced = self._trace is not None and (
            caller.is_sampled if caller.trace_id else self._is_next(self._trace.share)
        )
        is_kept = self._keep is not None and random.random() < self._keep.share  # noqa: S311 - a sample
        if not (is_traced or is_kept or self._access is not None):
            return None
        ids = _span_ids(caller) if is_traced else None
        if ids is not None and not caller.trace_id:  # so that lines of the log lead to the trace
            caller = caller._replace(trace_id=f"{ids.trace_id:032x}")
        return Followed(caller, ids, is_kept)

    def _is_next(self, share: float) -> bool:
        self._gap -= 1
        if self._gap > 0:
            return False
        self._more = (self._more or _in_a_row(share)) - 1
        self._gap = 1.0 if self._more else _gap(share)
        return True

    def end(self, followed: Followed) -> None:
        """Tell all who want to know."""
        if self._trace is not None and followed.ids is not None:
            self._trace.tell(followed)
        if self._keep is not None and followed.is_kept and followed.code is None:
            self._keep.tell(followed)
        if self._access is not None:
            self._access(followed)


def _in_a_row(share: float) -> int:
    """How many requests are traced one after another where `share` of all is."""
    return _IN_A_ROW if share < _SMALL_SHARE else 1


def _gap(share: float) -> float:
    """How many requests it takes until chance begins to trace again, so that `share` of all requests is traced."""
    if share <= 0:
        return math.inf
    begins = share / (share + _in_a_row(share) * (1 - share))
    return 1.0 if begins >= 1 else math.floor(math.log(1 - random.random()) / math.log(1 - begins)) + 1.0  # noqa: S311


def _span_ids(caller: Caller) -> SpanIds:
    own = random.getrandbits(64) or 1  # an id of 0 means none
    if caller.trace_id:
        return SpanIds(int(caller.trace_id, 16), own, int(caller.span_id, 16))
    return SpanIds(random.getrandbits(128) or 1, own, 0)
