"""The chart: lint, every feature rendered, every object held against its schema, and the suites of helm/unittests/."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from helm.tools import Missing, find_types
from service import logs, server
from service.cli import main
from service.metrics import Metrics
from service.registry.config import ModelConfig, read_configs
from service.settings import Settings
from tests.e2e import helm_unittest
from tests.e2e.chart import (
    CHART,
    CI_FILES,
    Mounts,
    Object,
    RenderError,
    container_of,
    image,
    render,
    select,
    with_values,
)

OLDEST, NEWEST = "1.30.0", "1.37.0"
"""The oldest Kubernetes that Chart.yaml takes, and the newest with schemas here."""
_TYPED = {
    "gateway.networking.k8s.io/v1": "@kubernetes-models/gateway-api",
    "keda.sh/v1alpha1": "@kubernetes-models/keda",
    "monitoring.coreos.com/v1": "@kubernetes-models/prometheus-operator",
}
"""Custom resources whose types a package has."""
_KSERVE = {
    "ServingRuntime": {
        "required": ["supportedModelFormats", "containers"],
        "additionalProperties": False,
        "properties": {
            "annotations": {"type": "object"},
            "supportedModelFormats": {
                "type": "array",
                "items": {
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string"},
                        "version": {"type": "string"},
                        "autoSelect": {"type": "boolean"},
                        "priority": {"type": "integer", "minimum": 1},
                    },
                },
            },
            "protocolVersions": {"type": "array", "items": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]}},
            **{key: {"type": "array"} for key in ("containers", "volumes", "tolerations", "imagePullSecrets")},
            **{key: {"type": "object"} for key in ("nodeSelector", "affinity")},
        },
    },
    "InferenceService": {
        "required": ["predictor"],
        "additionalProperties": False,
        "properties": {
            "predictor": {
                "required": ["model"],
                "additionalProperties": False,
                "properties": {
                    "minReplicas": {"type": "integer"},
                    "maxReplicas": {"type": "integer"},
                    "serviceAccountName": {"type": "string"},
                    "terminationGracePeriodSeconds": {"type": "integer"},
                    "model": {
                        "required": ["modelFormat", "storageUri"],
                        "additionalProperties": False,
                        "properties": {
                            "modelFormat": {"required": ["name"], "properties": {"name": {"type": "string"}}},
                            "protocolVersion": {"enum": ["v1", "v2"]},
                            "runtime": {"type": "string"},
                            "storageUri": {"type": "string", "minLength": 1},
                        },
                    },
                },
            },
        },
    },
}
"""The part of KServe's fields that the chart uses, written by hand: no package has these schemas."""


def named(path: Path) -> str:
    return path.name.removesuffix("-values.yaml")


def render_file(helm: Path, path: Path | None, version: str = NEWEST) -> list[Object]:
    values = ("--values", path) if path else ()
    return render(helm, *values, "--kube-version", version)


def oldest_for(path: Path | None) -> str:
    """The oldest Kubernetes that has what a file of ci/ asks for."""
    return "1.33.0" if path and named(path) == "image-volume" else OLDEST


@pytest.fixture(scope="module", params=[None, *CI_FILES], ids=lambda path: named(path) if path else "defaults")
def objects(request: pytest.FixtureRequest, helm: Path) -> list[Object]:
    """All objects with the chart's defaults, and with each file of ci/."""
    return render_file(helm, request.param)


