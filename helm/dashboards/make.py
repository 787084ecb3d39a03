"""Writes the Grafana dashboards beside it: ``python helm/dashboards/make.py``.

A dashboard is rows of panels, a panel its queries; all that Grafana wants to know beside that is said here once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

_COLUMNS = 24
_HEIGHT = 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_FAULTS = "internal|unavailable|overloaded|deadline_exceeded"
_ALL = 'job=~"$job"'
_MODEL = 'job=~"$job", model=~"$model", version=~"$version"'
_BY_VERSION = "model, version"


def dashboards() -> dict[str, Json]:
    """Every dashboard by the name of its file."""
    return {"overview.json": _overview(), "model.json": _model()}


def rate(metric: str, labels: str, by: str = "") -> str:
    """How fast a counter grows, by second, summed by the labels `by`."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[$__rate_interval]))"


def mean(metric: str, labels: str, by: str) -> str:
    """The mean value of a histogram or summary."""
    return f"{rate(metric + '_sum', labels, by)} / {rate(metric + '_count', labels, by)}"


def quantile(share: float, metric: str, labels: str, by: str) -> str:
    """The value of a histogram that `share` of all values do not exceed."""
    return f"histogram_quantile({share}, {rate(metric + '_bucket', labels, by + ', le')})"


def panel(title: str, queries: Mapping[str, str], unit: str = "short", **options: Any) -> Json:
    """A time series of `queries`, by their legends: at most one for each."""
    return _panel("timeseries", title, queries, unit, options)


def number(title: str, query: str, unit: str = "short") -> Json:
    """The latest value, large."""
    return _panel("stat", title, {"": query}, unit, {"reduceOptions": {"calcs": ["lastNotNull"]}})


def table(title: str, query: str, hidden: Sequence[str] = ()) -> Json:
    """A line for each series with its labels, less those that are `hidden`."""
    made = _panel("table", title, {"": query}, "short", {})
    made["targets"][0] |= {"format": "table", "instant": True}
    names = ("Time", "Value", "__name__", "instance", "job", *hidden)
    made["transformations"] = [{"id": "organize", "options": {"excludeByName": dict.fromkeys(names, True)}}]
    return made


def _panel(kind: str, title: str, queries: Mapping[str, str], unit: str, options: Json) -> Json:
    targets = [
        {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
        for place, (legend, query) in enumerate(queries.items())
    ]
    for target in targets:
        if "_bucket" in target["expr"]:
            target["exemplar"] = True  # type: ignore[assignment]
    return {
        "type": kind,
        "title": title,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": options,
    }


def _dashboard(uid: str, title: str, variables: Sequence[Json], rows: Mapping[str, Sequence[Json]]) -> Json:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    job = _variable("job", "label_values(kiln_build_info, job)")
    return {
        "uid": uid,
        "title": title,
        "tags": ["kiln"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [{"type": "dashboards", "title": "Kiln", "tags": ["kiln"], "includeVars": True, "keepTime": True}],
        "templating": {"list": [source, job, *variables]},
        "panels": _placed(rows),
    }


def _variable(name: str, query: str) -> Json:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": query,
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed(rows: Mapping[str, Sequence[Json]]) -> list[Json]:
    """Each row under its title, its panels side by side."""
    placed: list[Json] = []
    y = 0
    for title, panels in rows.items():
        placed.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}})
        y += 1
        width = _COLUMNS // len(panels)
        height = _HEIGHT // 2 if panels[0]["type"] == "stat" else _HEIGHT
        for place, each in enumerate(panels):
            placed.append(each | {"gridPos": {"x": place * width, "y": y, "w": width, "h": height}})
        y += height
    return [each | {"id": place} for place, each in enumerate(placed, 1)]


