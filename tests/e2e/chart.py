"""The chart rendered by helm, and a pod of it as a process: what the kubelet would start, mount and ask."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.process import DIGITS, ROOT, Server, environment

CHART = ROOT / "helm"
CI_FILES = sorted((CHART / "ci").glob("*-values.yaml"))
RELEASE = "kiln"
Object = dict[str, Any]


class _StrictLoader(yaml.SafeLoader):
    """As Kubernetes decodes: a key that comes twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        assert len(keys) == len({*keys}), f"a key comes twice: {keys}"
        return super().construct_mapping(node, deep)


class RenderError(Exception):
    """helm refuses to render, with its reason."""


def render(helm: Path, *arguments: str | Path, release: str = RELEASE) -> list[Object]:
    """The objects of ``helm template``; `arguments` are its own, such as ``--set replicas=2``."""
    command = [helm, "template", release, CHART, "--namespace", "serving", *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise RenderError(done.stderr)
    return [each for each in yaml.load_all(done.stdout, _StrictLoader) if each is not None]


def with_values(values: Mapping[str, Any]) -> tuple[str, ...]:
    """`values` as an argument of helm's."""
    return tuple(part for key, value in values.items() for part in ("--set-json", f"{key}={json.dumps(value)}"))


def select(objects: Iterable[Object], kind: str, name: str | None = None) -> Object:
    """The one object of `kind` (and `name`)."""
    found = [each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    assert len(found) == 1, [each["metadata"]["name"] for each in found]
    return found[0]


def container_of(workload: Object) -> Object:
    """The one container of a Deployment's pods."""
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return dict(container)


def image() -> tuple[list[str], dict[str, str]]:
    """Entry point and environment of the image, from the Dockerfile's last stage."""
    last_stage = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").split("\nFROM ")[-1]
    entry_point: list[str] = []
    env: dict[str, str] = {}
    for line in last_stage.splitlines():
        if line.startswith("ENTRYPOINT "):
            entry_point = json.loads(line.removeprefix("ENTRYPOINT "))
        elif line.startswith("ENV "):
            env |= dict(item.split("=", 1) for item in shlex.split(line.removeprefix("ENV ")))
    return entry_point, env


class Mounts:
    """The folders that a pod's container sees, below one of this machine."""

    def __init__(self, objects: Sequence[Object], workload: Object, folder: Path, *, cache: Path) -> None:
        """An example model takes the place of whatever models the pod has at /models, and `cache` that of /cache."""
        self._places: dict[str, Path] = {}
        volumes = {each["name"]: each for each in workload["spec"]["template"]["spec"]["volumes"]}
        mounts = container_of(workload)["volumeMounts"]
        for mount in mounts:
            self._places[mount["mountPath"]] = folder / mount["mountPath"].strip("/")
        self._places |= {"/models": folder / "models", "/cache": cache}
        shutil.copytree(DIGITS, self._places["/models"] / "digits" / "1")
        for mount in mounts:
            self._fill(volumes[mount["name"]], self._places[mount["mountPath"]], objects)

    def _fill(self, volume: Object, place: Path, objects: Sequence[Object]) -> None:
        place.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            name = volume["configMap"]["name"]
            maps = [each for each in objects if each["kind"] == "ConfigMap" and each["metadata"]["name"] == name]
            for config_map in maps:  # one that the chart does not make is its user's own
                for file, text in config_map["data"].items():
                    (place / file).write_text(self.mapped(text))

    def mapped(self, text: str) -> str:
        """`text` with the container's paths as they are here."""
        paths = "|".join(re.escape(path) for path in sorted(self._places, key=len, reverse=True))
        return re.sub(rf"(?<![\w/:.])({paths})(?![\w.-])", lambda match: str(self._places[match[1]]), text)


class Pod(Server):
    """The container of a Deployment as a process, as the kubelet starts it; only paths and ports are mapped."""

    def __init__(self, workload: Object, mounts: Mounts, log: Path) -> None:
        self.spec = workload["spec"]["template"]["spec"]
        self.container = container_of(workload)
        self.log_path = log
        self._ports = None
        entry_point, env = image()
        command = [*self.container.get("command", entry_point), *self.container["args"]]
        assert command[0] == "kiln"
        env |= {each["name"]: str(each["value"]) for each in self.container["env"]}
        del env["PATH"]
        arguments = [mounts.mapped(re.sub(r"^(--(?:rest|grpc)-port)=\d+$", r"\1=0", each)) for each in command[1:]]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", *arguments],
                cwd=ROOT,
                env=environment({name: mounts.mapped(value) for name, value in env.items()}),
                stdout=file,
                stderr=file,
            )

    def probe(self, name: str) -> bool:
        """Ask as the kubelet does for a `startupProbe`, `readinessProbe` or `livenessProbe`."""
        action = self.container[name]["httpGet"]
        ports = {each["name"]: each["containerPort"] for each in self.container["ports"]}
        assert ports[action["port"]] == 8501, "probes ask the REST port"
        return 200 <= self.request("GET", action["path"])[0] < 400

    def patience_s(self, name: str) -> float:
        """How long the kubelet asks in vain before it gives up."""
        return float(self.container[name]["periodSeconds"] * self.container[name]["failureThreshold"])
