"""A real Prometheus scrapes the server: it finds nothing wrong, its rules work, and every dashboard has data.

Needs the programs ``prometheus`` and ``promtool``: Debian's package ``prometheus``.
"""

from __future__ import annotations

import http.client
import json
import math
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from load_tests.prometheus import RULES, Prometheus, Query, missing, prometheus, queries
from tests.e2e.callers import TIMEOUT_S, callers
from tests.e2e.process import MODELS, ROOT, Server, wait_for

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(300)]

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SCRAPED_S = 60.0
"""How long something may take until it was scraped, and a rule has seen it."""
_NVML = '''
"""As NVIDIA's library answers where there is one GPU."""

from types import SimpleNamespace

NVMLError = OSError
nvmlInit = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetName = lambda handle: "A GPU"
nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=40, memory=10)
nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(total=80 << 30, used=20 << 30, free=60 << 30)
nvmlDeviceGetPowerUsage = lambda handle: 350_000
'''
_CONFIG = {"models": {"digits": {"versions": "all", "shadow": {"to": 1}, "slo_ms": 5000}}}


@dataclass(frozen=True)
class Observed:
    """A server under load, and the Prometheus that scrapes it."""

    server: Server
    prometheus: Prometheus


@pytest.fixture(scope="module")
def observed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """``digits`` in two versions, one on trial, with a goal, a GPU, and a model that cannot be loaded beside it."""
    folder = tmp_path_factory.mktemp("observed")
    for version in ("1", "2"):
        shutil.copytree(MODELS / "digits" / "1", folder / "models" / "digits" / version)
    (folder / "models" / "broken" / "1").mkdir(parents=True)
    (folder / "models" / "broken" / "1" / "model.keras").write_text("nothing")
    (folder / "models.yaml").write_text(yaml.safe_dump(_CONFIG))
    (folder / "fake").mkdir()
    (folder / "fake" / "pynvml.py").write_text(_NVML)
    server = Server(
        folder / "models",
        "--models-config",
        folder / "models.yaml",
        "--cache-dir",
        cache,
        log=folder / "log",
        env={"PYTHONPATH": str(folder / "fake")},
    )
    try:
        server.wait_ready()
        with _load(server), prometheus(server.rest_port, folder / "prometheus") as running:
            yield Observed(server, running)
    finally:
        server.kill()


class _load:  # noqa: N801 - reads as a function
    """Requests of all kinds, one after the other, for as long as the context lasts."""

    def __init__(self, server: Server) -> None:
        self._callers = callers(server.rest_port, server.grpc_port, 4)
        self._port = server.rest_port
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(TIMEOUT_S)
        assert self._failure is None, self._failure

    def _run(self) -> None:
        image = np.zeros((8, 8, 1), np.float32)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        try:
            while not self._over.is_set():
                for caller in self._callers:
                    caller.ask(image)
                for body, headers, status in (
                    ({"instances": [image.tolist()]}, {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}, 200),
                    ({"instances": []}, {}, 400),
                    ({"instances": [image.tolist()]}, {"kiln-timeout-ms": "0.0001"}, 504),
                ):
                    connection.request("POST", "/v1/models/digits:predict", json.dumps(body).encode(), headers)
                    response = connection.getresponse()
                    text = response.read()
                    assert response.status == status, text
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            self._failure = error
        finally:
            for caller in self._callers:
                caller.close()
            connection.close()


@pytest.mark.parametrize(
    "query",
    [*queries("overview.json"), *queries("model.json")],
    ids=lambda q: f"{q.dashboard[:-5]}-{q.panel}-{q.legend}",
)
def test_a_panel_has_data(observed: Observed, query: Query):
    """Each query of each panel gives at least one series with a number, once there has been load."""

    def has_data() -> bool:
        return any(math.isfinite(value) for _, value in observed.prometheus.query(query.expr))

    wait_for(has_data, query.expr, SCRAPED_S)


def test_what_it_scraped_is_what_was_counted(observed: Observed):
    """Rates, errors and durations by model, version and protocol; what is not there has no name."""
    series = {
        (labels["model"], labels["version"], labels["protocol"], labels["code"]): value
        for labels, value in observed.prometheus.query("kiln_requests_total")
    }
    for protocol in ("rest-tfs", "rest-v2", "grpc-v2"):
        assert series["digits", "2", protocol, "ok"] > 0
    assert series["digits", "2", "rest-tfs", "invalid_argument"] > 0
    assert series["digits", "2", "rest-tfs", "deadline_exceeded"] > 0
    assert {model for model, *_ in series} == {"digits"}


def test_tensorflow_is_not_a_models_memory(observed: Observed):
    """What importing it took is not told of the version that was loaded first."""

    def used() -> dict[str, float]:
        series = observed.prometheus.query('kiln_model_memory_bytes{device="CPU"}')
        return {labels["version"]: value for labels, value in series}

    wait_for(lambda: {*used()} == {"1", "2"}, "both versions", SCRAPED_S)
    assert 0 < max(used().values()) < 300 * 2**20


def test_a_trace_is_found_by_its_latency(observed: Observed):
    """Prometheus keeps the exemplars that it was told."""

    def traces() -> set[str]:
        found = observed.prometheus.get(
            "query_exemplars", query="kiln_request_duration_seconds_bucket", start="0", end="4e9"
        )
        return {each["labels"]["trace_id"] for series in found for each in series["exemplars"]}

    wait_for(lambda: traces() == {TRACE}, "the exemplar", SCRAPED_S)


def test_the_rules_are_evaluated(observed: Observed):
    """None has an error; what is wrong with this server is being noticed, and nothing else."""

    def rules() -> list[dict[str, str]]:
        return [rule for group in observed.prometheus.get("rules")["groups"] for rule in group["rules"]]

    wait_for(lambda: all(rule["health"] == "ok" for rule in rules()), "all rules", SCRAPED_S)
    noticed = {rule["name"] for rule in rules() if rule["type"] == "alerting" and rule["state"] != "inactive"}
    assert "KilnModelFailed" in noticed
    assert noticed & {"KilnQueueSaturated", "KilnPlanFellBack", "KilnMemoryNearBudget", "KilnNotReady"} == set()

    def with_a_ratio() -> list[str]:
        return [labels["model"] for labels, _ in observed.prometheus.query("kiln:failed_requests:ratio_rate5m")]

    wait_for(lambda: with_a_ratio() == ["digits"], "the ratio of failed requests", SCRAPED_S)


def test_promtool_finds_nothing_wrong_with_the_page(observed: Observed):
    """Names, types, units and texts are as they should be."""
    status, page = observed.server.request("GET", "/metrics")
    assert status == 200
    promtool("check", "metrics", stdin=page)


def test_promtool_finds_nothing_wrong_with_the_rules():
    """Their form, and their expressions."""
    promtool("check", "rules", "--lint-fatal", str(RULES))


def test_each_alert_fires_when_it_should_and_only_then():
    """The stories of ``tests/rules/alerts.yaml``."""
    promtool("test", "rules", str(ROOT / "tests" / "rules" / "alerts.yaml"))


def promtool(*arguments: str, stdin: bytes = b"") -> None:
    done = subprocess.run(["promtool", *arguments], input=stdin, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b""), done.stdout + done.stderr
