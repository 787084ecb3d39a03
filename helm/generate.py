"""Write what follows from elsewhere, or with ``--check`` only compare.

README.md's table comes from values.yaml; what settings and models may say in values.schema.json from Kiln's code.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from service.registry.config import ModelConfig
from service.settings import Settings

HERE = Path(__file__).parent
MANAGED = frozenset({"models", "models_config", "cache_dir", "drain_s", "rest_port", "grpc_port"})
"""Settings that the chart gives itself."""
_VERSIONS = {
    "description": ModelConfig.model_fields["versions"].description,
    "anyOf": [
        {"const": "all"},
        {
            "type": "object",
            "properties": {"latest": {"type": "integer", "minimum": 1}},
            "required": ["latest"],
            "additionalProperties": False,
        },
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    ],
}
_LINE = re.compile(r"( *)([\w.]+):(?: (.*?))?(?:  # (.*))?")
_TABLE = re.compile(r"(?<=<!-- values -->\n).*?(?=\n<!-- end of values -->)", re.DOTALL)


def described(text: str) -> dict[tuple[str, ...], str]:
    """Each key of a values.yaml, as a path, with the comment above or behind it; empty where there is none."""
    found: dict[tuple[str, ...], str] = {}
    path: list[str] = []
    above: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.strip("# "))
        elif match := _LINE.fullmatch(line):
            indent, key, _, behind = match.groups()
            path[len(indent) // 2 :] = [key]
            found[tuple(path)] = behind or " ".join(above)
            above = []
        else:
            above = []
    return found


def table(text: str) -> str:
    """The values as a Markdown table: key, default, meaning.

    Raises:
        SystemExit: a key is described neither itself nor as a part of what it lies in.
    """
    values = yaml.safe_load(text)
    comments = described(text)
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for path, comment in comments.items():
        below = [comments[other] for other in comments if len(other) > len(path) and other[: len(path)] == path]
        if not comment and not any(below) and not any(comments[path[:end]] for end in range(1, len(path))):
            raise SystemExit(f"values.yaml: {'.'.join(path)} has no comment")
        if not comment:
            continue
        value: Any = values
        for key in path:
            value = value[key]
        default = "" if any(below) else f"`{json.dumps(value, ensure_ascii=False)}`"
        rows.append(f"| `{'.'.join(path)}` | {default} | {comment.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def readme() -> str:
    """README.md with the table of today's values."""
    rows = table((HERE / "values.yaml").read_text())
    return _TABLE.sub(lambda _: rows, (HERE / "README.md").read_text())


def schema() -> str:
    """values.schema.json with what today's Kiln takes as settings and as models' configs."""
    document: dict[str, Any] = json.loads((HERE / "values.schema.json").read_text())
    settings = Settings.model_json_schema()["properties"]
    fields = {name: field for name, field in ModelConfig.model_fields.items() if name != "versions"}
    of_models = {name: _field_schema(field, document["$defs"]) for name, field in fields.items()}
    document["$defs"]["settings"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _plain(value) for name, value in settings.items() if name not in MANAGED},
    }
    document["$defs"]["model"] = {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {"versions": _VERSIONS, **of_models},
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _field_schema(field: FieldInfo, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one field of a model's config; what it refers to goes into `definitions`."""
    annotated: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    found = annotated.json_schema()
    for name, definition in found.pop("$defs", {}).items():
        definitions[name] = _plain(definition)
    plain: dict[str, Any] = _plain({"description": field.description, **found})
    return plain


def _plain(value: Any) -> Any:
    """A schema of pydantic's without titles, defaults and units."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {name: _plain(item) for name, item in each.items()} if key == "properties" else _plain(each)
        for key, each in value.items()
        if key not in ("title", "default", "unit", "flag", "format")
    }


def main(arguments: list[str]) -> int:
    """Write both files, or with ``--check`` say which are not what they should be; the exit code."""
    targets = {HERE / "README.md": readme(), HERE / "values.schema.json": schema()}
    stale = [path for path, text in targets.items() if path.read_text() != text]
    if arguments == ["--check"]:
        for path in stale:
            print(f"helm/{path.name} is not what helm/generate.py writes; run it", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(targets[path])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
