"""The image is built and started for real: `make image-test`, which takes minutes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import __version__
from service.runtime.plan_record import PlanCache
from tests.e2e.conftest import CLIENTS, Digits, run_python
from tests.e2e.image import TOOLS, Buildah, Container, build_image, make_base, mounted, size_bytes
from tests.e2e.process import MODELS

pytestmark = pytest.mark.timeout(1800)
_MISSING = [name for name in TOOLS if shutil.which(name) is None]
if "KILN_IMAGE_TEST" not in os.environ:
    pytest.skip("the image is built by `make image-test` only", allow_module_level=True)
if _MISSING or os.geteuid() != 0:
    reason = f"not installed: {', '.join(_MISSING)}" if _MISSING else "only root can build it without an engine"
    pytest.skip(reason, allow_module_level=True)

_REVISION = "0123abc"


@dataclass(frozen=True)
class Image:
    """Its files, what an engine reads of it, and the size of what it is built on, in bytes."""

    root: Path
    config: dict[str, Any]
    base_bytes: int


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image with digits baked in; nothing of it is left afterwards."""
    work = tmp_path_factory.mktemp("image")
    buildah = Buildah(work / "buildah")
    try:
        base_bytes = make_base(buildah, work / "base")
        build_image(buildah, work, MODELS="models", REVISION=_REVISION, EXTRAS="otel")
        with mounted(buildah) as (root, config):
            yield Image(root, config, base_bytes)
    finally:
        buildah.close()
        shutil.rmtree(work, ignore_errors=True)


@pytest.fixture
def container(image: Image, tmp_path: Path) -> Iterator[Container]:
    """The image's process, ready."""
    started = Container(image.root, image.config, tmp_path / "log")
    try:
        started.wait_ready()
        yield started
    finally:
        started.kill()


def test_it_answers_over_rest_and_grpc(container: Container, digits: Digits, tmp_path: Path):
    """Both ports answer as Keras does, by the baked model."""
    images = digits.images[:5]
    status, answer = container.predict({"instances": images.tolist()})
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], digits.probabilities[:5], rtol=0, atol=1e-4)
    np.save(tmp_path / "images.npy", images)
    asked = run_python(CLIENTS / "triton_grpc.py", f"127.0.0.1:{container.grpc_port}", tmp_path / "images.npy")
    np.testing.assert_allclose(json.loads(asked.stdout)["probabilities"], digits.probabilities[:5], rtol=0, atol=1e-4)


def test_nothing_is_converted_or_planned_at_the_start(container: Container):
    """What was found out at the build is found by the server, though its cache is an empty mount of its own."""
    assert "was imported before" in container.log
    (key,) = (path.name for path in (container.root / "opt/warm/plans").iterdir() if path.name != "xla")
    record = PlanCache(container.root / "opt/warm/plans").find(key)
    assert record is not None
    known = ", ".join(sorted({name for plans in record.plans.values() for name in plans.names.values()}))
    # those that need TensorFlow are put in use once that is loaded
    container.wait(lambda: container.get("/status")[1][0]["plans"] == known, f"plans {known}")
    kept = container.run("find", "/var/cache/kiln/plans", "-mindepth", "1", "-maxdepth", "1", "-printf", "%f %y\n")
    assert sorted(kept.stdout.splitlines()) == sorted([f"{key} l", "xla d"])


def test_it_is_neither_root_nor_can_it_write(container: Container):
    """The process has the image's user, and its files cannot be written but for what is mounted."""
    assert set(container.inner.uids()) == {10001}
    assert container.run("touch", "/tmp/new", "/var/cache/kiln/new").returncode == 0
    for place in ("/new", "/models/new", "/opt/kiln/new", "/opt/warm/new"):
        refused = container.run("touch", place)
        assert "Read-only file system" in refused.stderr


def test_its_program_is_not_its_users_even_where_the_root_can_be_written(image: Image):
    """Files of the program, the models and the warm cache are root's, and nobody else may write them."""
    for folder in ("opt/kiln", "opt/warm", "models"):
        for path in (image.root / folder).rglob("*"):
            about = path.lstat()
            assert about.st_uid == 0, path
            assert path.is_symlink() or not about.st_mode & 0o022, path


def test_its_health_is_told_by_the_healthcheck(container: Container, image: Image):
    """The command of HEALTHCHECK succeeds while the server is ready, and fails where nobody listens."""
    kind, *command = image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert container.run(*command).returncode == 0
    container.env["KILN_REST_PORT"] = "1"
    assert container.run(*command).returncode == 1


def test_sigterm_ends_it_in_order(container: Container, image: Image):
    """The first process of the container takes the signal, drains and exits with 0."""
    assert image.config["StopSignal"] == "SIGTERM"
    container.signal(signal.SIGTERM)
    assert container.exit_code() == 0, container.log
    assert "stopped" in container.log


def test_models_are_mounted_in_the_place_of_baked_ones(image: Image, tmp_path: Path):
    """A folder mounted at /models is what is served."""
    models = tmp_path / "models"
    shutil.copytree(MODELS / "digits", models / "other")
    tmp_path.chmod(0o755)
    started = Container(image.root, image.config, tmp_path / "log", models=models)
    try:
        started.wait_ready()
        assert [version["model"] for version in started.get("/status")[1]] == ["other"]
    finally:
        started.kill()


def test_a_cache_that_cannot_be_written_is_told(image: Image, tmp_path: Path):
    """Without a place to write to, the server says so and which setting names it."""
    env = [*image.config["Env"], "KILN_CACHE_DIR=/opt/cache"]
    started = Container(image.root, {**image.config, "Env": env}, tmp_path / "log")
    assert started.process.wait(60) == 1
    assert "the cache folder /opt/cache (--cache-dir) cannot be used: [Errno 30]" in started.log


def test_what_it_is_stands_in_its_labels(image: Image):
    """OCI's labels have title, version, revision and licence."""
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in image.config["Labels"].items()}
    assert labels["title"] == "Kiln"
    assert labels["version"] == __version__
    assert labels["revision"] == _REVISION
    assert labels["licenses"] == "Apache-2.0"


def test_it_has_what_it_needs_and_no_more(image: Image, container: Container):
    """Extras are there; packages of the development, pip, the build's files and pip's configuration are not."""
    assert container.run("python", "-c", "import opentelemetry.sdk").returncode == 0
    for name in ("pytest", "mypy", "pip", "s3fs"):
        assert container.run("python", "-c", f"import {name}").returncode == 1, name
    assert not any((image.root / name).exists() for name in ("build", "context", "wheels", "etc/pip.conf"))
    assert not list(image.root.glob("**/.secret"))


def test_it_is_not_much_larger_than_its_parts(image: Image, container: Container):
    """At most 1.3 times the base and TensorFlow's wheel, as its RECORD has it."""
    (record,) = image.root.glob("opt/kiln/lib/python3*/site-packages/tensorflow-*.dist-info/RECORD")
    wheel_bytes = sum(int(line.rpartition(",")[2] or 0) for line in record.read_text().splitlines())
    image_bytes, parts_bytes = size_bytes(image.root), image.base_bytes + wheel_bytes
    sizes = {"image": image_bytes, "base": image.base_bytes, "TensorFlow": wheel_bytes}
    told = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items())
    sys.stdout.write(f"\n{told}: {image_bytes / parts_bytes:.2f}\n")
    assert image_bytes <= 1.3 * parts_bytes
