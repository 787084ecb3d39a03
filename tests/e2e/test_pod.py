"""A pod's life, with the service started exactly as the rendered chart says, and nothing that a caller loses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from tests.e2e.chart import Mounts, Object, Pod, render, select, with_values
from tests.e2e.conftest import Digits
from tests.e2e.process import ROOT, environment, wait_for
from tests.e2e.test_load import assert_all_right, calling

CALLERS = 8
PRE_STOP_S = 1
READY_S = 240.0
VALUES: dict[str, Any] = {
    "preStopSeconds": PRE_STOP_S,
    "drainSeconds": 10,
    # A batch runs once all callers are in it, or after ten seconds.
    "settings": {"log_format": "json", "max_batch_rows": CALLERS, "batch_wait_ms": 10_000, "plan": "signature"},
    "models": {"held": {"path": "/models/digits", "labels": {"stable": 1}}},
}


class Schedule(Protocol):
    """Starts the pod of a chart's Deployment."""

    def __call__(self, objects: list[Object]) -> Pod: ...


@pytest.fixture
def schedule(cache: Path, tmp_path: Path) -> Iterator[Schedule]:
    running: list[Pod] = []

    def schedule(objects: list[Object]) -> Pod:
        workload = select(objects, "Deployment")
        pod = Pod(workload, Mounts(objects, workload, tmp_path / "root", cache=cache), tmp_path / "log")
        running.append(pod)
        return pod

    yield schedule
    for pod in running:
        pod.kill()


def come_up(pod: Pod) -> None:
    """Readiness, alive all the while."""

    def is_ready() -> bool:
        assert pod.probe("livenessProbe")
        return pod.probe("readinessProbe")

    pod.wait(is_ready, "ready", READY_S)


def terminate(pod: Pod, meanwhile: Callable[[], None]) -> float:
    """What the kubelet does to a pod that is deleted; returns the seconds it took.

    `meanwhile` is called while preStop sleeps, when the pod is taken off the endpoints.
    """
    deleted = time.monotonic()
    sleep_s = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep_s == PRE_STOP_S
    meanwhile()
    wait_for(lambda: time.monotonic() >= deleted + sleep_s, "preStop")
    assert pod.probe("readinessProbe"), "it must serve while preStop sleeps"
    pod.signal()
    left_s = pod.spec["terminationGracePeriodSeconds"] - (time.monotonic() - deleted)
    assert pod.exit_code(left_s) == 0, pod.log
    return time.monotonic() - deleted


def helm_test(objects: list[Object], pod: Pod) -> subprocess.CompletedProcess[str]:
    """The container of ``helm test``, with the Service's address mapped to the pod's."""
    (container,) = select(objects, "Pod")["spec"]["containers"]
    program, flag, code, url = container["command"]
    assert (program, flag, url) == ("python", "-c", "http://kiln:8501")
    return subprocess.run(
        [sys.executable, flag, code, f"http://127.0.0.1:{pod.rest_port}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def ask_held(pod: Pod, image: Any) -> tuple[int, Any]:
    """A request that fills no batch, and waits for others that never come."""
    body = json.dumps({"instances": [image.tolist()]}).encode()
    status, answer = pod.request("POST", "/v1/models/held/labels/stable:predict", body)
    return status, json.loads(answer)


@pytest.mark.timeout(300)
def test_a_pods_life(helm: Path, schedule: Schedule, digits: Digits):
    """Started from the chart's args, env and config, a pod comes up, serves, and goes, without a request that fails.

    Not one of those that come while endpoints are being told, nor one that is held when SIGTERM comes; and it is gone
    within its grace. ``helm test`` fails before the pod is ready, and not after.
    """
    objects = render(helm, *with_values(VALUES))
    pod = schedule(objects)
    pod.wait(lambda: pod.probe("startupProbe"), "startup", pod.patience_s("startupProbe"))
    assert not pod.probe("readinessProbe"), "it was ready before its models were"
    early = helm_test(objects, pod)
    assert (early.returncode != 0, "503" in early.stderr) == (True, True), "helm test must tell that it is not ready"
    come_up(pod)
    tested = helm_test(objects, pod)
    assert (tested.returncode, '"held"' in tested.stdout) == (0, True), tested.stderr
    leaves = [float("inf")]
    with (
        ThreadPoolExecutor(1) as pool,
        calling(pod, digits, CALLERS, lambda outcome: time.monotonic() > leaves[0]) as outcomes,
    ):
        pod.wait(lambda: all(outcome.answered >= 3 for outcome in outcomes), "three rounds")
        held = pool.submit(ask_held, pod, digits.images[0])
        pod.wait(lambda: pod.metric('kiln_queue_rows{model="held",version="1"}') == 1, "a request held")

        def take_off() -> None:
            leaves[0] = time.monotonic() + PRE_STOP_S / 2

        took_s = terminate(pod, take_off)
        status, answer = held.result(30)
    assert took_s < pod.spec["terminationGracePeriodSeconds"]
    assert_all_right(outcomes)
    assert [outcome.refused or outcome.cut for outcome in outcomes] == [None] * CALLERS
    assert status == 200, answer
    np.testing.assert_allclose(answer["predictions"], digits.probabilities[:1], rtol=0, atol=1e-4)
    assert "not finished" not in pod.log
    assert all(json.loads(line) for line in pod.log.splitlines() if line.startswith("{"))
