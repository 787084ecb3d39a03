"""Every metric that Kiln exposes, with its labels and buckets.

With `tallies` and `gauges` the only user of prometheus_client.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.openmetrics import exposition as openmetrics

from service.batching.queue import Limits
from service.build import versions
from service.errors import Code
from service.gauges import GpuGauges, VersionGauges
from service.gpus import ReadGpus, no_gpus
from service.registry.lifecycle import State, VersionStatus
from service.runtime.records import SignatureRecord
from service.series import Goal, RequestSeries, VersionMetrics
from service.tallies import Counts, Sums, Taken, Tallies

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody asks for

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OPEN_METRICS = re.compile(r"\s*application/openmetrics-text\s*(?:;(?!\s*q\s*=\s*0(?:\.0*)?\s*(?:;|$))[^;]*)*")

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_VERSION = ("model", "version")
_DROPPED = ("cancelled", "expired", "overloaded", "late")
_FAULTS = frozenset({Code.INTERNAL, Code.UNAVAILABLE, Code.OVERLOADED, Code.DEADLINE_EXCEEDED})
"""Failures that are the server's, not the caller's: they miss a model's goal however fast they are."""
_MOST_GONE = 8
"""Of versions that are gone, so many of a model keep their counts."""


@dataclass(frozen=True)
class RequestCounts:
    """What one process has counted of its requests: by family, and how many are in flight there now."""

    families: Sequence[Taken]
    in_flight: int


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, read_gpus: ReadGpus = no_gpus) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counts(
            "kiln_requests", "Predict requests answered, by outcome: ok or an error code.", "protocol", "code"
        )
        self._latency = self._histogram(
            "kiln_request_duration_seconds",
            "From a request's arrival at the predictor to its outputs.",
            _SECONDS,
            (*_VERSION, "protocol"),
        )
        self._decode = self._sums("kiln_decode_seconds", "Making tensors of a request, and checking them.")
        self._encode = self._sums("kiln_encode_seconds", "Making an answer of a request's outputs.")
        self._slo = self._counts(
            "kiln_slo_requests",
            "Requests to a model with slo_ms: met if answered within it, missed if slower or failed by the server.",
            "outcome",
        )
        self._queue = self._histogram("kiln_queue_seconds", "From enqueued to taken into a batch.", _SECONDS)
        self._execution = self._histogram("kiln_execution_seconds", "One run of a plan on one batch.", _SECONDS)
        self._batch_rows = self._histogram("kiln_batch_rows", "Rows of callers in one batch.", _ROWS)
        self._fill = self._histogram(
            "kiln_batch_fill_ratio", "Rows of callers in one batch, of those that its plan was given.", _SHARES
        )
        self._failed_batches = self._counts(
            "kiln_failed_batches", "Runs that raised; a batch of several is then bisected."
        )
        self._device_s = self._counts(
            "kiln_device_seconds", "Seconds of the device that a version's batches took, failed ones too."
        )
        self._dropped = self._counts(
            "kiln_dropped_requests",
            "Requests that left the queue unrun: cancelled, expired, refused as overloaded, or too late for slo_ms.",
            "reason",
        )
        self._shadow = self._counts(
            "kiln_shadow_requests",
            "Requests also sent to a version on trial, by outcome: agree, differ or error.",
            "outcome",
        )
        self._kept = Counts(
            "kiln_request_log_records",
            "Requests to be kept in the request log: written, dropped because too many waited, or failed on the disk.",
            ("outcome",),
        )
        self.registry.register(self._kept)
        self._in_flight = self._gauge("kiln_requests_in_flight", "Predict requests being answered now.")
        self._memory_budget = self._gauge(
            "kiln_memory_budget_bytes", "Memory that all versions together may take on a device.", "device"
        )
        self._goal = self._gauge("kiln_slo_seconds", "The goal that a model's slo_ms states.", "model")
        self._ready = self._gauge("kiln_ready", "1 while the server takes requests.")
        self._frontends = self._gauge("kiln_frontends", "Front-end processes that run; 0 without --frontends.")
        self._restarts = Counts("kiln_frontend_restarts", "Front-end processes that died and were started anew.", ())
        self._restarts.labels()
        self.registry.register(self._restarts)
        build = versions()
        self._gauge("kiln_build_info", "Always 1.", *build).labels(*build.values()).set(1)
        self._goals_s: dict[str, float] = {}
        self._loads: Counter[tuple[str, str]] = Counter()
        self._gone: dict[str, deque[int]] = {}
        self._requests_in_flight = 0
        self._in_flight_elsewhere: dict[int, int] = {}
        self._in_flight.set_function(lambda: self._requests_in_flight + sum(self._in_flight_elsewhere.values()))
        self._of_requests: tuple[Counts | Tallies | Sums, ...] = (
            self._requests,
            self._latency,
            self._decode,
            self._encode,
            self._slo,
            self._kept,
        )
        self._versions = VersionGauges()
        self.registry.register(self._versions)
        self.registry.register(GpuGauges(read_gpus))
        self._series: dict[tuple[str, int | None, str, Code | None], RequestSeries] = {}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], labels: tuple[str, ...] = _VERSION) -> Tallies:
        tallies = Tallies(name, text, labels, tuple(buckets))
        self.registry.register(tallies)
        return tallies

    def _counts(self, name: str, text: str, *labels: str) -> Counts:
        counts = Counts(name, text, (*_VERSION, *labels))
        self.registry.register(counts)
        return counts

    def _sums(self, name: str, text: str) -> Sums:
        sums = Sums(name, text, (*_VERSION, "protocol"))
        self.registry.register(sums)
        return sums

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def render(self) -> bytes:
        """The page in Prometheus's text format."""
        return generate_latest(self.registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, for an ``Accept`` header: with exemplars where OpenMetrics is taken."""
        if any(_OPEN_METRICS.fullmatch(part) for part in accept.lower().split(",")):
            text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return self.render(), CONTENT_TYPE

    async def whole_page(self, accept: str) -> tuple[bytes, str]:
        """As `page`, for a server that is this one process."""
        return self.page(accept)

    def take(self) -> RequestCounts:
        """What was counted of requests since it was last taken, for the process that shows it."""
        return RequestCounts([family.take() for family in self._of_requests], self._requests_in_flight)

    def add(self, process: int, counts: RequestCounts) -> None:
        """Count the requests that front end `process` has taken."""
        for family, taken in zip(self._of_requests, counts.families, strict=True):
            family.add(taken)
        self._in_flight_elsewhere[process] = counts.in_flight

    def frontends(self, numbers: Collection[int]) -> None:
        """Show that front ends of these numbers run; what was in flight in others is gone."""
        self._frontends.set(len(numbers))
        self._in_flight_elsewhere = {n: count for n, count in self._in_flight_elsewhere.items() if n in numbers}

    def frontend_restarted(self) -> None:
        self._restarts.labels().value += 1

    def request(self, model: str, protocol: str, trace_id: str = "") -> ObservedRequest:
        """Start to observe one predict request; `trace_id` is that of a trace which is recorded."""
        self._requests_in_flight += 1
        return ObservedRequest(self, model, protocol, trace_id)

    def refused(self, protocol: str, code: Code) -> None:
        """Count a predict request that could not be read so far as to tell which model it means."""
        self._requests.labels("", "", protocol, code.value).value += 1

    def request_done(self, request: ObservedRequest, code: Code | None) -> None:
        """Count a request and, where a version answered it, its latency."""
        self._requests_in_flight -= 1
        key = (request.model, request.version, request.protocol, code)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = self._bind(*key)
        now = time.monotonic()
        elapsed_s = now - request.started
        series.requests.value += 1
        if series.goal is not None:
            series.goal.count(elapsed_s)
        if request.version is None:
            return
        if request.trace_id:
            series.latency.observe_traced(elapsed_s, request.trace_id, time.time())
        else:
            series.latency.observe(elapsed_s)
        if request.decode_s is not None:
            series.decode.count += 1
            series.decode.total += request.decode_s
        if request.answered is not None:
            series.encode.count += 1
            series.encode.total += now - request.answered

    def _bind(self, model: str, version: int | None, protocol: str, code: Code | None) -> RequestSeries:
        of_version = (model, "" if version is None else str(version))
        goal_s = self._goals_s.get(model)
        goal = None
        if goal_s is not None and (code is None or code in _FAULTS):
            met, missed = (self._slo.labels(*of_version, outcome) for outcome in ("met", "missed"))
            goal = Goal(goal_s if code is None else -math.inf, met, missed)
        return RequestSeries(
            self._requests.labels(*of_version, protocol, code.value if code else "ok"),
            self._latency.labels(*of_version, protocol),
            self._decode.labels(*of_version, protocol),
            self._encode.labels(*of_version, protocol),
            goal,
        )

    def goal(self, model: str, slo_ms: float | None) -> None:
        """From now on hold a model's requests to `slo_ms`; None for no goal."""
        goal_s = None if slo_ms is None else slo_ms / 1e3
        if goal_s == self._goals_s.get(model):
            return
        if goal_s is None:
            del self._goals_s[model]
            self._goal.remove(model)
        else:
            self._goals_s[model] = goal_s
            self._goal.labels(model).set(goal_s)
        self._series = {key: series for key, series in self._series.items() if key[0] != model}

    def version(self, model: str, version: int, queued_rows: Callable[[], int], limits: Limits) -> VersionMetrics:
        """The metrics of a version just loaded, with its bounds; `queued_rows` is asked at each scrape."""
        labels = (model, str(version))
        self._loads[labels] += 1
        self._versions.plans[labels] = {}
        self._versions.queues[labels] = (queued_rows, limits)
        if model in self._gone:
            self._gone[model] = deque(each for each in self._gone[model] if each != version)
        return VersionMetrics(
            queue=self._queue.labels(*labels),
            execution=self._execution.labels(*labels),
            rows=self._batch_rows.labels(*labels),
            fill=self._fill.labels(*labels),
            failed=self._failed_batches.labels(*labels),
            device_s=self._device_s.labels(*labels),
            dropped={reason: self._dropped.labels(*labels, reason) for reason in _DROPPED},
        )

    def forget_version(self, model: str, version: int) -> None:
        """Stop telling how an unloaded version is; of those unloaded longest ago also what they have done."""
        labels = (model, str(version))
        self._loads[labels] -= 1
        if self._loads[labels] > 0:  # another took its place under the same number
            return
        del self._loads[labels]
        self._versions.forget(labels)
        gone = self._gone.setdefault(model, deque())
        gone.append(version)
        if len(gone) > _MOST_GONE:
            self._forget_counts(model, gone.popleft())

    def _forget_counts(self, model: str, version: int) -> None:
        histograms = (self._latency, self._queue, self._execution, self._batch_rows, self._fill)
        counters = (self._requests, self._slo, self._failed_batches, self._device_s, self._dropped, self._shadow)
        for family in (*histograms, *counters, self._decode, self._encode):
            family.forget(model, str(version))
        self._series = {key: series for key, series in self._series.items() if key[:2] != (model, version)}

    def state_changed(self, status: VersionStatus) -> None:
        """Show a version's state; a failed one shows its reason."""
        self._versions.statuses[(status.model, str(status.version))] = status

    def folder_problem(self, model: str, version: int | None, reason: str) -> None:
        """Show a folder that cannot be a model version at all."""
        label = "" if version is None else str(version)
        self._versions.statuses[(model, label)] = VersionStatus(model, version or 0, State.FAILED, reason)

    def forget_state(self, model: str, version: int | None) -> None:
        """Stop showing a version that is gone."""
        self._versions.statuses.pop((model, "" if version is None else str(version)), None)

    def shadow(self, model: str, version: int) -> Callable[[str], None]:
        """Count what came of a trial of `version`: agree, differ or error."""

        def count(outcome: str) -> None:
            self._shadow.labels(model, str(version), outcome).value += 1

        return count

    def request_log(self) -> Callable[[str], None]:
        """Count what came of records: each outcome from one thread alone."""
        outcomes = {outcome: self._kept.labels(outcome) for outcome in ("written", "dropped", "failed")}

        def count(outcome: str) -> None:
            outcomes[outcome].value += 1

        return count

    def loaded(self, model: str, version: int, seconds: float) -> None:
        """Show how long a version took from LOADING to READY."""
        self._versions.load_s[model, str(version)] = seconds

    def memory(self, model: str, version: int, bytes_by_device: Mapping[str, int]) -> None:
        """Show what a version takes; no devices: it is unloaded, and its series go."""
        if bytes_by_device:
            self._versions.memory_bytes[model, str(version)] = dict(bytes_by_device)
        else:
            self._versions.memory_bytes.pop((model, str(version)), None)

    def memory_budget(self, device: str, limit_bytes: int) -> None:
        """Show how much memory there is for models on a device."""
        self._memory_budget.labels(device).set(limit_bytes)

    def plans_chosen(self, model: str, version: int, plans: Mapping[str, SignatureRecord]) -> None:
        """Show which plan serves each bucket of each signature, in the place of those shown before."""
        self._versions.plans[model, str(version)] = plans

    def ready(self, *, is_ready: bool) -> None:
        self._ready.set(float(is_ready))


class ObservedRequest:
    """One predict request, from its arrival to `done`.

    Who answers it fills in `version`, `decode_s` once its inputs are there, and `answered`, in seconds of
    `time.monotonic`, once its outputs are.
    """

    __slots__ = ("_metrics", "answered", "decode_s", "model", "protocol", "started", "trace_id", "version")

    def __init__(self, metrics: Metrics, model: str, protocol: str, trace_id: str) -> None:
        self._metrics = metrics
        self.model = model
        self.protocol = protocol
        self.trace_id = trace_id
        self.version: int | None = None
        self.decode_s: float | None = None
        self.answered: float | None = None
        self.started = time.monotonic()

    def done(self, code: Code | None) -> None:
        """Answered: None for success. A name that no model has makes no series of its own."""
        if code is Code.NOT_FOUND and self.version is None:
            self.model = ""
        self._metrics.request_done(self, code)
