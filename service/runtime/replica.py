"""The model on one device: its graph, which TensorFlow loads where it is needed, and the tables of its signatures."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

from service.errors import Unavailable
from service.runtime.base import Run
from service.runtime.savedmodel import SavedModel, SessionPlan
from service.runtime.table import Table
from service.tensors import Tensors


class Replica:
    """What runs batches on `device`."""

    def __init__(self, path: Path, device: str, allow_operations: Collection[str]) -> None:
        self.device = device
        self.tables: dict[str, Table] = {}
        self._path = path
        self._allow_operations = allow_operations
        self._saved_model: SavedModel | None = None
        self._own: dict[str, SessionPlan] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def loaded(self) -> SavedModel | None:
        """The SavedModel, if TensorFlow has loaded it."""
        return self._saved_model

    def load(self) -> SavedModel:
        """The SavedModel, loaded where it is not yet: takes seconds, and the first one imports TensorFlow.

        Raises:
            ModelLoadError: TensorFlow cannot load it.
            Unavailable: the replica is closed.
        """
        with self._lock:
            if self._is_closed:
                raise Unavailable("the model is unloaded")
            if self._saved_model is None:
                self._saved_model = SavedModel(self._path, self.device, allow_operations=self._allow_operations)
            return self._saved_model

    def own_run(self, signature: str) -> Run:
        """What runs a signature as it is in the graph."""
        plan = self._own.get(signature)
        if plan is None:
            model = self.load()
            plan = self._own.setdefault(signature, model.plan(model.signatures[signature]))
        return plan.run

    def run_own(self, signature: str) -> Run:
        """As `own_run`, but the graph is loaded at the first run that needs it."""
        if self._saved_model is not None:
            return self.own_run(signature)

        def run(inputs: Tensors) -> Tensors:
            return self.own_run(signature)(inputs)

        return run

    def swap(self, tables: dict[str, Table]) -> None:
        """Put other tables in use, for batches that begin from now on; what runs keeps those that it began with."""
        self.tables = tables

    def close(self) -> None:
        """Free all plans, each once, and the graph."""
        with self._lock:
            self._is_closed = True
            model, self._saved_model = self._saved_model, None
        for table in {id(table): table for table in self.tables.values()}.values():
            table.close()
        for plan in self._own.values():
            plan.close()
        if model is not None:
            model.close()
