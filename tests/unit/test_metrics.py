"""What is counted, under which labels, and the page that shows it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from service.batching.queue import Limits
from service.build import versions
from service.errors import Code
from service.gpus import Gpu
from service.metrics import Metrics
from service.registry.lifecycle import State, VersionStatus
from service.runtime.records import Chosen, Difference, SignatureRecord

LIMITS = Limits(8, 64, 1 << 20)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def metrics() -> Metrics:
    """The metrics of a server of its own."""
    return Metrics()


def value(metrics: Metrics, name: str, /, **labels: str) -> float | None:
    """A sample as a scrape sees it; None where there is no such series."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def record(plans: dict[int, str], **more: Any) -> SignatureRecord:
    """That these plans serve these buckets."""
    return SignatureRecord({rows: Chosen(plan, rows, 0.01) for rows, plan in plans.items()}, **more)


def series(metrics: Metrics, name: str) -> list[dict[str, str]]:
    families = text_string_to_metric_families(metrics.render().decode())
    return [sample.labels for family in families for sample in family.samples if sample.name == name]


def test_two_servers_share_nothing():
    """Each server has a registry of its own, with what every process tells of itself in it."""
    one, other = Metrics(), Metrics()
    one.request("m", "rest-v2").done(None)
    assert series(other, "kiln_requests_total") == []
    assert value(one, "kiln_build_info", **versions()) == 1
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
    metrics.request("digits", "rest-tfs").done(code)
    labels = {"model": model, "version": "", "protocol": "rest-tfs"}
    assert value(metrics, "kiln_requests_total", code=code.value, **labels) == 1
    assert not value(metrics, "kiln_request_duration_seconds_count", **labels)


def test_requests_in_flight_are_those_not_done(metrics: Metrics):
    """The gauge goes up with each request and down with each end, however it ends."""
    requests = [metrics.request("m", "rest-v2") for _ in range(3)]
    assert value(metrics, "kiln_requests_in_flight") == 3
    requests[0].done(None)
    requests[1].done(Code.UNAVAILABLE)
    assert value(metrics, "kiln_requests_in_flight") == 1
    requests[2].done(Code.CANCELLED)
    assert value(metrics, "kiln_requests_in_flight") == 0


def test_a_version_reports_its_batches(metrics: Metrics):
    """What the batcher observes ends up under the version's labels."""
    observer = metrics.version("digits", 2, lambda: 0, LIMITS)
    observer.waited(0.002)
    observer.executed(3, 4, 0.02)
    observer.failed()
    observer.dropped("cancelled", 2)
    observer.dropped("expired", 0)
    labels = {"model": "digits", "version": "2"}
    assert value(metrics, "kiln_queue_seconds_sum", **labels) == 0.002
    assert value(metrics, "kiln_queue_seconds_bucket", le="0.0025", **labels) == 1
    assert value(metrics, "kiln_execution_seconds_sum", **labels) == 0.02
    assert value(metrics, "kiln_batch_rows_sum", **labels) == 3
    assert value(metrics, "kiln_batch_fill_ratio_sum", **labels) == 0.75
    assert value(metrics, "kiln_batch_rows_bucket", le="2.0", **labels) == 0
    assert value(metrics, "kiln_batch_rows_bucket", le="4.0", **labels) == 1
    assert value(metrics, "kiln_failed_batches_total", **labels) == 1
    drops = {r: value(metrics, "kiln_dropped_requests_total", reason=r, **labels) for r in ("cancelled", "expired")}
    assert drops == {"cancelled": 2, "expired": 0}
    assert value(metrics, "kiln_dropped_requests_total", reason="overloaded", **labels) == 0


def test_the_queue_is_asked_at_each_scrape_until_its_version_is_forgotten(metrics: Metrics):
    """The rows waiting are read when the page is; an unloaded version is not asked any more."""
    waiting = [5]
    metrics.version("digits", 2, lambda: waiting[0], LIMITS)
    assert value(metrics, "kiln_queue_rows", model="digits", version="2") == 5
    waiting[0] = 6
    assert value(metrics, "kiln_queue_rows", model="digits", version="2") == 6
    assert value(metrics, "kiln_queue_limit_rows", model="digits", version="2") == 64
    assert value(metrics, "kiln_batch_limit_rows", model="digits", version="2") == 8
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
    metrics.plans_chosen("digits", 2, {"serving_default": record({1: "signature", 8: "openvino"})})
    assert value(metrics, "kiln_model_load_seconds", model="digits", version="2") == 1.5
    plans = {(labels["bucket_rows"], labels["plan"]) for labels in series(metrics, "kiln_plan_info")}
    assert plans == {("1", "signature"), ("8", "openvino")}
    for is_ready in (True, False):
        metrics.ready(is_ready=is_ready)
        assert value(metrics, "kiln_ready") == is_ready


