"""Every knob, once: its name, unit, default, range and help.

A value comes from a flag, else the environment (``KILN_`` + name), else the YAML file, else the
default given here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from service.batching_file import batching_settings

ENV_PREFIX = "KILN_"


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kiln"


def _unit(unit: str) -> dict[str, Any]:
    return {"unit": unit}


def _modules(value: Any) -> tuple[str, ...]:
    """Names of Python modules, from a list of names, or of names with commas between them."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
        raise ValueError("names of Python modules expected")
    names = [name.strip() for item in given for name in item.split(",") if name.strip()]
    if any(not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) for name in names):
        raise ValueError("names of Python modules expected")
    return tuple(dict.fromkeys(names))


def _bucket_rows(value: Any) -> tuple[int, ...]:
    """Numbers of rows in order, from a list of numbers, or of texts of numbers with commas between them."""
    given = [value] if isinstance(value, str | int) else value
    try:
        found = {int(part) for item in given for part in str(item).split(",") if part.strip()}
    except (TypeError, ValueError):
        raise ValueError("numbers of rows expected") from None
    if any(not 1 <= rows <= 65536 for rows in found):
        raise ValueError("numbers of rows from 1 to 65536 expected")
    return tuple(sorted(found))


class SettingsError(Exception):
    """A setting is wrong; the text names it, what was expected and what came."""


class Settings(BaseSettings):
    """All settings of a server; frozen."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    models: str = Field(description="folder of models (NAME/VERSION/…), or one model; a path or URL")
    name: str | None = Field(None, description="name of the model, where one model is served")
    host: str = Field("0.0.0.0", description="address to listen on")  # noqa: S104
    rest_port: int = Field(8501, ge=0, le=65535, description="HTTP port, 0 for any free one")
    grpc_port: int = Field(8500, ge=0, le=65535, description="gRPC port, 0 for any free one")
    grpc_transport: Literal["grpcio", "envoy"] = Field(
        "grpcio", description="what carries gRPC: grpcio, or Envoy around Kiln, which needs kiln[envoy]"
    )
    frontends: int = Field(
        0,
        ge=0,
        le=64,
        description="processes that take REST and gRPC before the one that runs the models, 0 for that one alone",
        json_schema_extra=_unit("processes"),
    )
    max_message_bytes: int = Field(
        64 * 2**20, ge=1024, description="largest HTTP body or gRPC message", json_schema_extra=_unit("bytes")
    )
    max_json_depth: int = Field(
        100, ge=4, le=500, description="deepest nesting of a JSON body", json_schema_extra=_unit("levels")
    )
    gzip_min_bytes: int = Field(
        16 * 2**10,
        ge=0,
        description="smallest HTTP answer that is compressed for callers who take gzip, 0 for none",
        json_schema_extra=_unit("bytes"),
    )
    max_tensor_elements: int = Field(
        2**24, ge=1, le=2**40, description="most elements of one tensor of a request; a string counts as 16"
    )
    max_string_bytes: int = Field(
        32 * 2**20,
        ge=1,
        description="longest string that is an element of a tensor of a request",
        json_schema_extra=_unit("bytes"),
    )
    shared_memory: bool = Field(
        default=False,
        description="take tensors in shared memory; whoever asks can then read and write objects of /dev/shm",
    )
    request_timeout_s: float = Field(
        30.0, gt=0, description="deadline of a request that states none", json_schema_extra=_unit("seconds")
    )
    drain_s: float = Field(
        25.0, ge=0, description="time to finish accepted requests after SIGTERM", json_schema_extra=_unit("seconds")
    )
    max_batch_rows: int = Field(
        64, ge=1, le=65536, description="most rows fused into one batch", json_schema_extra=_unit("rows")
    )
    max_queue_rows: int = Field(
        4096, ge=1, description="most rows waiting per model version", json_schema_extra=_unit("rows")
    )
    max_queue_bytes: int = Field(
        512 * 2**20,
        ge=1024,
        description="most memory of rows waiting per model version",
        json_schema_extra=_unit("bytes"),
    )
    batch_wait_ms: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="time a free runner waits for a fuller batch",
        json_schema_extra=_unit("milliseconds"),
    )
    buckets: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_bucket_rows)] = Field(
        (),
        description="batch sizes that plans are prepared for, as 8,16; else powers of two; a model may have its own",
        json_schema_extra=_unit("rows"),
    )
    batching_parameters_file: Path | None = Field(
        None, description="TensorFlow Serving's batching parameters, which count where no setting says otherwise"
    )
    oversize: Literal["split", "refuse"] = Field(
        "split", description="what becomes of a request with more rows than a batch may have"
    )
    plan: Literal["auto", "signature", "frozen", "xla", "openvino", "litert"] = Field(
        "auto", description="execution plan: auto takes the fastest measured one that agrees with the signature"
    )
    plan_budget_s: float = Field(
        60.0,
        ge=0,
        description="time to measure plans, per model; they are measured while it serves",
        json_schema_extra=_unit("seconds"),
    )
    import_timeout_s: float = Field(
        600.0, gt=0, description="time to convert one .keras or .h5 file", json_schema_extra=_unit("seconds")
    )
    imports: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_modules)] = Field(
        (),
        description="trusted Python module that registers Keras classes for .keras and .h5 files; repeatable",
        json_schema_extra={"flag": "--import"},
    )
    models_config: Path | None = Field(
        None, description="YAML file with versions, labels, device and so on of each model; reread when it changes"
    )
    model_control: Literal["none", "poll", "explicit"] = Field(
        "poll", description="what changes models: nothing, the folder, or load and unload requests"
    )
    poll_s: float = Field(
        2.0,
        gt=0,
        description="time between two looks at folder and config file",
        json_schema_extra=_unit("seconds"),
    )
    parallel_loads: int = Field(1, ge=1, le=64, description="most versions being loaded at once")
    memory_budget_bytes: int | None = Field(
        None,
        ge=1,
        description="memory that models on the CPU may take; else 80 % of the machine's or container's",
        json_schema_extra=_unit("bytes"),
    )
    gpu_memory_budget_bytes: int | None = Field(
        None,
        ge=1,
        description="memory that models may take on each GPU; else 90 % of what it reports",
        json_schema_extra=_unit("bytes"),
    )
    cache_dir: Path = Field(
        default_factory=_default_cache_dir, description="where models are kept, converted or fetched"
    )
    warm_cache_dir: Path | None = Field(
        None, description="a cache that was filled before, such as an image's; linked into the cache folder, only read"
    )
    otlp_endpoint: str | None = Field(
        None, description="URL of an OTLP collector that spans are sent to over HTTP; needs kiln[otel]"
    )
    trace_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the requests traced of those that come without a traceparent, under 0.05 eight in a row",
    )
    request_log: Path | None = Field(
        None, description="folder where answered requests are kept with their payload, to warm up with or to replay"
    )
    request_log_share: float = Field(0.01, ge=0, le=1, description="share of the requests that are kept")
    request_log_format: Literal["tfrecord", "jsonl"] = Field(
        "tfrecord", description="form of the PredictionLog records that are kept"
    )
    request_log_file_bytes: int = Field(
        64 * 2**20,
        ge=1024,
        description="largest file of kept requests; then the next is begun",
        json_schema_extra=_unit("bytes"),
    )
    request_log_total_bytes: int = Field(
        2**30,
        ge=1024,
        validate_default=True,
        description="most that kept requests take together; the oldest files make room",
        json_schema_extra=_unit("bytes"),
    )
    access_log: bool = Field(default=False, description="log a line for each predict request")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log shown")
    log_format: Literal["console", "json"] = Field("console", description="form of the log")

    @field_validator("request_log_total_bytes")
    @classmethod
    def _holds_a_file(cls, value: int, info: ValidationInfo) -> int:
        file_bytes = info.data.get("request_log_file_bytes", 0)
        if value < file_bytes:
            raise ValueError(f"at least request_log_file_bytes expected, which is {file_bytes}")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then YAML, then the batching file; no .env file and no secrets folder."""
        del dotenv_settings, file_secret_settings
        flags = dict(init_settings())
        yaml_file = flags.pop("config", None) or os.environ.get(ENV_PREFIX + "CONFIG")
        yaml = YamlConfigSettingsSource(settings_cls, yaml_file) if yaml_file else None
        sources = (_Flags(settings_cls, flags), env_settings, yaml, _BatchingFile(settings_cls))
        return tuple(source for source in sources if source)


