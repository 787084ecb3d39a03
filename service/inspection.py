"""What ``kiln inspect`` and ``kiln plan`` tell: the models a server would load, and the plans that run them here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from service.errors import KilnError
from service.extensions.plans import plans_table
from service.registry.config import ModelConfig, read_configs
from service.registry.policy import wanted
from service.registry.repository import Source
from service.registry.version import Model
from service.registry.watch import look
from service.server import registry_options
from service.settings import Settings


def look_at(settings: Settings, *, tell: Callable[[str], None], plan: bool) -> list[str]:
    """Tell the plans of each version that ``kiln serve`` would load, which are found out where they are not known.

    Returns what could not be told, and why.
    """
    options = registry_options(settings)
    configs = read_configs(settings.models_config) if settings.models_config else {}
    repository = look(settings.models, settings.name, configs, settings.cache_dir)
    failures = [f"{p.model}: {p.reason}" for p in repository.problems]
    for source in _served(repository.sources, configs):
        config = configs.get(source.model, ModelConfig())
        try:
            model = options.load(options.materialize(source), config)
            try:
                if not _tell(source, model, tell, plan=plan):
                    failures.append(f"{source.model} v{source.version}: not planned; --log-level warning tells why")
            finally:
                model.close()
        except KilnError as error:
            failures.append(f"{source.model} v{source.version}: {error}")
    return failures


def _served(sources: Sequence[Source], configs: Mapping[str, ModelConfig]) -> list[Source]:
    """The versions that their models' policies want."""
    by_model: dict[str, dict[int, Source]] = {}
    for source in sources:
        by_model.setdefault(source.model, {})[source.version] = source
    return [
        versions[number]
        for name, versions in sorted(by_model.items())
        for number in sorted(wanted(versions, configs.get(name, ModelConfig()).versions))
    ]


def _tell(source: Source, model: Model, tell: Callable[[str], None], *, plan: bool) -> bool:
    """False where planning was called for and failed."""
    model.warm_up()
    is_planned = True
    if model.needs_planning and not model.is_planned:
        tell(f"{source.model} v{source.version}: looking for its fastest plans")
        is_planned = model.plan(tell)
    elif plan and model.is_planned:
        tell(f"{source.model} v{source.version}: planned before")
    tell(f"\n{source.model} v{source.version} on {model.device}")
    for name, signature in model.signatures.items():
        record = model.plans[name]
        tell(f"\n{name}: {signature.describe()}")
        tell(f"as {record.twin}" if record.twin else plans_table(record))
    return is_planned
