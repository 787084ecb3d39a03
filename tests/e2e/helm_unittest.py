"""The suites of helm/unittests/, which are in the format of the plugin helm-unittest; this runs what they use of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.chart import CHART, Object, RenderError, render, with_values

_STEP = re.compile(r'\.?([\w-]+)|\["([^"]+)"\]|\[(\d+)\]|\[\?\(@\.([\w-]+)\s*==\s*"([^"]*)"\)\]')
_MISSING = object()


@dataclass(frozen=True)
class Case:
    """One test of a suite."""

    suite: str
    test: Object
    templates: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.suite}: {self.test['it']}"


def cases() -> list[Case]:
    """All tests of all suites."""
    found = []
    for path in sorted((CHART / "unittests").glob("*_test.yaml")):
        suite = yaml.safe_load(path.read_text())
        templates = tuple(suite.get("templates", ()))
        found += [Case(suite["suite"], test, tuple(test.get("templates", templates))) for test in suite["tests"]]
    return found


def look_up(document: Any, path: str) -> Any:
    """What is at `path`: ``spec.ports[0]["a.b"]`` or ``containers[?(@.name == "kiln")]``; `_MISSING` if nothing."""
    at = 0
    while at < len(path):
        step = _STEP.match(path, at)
        assert step, f"path not understood at {path[at:]!r}"
        at = step.end()
        name, quoted, index, key, value = step.groups()
        if key is not None:
            chosen = [each for each in document if each.get(key) == value] if isinstance(document, list) else []
            document = chosen[0] if chosen else _MISSING
        elif index is not None:
            document = document[int(index)] if isinstance(document, list) and int(index) < len(document) else _MISSING
        else:
            document = document.get(name or quoted, _MISSING) if isinstance(document, dict) else _MISSING
    return document


def _is_subset(value: Any, content: Any) -> bool:
    return isinstance(value, dict) and content.items() <= value.items()


_OF_A_VALUE: dict[str, Callable[[Any, Any], bool]] = {
    "equal": lambda value, given: value == given["value"],
    "notEqual": lambda value, given: value != given["value"],
    "exists": lambda value, given: value is not _MISSING,
    "notExists": lambda value, given: value is _MISSING,
    "matchRegex": lambda value, given: isinstance(value, str) and bool(re.search(given["pattern"], value)),
    "contains": lambda value, given: isinstance(value, list) and given["content"] in value,
    "notContains": lambda value, given: isinstance(value, list) and given["content"] not in value,
    "lengthEqual": lambda value, given: isinstance(value, list) and len(value) == given["count"],
    "isSubset": lambda value, given: _is_subset(value, given["content"]),
}


def run(helm: Path, case: Case) -> None:
    """Render with the test's values and check what it asserts; `AssertionError` says what does not hold."""
    test = case.test
    arguments = [*with_values(test.get("set", {}))]
    for template in case.templates:
        arguments += ["--show-only", f"templates/{template}"]
    for values in test.get("values", ()):
        arguments += ["--values", str(CHART / "unittests" / values)]
    if capabilities := test.get("capabilities"):
        arguments += ["--kube-version", f"{capabilities['majorVersion']}.{capabilities['minorVersion']}.0"]
    release = test.get("release", {}).get("name", "release-name")
    documents, error = _rendered(helm, arguments, release)
    failure = next((each["failedTemplate"] for each in test["asserts"] if "failedTemplate" in each), None)
    if failure is not None:
        assert len(test["asserts"]) == 1, f"{case}: what is not rendered has no more to it"
        assert error is not None, f"{case}: it was rendered"
        assert re.search(failure["errorPattern"], error), f"{case}: {error}"
        return
    assert error is None, f"{case}: {error}"
    documents = _chosen(documents, test.get("documentSelector"))
    for each in test["asserts"]:
        _check(documents, each, str(case))


def _rendered(helm: Path, arguments: list[str], release: str) -> tuple[list[Object], str | None]:
    """What helm renders, or why it does not."""
    try:
        return render(helm, *arguments, release=release), None
    except RenderError as error:
        return [], str(error)


def _chosen(documents: list[Object], selector: Object | None) -> list[Object]:
    if selector is None:
        return documents
    found = [each for each in documents if look_up(each, selector["path"]) == selector["value"]]
    return found if selector.get("matchMany") else found[:1]


def _check(documents: list[Object], assertion: Object, where: str) -> None:
    ((kind, given),) = assertion.items()
    if kind == "hasDocuments":
        assert len(documents) == given["count"], f"{where}: {len(documents)} documents"
        return
    assert documents, f"{where}: nothing was rendered"
    for document in documents:
        value = look_up(document, given["path"])
        assert _OF_A_VALUE[kind](value, given), f"{where}: {kind} {given}, got {value!r}"