class _Flags(PydanticBaseSettingsSource):
    """The flags that were given, less ``--config``, which is not a setting itself."""

    def __init__(self, settings_cls: type[BaseSettings], flags: dict[str, Any]) -> None:
        super().__init__(settings_cls)
        self._flags = flags

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return self._flags.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._flags


class _BatchingFile(PydanticBaseSettingsSource):
    """What the batching parameters file says, where one of the sources before names it."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("batching_parameters_file")
        if not path:
            return {}
        try:
            return batching_settings(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"batching_parameters_file: {path}: {error}") from error


def load_settings(flags: dict[str, Any]) -> Settings:
    """Settings from `flags` (name → text as given), the environment and the YAML file.

    Raises:
        SettingsError: a value is wrong, a name unknown, or the file unreadable.
    """
    config = flags.get("config") or os.environ.get(ENV_PREFIX + "CONFIG")
    if config:
        _check_yaml(config)
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(e) for e in error.errors())) from error


def _check_yaml(config: str) -> None:
    """Raise `SettingsError` unless the file is there and maps names to values."""
    if not Path(config).is_file():
        raise SettingsError(f"--config: no file {config!r}")
    try:
        content = yaml.safe_load(Path(config).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"--config: {config} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if content is not None and not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
        raise SettingsError(f"--config: {config}: names of settings with their values expected, got {content!r}")


def _explain(error: Any) -> str:
    """One error of pydantic's as: the setting, what was expected, what came."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{name}: there is no such setting"
    if error["type"] == "missing":
        return f"{name}: must be given"
    return f"{name}: {error['msg'].lower()}, got {error['input']!r}"
