"""What is counted, under which labels, and the page that shows it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service import __version__
from service.errors import Code
from service.metrics import Metrics
from service.registry.lifecycle import State, VersionStatus


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of a server of its own."""
    return Metrics()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """A sample as a scrape sees it; None where there is no such series."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def series(metrics: Metrics, name: str) -> list[dict[str, str]]:
    families = text_string_to_metric_families(metrics.render().decode())
    return [sample.labels for family in families for sample in family.samples if sample.name == name]


def test_two_servers_share_nothing():
    """Each server has a registry of its own, with what every process tells of itself in it."""
    one, other = Metrics(), Metrics()
    one.request("m", "rest-v2").done(None)
    assert series(other, "kiln_requests_total") == []
    assert value(one, "kiln_build_info", version=__version__) == 1
    assert value(one, "process_start_time_seconds") is not None


@pytest.mark.parametrize("code", [None, *Code])
def test_each_outcome_has_its_series(metrics: Metrics, code: Code | None):
    """A request counts once, as ok or under its error's code, and its time is observed."""
    for _ in range(2):
        request = metrics.request("digits", "grpc-tfs")
        request.version = 4
        request.done(code)
    labels = {"model": "digits", "version": "4", "protocol": "grpc-tfs"}
    assert value(metrics, "kiln_requests_total", code=code.value if code else "ok", **labels) == 2
    assert value(metrics, "kiln_request_duration_seconds_count", **labels) == 2
    assert len(series(metrics, "kiln_requests_total")) == 1


@pytest.mark.parametrize(("code", "model"), [(Code.NOT_FOUND, ""), (Code.UNAVAILABLE, "digits")])
def test_a_made_up_name_makes_no_series(metrics: Metrics, code: Code, model: str):
    """A refused request has no version and no time; where there is no such model, no name either."""
    metrics.request("digits", "rest-tfs").refused(code)
    labels = {"model": model, "version": "", "protocol": "rest-tfs"}
    assert value(metrics, "kiln_requests_total", code=code.value, **labels) == 1
    assert not value(metrics, "kiln_request_duration_seconds_count", **labels)


def test_requests_in_flight_are_those_not_done(metrics: Metrics):
    """The gauge goes up with each request and down with each end, however it ends."""
    requests = [metrics.request("m", "rest-v2") for _ in range(3)]
    assert value(metrics, "kiln_requests_in_flight") == 3
    requests[0].done(None)
    requests[1].refused(Code.UNAVAILABLE)
    assert value(metrics, "kiln_requests_in_flight") == 1
    requests[2].done(Code.CANCELLED)
    assert value(metrics, "kiln_requests_in_flight") == 0


def test_a_version_reports_its_batches(metrics: Metrics):
    """What the batcher observes ends up under the version's labels."""
    observer = metrics.version("digits", 2, lambda: 0)
    observer.waited(0.002)
    observer.executed(3, 0.02)
    observer.failed()
    observer.dropped("cancelled", 2)
    observer.dropped("expired", 0)
    labels = {"model": "digits", "version": "2"}
    assert value(metrics, "kiln_queue_seconds_sum", **labels) == 0.002
    assert value(metrics, "kiln_queue_seconds_bucket", le="0.0025", **labels) == 1
    assert value(metrics, "kiln_execution_seconds_sum", **labels) == 0.02
    assert value(metrics, "kiln_batch_rows_sum", **labels) == 3
    assert value(metrics, "kiln_batch_rows_bucket", le="2.0", **labels) == 0
    assert value(metrics, "kiln_batch_rows_bucket", le="4.0", **labels) == 1
    assert value(metrics, "kiln_failed_batches_total", **labels) == 1
    drops = {r: value(metrics, "kiln_dropped_requests_total", reason=r, **labels) for r in ("cancelled", "expired")}
    assert drops == {"cancelled": 2, "expired": 0}
    assert value(metrics, "kiln_dropped_requests_total", reason="overloaded", **labels) == 0


def test_the_queue_is_asked_at_each_scrape_until_its_version_is_forgotten(metrics: Metrics):
    """The rows waiting are read when the page is; an unloaded version is not asked any more."""
    waiting = [5]
    metrics.version("digits", 2, lambda: waiting[0])
    assert value(metrics, "kiln_queue_rows", model="digits", version="2") == 5
    waiting[0] = 6
    assert value(metrics, "kiln_queue_rows", model="digits", version="2") == 6
    for _ in range(2):
        metrics.forget_version("digits", 2)
    assert series(metrics, "kiln_queue_rows") == []


def test_a_version_is_in_one_state(metrics: Metrics):
    """Of a version's series by state exactly the current one is 1; there is no failure unless it failed."""
    for state in (State.LOADING, State.READY):
        metrics.state_changed(VersionStatus("digits", 2, state))
    states = {s: value(metrics, "kiln_model_state", model="digits", version="2", state=s.value) for s in State}
    assert states == {state: float(state is State.READY) for state in State}
    assert series(metrics, "kiln_model_failed") == []


def test_a_failed_version_tells_its_reason_in_bounds(metrics: Metrics):
    """The reason is a label, cut to a length that a label may have."""
    metrics.state_changed(VersionStatus("digits", 2, State.FAILED, "x" * 500))
    assert value(metrics, "kiln_model_failed", model="digits", version="2", reason="x" * 200) == 1
    assert value(metrics, "kiln_model_state", model="digits", version="2", state="FAILED") == 1


@pytest.mark.parametrize(("version", "label"), [(None, ""), (3, "3")])
def test_a_folder_that_is_no_version_is_a_failure(metrics: Metrics, version: int | None, label: str):
    """A folder that cannot be a model version shows with its name and the reason."""
    metrics.folder_problem("cats", version, "no model file")
    assert value(metrics, "kiln_model_failed", model="cats", version=label, reason="no model file") == 1


def test_load_time_plans_and_readiness_are_shown(metrics: Metrics):
    """How long a version took to load, which plan serves which bucket, and whether the server is ready."""
    metrics.loaded("digits", 2, 1.5)
    metrics.plan_chosen("digits", 2, "serving_default", {1: "signature", 8: "openvino"})
    assert value(metrics, "kiln_model_load_seconds", model="digits", version="2") == 1.5
    plans = {(labels["bucket_rows"], labels["plan"]) for labels in series(metrics, "kiln_plan_info")}
    assert plans == {("1", "signature"), ("8", "openvino")}
    for is_ready in (True, False):
        metrics.ready(is_ready=is_ready)
        assert value(metrics, "kiln_ready") == is_ready


def test_memory_is_shown_by_device_until_the_version_is_unloaded(metrics: Metrics):
    """What a version takes is told for each device it is on now, and no more once it takes nothing."""
    metrics.memory_budget("CPU", 1000)
    metrics.memory("digits", 2, {"CPU": 10, "GPU:0": 20})
    metrics.memory("digits", 3, {"CPU": 5})
    metrics.memory("digits", 2, {"CPU": 11})
    assert value(metrics, "kiln_memory_budget_bytes", device="CPU") == 1000
    assert value(metrics, "kiln_model_memory_bytes", model="digits", version="2", device="CPU") == 11
    for _ in range(2):
        metrics.memory("digits", 2, {})
    assert series(metrics, "kiln_model_memory_bytes") == [{"model": "digits", "version": "3", "device": "CPU"}]


def test_counters_have_no_second_series_for_their_creation(metrics: Metrics):
    """Nobody asks when a counter was made."""
    metrics.request("m", "rest-v2").done(None)
    assert b"_created" not in metrics.render()
