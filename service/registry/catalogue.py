"""All models as requests see them: what an `Engine` answers from what it knows, wherever the models run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

from service.batching.statistics import VersionStatistics
from service.errors import NotFound, Unavailable
from service.predictor import ModelRef
from service.registry.lifecycle import VersionStatus
from service.registry.routes import Routes

V = TypeVar("V")


class Catalogue(ABC, Generic[V]):
    """The models by name; with `draining` none of them takes new requests."""

    draining: bool

    @property
    @abstractmethod
    def routes(self) -> Mapping[str, Routes[V]]:
        """The models by name."""

    @abstractmethod
    def statistics_of(self, name: str) -> list[VersionStatistics]:
        """Of the loaded versions of a model, in order."""

    def check(self, ref: ModelRef) -> None:
        """See `Engine.check`."""
        self._route(self._meant(ref))

    def is_coming(self, ref: ModelRef) -> bool:
        """See `Engine.is_coming`."""
        ref = self._meant(ref)
        model = self.routes.get(ref.name)
        return model is not None and not self.draining and model.is_coming(ref.version, ref.label)

    def statuses(self, ref: ModelRef) -> list[VersionStatus]:
        """See `Engine.statuses`; folders that could not be a version are FAILED with the reason."""
        ref = self._meant(ref)
        model = self.routes.get(ref.name)
        number = ref.version
        if model is not None and ref.label is not None:
            number = model.number_of(ref.label)
        known = model.statuses() if model is not None else []
        if not known:
            raise NotFound(f"Could not find any versions of model {ref.name}; {self._loaded_names()}")
        if number is not None:
            known = [status for status in known if status.version == number]
            if not known:
                raise NotFound(f"Could not find version {number} of model {ref.name}")
        return known

    def statistics(self, ref: ModelRef | None) -> list[VersionStatistics]:
        """See `Engine.statistics`."""
        if ref is None:
            return [each for name in self.routes for each in self.statistics_of(name)]
        ref = self._meant(ref)
        self.statuses(ref)
        return [each for each in self.statistics_of(ref.name) if ref.version in (None, each.version)]

    def all_statuses(self) -> list[VersionStatus]:
        """The states of all versions that are loaded, to be loaded, or could not be."""
        return [status for name in sorted(self.routes) for status in self.routes[name].statuses()]

    def model_names(self) -> list[str]:
        return sorted(self.routes)

    def _meant(self, ref: ModelRef) -> ModelRef:
        """`ref`; without its version where that is 0 and the model has none of that number.

        OpenVINO Model Server's clients send 0 when they mean the latest version.
        """
        if ref.version != 0 or ((model := self.routes.get(ref.name)) is not None and 0 in model.numbers):
            return ref
        return ModelRef(ref.name, None, ref.label)

    def _route(self, ref: ModelRef) -> V:
        model = self.routes.get(ref.name)
        if model is None:
            which = f"Latest({ref.name})" if ref.version is None else f"Specific({ref.name}, {ref.version})"
            raise NotFound(f"Servable not found for request: {which}; {self._loaded_names()}")
        if self.draining:
            raise Unavailable("the server is stopping and takes no new requests")
        return model.route(ref.version, ref.label)

    def _loaded_names(self) -> str:
        names = sorted(name for name, model in self.routes.items() if model.default is not None)
        return f"loaded are {', '.join(names)}" if names else "no model is loaded"