def test_plans_take_the_place_of_those_before(metrics: Metrics):
    """After planning what is shown is what serves: plans, how far company changes answers, and what was left out."""
    metrics.plans_chosen("digits", 2, {"a": record({1: "signature", 8: "signature"})})
    planned = record({1: "xla", 8: "openvino-1"}, left_out={"frozen": "?"}, invariance=Difference(1e-7, 2e-6))
    pieces = replace(planned, chosen={8: Chosen("xla", 1, 0.01)}, invariance=Difference(), left_out={})
    metrics.plans_chosen("digits", 2, {"a": planned, "b": pieces})
    version = {"model": "digits", "version": "2"}
    shown = {(s["signature"], s["bucket_rows"], s["plan"]) for s in series(metrics, "kiln_plan_info")}
    assert shown == {("a", "1", "xla"), ("a", "8", "openvino-1"), ("b", "8", "xla (8 × 1)")}
    for kind, expected in (("absolute", 1e-7), ("relative", 2e-6)):
        assert value(metrics, "kiln_plan_batch_difference", **version, signature="a", kind=kind) == expected
        assert value(metrics, "kiln_plan_batch_difference", **version, signature="b", kind=kind) == 0
    assert series(metrics, "kiln_plan_left_out") == [{**version, "signature": "a", "plan": "frozen"}]


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


def test_a_version_replaced_under_its_number_is_told_of(metrics: Metrics):
    """The new one is loaded before the old one goes: what is shown then is the new one's, of its plans too."""
    for rows, plan in ((1, "signature"), (2, "openvino")):
        metrics.version("digits", 2, lambda rows=rows: rows, LIMITS)  # type: ignore[misc]
        metrics.plans_chosen("digits", 2, {"serving_default": record({1: plan})})
        metrics.loaded("digits", 2, 0.5 * rows)
    metrics.forget_version("digits", 2)
    assert value(metrics, "kiln_queue_rows", model="digits", version="2") == 2
    assert value(metrics, "kiln_model_load_seconds", model="digits", version="2") == 1
    assert [labels["plan"] for labels in series(metrics, "kiln_plan_info")] == ["openvino"]
    metrics.forget_version("digits", 2)
    gone = ("kiln_queue_rows", "kiln_model_load_seconds", "kiln_plan_info")
    assert [series(metrics, name) for name in gone] == [[], [], []]


def serve_and_unload(metrics: Metrics, version: int) -> None:
    """One version that comes, answers once, and goes."""
    observer = metrics.version("digits", version, lambda: 0, LIMITS)
    observer.executed(1, 1, 0.01)
    request = metrics.request("digits", "rest-v2")
    request.version = version
    request.decode_s, request.answered = 0.001, request.started
    request.done(None)
    metrics.forget_version("digits", version)


def test_a_server_that_takes_a_new_version_each_hour_has_no_more_series_for_it(metrics: Metrics):
    """Of versions that are gone the latest keep their counts; all series of the older ones are dropped."""
    for version in range(1, 10):
        serve_and_unload(metrics, version)
    settled = len(metrics.render().splitlines())
    for version in range(10, 60):
        serve_and_unload(metrics, version)
    assert len(metrics.render().splitlines()) == settled
    kept = {labels["version"] for labels in series(metrics, "kiln_requests_total")}
    assert kept == {str(version) for version in range(52, 60)}


def test_a_version_that_comes_back_counts_on(metrics: Metrics):
    """One that is let go for room and loaded again has its counts still, and is not the next to be dropped."""
    serve_and_unload(metrics, 1)
    metrics.version("digits", 1, lambda: 0, LIMITS)
    for version in range(2, 12):
        serve_and_unload(metrics, version)
    assert value(metrics, "kiln_requests_total", model="digits", version="1", protocol="rest-v2", code="ok") == 1


