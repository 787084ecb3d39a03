"""The commands of ``kiln`` and their exit codes: 0 done, 1 failed, 2 wrongly called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import __version__

if TYPE_CHECKING:
    from service.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="kiln", description="Serves trained Keras models over REST and gRPC.")
    parser.add_argument("--version", action="version", version=f"kiln {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve a folder of models, or one model", add_help=False)
    status = commands.add_parser("status", help="tell what a server serves, as a table")
    status.add_argument("--url", default="http://localhost:8501", help="its REST address (default: %(default)s)")
    inspect = commands.add_parser("inspect", help="tell signatures and the plans that run them here", add_help=False)
    plan = commands.add_parser("plan", help="find out a model's plans ahead of time, and keep them", add_help=False)
    importing = commands.add_parser("import", help="make a trained model the next version of a served one")
    _add_import(importing)
    bench = commands.add_parser("bench", help="find the highest rate that keeps a goal for p99, by protocol")
    args = list(sys.argv[1:] if argv is None else argv)
    with_settings = {"serve": (serve, _serve), "inspect": (inspect, _inspect), "plan": (plan, _plan)}
    if args[:1] and args[0] in with_settings:
        command, run = with_settings[args[0]]
        _add_settings(command)
        return run(vars(command.parse_args(args[1:])))
    if args[:1] == ["bench"]:
        return _bench(bench, args[1:])
    given = parser.parse_args(args)  # help and errors leave from within
    return _import(given) if given.command == "import" else _status(given.url)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, with its unit, default and environment variable in the help."""
    from service.settings import ENV_PREFIX, Settings

    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help=f"YAML file of settings (env {ENV_PREFIX}CONFIG)"
    )
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        unit = extra.get("unit")
        choices = getattr(field.annotation, "__args__", ()) if "Literal" in str(field.annotation) else ()
        notes = [str(unit)] if unit else []
        if not field.is_required():
            default = field.get_default(call_default_factory=True, validated_data={})
            notes.append(f"default: {'none' if default in (None, ()) else default}")
        notes.append(f"env {ENV_PREFIX}{name.upper()}")
        text = f"{field.description} ({'; '.join(notes)})".replace("%", "%%")
        options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if name == "models":
            parser.add_argument(name, nargs="?", metavar="MODELS", **options)
        elif field.annotation is bool:
            flag = "--" + name.replace("_", "-")
            parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, **options)
        else:
            flag = str(extra.get("flag", "--" + name.replace("_", "-")))
            metavar = "{" + ",".join(choices) + "}" if choices else flag.rsplit("-", 1)[-1].upper()
            action = "append" if isinstance(field.default, tuple) else "store"
            parser.add_argument(flag, dest=name, action=action, metavar=metavar, **options)


def _add_import(parser: argparse.ArgumentParser) -> None:
    unset = argparse.SUPPRESS
    parser.add_argument("trained", metavar="TRAINED", help=".keras or .h5 file, or SavedModel folder")
    parser.add_argument("--name", help="name of the model (default: that of the file)")
    parser.add_argument("--labels", metavar="FILE", help="names of the classes, one per line; kept as labels.txt")
    parser.add_argument("--models", default=unset, help="folder of models (default: models; env KILN_MODELS)")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        metavar="MODULE",
        default=unset,
        help="trusted Python module that registers Keras classes; repeatable (env KILN_IMPORTS)",
    )
    parser.add_argument("--cache-dir", metavar="DIR", default=unset, help="as with serve (env KILN_CACHE_DIR)")
    parser.add_argument(
        "--import-timeout-s",
        metavar="S",
        default=unset,
        help="time to convert the file in seconds (default: 600; env KILN_IMPORT_TIMEOUT_S)",
    )


def _import(given: argparse.Namespace) -> int:
    from service.settings import ENV_PREFIX, SettingsError, load_settings

    flags = {key: getattr(given, key) for key in ("models", "imports", "cache_dir", "import_timeout_s") if key in given}
    if f"{ENV_PREFIX}MODELS" not in os.environ:
        flags.setdefault("models", "models")
    try:
        settings = load_settings(flags)
    except SettingsError as error:
        print(f"kiln import: {error}", file=sys.stderr)
        return 2
    from service import logs
    from service.errors import KilnError
    from service.registry.imports import ImportOptions, import_trained

    logs.configure("warning", settings.log_format)
    options = ImportOptions(settings.cache_dir, settings.import_timeout_s, settings.imports, settings.rest_port)
    labels = None if given.labels is None else Path(given.labels)
    try:
        print(import_trained(Path(given.trained), Path(settings.models), options, name=given.name, labels=labels))
    except (KilnError, OSError) as error:
        print(f"kiln import: {error}", file=sys.stderr)
        return 1
    return 0


def _status(url: str) -> int:
    import json
    import urllib.request

    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/status", timeout=10) as answer:  # noqa: S310 - the user's own
            versions = json.load(answer)
    except (OSError, ValueError) as error:
        print(f"kiln status: {url} does not answer: {error}", file=sys.stderr)
        return 1
    heads = ("model", "version", "state", "since", "device", "plans", "memory MB", "rows", "reason")
    rows = [[*(str(v[k]) for k in heads[:6]), f"{v['memory_bytes'] / 1e6:.0f}", str(v["rows"]), v["reason"]]
            for v in versions]  # fmt: skip
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _bench(parser: argparse.ArgumentParser, args: Sequence[str]) -> int:
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from service.bench import command

    command.add_arguments(parser)
    return command.run(parser.parse_args(args), lambda text: print(text, flush=True))


def _settings(command: str, flags: dict[str, Any]) -> Settings | None:
    from service.settings import SettingsError, load_settings

    try:
        return load_settings(flags)
    except SettingsError as error:
        print(f"kiln {command}: {error}", file=sys.stderr)
        return None


def _inspect(flags: dict[str, Any]) -> int:
    return _look_at_plans("inspect", flags)


def _plan(flags: dict[str, Any]) -> int:
    return _look_at_plans("plan", flags)


def _look_at_plans(command: str, flags: dict[str, Any]) -> int:
    """Print what is known of the plans of every version that a server would load; `plan` finds it out first."""
    settings = _settings(command, flags)
    if settings is None:
        return 2
    from service import logs
    from service.errors import KilnError
    from service.inspection import look_at

    is_quiet = command == "inspect" and "log_level" not in flags
    logs.configure("error" if is_quiet else settings.log_level, settings.log_format)
    try:
        failures = look_at(settings, tell=lambda text: print(text, flush=True), plan=command == "plan")
    except (KilnError, OSError) as error:
        print(f"kiln {command}: {error}", file=sys.stderr)
        return 1
    for failure in failures:
        print(f"kiln {command}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _serve(flags: dict[str, Any]) -> int:
    settings = _settings("serve", flags)
    if settings is None:
        return 2
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read when grpc is imported; Kiln never forks alone
    from service import logs
    from service.errors import KilnError
    from service.server import run

    process = "engine" if settings.frontends else ""
    logs.configure(settings.log_level, settings.log_format, process, access=settings.access_log)
    try:
        run(settings)
    except (KilnError, OSError) as error:
        print(f"kiln serve: {error}", file=sys.stderr)
        return 1
    return 0