@pytest.mark.parametrize("path", [None, *CI_FILES], ids=lambda path: named(path) if path else "defaults")
def test_lint(helm: Path, path: Path | None):
    """Helm finds nothing wrong with the chart, with whatever feature."""
    values = ("--values", path) if path else ()
    command = [*map(str, (helm, "lint", "--strict", CHART, *values))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def pod_of(spec: Object, *, of_kserve: bool = False) -> Object:
    """A pod with the pod's fields of `spec`, which KServe mixes with its own."""
    own = _KSERVE["ServingRuntime"]["properties"] if of_kserve else {}
    fields = {"containers", "volumes", "tolerations", "imagePullSecrets", "nodeSelector", "affinity"}
    assert isinstance(own, dict)
    kept = {key: value for key, value in spec.items() if key in fields or key not in own}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": kept}


def check_schema(each: Object, version: str) -> None:
    """Hold one object against the schema of its kind; types of other projects are checked elsewhere."""
    if each["apiVersion"] in _TYPED:
        return
    if each["apiVersion"].startswith("serving.kserve.io/"):
        jsonschema.validate(each["spec"], _KSERVE[each["kind"]])
        if each["kind"] == "ServingRuntime":
            kubernetes_validate.validate(pod_of(each["spec"], of_kserve=True), version, strict=True)
        return
    kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("age", ["oldest", "newest"])
@pytest.mark.parametrize("path", [None, *CI_FILES], ids=lambda path: named(path) if path else "defaults")
def test_every_object_has_its_schema(helm: Path, path: Path | None, age: str):
    """Each object is what Kubernetes takes, without a field that it does not know; KServe's as written above."""
    version = NEWEST if age == "newest" else oldest_for(path)
    for each in render_file(helm, path, version):
        check_schema(each, version)


def test_a_wrong_object_is_found(helm: Path):
    """A field that is misspelt, in a Deployment or a ServingRuntime, does not pass."""
    deployment = copy.deepcopy(select(render(helm), "Deployment"))
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(deployment, NEWEST)
    runtime = copy.deepcopy(select(render(helm, "--set", "kserve.enabled=true"), "ServingRuntime"))
    runtime["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema(runtime, NEWEST)


@pytest.fixture(scope="session")
def types() -> Path:
    try:
        return find_types()
    except Missing as missing:
        pytest.skip(str(missing))


def check_types(types: Path, folder: Path, custom: list[Object]) -> subprocess.CompletedProcess[str]:
    """Have TypeScript hold each object against the interface of its kind; unknown fields are errors."""
    lines = []
    for number, each in enumerate(custom):
        module = f"{_TYPED[each['apiVersion']]}/{each['apiVersion']}"
        lines.append(f'import type {{ I{each["kind"]} as T{number} }} from "{module}";')
        lines.append(f"export const object{number}: T{number} = {json.dumps(each)};")
    folder.mkdir()
    (folder / "objects.ts").write_text("\n".join(lines))
    (folder / "node_modules").symlink_to(types / "node_modules")
    options = "--noEmit --strict --skipLibCheck --target es2022 --module esnext --moduleResolution bundler".split()
    compiler = types / "node_modules" / "typescript" / "bin" / "tsc"
    node = shutil.which("node")
    assert node, "npm is here, but not node"
    return subprocess.run(
        [node, str(compiler), *options, "objects.ts"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_every_custom_resource_has_its_type(helm: Path, types: Path, tmp_path: Path):
    """Routes, Gateways, monitors, rules and ScaledObjects have the fields of their projects' types, and no others."""
    rendered = [each for path in CI_FILES for each in render_file(helm, path)]
    custom = [each for each in rendered if each["apiVersion"] in _TYPED]
    assert {each["kind"] for each in custom} == {
        *("Gateway", "HTTPRoute", "GRPCRoute", "ScaledObject"),
        *("ServiceMonitor", "PodMonitor", "PrometheusRule"),
    }
    done = check_types(types, tmp_path / "right", custom)
    assert done.returncode == 0, done.stdout
    route = copy.deepcopy(select(render_file(helm, CHART / "ci" / "canary-values.yaml"), "HTTPRoute"))
    route["spec"]["rules"][0]["backendRefs"][0]["wait"] = 3
    wrong = check_types(types, tmp_path / "wrong", [route])
    assert wrong.returncode != 0
    assert "wait" in wrong.stdout


def selects(selector: Object, labels: Object) -> bool:
    expressions = selector.get("matchExpressions", ())
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


def of_kind(objects: list[Object], *kinds: str) -> dict[str, Object]:
    """The objects of some kinds by name."""
    found = [each for each in objects if each["kind"] in kinds]
    return {each["metadata"]["name"]: each for each in found}


def led_to(objects: list[Object], selector: Object) -> list[str]:
    """The Deployments whose pods `selector` selects."""
    pods = {name: each["spec"]["template"] for name, each in of_kind(objects, "Deployment").items()}
    return [name for name, pod in pods.items() if selects(selector, pod["metadata"]["labels"])]


def test_names_are_of_one_object_each(objects: list[Object]):
    """No two objects of a kind have the same name."""
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len({*names})


def test_pods_have_what_they_refer_to(objects: list[Object]):
    """A Deployment has its own pods, their volumes, mounts, config and account, and more time to go than they need."""
    for name, deployment in of_kind(objects, "Deployment").items():
        assert led_to(objects, deployment["spec"]["selector"]) == [name]
        spec = deployment["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert volumes == {mount["name"] for mount in container_of(deployment)["volumeMounts"]}
        assert len(volumes) == len(spec["volumes"])
        (config,) = [volume for volume in spec["volumes"] if volume["name"] == "config"]
        assert config["configMap"]["name"] in of_kind(objects, "ConfigMap")
        assert spec["serviceAccountName"] in of_kind(objects, "ServiceAccount")
        sleep_s = container_of(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
        (drain_s,) = re.findall(r"--drain-s=(\d+)", " ".join(container_of(deployment)["args"]))
        assert spec["terminationGracePeriodSeconds"] > sleep_s + int(drain_s)


def test_services_lead_to_pods(objects: list[Object]):
    """A Service has the pods of one Deployment, and ports that they have; a headless one those very ports."""
    for service in of_kind(objects, "Service").values():
        (name,) = led_to(objects, {"matchLabels": service["spec"]["selector"]})
        container = container_of(of_kind(objects, "Deployment")[name])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports
            assert service["spec"].get("clusterIP") != "None" or port["port"] == ports[port["targetPort"]]


def test_scalers_and_budgets_lead_to_pods(objects: list[Object]):
    """A scaler has a Deployment that leaves the number to it; a budget and a policy have pods."""
    for scaler in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject").values():
        assert "replicas" not in of_kind(objects, "Deployment")[scaler["spec"]["scaleTargetRef"]["name"]]["spec"]
    for each in of_kind(objects, "PodDisruptionBudget", "PodMonitor").values():
        assert led_to(objects, each["spec"]["selector"])
    for policy in of_kind(objects, "NetworkPolicy").values():
        assert led_to(objects, policy["spec"]["podSelector"])


def test_routes_lead_to_services(objects: list[Object]):
    """What comes in goes to Services that there are, in shares that make up a whole."""
    services = of_kind(objects, "Service")
    routes = [each for each in objects if each["kind"] in ("HTTPRoute", "GRPCRoute")]
    for rule in [rule for route in routes for rule in route["spec"]["rules"]]:
        assert sum(backend["weight"] for backend in rule["backendRefs"]) == 100
        for backend in rule["backendRefs"]:
            assert backend["port"] in [port["port"] for port in services[backend["name"]]["spec"]["ports"]]
    for ingress in of_kind(objects, "Ingress").values():
        for path in ingress["spec"]["rules"][0]["http"]["paths"]:
            service = path["backend"]["service"]
            assert service["port"]["name"] in [port["name"] for port in services[service["name"]]["spec"]["ports"]]


def test_no_pod_is_scraped_twice(objects: list[Object]):
    """A ServiceMonitor has the Services, but not the headless one, which has the same pods."""
    services = of_kind(objects, "Service")
    for monitor in of_kind(objects, "ServiceMonitor").values():
        labels = {name: each["metadata"]["labels"] for name, each in services.items()}
        assert [name for name in labels if selects(monitor["spec"]["selector"], labels[name])] == ["kiln"]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that ``kiln serve`` comes to; it serves nothing."""
    settings: list[Settings] = []
    monkeypatch.setattr(server, "run", settings.append)
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)
    return settings


def test_kiln_takes_what_it_is_given(
    objects: list[Object], taken: list[Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The command line, environment, settings and models' configs of every container are such as Kiln understands."""
    for number, workload in enumerate(each for each in objects if each["kind"] == "Deployment"):
        mounts = Mounts(objects, workload, tmp_path / str(number), cache=tmp_path / "cache")
        container = container_of(workload)
        for name, value in {**image()[1], **{each["name"]: each["value"] for each in container["env"]}}.items():
            if name.startswith("KILN_"):
                monkeypatch.setenv(name, value)
        assert main([mounts.mapped(argument) for argument in container["args"]]) == 0
        settings = taken[-1]
        assert (settings.rest_port, settings.grpc_port) == (8501, 8500)
        assert settings.models_config
        configs = read_configs(settings.models_config)
        (config,) = [each for each in container["args"] if each.startswith("--config=")]
        wanted = yaml.safe_load(Path(mounts.mapped(config).partition("=")[2]).read_text())
        found = {name: getattr(settings, name) for name in wanted}
        assert {name: str(value) if isinstance(value, Path) else value for name, value in found.items()} == {
            name: tuple(value) if isinstance(value, list) else value for name, value in wanted.items()
        }
        assert all(isinstance(config, ModelConfig) for config in configs.values())
    assert len(taken) == sum(each["kind"] == "Deployment" for each in objects)


def test_kiln_takes_what_kserve_gives(helm: Path, taken: list[Settings], tmp_path: Path):
    """The ServingRuntime's command line names the model after the InferenceService, on KServe's port."""
    objects = render_file(helm, CHART / "ci" / "kserve-values.yaml")
    for file, text in select(objects, "ConfigMap")["data"].items():
        (tmp_path / file).write_text(text)
    (container,) = select(objects, "ServingRuntime")["spec"]["containers"]
    given = [each.replace("{{.Name}}", "digits").replace("/etc/kiln", str(tmp_path)) for each in container["args"]]
    assert main(given) == 0
    (settings,) = taken
    assert (settings.models, settings.name, settings.rest_port) == ("/mnt/models", "digits", 8080)
    assert settings.max_batch_rows == 128
    (port,) = container["ports"]
    assert port["containerPort"] == settings.rest_port
    probes = ("startupProbe", "readinessProbe", "livenessProbe")
    assert {container[probe]["httpGet"]["port"] for probe in probes} == {port["name"]}


def test_values_reach_kiln_as_they_are(helm: Path):
    """Numbers stay numbers and large ones whole, on their way through helm."""
    config_map = select(render_file(helm, CHART / "ci" / "settings-values.yaml"), "ConfigMap")
    assert yaml.safe_load(config_map["data"]["kiln.yaml"])["max_message_bytes"] == 2**30
    config_map = select(render_file(helm, CHART / "ci" / "models-values.yaml"), "ConfigMap")
    models = yaml.safe_load(config_map["data"]["models.yaml"])["models"]
    assert models["digits"]["shadow"] == {"to": "canary", "share": 0.1}
    assert models["plain"] is None


@pytest.mark.parametrize("case", helm_unittest.cases(), ids=str)
def test_suites(helm: Path, case: helm_unittest.Case):
    """Each sentence of helm/unittests/ holds."""
    helm_unittest.run(helm, case)


def test_a_sentence_that_does_not_hold_is_found(helm: Path):
    """The suites' runner fails where a value is another, where nothing is rendered and where rendering fails."""
    false: list[tuple[Object, list[Object]]] = [
        ({}, [{"equal": {"path": "kind", "value": "Deployment"}}]),
        ({"documentSelector": {"path": "kind", "value": "Nothing"}}, [{"exists": {"path": "kind"}}]),
        ({}, [{"failedTemplate": {"errorPattern": ""}}]),
        ({"set": {"unknown": 1}}, [{"exists": {"path": "kind"}}]),
        ({"set": {"unknown": 1}}, [{"failedTemplate": {"errorPattern": "something else"}}]),
    ]
    for test, asserts in false:
        case = helm_unittest.Case("wrong", {"it": "does not hold", "asserts": asserts, **test}, ())
        with pytest.raises(AssertionError):
            helm_unittest.run(helm, case)


def schema_objects(schema: Any) -> Iterator[Object]:
    """Every part of a JSON schema that is an object."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from schema_objects(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from schema_objects(value)


def test_no_unknown_keys():
    """Whatever the chart names the keys of, it takes no others; and all of values.yaml has its place in the schema."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    lists = [each for each in schema_objects(schema) if isinstance(each.get("properties"), dict)]
    lists = [each for each in lists if "type" in each and each["type"] in ("object", ["object", "null"])]
    assert len(lists) > 20
    assert [each for each in lists if each.get("additionalProperties") is not False] == []
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    jsonschema.validate(values, schema)
    assert set(schema["properties"]) == {*values, "global"}


@pytest.mark.parametrize("key", ["replica", "image.tags", "source.claim.names", "kserve.inferenceService.uri"])
def test_a_misspelt_key_is_refused(helm: Path, key: str):
    """Helm names the key that there is not."""
    with pytest.raises(RenderError, match=f"'{key.rsplit('.', maxsplit=1)[-1]}' not allowed"):
        render(helm, *with_values({key: 1}))


def test_metrics_that_are_named_are_there():
    """Scalers, rules and dashboards ask for metrics that Kiln has."""
    known = set()
    for family in Metrics().registry.collect():
        endings = {
            "counter": ("_total",),
            "summary": ("_sum", "_count"),
            "histogram": ("_bucket", "_sum", "_count"),
        }.get(family.type, ("",))
        known |= {family.name + ending for ending in endings}
    files = [*(CHART / "rules").glob("*.yaml"), *(CHART / "dashboards").glob("*.json")]
    text = "\n".join(path.read_text() for path in (*files, CHART / "templates" / "scaling.yaml", CHART / "README.md"))
    asked = set(re.findall(r"\bkiln_[a-z_]+\b(?!:)", text))
    assert len(asked) >= 8
    assert asked - known == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_takes_the_rules():
    """The files of rules/ are Prometheus's."""
    rules = [*map(str, (CHART / "rules").glob("*.yaml"))]
    done = subprocess.run(
        ["promtool", "check", "rules", *rules], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_is_small():
    """Without its schema the chart has at most a thousand lines."""
    files = [CHART / "Chart.yaml", CHART / "values.yaml", *(p for p in (CHART / "templates").rglob("*") if p.is_file())]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1000
