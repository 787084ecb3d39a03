"""Every metric that Kiln exposes, with its labels and buckets; with `tallies` the only user of prometheus_client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service import __version__
from service.errors import Code
from service.registry.lifecycle import State, VersionStatus
from service.runtime.plan_record import SignatureRecord
from service.tallies import Count, Counts, Tallies, Tally

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody asks for

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_VERSION = ("model", "version")
_LONGEST_REASON = 200


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counts(
            "kiln_requests",
            "Predict requests answered, by outcome: ok or an error code.",
            (*_VERSION, "protocol", "code"),
        )
        self.registry.register(self._requests)
        self._latency = self._histogram(
            "kiln_request_duration_seconds",
            "From a request's arrival at the predictor to its outputs.",
            _SECONDS,
            (*_VERSION, "protocol"),
        )
        self._queue = self._histogram("kiln_queue_seconds", "From enqueued to taken into a batch.", _SECONDS)
        self._execution = self._histogram("kiln_execution_seconds", "One run of a plan on one batch.", _SECONDS)
        self._batch_rows = self._histogram("kiln_batch_rows", "Rows of callers in one batch.", _ROWS)
        self._failed_batches = self._counter(
            "kiln_failed_batches", "Runs that raised; a batch of several is then bisected."
        )
        self._dropped = Counter(
            "kiln_dropped_requests",
            "Requests that left the queue unrun: cancelled, expired or refused because it was full.",
            (*_VERSION, "reason"),
            registry=self.registry,
        )
        self._shadow = Counter(
            "kiln_shadow_requests",
            "Requests also sent to a version on trial, by outcome: agree, differ or error.",
            (*_VERSION, "outcome"),
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "kiln_requests_in_flight", "Predict requests being answered now.", registry=self.registry
        )
        self._load = Gauge("kiln_model_load_seconds", "Time from LOADING to READY.", _VERSION, registry=self.registry)
        self._memory = Gauge(
            "kiln_model_memory_bytes",
            "Memory that a loaded version takes on a device; CPU is the machine's memory.",
            (*_VERSION, "device"),
            registry=self.registry,
        )
        self._memory_budget = Gauge(
            "kiln_memory_budget_bytes",
            "Memory that all versions together may take on a device.",
            ("device",),
            registry=self.registry,
        )
        self._plans: dict[tuple[str, int], list[tuple[str, str, str, str, str]]] = {}
        self._difference = Gauge(
            "kiln_plan_batch_difference",
            "The most by which company in a batch was seen to change an answer, absolute and relative.",
            (*_VERSION, "signature", "kind"),
            registry=self.registry,
        )
        self._plan = Gauge(
            "kiln_plan_info",
            "The execution plan in use for each batch bucket.",
            (*_VERSION, "signature", "bucket_rows", "plan"),
            registry=self.registry,
        )
        self._ready = Gauge("kiln_ready", "1 while the server takes requests.", registry=self.registry)
        info = Gauge("kiln_build_info", "Always 1.", ("version",), registry=self.registry)
        info.labels(__version__).set(1)
        self._memory_devices: dict[tuple[str, int], set[str]] = {}
        self._requests_in_flight = 0
        self._in_flight.set_function(lambda: self._requests_in_flight)
        self._states = _ModelStates()
        self.registry.register(self._states)
        self._children: dict[tuple[str, int | None, str, Code | None], tuple[Count, Tally]] = {}
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], labels: tuple[str, ...] = _VERSION) -> Tallies:
        tallies = Tallies(name, text, labels, tuple(buckets))
        self.registry.register(tallies)
        return tallies

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _VERSION, registry=self.registry)

    def render(self) -> bytes:
        """The page in Prometheus's text format."""
        return generate_latest(self.registry)

    def request(self, model: str, protocol: str) -> ObservedRequest:
        """Start to observe one predict request."""
        self._requests_in_flight += 1
        return ObservedRequest(self, model, protocol)

    def request_done(self, request: ObservedRequest, code: Code | None) -> None:
        """Count a request and, where a version answered it, its latency."""
        self._requests_in_flight -= 1
        key = (request.model, request.version, request.protocol, code)
        pair = self._children.get(key)
        if pair is None:
            labels = (request.model, "" if request.version is None else str(request.version), request.protocol)
            pair = (
                self._requests.labels(*labels, code.value if code else "ok"),
                self._latency.labels(*labels),
            )
            self._children[key] = pair
        pair[0].value += 1
        if request.version is not None:
            pair[1].observe(time.monotonic() - request.started)

    def version(self, model: str, version: int, queued_rows: Callable[[], int]) -> VersionMetrics:
        """The metrics of one loaded version; `queued_rows` is asked at each scrape."""
        labels = (model, str(version))
        self._states.queued_rows[labels] = queued_rows
        return VersionMetrics(
            queue=self._queue.labels(*labels),
            execution=self._execution.labels(*labels),
            rows=self._batch_rows.labels(*labels),
            failed=self._failed_batches.labels(*labels),
            dropped={r: self._dropped.labels(*labels, r) for r in ("cancelled", "expired", "overloaded")},
        )

    def forget_version(self, model: str, version: int) -> None:
        """Stop asking an unloaded version for its queue."""
        self._states.queued_rows.pop((model, str(version)), None)

    def state_changed(self, status: VersionStatus) -> None:
        """Show a version's state; a failed one shows its reason."""
        self._states.statuses[(status.model, str(status.version))] = status

    def folder_problem(self, model: str, version: int | None, reason: str) -> None:
        """Show a folder that cannot be a model version at all."""
        label = "" if version is None else str(version)
        self._states.statuses[(model, label)] = VersionStatus(model, version or 0, State.FAILED, reason)

    def forget_state(self, model: str, version: int | None) -> None:
        """Stop showing a version that is gone."""
        self._states.statuses.pop((model, "" if version is None else str(version)), None)

    def shadow(self, model: str, version: int) -> Callable[[str], None]:
        """Count what came of a trial of `version`: agree, differ or error."""
        return lambda outcome: self._shadow.labels(model, str(version), outcome).inc()

    def loaded(self, model: str, version: int, seconds: float) -> None:
        self._load.labels(model, str(version)).set(seconds)

    def memory(self, model: str, version: int, bytes_by_device: Mapping[str, int]) -> None:
        """Show what a version takes; no devices: it is unloaded, and its series go."""
        known = self._memory_devices.pop((model, version), set())
        for device in known - bytes_by_device.keys():
            self._memory.remove(model, str(version), device)
        for device, size_bytes in bytes_by_device.items():
            self._memory.labels(model, str(version), device).set(size_bytes)
        if bytes_by_device:
            self._memory_devices[model, version] = set(bytes_by_device)

    def memory_budget(self, device: str, limit_bytes: int) -> None:
        """Show how much memory there is for models on a device."""
        self._memory_budget.labels(device).set(limit_bytes)

    def plans_chosen(self, model: str, version: int, plans: Mapping[str, SignatureRecord]) -> None:
        """Show which plan serves each bucket of each signature, in the place of those shown before."""
        for labels in self._plans.pop((model, version), ()):
            self._plan.remove(*labels)
        shown = self._plans[model, version] = []
        for signature, record in plans.items():
            for rows, name in record.names.items():
                shown.append((model, str(version), signature, str(rows), name))
                self._plan.labels(*shown[-1]).set(1)
            for kind, value in asdict(record.invariance).items():
                self._difference.labels(model, str(version), signature, kind).set(value)

    def ready(self, *, is_ready: bool) -> None:
        self._ready.set(float(is_ready))


