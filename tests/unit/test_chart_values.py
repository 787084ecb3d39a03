"""What of the chart follows from elsewhere is up to date: README.md from values.yaml, the schema from Kiln's code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from helm import generate, tools
from service.registry.config import ModelConfig
from service.settings import Settings


def test_readme_and_schema_are_what_is_generated(capsys: pytest.CaptureFixture[str]):
    """``python -m helm.generate`` would change nothing."""
    assert (generate.main(["--check"]), capsys.readouterr().err) == (0, "")


def test_every_value_is_described():
    """Each leaf of values.yaml, or what it lies in, has a row with its default."""
    text = (generate.HERE / "values.yaml").read_text()
    rows = generate.table(text).splitlines()
    assert len(rows) > 100
    assert any(row.startswith("| `canary.weight` | `10` | ") for row in rows)
    assert {f"`{name}" for name in yaml.safe_load(text)} <= {
        row.split()[1].rstrip("`").split(".")[0] for row in rows[2:]
    }


def test_a_value_without_a_comment_is_found():
    """A key that nothing describes is named."""
    with pytest.raises(SystemExit, match=r"a\.c has no comment"):
        generate.table("a:\n  b: 1  # described\n  c: 2\n")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a: 1  # behind\n", ["| `a` | `1` | behind |"]),
        ("# above,\n# in two lines\na: []\n", ["| `a` | `[]` | above, in two lines |"]),
        ("# apart\n\na: x  # own\n", ['| `a` | `"x"` | own |']),
        ("# whole\na:\n  b: 1\n", ['| `a` | `{"b": 1}` | whole |']),
        ("# section\na:\n  b: 1  # part|ed\n", ["| `a` |  | section |", "| `a.b` | `1` | part\\|ed |"]),
    ],
)
def test_where_comments_stand(text: str, rows: list[str]):
    """A comment stands above or behind a key; a key whose parts have none shows all of them."""
    assert generate.table(text).splitlines()[2:] == rows


def test_the_schema_has_every_setting_and_field():
    """All that Kiln takes can be said in the values, but for what the chart gives itself."""
    definitions = yaml.safe_load(generate.schema())["$defs"]
    assert set(definitions["settings"]["properties"]) == set(Settings.model_fields) - generate.MANAGED
    assert set(definitions["model"]["properties"]) == set(ModelConfig.model_fields)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing on its PATH; the folder of its caches."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_tools_that_are_not_to_be_had(bare: Path):
    """Without npm the reason is told, and nothing is left behind."""
    for find in (tools.find_helm, tools.find_types):
        with pytest.raises(tools.Missing, match="npm, which fetches it, is not on the PATH either"):
            find()
    assert list((bare / "kiln-chart").iterdir()) == []


def test_helm_is_fetched_for_one_platform_only(bare: Path, monkeypatch: pytest.MonkeyPatch):
    """On another platform helm must be on the PATH."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(tools.Missing, match="for Linux on x86-64 only"):
        tools.find_helm()


def test_helm_that_is_here_is_taken(bare: Path, monkeypatch: pytest.MonkeyPatch):
    """That on the PATH first, then the one that was fetched before."""
    (bare / "kiln-chart").mkdir()
    (bare / "kiln-chart" / "helm").touch()
    assert tools.find_helm() == bare / "kiln-chart" / "helm"
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert tools.find_helm() == Path("/opt/helm")
