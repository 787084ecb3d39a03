"""The use case: hold a version, decode against its signature, validate, submit, hand back outputs.

The front ends call this and nothing below it. It sees the engine only through `Engine`, so that
front ends can live in another process than the one that holds the device.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from service.batching.queue import Spent
from service.batching.statistics import VersionStatistics
from service.errors import Code, DeadlineExceeded, FailedPrecondition, InvalidArgument, KilnError, Unavailable
from service.following.followed import Followed, Following
from service.metrics import Metrics, ObservedRequest
from service.padding import Lengths
from service.registry.config import ModelConfig
from service.registry.lifecycle import VersionStatus
from service.runtime.records import SignatureRecord
from service.tensors import (
    DEFAULT_SIGNATURE,
    Array,
    Signature,
    Tensors,
    check_names,
    check_shape,
    count_rows,
    is_padded,
)
from service.trace_context import NOBODY, Caller, caller

SERVER_NAME = "kiln"
EXTENSIONS = (
    "classification",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
"""What Kiln answers of the Open Inference Protocol's extensions, in REST and gRPC alike."""


class ModelRef(NamedTuple):
    """Which model a request means; with neither version nor label, the engine's default version."""

    name: str
    version: int | None = None
    label: str | None = None


@dataclass(slots=True)
class Decoded:
    """A request in terms of a signature.

    With `strict_shapes` the signature's rank and sizes are enforced here; without, as TensorFlow
    Serving has it, a shape that differs goes to the graph, which may refuse it: but only if the
    signature says that the graph can be let try. `timeout_s` is what the request gives itself, beside
    the deadline of its call; `priority` is as in `Batcher.submit`. Of an input whose rows came in different lengths
    and are padded to the longest, `lengths` has that of each.
    """

    signature: Signature
    inputs: Tensors
    strict_shapes: bool = True
    timeout_s: float | None = None
    priority: int = 0
    lengths: Lengths | None = None


Decoder = Callable[[Mapping[str, Signature]], Decoded]
"""Turns a body into `Decoded`, given the signatures of the version that will answer it."""


