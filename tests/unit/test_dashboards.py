"""Dashboards, rules and runbook agree with each other and with the metrics that there are."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import Metrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "helm" / "dashboards"
RULES = ROOT / "helm" / "rules" / "kiln.yaml"
MAKE = runpy.run_path(str(FOLDER / "make.py"))
_SCRAPED = {"job", "instance", "namespace", "le"}
"""Labels that are not ours: Prometheus's, and that of a bucket."""
_ONCE_RENAMED = {"rows"}
"""A label that expressions may leave out though no metric has it."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    panels = [panel for made in MAKE["dashboards"]().values() for panel in made["panels"]]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [*queries, *(rule["expr"] for rule in rules())]


def exposed() -> dict[str, set[str]]:
    """The labels of every series that there can be, by its name."""
    metrics = Metrics()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
    found = {}
    for family in metrics.registry.collect():
        collector: Any = metrics.registry._names_to_collectors.get(family.name)
        labels = getattr(collector, "_labelnames", None) or getattr(family, "_labelnames", None) or ()
        for suffix in suffixes.get(family.type, ("",)):
            found[family.name + suffix] = {*labels}
    return found


def test_the_dashboards_are_those_that_are_made():
    """Nobody edited a file that the next run of `make.py` would write over."""
    made = MAKE["dashboards"]()
    assert {path.name for path in FOLDER.glob("*.json")} == {*made}
    for name, dashboard in made.items():
        assert (FOLDER / name).read_text() == MAKE["written"](dashboard), f"run python helm/dashboards/make.py: {name}"


@pytest.mark.parametrize("name", ["overview.json", "model.json"])
def test_panels_do_not_overlap(name: str):
    """Each has an id and a place of its own within Grafana's 24 columns."""
    panels = json.loads((FOLDER / name).read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_all_that_is_asked_for_is_exposed():
    """Every name in a query or rule is a metric's or a rule's, and every label that it is asked by is that metric's."""
    series, recorded = exposed(), {rule["record"] for rule in rules() if "record" in rule}
    for expression in expressions():
        for name in re.findall(r"\bkiln:[\w:]+", expression):
            assert name in recorded, expression
        names = re.findall(r"\b(?:kiln|process)_\w+", expression)
        assert names or "kiln:" in expression, expression
        for name, selector in re.findall(r"\b((?:kiln|process)_\w+)(?:\{([^}]*)\})?", expression):
            assert name in series, f"{name} in {expression}"
            asked = {*re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", selector)}
            assert asked <= series[name] | _SCRAPED, f"{name}{{{selector}}}"
        grouped = {
            label.strip()
            for labels in re.findall(r"\b(?:by|without|on) \(([^)]*)\)", expression)
            for label in labels.split(",")
            if label.strip()
        }
        known = {label for name in names for label in series[name]} | {"model"}
        assert grouped <= known | _SCRAPED | _ONCE_RENAMED, expression


def test_every_alert_has_its_page_in_the_runbook():
    """And the runbook has none for alerts that there are not."""
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    text = (ROOT / "docs" / "runbook.md").read_text()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == [*alerts]
    for name, alert in alerts.items():
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert alert["labels"]["severity"] in {"critical", "warning", "info"}
        assert {"summary", "description"} <= {*alert["annotations"]}
    assert {*re.findall(r"\]\(#(\w+)\)", text)} <= {name.lower() for name in alerts}


def test_every_alert_is_told_to_fire_once():
    """The stories that promtool plays have each alert both firing and quiet."""
    stories = yaml.safe_load((ROOT / "tests" / "rules" / "alerts.yaml").read_text())["tests"]
    checks = [check for story in stories for check in story["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == alerts
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == alerts
