"""The commands of ``kiln``: what they print, their exit codes, and what they do not load."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

import service
from service import __version__, logs, server
from service.cli import main
from service.errors import InvalidArgument
from service.settings import Settings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any of Kiln's variables."""
    for name in [name for name in os.environ if name.startswith("KILN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GRPC_ENABLE_FORK_SUPPORT", "0")
    return monkeypatch


class Ran:
    """What `kiln serve` would have started: its settings and the log's configuration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings: list[Settings] = []
        self.logs: list[tuple[str, str]] = []
        self.error: Exception | None = None
        monkeypatch.setattr(server, "run", self._run)
        monkeypatch.setattr(
            logs, "configure", lambda level, form, process="", *, access=False: self.logs.append((level, form))
        )

    def _run(self, settings: Settings) -> None:
        self.settings.append(settings)
        if self.error:
            raise self.error


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """The server is not started but looked at."""
    return Ran(monkeypatch)


def test_serve_runs_the_server_with_what_was_given(ran: Ran):
    """Flags become settings, the log is set up first, and a server that ends well is exit code 0."""
    assert main(["serve", "m", "--rest-port", "0", "--batch-wait-ms", "1.5", "--log-format", "json"]) == 0
    (settings,) = ran.settings
    assert (str(settings.models), settings.rest_port, settings.batch_wait_ms) == ("m", 0, 1.5)
    assert settings.grpc_port == 8500
    assert ran.logs == [("info", "json")]


@pytest.mark.parametrize(
    ("flags", "expected"), [([], False), (["--shared-memory"], True), (["--no-shared-memory"], False)]
)
def test_a_setting_of_two_values_is_a_flag_without_one(ran: Ran, flags: list[str], expected: bool):
    """So that the models may follow it."""
    assert main(["serve", *flags, "m"]) == 0
    assert ran.settings[0].shared_memory is expected
    assert str(ran.settings[0].models) == "m"


def test_serve_takes_its_models_from_the_environment(ran: Ran, environment: pytest.MonkeyPatch):
    """Nothing need be on the command line, if the environment says it."""
    environment.setenv("KILN_MODELS", "/models")
    assert main(["serve"]) == 0
    assert str(ran.settings[0].models) == "/models"


@pytest.mark.parametrize("command", ["inspect", "plan"])
@pytest.mark.parametrize(
    ("failures", "error", "code", "text"),
    [
        ([], None, 0, ""),
        (["cat v1: it is damaged"], None, 1, "cat v1: it is damaged"),
        ([], InvalidArgument("models.yaml: a mapping expected"), 1, "models.yaml: a mapping expected"),
        ([], OSError("no disk"), 1, "no disk"),
    ],
)
def test_plans_are_told_by_two_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ran: Ran, command: str, failures: list[str],
    error: Exception | None, code: int, text: str,
):  # fmt: skip
    """With the settings of a server; what cannot be told goes to stderr, and is exit code 1."""
    asked: list[tuple[str, int, bool]] = []

    def look_at(settings: Settings, *, tell: Any, plan: bool) -> list[str]:
        asked.append((settings.models, settings.max_batch_rows, plan))
        tell("a table")
        if error:
            raise error
        return failures

    monkeypatch.setattr("service.inspection.look_at", look_at)
    assert main([command, "m", "--max-batch-rows", "8"]) == code
    told = capsys.readouterr()
    assert told.out == "a table\n"
    assert told.err == (f"kiln {command}: {text}\n" if text else "")
    assert asked == [("m", 8, command == "plan")]
    assert ran.logs == [("error" if command == "inspect" else "info", "console")]
    assert main([command, "m", "--log-level", "debug"]) == code
    assert ran.logs[1] == ("debug", "console")


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_wrong_settings_are_told_by_each_command(capsys: pytest.CaptureFixture[str], command: str):
    """By the command's name, as exit code 2."""
    assert main([command, "m", "--max-batch-rows", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"kiln {command}: max_batch_rows: ")


def test_the_arguments_of_the_process_are_the_default(ran: Ran, monkeypatch: pytest.MonkeyPatch):
    """Called as a script, the command line is that of the process."""
    monkeypatch.setattr(sys, "argv", ["kiln", "serve", "here"])
    assert main() == 0
    assert str(ran.settings[0].models) == "here"


@pytest.mark.parametrize("error", [InvalidArgument("there is no folder"), OSError("the REST port is taken")])
def test_a_server_that_cannot_start_is_exit_code_1(ran: Ran, error: Exception, capsys: pytest.CaptureFixture[str]):
    """What keeps the server from running is told in one line on stderr."""
    ran.error = error
    assert main(["serve", "m"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"kiln serve: {error}\n")


def test_a_bug_is_not_dressed_up(ran: Ran):
    """An error that nobody foresaw keeps its traceback."""
    ran.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        main(["serve", "m"])


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "kiln serve: models: must be given\n"),
        (["m", "--rest-port", "x"], "kiln serve: rest_port: input should be a valid integer"),
        (["m", "--config", "no-such.yaml"], "kiln serve: --config: no file 'no-such.yaml'\n"),
    ],
)
def test_wrong_settings_are_exit_code_2(ran: Ran, args: list[str], text: str, capsys: pytest.CaptureFixture[str]):
    """A setting that is wrong is told by its name, and nothing is started."""
    assert main(["serve", *args]) == 2
    assert capsys.readouterr().err.startswith(text)
    assert ran.settings == []


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["--models", "m"], "invalid choice: 'm'"),
        (["serve", "m", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["serve", "m", "n"], "unrecognized arguments: n"),
        (["serve", "m", "--rest-port"], "argument --rest-port: expected one argument"),
    ],
)
def test_a_wrong_call_is_exit_code_2(ran: Ran, args: list[str], text: str, capsys: pytest.CaptureFixture[str]):
    """An unknown command or flag is refused with the usage, and nothing is started."""
    with pytest.raises(SystemExit) as leaving:
        main(args)
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.startswith("usage: kiln")
    assert ran.settings == []


