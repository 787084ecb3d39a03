"""The image's recipe, as far as it can be checked without a build, which test_image.py makes; see test_chart.py too."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from packaging.requirements import Requirement

from service import __version__
from service.settings import Settings
from tests.e2e.process import ROOT

Lock = dict[tuple[str, str], set[str]]


@pytest.fixture
def stages() -> list[list[str]]:
    """The Dockerfile's instructions, one list a stage, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found: list[list[str]] = []
    for line in lines:
        if line.startswith("FROM "):
            found.append([])
        if found:
            found[-1].append(line)
    return found


def lock(name: str) -> Lock:
    """Hashes by name and version, of a file of pinned requirements."""
    entries = re.findall(
        r"^([\w.-]+)(?:\[.*\])?==(\S+).*((?:\n    --hash=\S+.*)+)", (ROOT / name).read_text(), re.MULTILINE
    )
    return {(package, version): set(re.findall(r"--hash=(\S+)", hashes)) for package, version, hashes in entries}


def arguments(stage: list[str]) -> dict[str, str]:
    """The stage's build arguments with their defaults."""
    given = [line.removeprefix("ARG ").partition("=") for line in stage if line.startswith("ARG ")]
    return {name: value for name, _, value in given}


def test_what_builds_is_left_behind(stages: list[list[str]]):
    """The last stage copies the results of the others and installs no package."""
    *before, final = stages
    assert [stage[0].partition(" AS ")[2] for stage in before] == ["build", "baked"]
    assert any(line.startswith("COPY --from=build ") for line in final)
    assert all("--from=" in line for line in final if line.startswith("COPY "))
    assert not any("pip" in line for line in final if line.startswith("RUN "))


def test_only_wheels_with_known_hashes_are_installed(stages: list[list[str]]):
    """They are downloaded against their hashes, and installed without an index."""
    runs = [line for line in stages[0] if line.startswith("RUN ")]
    (download,) = [line for line in runs if "pip download" in line]
    assert "--require-hashes" in download
    assert "--only-binary :all:" in download
    assert "-r constraints-${VARIANT}.txt" in download
    (install,) = [line for line in runs if " install " in line]
    assert "--no-index --find-links wheels" in install


def test_pips_configuration_is_a_secret(stages: list[list[str]]):
    """Neither an argument nor a file of any layer names an index."""
    assert "--mount=type=secret,id=pip,target=/etc/pip.conf" in "\n".join(stages[0])
    assert not re.search(r"index-url|PIP_", "\n".join(line for stage in stages for line in stage))


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_the_image_has_the_versions_that_are_tested(variant: str):
    """What both lock files have is the same, hashes included; every dependency is in the image's."""
    tested, installed = lock("constraints.txt"), lock(f"constraints-{variant}.txt")
    versions = {name: {v for n, v in installed if n == name} for name, _ in installed}
    for (name, version), hashes in tested.items():
        if name in versions:
            assert installed[name, version] == hashes, name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"].keys() - ({"dev", "gpu"} - {variant})
    extras = [line for name in wanted for line in project["optional-dependencies"][name]]
    for requirement in map(Requirement, (*project["dependencies"], *extras)):
        assert requirement.name in versions
        assert all(requirement.specifier.contains(version) for version in versions[requirement.name])
    assert all(installed.values())


def test_only_what_runs_is_in_the_image():
    """Neither variant has what only development needs, and CUDA's libraries are in one only."""
    cpu, gpu = ({name for name, _ in lock(f"constraints-{variant}.txt")} for variant in ("cpu", "gpu"))
    assert not (cpu | gpu) & {"pytest", "mypy", "ruff", "locust", "jax", "matplotlib"}
    assert {name for name in gpu if name.startswith("nvidia-")} == gpu - cpu != set()
    assert cpu <= gpu


def test_the_image_runs_as_a_numbered_user(stages: list[list[str]]):
    """The process is not root, by a number that Kubernetes can check."""
    users = [line.split()[1] for line in stages[-1] if line.startswith("USER ")]
    assert users
    assert re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1])


def test_signals_reach_the_process(stages: list[list[str]]):
    """Entry point and command are lists, so that no shell stands between SIGTERM and Kiln."""
    for instruction, expected in (("ENTRYPOINT", ["kiln"]), ("CMD", ["serve"])):
        (line,) = [line for line in stages[-1] if line.startswith(instruction + " ")]
        assert json.loads(line.removeprefix(instruction)) == expected
    assert "STOPSIGNAL SIGTERM" in stages[-1]


def test_the_health_check_needs_no_shell(stages: list[list[str]]):
    """It is a list, and asks for readiness."""
    (check,) = [line for line in stages[-1] if line.startswith("HEALTHCHECK ")]
    command = json.loads(check.partition(" CMD ")[2])
    assert command[0] == "python"
    assert "/v2/health/ready" in command[-1]


def test_settings_of_the_image_are_settings_of_kiln(stages: list[list[str]]):
    """Each KILN_ variable names a setting, so none of them is in vain."""
    environment = " ".join(line for line in stages[-1] if line.startswith("ENV "))
    names = {name.lower() for name in re.findall(r"KILN_(\w+)=", environment)}
    assert {"models", "cache_dir", "warm_cache_dir"} <= names <= set(Settings.model_fields)


def test_the_label_has_kilns_version(stages: list[list[str]]):
    """The argument's default goes along with the package."""
    assert arguments(stages[-1])["VERSION"] == __version__


def test_the_arguments_are_those_of_the_readme(stages: list[list[str]]):
    """The README's table has each argument of the build, and no other."""
    table = (ROOT / "README.md").read_text().partition("| argument of the build |")[2].partition("\n\n")[0]
    told = {name for line in table.splitlines()[2:] for name in re.findall(r"`([A-Z_]+)`", line.split("|")[1])}
    assert told == {name for stage in stages for name in arguments(stage)}
