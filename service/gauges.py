"""Gauges that are read from live objects at each scrape: the versions' states and queues, and the GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.batching.queue import Limits
from service.gpus import ReadGpus
from service.registry.lifecycle import State, VersionStatus
from service.runtime.records import SignatureRecord

_VERSION = ("model", "version")
_LONGEST_REASON = 200


class VersionGauges(Collector):
    """States, failures and queues, by model and version as labels show them."""

    def __init__(self) -> None:
        self.statuses: dict[tuple[str, str], VersionStatus] = {}
        self.queues: dict[tuple[str, str], tuple[Callable[[], int], Limits]] = {}
        """Of each loaded version what tells the rows that wait, and its bounds."""
        self.load_s: dict[tuple[str, str], float] = {}
        self.memory_bytes: dict[tuple[str, str], dict[str, int]] = {}
        """By device."""
        self.plans: dict[tuple[str, str], Mapping[str, SignatureRecord]] = {}
        """By signature."""

    def forget(self, labels: tuple[str, str]) -> None:
        """A version is unloaded: all goes but its state."""
        for told in (self.queues, self.load_s, self.memory_bytes, self.plans):
            told.pop(labels, None)

    def collect(self) -> Iterable[Metric]:
        return (*self._states(), *self._queues(), *self._loaded())

    def _states(self) -> Iterable[Metric]:
        state = GaugeMetricFamily(
            "kiln_model_state", "1 for the state a version is in, else 0.", labels=(*_VERSION, "state")
        )
        failed = GaugeMetricFamily(
            "kiln_model_failed", "1 for each version that failed, with the reason.", labels=(*_VERSION, "reason")
        )
        for labels, status in sorted(self.statuses.items()):
            for each in State:
                state.add_metric((*labels, each.value), float(each is status.state))
            if status.state is State.FAILED:
                failed.add_metric((*labels, status.reason[:_LONGEST_REASON]), 1.0)
        return (state, failed)

    def _queues(self) -> Iterable[Metric]:
        rows = GaugeMetricFamily("kiln_queue_rows", "Rows waiting now.", labels=_VERSION)
        most = GaugeMetricFamily("kiln_queue_limit_rows", "Rows that may wait; more are refused.", labels=_VERSION)
        batch = GaugeMetricFamily("kiln_batch_limit_rows", "Rows of callers that one batch may have.", labels=_VERSION)
        for labels, (queued_rows, limits) in list(self.queues.items()):
            rows.add_metric(labels, float(queued_rows()))
            most.add_metric(labels, float(limits.max_queue_rows))
            batch.add_metric(labels, float(limits.max_batch_rows))
        return (rows, most, batch)

    def _loaded(self) -> Iterable[Metric]:
        seconds = GaugeMetricFamily("kiln_model_load_seconds", "Time from LOADING to READY.", labels=_VERSION)
        for labels, load_s in list(self.load_s.items()):
            seconds.add_metric(labels, load_s)
        memory = GaugeMetricFamily(
            "kiln_model_memory_bytes",
            "Memory that a loaded version takes on a device; CPU is the machine's memory.",
            labels=(*_VERSION, "device"),
        )
        for labels, by_device in list(self.memory_bytes.items()):
            for device, size_bytes in by_device.items():
                memory.add_metric((*labels, device), float(size_bytes))
        plan = GaugeMetricFamily(
            "kiln_plan_info",
            "The execution plan in use for each batch bucket.",
            labels=(*_VERSION, "signature", "bucket_rows", "plan"),
        )
        apart = GaugeMetricFamily(
            "kiln_plan_batch_difference",
            "The most by which company in a batch was seen to change an answer, absolute and relative.",
            labels=(*_VERSION, "signature", "kind"),
        )
        refused = GaugeMetricFamily(
            "kiln_plan_left_out",
            "1 for each plan that was tried and is not used everywhere; why is in the model's config.",
            labels=(*_VERSION, "signature", "plan"),
        )
        for labels, plans in list(self.plans.items()):
            for signature, record in plans.items():
                for rows, name in record.names.items():
                    plan.add_metric((*labels, signature, str(rows), name), 1.0)
                apart.add_metric((*labels, signature, "absolute"), record.invariance.absolute)
                apart.add_metric((*labels, signature, "relative"), record.invariance.relative)
                for name in record.left_out:
                    refused.add_metric((*labels, signature, name), 1.0)
        return (seconds, memory, plan, apart, refused)


class GpuGauges(Collector):
    """What the GPUs tell; families without series where there are none."""

    def __init__(self, read: ReadGpus) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return _gpu_families().values()

    def collect(self) -> Iterable[Metric]:
        families = _gpu_families()
        for gpu in self._read():
            for name, family in families.items():
                value = getattr(gpu, name)
                if value is not None:
                    family.add_metric((str(gpu.index), gpu.name), value)
        return families.values()


def _gpu_families() -> dict[str, GaugeMetricFamily]:
    """By the field of `Gpu` that they show."""
    texts = {
        "busy": ("kiln_gpu_busy_ratio", "Share of the last moments in which a GPU ran something."),
        "memory_used_bytes": ("kiln_gpu_memory_used_bytes", "Memory in use on a GPU, by whatever process."),
        "memory_bytes": ("kiln_gpu_memory_bytes", "Memory of a GPU."),
        "power_w": ("kiln_gpu_power_watts", "Power that a GPU draws."),
    }
    return {field: GaugeMetricFamily(name, text, labels=("gpu", "name")) for field, (name, text) in texts.items()}