def _overview() -> Json:
    named = _ALL + ', model!=""'
    all_requests = rate("kiln_requests_total", named)
    faults = rate("kiln_requests_total", f'{named}, code=~"{_FAULTS}"')
    return _dashboard(
        "kiln-overview",
        "Kiln: overview",
        [],
        {
            "Now": [
                number("Servers ready", f"sum(kiln_ready{{{_ALL}}})"),
                number("Versions ready", f'sum(kiln_model_state{{{_ALL}, state="READY"}})'),
                number("Requests/s", all_requests, "reqps"),
                number("Failed by the server", f"({faults} or vector(0)) / {all_requests}", "percentunit"),
                number("In flight", f"sum(kiln_requests_in_flight{{{_ALL}}})"),
                number("Rows waiting", f"sum(kiln_queue_rows{{{_ALL}}})"),
            ],
            "Requests": [
                panel("Requests by model", {"{{model}}": rate("kiln_requests_total", named, "model")}, "reqps"),
                panel("Requests by protocol", {"{{protocol}}": rate("kiln_requests_total", _ALL, "protocol")}, "reqps"),
                panel(
                    "Errors by code", {"{{code}}": rate("kiln_requests_total", f'{_ALL}, code!="ok"', "code")}, "reqps"
                ),
            ],
            "Time": [
                panel(f"Latency, {name} by model", {"{{model}}": _latency(share, _ALL, "model")}, "s")
                for name, share in (("median", 0.5), ("99 %", 0.99))
            ]
            + [panel("Goals met", {"{{model}}": _attained(_ALL, "model")}, "percentunit")],
            "Batches": [
                panel("Rows in a batch, mean", {"{{model}}": mean("kiln_batch_rows", _ALL, "model")}),
                panel("Rows waiting", {"{{model}}": f"sum by (model) (kiln_queue_rows{{{_ALL}}})"}),
                panel(
                    "Left the queue unrun", {"{{reason}}": rate("kiln_dropped_requests_total", _ALL, "reason")}, "reqps"
                ),
            ],
            "Resources": [
                panel(
                    "Memory of models, of its budget",
                    {
                        "{{instance}} {{device}}": f"sum without (model, version) (kiln_model_memory_bytes{{{_ALL}}})"
                        f" / kiln_memory_budget_bytes{{{_ALL}}}"
                    },
                    "percentunit",
                ),
                panel("Memory of the process", {"{{instance}}": f"process_resident_memory_bytes{{{_ALL}}}"}, "bytes"),
                panel("CPU", {"{{instance}}": rate("process_cpu_seconds_total", _ALL, "instance")}, "cores"),
            ],
            "GPUs": [
                panel("GPU busy", {"{{instance}} {{gpu}}": f"kiln_gpu_busy_ratio{{{_ALL}}}"}, "percentunit"),
                panel(
                    "GPU memory",
                    {
                        "{{instance}} {{gpu}}": f"kiln_gpu_memory_used_bytes{{{_ALL}}}",
                        "{{instance}} {{gpu}}, all": f"kiln_gpu_memory_bytes{{{_ALL}}}",
                    },
                    "bytes",
                ),
                panel("GPU power", {"{{instance}} {{gpu}}": f"kiln_gpu_power_watts{{{_ALL}}}"}, "watt"),
            ],
            "What is there": [
                table("Failed to load", f"kiln_model_failed{{{_ALL}}}"),
                table("Builds", f"kiln_build_info{{{_ALL}}}"),
            ],
        },
    )