def test_the_parts_of_a_request_are_summed(metrics: Metrics):
    """Decoding and encoding each count once for a request that got so far."""
    labels = {"model": "digits", "version": "2", "protocol": "rest-tfs"}
    for is_answered in (True, False):
        request = metrics.request("digits", "rest-tfs")
        request.version, request.decode_s = 2, 0.25
        if is_answered:
            request.answered = request.started - 1.0
        request.done(None if is_answered else Code.OVERLOADED)
    assert value(metrics, "kiln_decode_seconds_count", **labels) == 2
    assert value(metrics, "kiln_decode_seconds_sum", **labels) == 0.5
    assert value(metrics, "kiln_encode_seconds_count", **labels) == 1
    assert value(metrics, "kiln_encode_seconds_sum", **labels) == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize(
    ("slo_ms", "code", "outcome"),
    [
        (60_000, None, "met"),
        (1e-9, None, "missed"),
        (60_000, Code.OVERLOADED, "missed"),
        (60_000, Code.INTERNAL, "missed"),
        (60_000, Code.UNAVAILABLE, "missed"),
        (60_000, Code.DEADLINE_EXCEEDED, "missed"),
        (60_000, Code.INVALID_ARGUMENT, None),
        (60_000, Code.CANCELLED, None),
        (None, None, None),
    ],
)
def test_a_goal_is_met_or_missed(metrics: Metrics, slo_ms: float | None, code: Code | None, outcome: str | None):
    """What is slow or failed by the server misses it; what the caller did wrong counts for neither."""
    metrics.goal("digits", slo_ms)
    request = metrics.request("digits", "rest-v2")
    request.version = 2
    request.done(code)
    labels = {"model": "digits", "version": "2"}
    counts = {each: value(metrics, "kiln_slo_requests_total", outcome=each, **labels) for each in ("met", "missed")}
    assert counts == ({"met": None, "missed": None} if outcome is None else {"met": 0, "missed": 0} | {outcome: 1})


def test_a_goal_that_changes_holds_from_then_on(metrics: Metrics):
    """Also for requests of a kind that was counted before; without a goal nothing is held to one."""
    labels = {"model": "digits", "version": "2", "outcome": "missed"}
    for slo_ms, missed in ((60_000.0, 0), (1e-9, 1), (1e-9, 2), (None, 2)):
        metrics.goal("digits", slo_ms)
        request = metrics.request("digits", "rest-v2")
        request.version = 2
        request.done(None)
        assert value(metrics, "kiln_slo_requests_total", **labels) == missed
        assert value(metrics, "kiln_slo_seconds", model="digits") == (None if slo_ms is None else slo_ms / 1e3)


def test_a_traced_request_is_the_example_of_its_bucket(metrics: Metrics):
    """In OpenMetrics, with its trace's id, on the bucket that it fell into, and there alone; the latest wins."""
    for trace in ("0" * 31 + "1", TRACE, ""):
        request = metrics.request("digits", "rest-v2", trace)
        request.version = 2
        request.started -= 0.3
        request.done(None)
    text, content_type = metrics.page("application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith(b"# EOF\n")
    samples = [
        sample
        for family in open_metrics(text.decode())
        for sample in family.samples
        if sample.name == "kiln_request_duration_seconds_bucket"
    ]
    assert [sample.value for sample in samples if sample.labels["le"] == "0.5"] == [3]
    (traced,) = [sample for sample in samples if sample.exemplar]
    assert traced.labels["le"] == "0.5"
    assert traced.exemplar is not None
    assert traced.exemplar.labels == {"trace_id": TRACE}
    assert traced.exemplar.value == pytest.approx(0.3, abs=0.1)
    assert float(traced.exemplar.timestamp) == pytest.approx(time.time(), abs=60)
    assert TRACE.encode() not in metrics.render()


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("text/html, Application/OpenMetrics-Text; version=0.0.1; q=0.75", True),
        ("application/openmetrics-text;version=nonsense", True),
        ("application/openmetrics-text; q=0, text/plain", False),
        ("application/openmetrics-text; q=0.0; version=1.0.0", False),
        ("application/openmetrics-texts", False),
    ],
)
def test_the_form_of_the_page_is_that_asked_for(metrics: Metrics, accept: str, is_open: bool):
    """OpenMetrics only for who names it."""
    text, content_type = metrics.page(accept)
    assert content_type.partition(";")[0] == ("application/openmetrics-text" if is_open else "text/plain")
    assert text.endswith(b"# EOF\n") == is_open


def test_gpus_tell_what_they_can():
    """A figure that a GPU does not tell has no series; without GPUs there are none at all."""
    gpus = [Gpu(0, "H100", 0.25, 10, 80, 350.5), Gpu(1, "H100 MIG", None, 5, 40, None)]
    metrics = Metrics(lambda: gpus)
    assert value(metrics, "kiln_gpu_busy_ratio", gpu="0", name="H100") == 0.25
    assert value(metrics, "kiln_gpu_power_watts", gpu="0", name="H100") == 350.5
    assert value(metrics, "kiln_gpu_memory_used_bytes", gpu="1", name="H100 MIG") == 5
    assert value(metrics, "kiln_gpu_memory_bytes", gpu="1", name="H100 MIG") == 40
    assert len(series(metrics, "kiln_gpu_busy_ratio")) == len(series(metrics, "kiln_gpu_power_watts")) == 1
    assert series(Metrics(), "kiln_gpu_memory_bytes") == []
