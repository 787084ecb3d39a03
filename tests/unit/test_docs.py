"""README.md says what the code does: its tables are compared with the settings, metrics and errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Gt, Le
from prometheus_client.metrics_core import Metric

from service.cli import main
from service.errors import Code
from service.meaning import InputMeaning, ModelMeaning, OutputMeaning
from service.metrics import Metrics
from service.registry.config import ModelConfig, parse_configs
from service.registry.meaning import read_meaning
from service.rest.codes import HTTP_STATUS
from service.rpc.codes import GRPC_STATUS
from service.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_RUNTIME_METRICS = ("process_", "python_")
"""What prometheus_client's own collectors add."""


def table(marker: str) -> list[str]:
    """The rows of the table that follows ``<!-- marker -->``, without its head."""
    match = re.search(rf"<!-- {marker} -->\n((?:\|.*\n)+)", README)
    assert match, f"README.md has no table after <!-- {marker} -->"
    return match[1].splitlines()[2:]


def _range(field: Any) -> str:
    low = next((f"≥ {m.ge}" for m in field.metadata if isinstance(m, Ge)), "")
    low = low or next((f"> {m.gt}" for m in field.metadata if isinstance(m, Gt)), "")
    high = next((f"≤ {m.le}" for m in field.metadata if isinstance(m, Le)), "")
    choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
    return ", ".join(filter(None, (low, high))) or ", ".join(f"`{choice}`" for choice in choices)


def _default(name: str, field: Any) -> str:
    if field.is_required():
        return "must be given"
    if name == "cache_dir":
        return "`~/.cache/kiln`"
    return "none" if field.default in (None, ()) else f"`{field.default}`"


def _setting_row(name: str, field: Any) -> str:
    extra = field.json_schema_extra or {}
    unit = extra.get("unit", "")
    flag = "`MODELS`" if name == "models" else f"`{extra.get('flag', '--' + name.replace('_', '-'))}`"
    cells = (
        flag,
        f"`{ENV_PREFIX}{name.upper()}`",
        _default(name, field),
        unit,
        _range(field),
        field.description.replace("|", "\\|"),
    )
    return "| " + " | ".join(cells) + " |"


def test_the_settings_table_is_that_of_the_code():
    """Every setting has its row: flag, environment variable, default, unit, range and meaning."""
    assert table("settings") == [_setting_row(name, field) for name, field in Settings.model_fields.items()]


def model_config_row(name: str, field: Any) -> str:
    default = field.default
    text = {"versions": "`{latest: 1}`", "labels": "none", "split": "none"}.get(name)
    if text is None:
        text = "none" if default in (None, frozenset()) else f"`{str(default).lower()}`"
    return f"| `{name}` | {text} | {field.description} |"


def test_the_model_config_table_is_that_of_the_code():
    """Every field of a model's config has its row: name, default and meaning."""
    assert table("model config") == [model_config_row(name, field) for name, field in ModelConfig.model_fields.items()]


def test_the_model_config_example_is_valid():
    """The YAML in the README is taken as it stands."""
    example = re.search(r"```yaml\n(models:.*?)```", README, re.DOTALL)
    assert example
    configs = parse_configs(yaml.safe_load(example[1]), "README.md")
    assert configs["digits"].labels == {"stable": 1, "canary": 2}
    assert configs["speech"].path == "s3://bucket/speech"


def _labels(metrics: Metrics, family: Metric) -> str:
    collector: Any = metrics.registry._names_to_collectors.get(family.name)
    names = getattr(collector, "_labelnames", None) or getattr(family, "_labelnames", None) or ()
    return ", ".join(f"`{name}`" for name in names)


def test_the_metrics_table_is_that_of_the_code():
    """Every metric has its row: name as exposed, type, labels and meaning."""
    metrics = Metrics()
    expected = []
    for family in metrics.registry.collect():
        if family.name.startswith(_RUNTIME_METRICS):
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        row = f"| `{name}` | {family.type} | {_labels(metrics, family)} | {family.documentation} |"
        expected.append(row.replace("|  |", "| |"))
    assert sorted(table("metrics")) == sorted(expected)


def test_the_table_of_model_yaml_is_that_of_the_code():
    """Every field of a model's, an input's and an output's meaning has its row, under what it is of."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table("model.yaml")]
    images = {"mode", "size", "scale", "offset", "invert"}
    documented: dict[str, set[str]] = {"model": set(), "inputs": set(), "outputs": set(), "images": set()}
    for fields, of, *_ in rows:
        for each in of.split(", "):
            documented[each] |= set(re.findall(r"`(\w+)`", fields))
    assert documented == {
        "model": set(ModelMeaning.model_fields),
        "inputs": set(InputMeaning.model_fields) - images,
        "outputs": set(OutputMeaning.model_fields) - images,
        "images": images,
    }


def test_the_example_of_model_yaml_is_valid(tmp_path: Path):
    """The YAML in the README is taken as it stands, yes and no as words."""
    example = re.search(r"```yaml\n(description:.*?)```", README, re.DOTALL)
    assert example
    (tmp_path / "model.yaml").write_text(example[1])
    meaning = read_meaning(tmp_path)
    assert meaning is not None
    assert meaning.inputs["driveway"].values == ("yes", "no")
    assert meaning.outputs["style"].labels == ("bungalow", "villa", "hut")


def test_the_errors_table_is_that_of_the_code():
    """Every kind of failure has its row, with both statuses."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table("errors")]
    expected = [[f"`{code.value}`", str(HTTP_STATUS[code]), f"`{GRPC_STATUS[code].name}`"] for code in Code]
    assert [row[:3] for row in rows] == expected


def test_the_features_table_names_tests_that_there_are():
    """Each row says for each of the four dialects whether it has the feature, and names tests that show it."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table("features")]
    assert all(len(row) == 6 and all(row) for row in rows)
    features = [row[0] for row in rows]
    assert len({*features}) == len(features)
    for feature, *_, tests in rows:
        named = [test.partition("::") for test in re.findall(r"`([^`]+)`", tests)]
        assert named, feature
        for path, _, function in named:
            source = (ROOT / "tests" / path).read_text()
            assert re.search(rf"^(?:async )?def {function}\(", source, re.MULTILINE), (feature, path, function)


def test_help_names_every_setting_with_default_and_unit(capsys: pytest.CaptureFixture[str]):
    """`kiln serve --help` shows each setting's flag, environment variable, unit and default."""
    with pytest.raises(SystemExit) as leaving:
        main(["serve", "--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"env {ENV_PREFIX}{name.upper()}" in text
        extra: Any = field.json_schema_extra or {}
        assert extra.get("unit", "") in text
        if not field.is_required() and name != "cache_dir":
            assert f"default: {'none' if field.default in (None, ()) else field.default}" in text


def test_every_dependency_has_its_reason():
    """CONTRIBUTING.md says in one line why each package is there."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r'^  "([A-Za-z0-9-]+)[^"]*",$', pyproject.split("[tool.")[0], re.MULTILINE)
    assert len(names) > 20
    missing = [name for name in names if not re.search(rf"^\| `{re.escape(name)}` \|", contributing, re.MULTILINE)]
    assert not missing


def test_no_file_names_an_index():
    """Installation goes to whatever index the machine is set up with."""
    for name in ("constraints.txt", "pyproject.toml", "Makefile", "Dockerfile"):
        text = (ROOT / name).read_text()
        assert "index-url" not in text
        assert name != "constraints.txt" or "://" not in text