class ObservedRequest:
    """One predict request, from its arrival to `done` or `refused`."""

    __slots__ = ("_metrics", "model", "protocol", "started", "version")

    def __init__(self, metrics: Metrics, model: str, protocol: str) -> None:
        self._metrics = metrics
        self.model = model
        self.protocol = protocol
        self.version: int | None = None
        self.started = time.monotonic()

    def refused(self, code: Code) -> None:
        """No version took it. A name that no model has makes no series of its own."""
        if code is Code.NOT_FOUND:
            self.model = ""
        self._metrics.request_done(self, code)

    def done(self, code: Code | None) -> None:
        """Answered: None for success."""
        self._metrics.request_done(self, code)


class VersionMetrics:
    """What the batcher of one version reports; labels are bound once."""

    def __init__(
        self,
        *,
        queue: Tally,
        execution: Tally,
        rows: Tally,
        failed: Counter,
        dropped: dict[str, Counter],
    ) -> None:
        self.waited = queue.observe
        self._execution = execution
        self._rows = rows
        self._failed = failed
        self._dropped = dropped

    def executed(self, rows: int, seconds: float) -> None:
        self._rows.observe(rows)
        self._execution.observe(seconds)

    def failed(self) -> None:
        self._failed.inc()

    def dropped(self, reason: str, count: int) -> None:
        """`reason` is cancelled, expired or overloaded."""
        if count:
            self._dropped[reason].inc(count)


class _ModelStates(Collector):
    """Gauges that are read from live objects at each scrape."""

    def __init__(self) -> None:
        self.statuses: dict[tuple[str, str], VersionStatus] = {}
        self.queued_rows: dict[tuple[str, str], Callable[[], int]] = {}

    def collect(self) -> Iterable[Metric]:
        state = GaugeMetricFamily(
            "kiln_model_state", "1 for the state a version is in, else 0.", labels=(*_VERSION, "state")
        )
        failed = GaugeMetricFamily(
            "kiln_model_failed", "1 for each version that failed, with the reason.", labels=(*_VERSION, "reason")
        )
        for (model, version), status in sorted(self.statuses.items()):
            for each in State:
                state.add_metric((model, version, each.value), float(each is status.state))
            if status.state is State.FAILED:
                failed.add_metric((model, version, status.reason[:_LONGEST_REASON]), 1.0)
        rows = GaugeMetricFamily("kiln_queue_rows", "Rows waiting now.", labels=_VERSION)
        for labels, queued_rows in list(self.queued_rows.items()):
            rows.add_metric(labels, float(queued_rows()))
        return (state, failed, rows)
