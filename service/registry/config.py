"""What is said of each model: where it lies, which versions, labels, device, trust; from a YAML file or a client."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from service.errors import InvalidArgument
from service.padding import Side
from service.registry.policy import All, Latest, Specific, VersionPolicy
from service.runtime.base import PlanName, Precision


def _policy(value: Any) -> VersionPolicy:
    """``all``, ``{latest: 2}`` or a list of versions."""
    if isinstance(value, All | Latest | Specific):
        return value
    if value == "all":
        return All()
    if isinstance(value, Mapping) and set(value) == {"latest"} and type(value["latest"]) is int and value["latest"] > 0:
        return Latest(value["latest"])
    if isinstance(value, list) and value and all(type(v) is int and v >= 0 for v in value):
        return Specific(frozenset(value))
    raise ValueError("all, {latest: N} or a list of versions expected")


class Shadow(BaseModel):
    """A copy of `share` of the requests goes to version `to`, a number or a label; its answers are only compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    to: int | str
    share: float = Field(default=1.0, gt=0, le=1)


def _fill(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError("a number, a text, true or false expected")


def _axes(value: Any) -> Any:
    """One axis or several."""
    return [value] if type(value) is int else value


def _cut_output(value: Any) -> Any:
    """An output's axes alone, or with what they follow."""
    return {"axis": value} if isinstance(value, int | list | tuple) else value


def _padding(value: Any) -> Any:
    """``true`` for all defaults, ``false`` for none."""
    return ({} if value else None) if isinstance(value, bool) else value


Fill = Annotated[bool | int | float | str | None, BeforeValidator(_fill)]
Axis = Annotated[int, Field(ge=1, le=63, strict=True)]


class InputPadding(BaseModel):
    """How one input is padded; what is not said is as in `PaddingConfig`, the axis the only one that is open."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    axis: Axis | None = None
    value: Fill = None
    side: Side | None = None


class OutputPadding(BaseModel):
    """The axes along which an output is cut back to the length of input `like`, by default the first that is padded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    axis: Annotated[
        tuple[Axis, ...], Field(min_length=1), BeforeValidator(_axes, json_schema_input_type=Axis | list[Axis])
    ]
    like: str | None = None


class PaddingConfig(BaseModel):
    """How sequences of different lengths come to share a batch.

    Without `inputs` all are padded that have one open dimension beside their rows; without `outputs` those are cut
    back that are open along the same axis.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: dict[str, InputPadding] = {}
    value: Fill = None
    side: Side = "right"
    lengths: tuple[Annotated[int, Field(ge=1, le=2**20, strict=True)], ...] = ()
    longer: Literal["refuse", "exact"] = "refuse"
    outputs: (
        dict[
            str,
            Annotated[
                OutputPadding, BeforeValidator(_cut_output, json_schema_input_type=Axis | list[Axis] | OutputPadding)
            ],
        ]
        | None
    ) = None
    check: bool = True

    @field_validator("lengths")
    @classmethod
    def _lengths_ascend(cls, lengths: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in itertools.pairwise(lengths)):
            raise ValueError("ascending lengths expected")
        return lengths


class ModelConfig(BaseModel):
    """How one model is served. Everything has a default: a model need not be configured at all."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    path: str | None = Field(default=None, description="folder of its versions, or a URL of one; default: MODELS/NAME")
    versions: Annotated[VersionPolicy, BeforeValidator(_policy)] = Field(
        default=Latest(1), description="`{latest: N}`, `all` or a list of versions"
    )
    labels: dict[str, int] = Field(default={}, description="version by label, such as `stable: 1`")
    split: dict[int | str, float] = Field(
        default={}, description="share of the requests that name no version, by version or label; shares are relative"
    )
    shadow: Shadow | None = Field(default=None, description="`{to: LABEL, share: 0.1}`: a version on trial")
    transition: Literal["availability", "resource"] = Field(
        default="availability", description="a new version is ready before the old one goes, or the old one goes first"
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu(:\d+)?|gpu(:(\d+|\*))?|tpu(:\d+)?|cpu:\*)$")] = Field(
        default="auto", description="`auto`, `cpu`, `gpu:0`, `gpu:*` (a replica on each) or `tpu`"
    )
    slo_ms: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="goal for 99 % of its requests, in ms: batches are made, and requests refused, to keep it",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="its share of the device beside other models that are busy: one of 3 gets three times one of 1",
    )
    on_demand: bool = Field(default=False, description="loaded at its first request; goes when idle, for room")
    stateful: bool = Field(default=False, description="its variables change: never fused, never run again")
    plan: PlanName | None = Field(
        default=None,
        description="`auto`, `signature`, `frozen`, `xla`, `openvino` or `litert`; else the setting `plan`",
    )
    budget_s: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="seconds to measure plans; else the setting `plan_budget_s`"
    )
    buckets: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        default=(), description="batch sizes that plans are prepared for; else the setting `buckets`"
    )
    padding: Annotated[
        PaddingConfig | None, BeforeValidator(_padding, json_schema_input_type=PaddingConfig | bool | None)
    ] = Field(
        default=None,
        description="`true` or `{value: 0, lengths: [16, 32]}`: sequences of different lengths share batches",
    )
    rtol: float = Field(default=1e-4, ge=0, description="how far a plan's floats may be from the signature's, relative")
    atol: float = Field(default=1e-5, ge=0, description="the same, absolute; integers, booleans and strings are equal")
    deterministic: bool = Field(
        default=False, description="all batches are padded to one bucket, so that answers do not depend on company"
    )
    precision: Precision = Field(
        default="f32",
        description="`bf16` lets plans compute in bfloat16 where the CPU can, `int8` with weights of 8 bits",
    )
    precision_rtol: float = Field(default=1e-2, ge=0, description="`rtol` for plans of less precision")
    precision_atol: float = Field(default=1e-2, ge=0, description="`atol` for plans of less precision")
    allow_operations: frozenset[str] = Field(
        default=frozenset(), description="operations that are refused otherwise, such as `ReadFile`"
    )

    @model_validator(mode="after")
    def _shares_are_positive(self) -> ModelConfig:
        if any(share < 0 for share in self.split.values()) or (self.split and not sum(self.split.values())):
            raise ValueError("split: shares are not negative, and one is more than 0")
        return self


ModelConfigs = Mapping[str, ModelConfig]


def parse_configs(document: Any, where: str) -> dict[str, ModelConfig]:
    """``{models: {name: {…}}}`` as configs by name.

    Raises:
        InvalidArgument: names the model and field, what was expected and what came.
    """
    if not isinstance(document, Mapping) or set(document) != {"models"} or not isinstance(document["models"], Mapping):
        raise InvalidArgument(f"{where}: a mapping with the one key 'models' expected")
    configs = {}
    for name, value in document["models"].items():
        if not isinstance(name, str):
            raise InvalidArgument(f"{where}: models: a name expected, got {name!r}")
        try:
            configs[name] = ModelConfig.model_validate({} if value is None else value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in ("models", name, *first["loc"]))
            raise InvalidArgument(f"{where}: {field}: {first['msg']}, got {first['input']!r}") from None
    return configs


def read_configs(path: Path) -> dict[str, ModelConfig]:
    """The configs in a YAML file; see `parse_configs`."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{path}: {' '.join(str(error).split())}") from None
    return parse_configs(document, str(path))
