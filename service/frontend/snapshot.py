"""What the engine tells its front ends of the models, so that they look it up instead of asking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.batching.statistics import VersionStatistics
from service.predictor import ModelInfo
from service.registry.config import ModelConfig
from service.registry.lifecycle import VersionStatus
from service.registry.registry import Registry

Region = tuple[str, str, int, int]
"""A registered region of shared memory: name, key, offset and size in bytes."""


@dataclass(frozen=True)
class Shared:
    """What a client may change in one front end and then finds changed in all of them."""

    log_level: int
    regions: frozenset[Region] = frozenset()


@dataclass(frozen=True)
class ListedVersion:
    """A READY version; `key` is that of `Version`."""

    key: int
    info: ModelInfo


@dataclass(frozen=True)
class ListedModel:
    """One model as `Routes` has it, with what its loaded versions have done."""

    name: str
    config: ModelConfig
    is_enabled: bool
    labels: dict[str, int]
    problems: Mapping[int | None, VersionStatus]
    statuses: list[VersionStatus]
    numbers: frozenset[int]
    ready: Mapping[int, ListedVersion]
    is_asleep: bool
    is_moving: bool
    statistics: list[VersionStatistics]


@dataclass(frozen=True)
class Snapshot:
    """Everything that a front end knows."""

    models: tuple[ListedModel, ...]
    draining: bool
    is_ready: bool
    shared: Shared


def take_snapshot(registry: Registry, *, is_ready: bool, shared: Shared) -> Snapshot:
    """What `registry` has now."""
    models = tuple(
        ListedModel(
            name,
            model.config,
            model.is_enabled,
            dict(model.labels),
            dict(model.problems),
            model.statuses(),
            frozenset(model.numbers),
            {number: ListedVersion(version.key, registry.info(version)) for number, version in model.ready.items()},
            model.is_asleep,
            model.is_moving,
            registry.statistics_of(name),
        )
        for name, model in registry.routes.items()
    )
    return Snapshot(models, registry.draining, is_ready, shared)
