"""Where a setting's value comes from, and what is said of one that is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.settings import Settings, SettingsError, load_settings

MODELS = {"models": "models"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any of Kiln's variables, to be filled."""
    for name in [name for name in os.environ if name.startswith("KILN_")]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where a test may write its YAML file."""
    return tmp_path / "kiln.yaml"


@pytest.mark.parametrize(
    ("sources", "port"),
    [("", 8501), ("yaml", 1), ("yaml env", 2), ("yaml env flag", 3), ("env", 2), ("yaml flag", 3)],
)
def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(
    sources: str, port: int, environment: pytest.MonkeyPatch, config: Path
):
    """Of the places that name a setting the nearest to the command line decides."""
    flags: dict[str, Any] = dict(MODELS)
    if "yaml" in sources:
        config.write_text("rest_port: 1\ngrpc_port: 9\n")
        flags["config"] = str(config)
    if "env" in sources:
        environment.setenv("KILN_REST_PORT", "2")
    if "flag" in sources:
        flags["rest_port"] = "3"
    settings = load_settings(flags)
    assert settings.rest_port == port
    assert settings.grpc_port == (9 if "yaml" in sources else 8500)


def test_the_file_may_be_named_by_the_environment(environment: pytest.MonkeyPatch, config: Path, tmp_path: Path):
    """KILN_CONFIG names the YAML file, unless ``--config`` names another."""
    config.write_text("name: env\n")
    other = tmp_path / "other.yaml"
    other.write_text("name: flag\n")
    environment.setenv("KILN_CONFIG", str(config))
    assert load_settings(dict(MODELS)).name == "env"
    assert load_settings({**MODELS, "config": str(other)}).name == "flag"


def test_everything_can_come_from_the_file(config: Path):
    """A file alone is enough; an empty one says nothing."""
    config.write_text("models: /srv/models\noversize: refuse\nbatch_wait_ms: 2.5\n")
    settings = load_settings({"config": str(config)})
    assert (settings.models, settings.oversize, settings.batch_wait_ms) == ("/srv/models", "refuse", 2.5)
    config.write_text("")
    assert load_settings({**MODELS, "config": str(config)}) == load_settings(dict(MODELS))


def test_no_other_source_is_read(environment: pytest.MonkeyPatch, tmp_path: Path):
    """A .env file in the working folder is not looked at, nor variables that name no setting."""
    (tmp_path / ".env").write_text("KILN_REST_PORT=7\n")
    environment.chdir(tmp_path)
    environment.setenv("KILN_SERVICE_HOST", "10.0.0.1")
    assert load_settings(dict(MODELS)).rest_port == 8501


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("rest_port", "http", "rest_port: input should be a valid integer, unable to parse string as an integer, got"),
        ("rest_port", "65536", "rest_port: input should be less than or equal to 65535, got '65536'"),
        ("grpc_port", "-1", "grpc_port: input should be greater than or equal to 0, got '-1'"),
        ("max_message_bytes", "1023", "max_message_bytes: input should be greater than or equal to 1024, got '1023'"),
        ("max_json_depth", "501", "max_json_depth: input should be less than or equal to 500, got '501'"),
        ("request_timeout_s", "0", "request_timeout_s: input should be greater than 0, got '0'"),
        ("request_timeout_s", "soon", "request_timeout_s: input should be a valid number, unable to parse"),
        ("drain_s", "nan", "drain_s: input should be greater than or equal to 0, got 'nan'"),
        ("max_batch_rows", "1.5", "max_batch_rows: input should be a valid integer"),
        ("max_batch_rows", "0", "max_batch_rows: input should be greater than or equal to 1, got '0'"),
        ("max_batch_rows", "65537", "max_batch_rows: input should be less than or equal to 65536, got '65537'"),
        ("max_queue_rows", "0", "max_queue_rows: input should be greater than or equal to 1, got '0'"),
        ("max_queue_bytes", "", "max_queue_bytes: input should be a valid integer"),
        ("batch_wait_ms", "10001", "batch_wait_ms: input should be less than or equal to 10000, got '10001'"),
        ("oversize", "drop", "oversize: input should be 'split' or 'refuse', got 'drop'"),
        (
            "plan",
            "onnx",
            "plan: input should be 'auto', 'signature', 'frozen', 'xla', 'openvino' or 'litert', got 'onnx'",
        ),
        ("plan_budget_s", "-0.1", "plan_budget_s: input should be greater than or equal to 0, got '-0.1'"),
        ("import_timeout_s", "0", "import_timeout_s: input should be greater than 0, got '0'"),
        ("log_level", "loud", "log_level: input should be 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ("log_format", "xml", "log_format: input should be 'console' or 'json', got 'xml'"),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_a_wrong_value_is_told_with_its_setting(
    source: str, name: str, value: str, text: str, environment: pytest.MonkeyPatch
):
    """The text names the setting, what was expected and what came, wherever it came from."""
    flags = dict(MODELS)
    if source == "flag":
        flags[name] = value
    else:
        environment.setenv(f"KILN_{name.upper()}", value)
    with pytest.raises(SettingsError) as refused:
        load_settings(flags)
    assert str(refused.value).startswith(text)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("rest_port: [1]", "rest_port: input should be a valid integer, got [1]"),
        ("rest_port: null", "rest_port: input should be a valid integer, got None"),
        ("name: 5", "name: input should be a valid string, got 5"),
        ("host: {a: 1}", "host: input should be a valid string, got {'a': 1}"),
        ("rest-port: 1", "rest-port: there is no such setting"),
        ("config: other.yaml", "config: there is no such setting"),
        ("- rest_port", "names of settings with their values expected, got ['rest_port']"),
        ("8501", "names of settings with their values expected, got 8501"),
        ("8501: rest_port", "names of settings with their values expected, got {8501: 'rest_port'}"),
        ("rest_port: [1", "cannot be read as YAML: while parsing a flow sequence"),
        ("name: a\n---\nname: b", "cannot be read as YAML: expected a single document"),
        ("name: !!python/object:os.system x", "cannot be read as YAML: could not determine a constructor"),
        (b"name: \xff", "cannot be read as YAML: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_wrong_with_the_file_is_told(content: str | bytes, text: str, config: Path):
    """A file with a wrong value, an unknown name, another shape or no YAML at all is refused in one line."""
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SettingsError) as refused:
        load_settings({**MODELS, "config": str(config)})
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", ["flag", "environment"])
def test_a_file_that_is_not_there_is_told(given: str, environment: pytest.MonkeyPatch, config: Path):
    """A configuration file that was named and does not exist is an error, not a default."""
    flags = dict(MODELS)
    if given == "flag":
        flags["config"] = str(config)
    else:
        environment.setenv("KILN_CONFIG", str(config))
    with pytest.raises(SettingsError) as refused:
        load_settings(flags)
    assert str(refused.value) == f"--config: no file {str(config)!r}"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({}, "models: must be given"),
        ({**MODELS, "colour": "red"}, "colour: there is no such setting"),
        ({"rest_port": "x"}, "models: must be given; rest_port: input should be a valid integer"),
    ],
)
def test_what_is_missing_or_unknown_is_told_all_at_once(flags: dict[str, str], text: str):
    """Every setting that is wrong is named in one message."""
    with pytest.raises(SettingsError) as refused:
        load_settings(flags)
    assert str(refused.value).startswith(text)


@pytest.mark.parametrize(
    ("given", "modules"),
    [
        ("a", ("a",)),
        ("a.b, c ,,a.b", ("a.b", "c")),
        (["a", "b,c"], ("a", "b", "c")),
        ("", ()),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment"])
def test_modules_come_one_by_one_or_with_commas(
    source: str, given: str | list[str], modules: tuple[str, ...], environment: pytest.MonkeyPatch
):
    """``--import`` may be repeated, and each may name several modules; KILN_IMPORTS has all of them."""
    flags: dict[str, Any] = dict(MODELS)
    if source == "flag":
        flags["imports"] = given
    else:
        environment.setenv("KILN_IMPORTS", given if isinstance(given, str) else ",".join(given))
    assert load_settings(flags).imports == modules


@pytest.mark.parametrize("value", ["a-b", "a/b", ".a", "a.", "1a", 5, ["a", 5]])
def test_what_is_no_module_is_told(value: Any):
    """A path, a number or a wrong name is refused before anything is imported."""
    with pytest.raises(SettingsError) as refused:
        load_settings({**MODELS, "imports": value})
    assert str(refused.value) == f"imports: value error, names of python modules expected, got {value!r}"


def test_settings_do_not_change():
    """Once loaded, a setting stays what it is."""
    settings = load_settings(dict(MODELS))
    with pytest.raises(ValidationError, match="frozen"):
        settings.rest_port = 1


@pytest.mark.parametrize(("base", "parent"), [("/var/cache", "/var/cache"), ("", "~/.cache")])
def test_the_cache_goes_where_caches_go(base: str, parent: str, environment: pytest.MonkeyPatch):
    """Converted models are kept under XDG_CACHE_HOME, else in the home folder's .cache."""
    environment.setenv("XDG_CACHE_HOME", base)
    assert load_settings(dict(MODELS)).cache_dir == Path(parent).expanduser() / "kiln"


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name not in {"models", "cache_dir"}])
def test_every_default_passes_its_own_check(name: str):
    """What a setting is by default could have been given."""
    default = Settings.model_fields[name].default
    given = {} if default is None else {name: ",".join(default) if isinstance(default, tuple) else str(default)}
    assert getattr(load_settings({**MODELS, **given}), name) == default