@dataclass(slots=True)
class Prediction:
    """Outputs, ``(rows, …)`` each, who made them, and where the time went; `lengths` is as in `Decoded`."""

    model: str
    version: int
    signature: Signature
    outputs: Tensors
    spent: Spent = field(default_factory=Spent)
    lengths: Lengths | None = None

    def rows_of(self, name: str) -> list[Array] | None:
        """The rows of an output that follows the lengths of rows that differ, each of its own; else None."""
        if self.lengths is None or self.signature.padding is None:
            return None
        return self.signature.padding.rows_of(name, self.outputs[name], self.lengths)


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded version says of itself, and how it is batched. `versions` are those loaded, in order."""

    name: str
    version: int
    versions: tuple[int, ...]
    platform: str
    signatures: Mapping[str, Signature]
    device: str = ""
    config: ModelConfig = field(default_factory=ModelConfig)
    max_batch_rows: int = 1
    batch_wait_s: float = 0.0
    plans: Mapping[str, SignatureRecord] = field(default_factory=dict)


class Handle(Protocol):
    """A version held for one request; it stays loaded until `release`."""

    model: str
    version: int
    signatures: Mapping[str, Signature]

    def submit(
        self,
        signature: Signature,
        inputs: Tensors,
        deadline: float | None,
        spent: Spent | None = None,
        priority: int = 0,
    ) -> Awaitable[Tensors]:
        """Queue validated inputs; raises what `Batcher.submit` and the answer do."""

    def release(self) -> None:
        """Give the version back."""


class Engine(Protocol):
    """What holds the models and the device."""

    def acquire(self, ref: ModelRef) -> Handle:
        """Hold a READY version; `NotFound` or `Unavailable` otherwise."""

    def check(self, ref: ModelRef) -> None:
        """As `acquire`, but holds nothing: to refuse a request before its body is read."""

    def describe(self, ref: ModelRef) -> ModelInfo:
        """Metadata of a READY version; `NotFound` or `Unavailable` otherwise."""

    def is_coming(self, ref: ModelRef) -> bool:
        """Whether what `acquire` refused as `Unavailable` is being loaded, so that waiting makes sense."""

    async def wait(self, ref: ModelRef, deadline: float | None) -> None:
        """Until what `ref` means has been loaded, or could not be, or `deadline` has come."""

    def statuses(self, ref: ModelRef) -> list[VersionStatus]:
        """All known versions of a model (or the one asked for), newest first; `NotFound` if none."""

    def statistics(self, ref: ModelRef | None) -> list[VersionStatistics]:
        """Of the loaded versions that `ref` means, or of all; `NotFound` if there is no such version at all."""

    def all_statuses(self) -> list[VersionStatus]:
        """All known versions of all models."""

    async def load(self, name: str) -> None:
        """Load a model, or what has changed of it; see `Registry.load`."""

    async def unload(self, name: str) -> None:
        """Drain a model and let it go; see `Registry.unload`."""

    async def configure(self, configs: Mapping[str, ModelConfig]) -> None:
        """Serve these models so, and no others; see `Registry.configure`."""

    def model_names(self) -> list[str]:
        """Names of all known models, sorted."""


class Predictor:
    """Answers predict calls of every dialect."""

    def __init__(self, engine: Engine, metrics: Metrics, following: Following | None = None) -> None:
        """`following` is told of requests that are traced, logged or kept."""
        self.engine = engine
        self._metrics = metrics
        self._following = following if following is not None and following.is_needed else None

    @property
    def trace_share(self) -> float | None:
        """See `Following.trace_share`."""
        return None if self._following is None else self._following.trace_share

    def request(self, ref: ModelRef, protocol: str) -> Request:
        """Begin one predict request: a context that ends when its answer is written.

        `protocol` is a label for the metrics. A model that cannot be asked is refused on entry,
        so that a large body need not be read first; nothing is held until `Request.predict`.

        Raises:
            NotFound, Unavailable, InvalidArgument: on entry, as `Engine.acquire`.
        """
        who = caller.get()
        if self._following is None or (who is NOBODY and self._following.passes_by()):
            trace_id = "" if who is NOBODY else who.recorded_trace_id
            return Request(self.engine, ref, self._metrics.request(ref.name, protocol, trace_id), who)
        followed = self._following.begin(who)
        trace_id = who.recorded_trace_id if followed is None or followed.ids is None else followed.trace_id
        observed = self._metrics.request(ref.name, protocol, trace_id)
        if followed is None:
            return Request(self.engine, ref, observed, who)
        if followed.caller is not who:
            caller.set(followed.caller)
        followed.model, followed.protocol, followed.started = ref.name, protocol, observed.started
        return FollowedRequest(self.engine, ref, observed, followed, self._following)

    def refused(self, protocol: str, error: KilnError) -> None:
        """Count a predict request that failed before it could be begun, unless `error` is of one that was."""
        if error.is_counted:
            return
        error.is_counted = True
        self._metrics.refused(protocol, error.code)
        followed = None if self._following is None else self._following.begin(caller.get())
        if self._following is not None and followed is not None:
            followed.protocol, followed.code = protocol, error.code
            followed.started = followed.ended = time.monotonic()
            self._following.end(followed)


class Request:
    """One predict request, counted once whichever way it ends."""

    __slots__ = ("_caller", "_engine", "_observed", "_ref")

    def __init__(self, engine: Engine, ref: ModelRef, observed: ObservedRequest, who: Caller) -> None:
        self._engine = engine
        self._ref = ref
        self._observed = observed
        self._caller = who

    def __enter__(self) -> Request:
        try:
            self._engine.check(self._ref)
        except KilnError as error:
            if not (isinstance(error, Unavailable) and self._engine.is_coming(self._ref)):
                self._end(error)
                raise
        return self

    async def predict(self, deadline: float | None, decode: Decoder) -> Prediction:
        """Decode, validate and run; `deadline` is in seconds of `time.monotonic`, None for no limit.

        Raises:
            KilnError: whatever went wrong; the front end translates its code.
        """
        handle = await self._hold(deadline)
        try:
            self._observed.version = handle.version
            begun = time.monotonic()
            decoded = decode(handle.signatures)
            validate(decoded)
            now = time.monotonic()
            self._observed.decode_s = now - begun
            if decoded.timeout_s is not None:
                own = now + decoded.timeout_s
                deadline = own if deadline is None else min(deadline, own)
            if deadline is not None and now >= deadline:
                raise DeadlineExceeded("the deadline passed before the request was queued")
            answer = await self._ask(handle, decoded, deadline)
            self._observed.answered = time.monotonic()
            return answer
        finally:
            handle.release()

    async def predict_all(self, deadline: float | None, decoders: Sequence[Decoder]) -> list[Prediction]:
        """As `predict`, with several signatures of one version; all are checked before any is queued."""
        handle = await self._hold(deadline)
        try:
            self._observed.version = handle.version
            begun = time.monotonic()
            asked = [decode(handle.signatures) for decode in decoders]
            return await self._run_all(handle, asked, begun, deadline)
        finally:
            handle.release()

    async def predict_apart(
        self, deadline: float | None, decode: Callable[[Mapping[str, Signature]], list[Decoded]]
    ) -> list[Prediction]:
        """As `predict_all`, but `decode` may take its time: it makes all of the requests, in a thread."""
        handle = await self._hold(deadline)
        try:
            self._observed.version = handle.version
            begun = time.monotonic()
            asked = await asyncio.to_thread(decode, handle.signatures)
            return await self._run_all(handle, asked, begun, deadline)
        finally:
            handle.release()

    async def _run_all(
        self, handle: Handle, asked: Sequence[Decoded], begun: float, deadline: float | None
    ) -> list[Prediction]:
        """The answers to requests of one version, which is held until the last of them has ended, whichever way."""
        for decoded in asked:
            validate(decoded)
        now = time.monotonic()
        self._observed.decode_s = now - begun
        if deadline is not None and now >= deadline:
            raise DeadlineExceeded("the deadline passed before the request was queued")

        answers = await asyncio.gather(
            *(self._ask(handle, decoded, deadline) for decoded in asked), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        self._observed.answered = time.monotonic()
        return [answer for answer in answers if isinstance(answer, Prediction)]

    async def _hold(self, deadline: float | None) -> Handle:
        """The version to ask, which is waited for where it is being loaded."""
        try:
            return self._engine.acquire(self._ref)
        except Unavailable:
            if not self._engine.is_coming(self._ref):
                raise
            await self._engine.wait(self._ref, deadline)
            return self._engine.acquire(self._ref)

    async def _ask(self, handle: Handle, decoded: Decoded, deadline: float | None) -> Prediction:
        spent = Spent()
        spent.caller = self._caller
        outputs = await handle.submit(decoded.signature, decoded.inputs, deadline, spent, decoded.priority)
        return Prediction(handle.model, handle.version, decoded.signature, outputs, spent, decoded.lengths)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end(error)

    def _end(self, error: BaseException | None) -> Code | None:
        """Count it; returns how it ended, None for success."""
        code = None if error is None else _counted(error)
        self._observed.done(code)
        return code


def _counted(error: BaseException) -> Code:
    """The code that `error` is counted as, from here on not again."""
    if isinstance(error, KilnError):
        error.is_counted = True
        return error.code
    return Code.INTERNAL if isinstance(error, Exception) else Code.CANCELLED


class FollowedRequest(Request):
    """A `Request` that is traced, logged or kept."""

    __slots__ = ("_followed", "_following")

    def __init__(
        self, engine: Engine, ref: ModelRef, observed: ObservedRequest, followed: Followed, following: Following
    ) -> None:
        super().__init__(engine, ref, observed, followed.caller)
        self._followed = followed
        self._following = following

    async def _ask(self, handle: Handle, decoded: Decoded, deadline: float | None) -> Prediction:
        asked = self._followed.asks(decoded.signature, decoded.inputs)
        asked.outputs = await handle.submit(decoded.signature, decoded.inputs, deadline, asked.spent, decoded.priority)
        return Prediction(handle.model, handle.version, decoded.signature, asked.outputs, asked.spent, decoded.lengths)

    def _end(self, error: BaseException | None) -> Code | None:
        followed, observed = self._followed, self._observed
        followed.code = super()._end(error)
        followed.version, followed.decode_s, followed.answered = observed.version, observed.decode_s, observed.answered
        followed.ended = time.monotonic()
        self._following.end(followed)
        return followed.code


def validate(decoded: Decoded) -> None:
    """Raise `InvalidArgument` for anything that must not reach a batch.

    Types are the decoder's business: only it knows what the caller's dialect called them.
    """
    signature, inputs = decoded.signature, decoded.inputs
    check_names(signature, inputs)
    is_strict = decoded.strict_shapes or not signature.takes_other_shapes or decoded.lengths is not None
    for spec in signature.inputs:
        array = inputs[spec.name]
        if is_strict:
            check_shape(spec, array.shape)
        if array.dtype != spec.dtype.numpy:
            raise InvalidArgument(f"input {spec.name!r}: expected datatype {spec.dtype.value}, got {array.dtype}")
    count_rows(signature, inputs)
    if signature.padding is not None and is_padded(signature, inputs):
        signature.padding.check(inputs, decoded.lengths)


def choose_signature(signatures: Mapping[str, Signature], name: str = "") -> Signature:
    """The signature of that name; for no name ``serving_default``, or the only one there is.

    Raises:
        FailedPrecondition: there is no such signature.
    """
    if not name:
        if DEFAULT_SIGNATURE in signatures:
            return signatures[DEFAULT_SIGNATURE]
        if len(signatures) == 1:
            return next(iter(signatures.values()))
        name = DEFAULT_SIGNATURE
    try:
        return signatures[name]
    except KeyError:
        known = ", ".join(sorted(signatures)) or "none"
        raise FailedPrecondition(
            f'Serving signature name: "{name}" not found in signature def; this model has {known}'
        ) from None