@pytest.mark.parametrize(
    ("args", "text"),
    [(["--version"], f"kiln {__version__}\n"), (["--help"], "usage: kiln"), (["serve", "--help"], "usage: kiln serve")],
)
def test_what_is_asked_for_goes_to_stdout_with_exit_code_0(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str]
):
    """Version and help are answers, not errors."""
    with pytest.raises(SystemExit) as leaving:
        main(args)
    assert leaving.value.code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(text)
    assert captured.err == ""


def test_grpc_is_told_that_nobody_forks(ran: Ran, environment: pytest.MonkeyPatch):
    """GRPC's fork handlers are off, unless the environment asks for them."""
    environment.delenv("GRPC_ENABLE_FORK_SUPPORT")
    main(["serve", "m"])
    assert os.environ["GRPC_ENABLE_FORK_SUPPORT"] == "0"
    environment.setenv("GRPC_ENABLE_FORK_SUPPORT", "1")
    main(["serve", "m"])
    assert os.environ["GRPC_ENABLE_FORK_SUPPORT"] == "1"


def test_the_package_is_a_program(ran: Ran, monkeypatch: pytest.MonkeyPatch):
    """``python -m service`` is the same as ``kiln``."""
    monkeypatch.setattr(sys, "argv", ["kiln", "serve", "m"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("service", run_name="__main__")
    assert leaving.value.code == 0
    assert len(ran.settings) == 1


def test_a_tree_that_was_never_installed_has_a_version_too(monkeypatch: pytest.MonkeyPatch):
    """Without the package's metadata the version is said to be unknown; nothing breaks."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert runpy.run_path(str(service.__file__))["__version__"] == "0+unknown"


HEAVY = {"tensorflow", "keras", "openvino", "grpc", "google.protobuf", "fastapi", "starlette", "uvicorn", "numpy"}
_LOADED = """
import sys
try:
    {code}
except SystemExit:
    pass
print("loaded:", *sorted({names!r} & sys.modules.keys()))
"""


def loaded_by(code: str, names: set[str]) -> list[str]:
    """Which of the modules `names` a fresh interpreter has after `code`."""
    script = _LOADED.format(code=code, names=names)
    result: Any = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return str(result.stdout.splitlines()[-1]).split()[1:]


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["serve", "--help"], ["serve"], ["import"], ["import", "x", "--import-timeout-s", "x"]],
)
def test_help_and_errors_are_quick(args: list[str]):
    """What needs no server loads neither the front ends nor what models need."""
    assert loaded_by(f"from service.cli import main; main({args!r})", HEAVY) == []


def test_the_package_is_quick():
    """``import service`` loads nothing, though `service.export` is there."""
    assert loaded_by("import service; assert 'export' not in vars(service)", {*HEAVY, "pydantic"}) == []
    assert loaded_by("import service; service.export", {"tensorflow", "keras", "openvino", "grpc"}) == []


def test_the_server_does_not_load_what_no_model_needs():
    """TensorFlow, Keras and OpenVINO are loaded where a model needs them, not with the server."""
    assert loaded_by("import service.server", {"tensorflow", "keras", "openvino", "uvicorn"}) == ["uvicorn"]