def _model() -> Json:
    variables = [
        _variable("model", 'label_values(kiln_requests_total{job=~"$job", model!=""}, model)'),
        _variable("version", 'label_values(kiln_requests_total{job=~"$job", model=~"$model", version!=""}, version)'),
    ]
    key = "{{model}} v{{version}}"
    outcomes = f"{_BY_VERSION}, protocol, code"
    return _dashboard(
        "kiln-model",
        "Kiln: model",
        variables,
        {
            "Requests": [
                panel(
                    "Requests",
                    {key + " {{protocol}}": rate("kiln_requests_total", _MODEL, f"{_BY_VERSION}, protocol")},
                    "reqps",
                ),
                panel(
                    "Outcomes", {key + " {{protocol}} {{code}}": rate("kiln_requests_total", _MODEL, outcomes)}, "reqps"
                ),
                panel(
                    "Goal met",
                    {key: _attained(_MODEL, _BY_VERSION)},
                    "percentunit",
                ),
            ],
            "Time": [
                panel(
                    "Latency",
                    {
                        f"{key} {name}": _latency(share, _MODEL, _BY_VERSION)
                        for name, share in (("50 %", 0.5), ("99 %", 0.99))
                    },
                    "s",
                ),
                panel(
                    "Where it goes, mean",
                    {
                        "decode": mean("kiln_decode_seconds", _MODEL, ""),
                        "queue": mean("kiln_queue_seconds", _MODEL, ""),
                        "execute": mean("kiln_execution_seconds", _MODEL, ""),
                        "encode": mean("kiln_encode_seconds", _MODEL, ""),
                    },
                    "s",
                ),
                panel(
                    "Latency by protocol, 99 %",
                    {"{{protocol}}": _latency(0.99, _MODEL, "protocol")},
                    "s",
                ),
            ],
            "Batches": [
                panel(
                    "Rows in a batch",
                    {
                        key + " mean": mean("kiln_batch_rows", _MODEL, _BY_VERSION),
                        key + " 90 %": quantile(0.9, "kiln_batch_rows", _MODEL, _BY_VERSION),
                        key + " most": f"kiln_batch_limit_rows{{{_MODEL}}}",
                    },
                ),
                panel(
                    "Fill of what the plan is given, mean",
                    {key: mean("kiln_batch_fill_ratio", _MODEL, _BY_VERSION)},
                    "percentunit",
                ),
                panel("Rows/s", {key: rate("kiln_batch_rows_sum", _MODEL, _BY_VERSION)}),
                panel(
                    "Plan's time for a batch, 99 %",
                    {key: quantile(0.99, "kiln_execution_seconds", _MODEL, _BY_VERSION)},
                    "s",
                ),
            ],
            "Queue": [
                panel(
                    "Rows waiting, of those that may",
                    {key: f"kiln_queue_rows{{{_MODEL}}} / kiln_queue_limit_rows{{{_MODEL}}}"},
                    "percentunit",
                ),
                panel("Wait", {f"{key} 99 %": quantile(0.99, "kiln_queue_seconds", _MODEL, _BY_VERSION)}, "s"),
                panel(
                    "Left it unrun",
                    {key + " {{reason}}": rate("kiln_dropped_requests_total", _MODEL, f"{_BY_VERSION}, reason")},
                    "reqps",
                ),
                panel("Batches that failed", {key: rate("kiln_failed_batches_total", _MODEL, _BY_VERSION)}),
            ],
            "Versions": [
                table("Plans in use", f"kiln_plan_info{{{_MODEL}}}"),
                table("State", 'kiln_model_state{job=~"$job", model=~"$model"} == 1'),
                panel("Memory", {key + " {{device}}": f"kiln_model_memory_bytes{{{_MODEL}}}"}, "bytes"),
                panel("Time to load", {key: f"kiln_model_load_seconds{{{_MODEL}}}"}, "s"),
                panel(
                    "On trial",
                    {key + " {{outcome}}": rate("kiln_shadow_requests_total", _MODEL, f"{_BY_VERSION}, outcome")},
                    "reqps",
                ),
            ],
        },
    )


def _latency(share: float, labels: str, by: str) -> str:
    return quantile(share, "kiln_request_duration_seconds", labels, by)


def _attained(labels: str, by: str) -> str:
    """Of the requests to models with a goal, the share that met it."""
    met = rate("kiln_slo_requests_total", labels + ', outcome="met"', by)
    return f"{met} / {rate('kiln_slo_requests_total', labels, by)}"


def written(dashboard: Json) -> str:
    """As its file has it."""
    return json.dumps(dashboard, indent=2) + "\n"


if __name__ == "__main__":
    for file, made in dashboards().items():
        Path(__file__).with_name(file).write_text(written(made))
