"""At the end of training: `service.export` and `service.ExportCallback`, from the process that trained."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from service.errors import InvalidArgument, ModelLoadError
from service.registry.exporting import export_model
from service.registry.imports import Imported, ImportOptions, import_trained
from service.registry.reference import answers_of_model
from service.registry.repository import version_number
from service.registry.scan import scan_file

_log = logging.getLogger("kiln.registry")
_MORE_IS_BETTER = ("acc", "accuracy", "auc", "precision", "recall", "f1_score", "fbeta_score", "r2_score", "iou")
Labels = Sequence[str] | str | Path | None


def export(
    model: Any, path: str | Path, *, labels: Labels = None, imports: Sequence[str] = (), timeout_s: float = 600.0
) -> Imported:
    """Write the Keras model as the next version in `path`, ``models/<name>``, as ``kiln import`` does.

    It is written as ``model.keras``. A model with classes or code of its own is written as a
    SavedModel, which needs neither; unless `imports` names the modules that define them, which the
    server is then told with ``--import``. `labels` are the names of the classes, or a file with one
    per line. What is written is tried first, and compared with the answers of `model` itself.

    Raises:
        InvalidArgument: `path` is no ``models/<name>``, or the labels do not fit.
        ModelLoadError: the model cannot be saved or served, or answers differently when served.
        OSError: the folder cannot be written.
    """
    target = Path(path)
    if not target.name or version_number(target.name) is not None:
        raise InvalidArgument(f"path: models/<name> expected, the version is numbered here; got {str(path)!r}")
    with tempfile.TemporaryDirectory(prefix="kiln-export-") as work:
        saved = _save(model, Path(work), imports)
        return import_trained(
            saved,
            target.parent,
            ImportOptions(Path(work) / "cache", timeout_s, tuple(imports)),
            name=target.name,
            labels=_labels_file(labels, Path(work)),
            answers=lambda batches: answers_of_model(model, batches),
        )


def _save(model: Any, work: Path, imports: Sequence[str]) -> Path:
    """The file, or the SavedModel folder where the file would not be opened elsewhere."""
    file, folder = work / "model.keras", work / "saved_model"
    reason = ""
    try:
        model.save(file)
        if imports:
            return file
        scan_file(file)
    except Exception as error:  # noqa: BLE001 - a model's own code may raise what it likes
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ModelLoadError) else str(error)
        _log.info("a SavedModel is written: %s", reason)
    else:
        return file
    try:
        export_model(model, folder)
    except Exception as error:
        raise ModelLoadError(f"it can be written neither as .keras ({reason}) nor as SavedModel ({error})") from error
    return folder


def _labels_file(labels: Labels, work: Path) -> Path | None:
    if labels is None or isinstance(labels, str | Path):
        return None if labels is None else Path(labels)
    file = work / "labels.txt"
    file.write_text("".join(f"{name}\n" for name in labels), encoding="utf-8")
    return file


@cache
def callback_class() -> type[Any]:
    """`service.ExportCallback`; Keras is imported here, for it is Keras's callbacks that it derives from."""
    import keras

    class ExportCallback(keras.callbacks.Callback):  # type: ignore[misc]
        """Calls `service.export` at the end of training.

        With `save_best_only` the version that is written has the weights of the epoch that was the
        best by `monitor`; the model in training keeps its last ones. `mode` is ``min``, ``max`` or
        ``auto``, which goes by the name. Other options are those of `service.export`; after
        training `exported` is what it returned.
        """

        def __init__(
            self,
            path: str | Path,
            *,
            save_best_only: bool = False,
            monitor: str = "val_loss",
            mode: str = "auto",
            **options: Any,
        ) -> None:
            super().__init__()
            self.path = path
            self.exported: Imported | None = None
            self._best = Best(monitor, mode) if save_best_only else None
            self._options = options

        def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002
            if self._best is not None:
                self._best = Best(self._best.monitor, self._best.mode)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
            if self._best is not None and self._best.is_better(logs or {}):
                self._best.weights = self.model.get_weights()

        def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
            best = self._best.weights if self._best is not None else None
            if best is None:
                self.exported = export(self.model, self.path, **self._options)
                return
            last = self.model.get_weights()
            self.model.set_weights(best)
            try:
                self.exported = export(self.model, self.path, **self._options)
            finally:
                self.model.set_weights(last)

    return ExportCallback


class Best:
    """The best value of a metric so far, and the weights that go with it.

    Raises:
        InvalidArgument: `mode` is none of ``min``, ``max`` and ``auto``.
    """

    def __init__(self, monitor: str, mode: str = "auto") -> None:
        if mode not in ("auto", "min", "max"):
            raise InvalidArgument(f"mode: auto, min or max expected, got {mode!r}")
        rises = monitor.endswith(_MORE_IS_BETTER) if mode == "auto" else mode == "max"
        self.monitor, self.mode = monitor, mode
        self.weights: list[Any] | None = None
        self._sign = 1.0 if rises else -1.0
        self._value = -math.inf

    def is_better(self, logs: dict[str, Any]) -> bool:
        """Whether an epoch with these logs is better than all before, which it then is to be beaten by.

        Raises:
            InvalidArgument: the metric is not in `logs`.
        """
        if self.monitor not in logs:
            raise InvalidArgument(f"monitor: one of {', '.join(sorted(logs))} expected, got {self.monitor!r}")
        value = self._sign * float(logs[self.monitor])
        if not value > self._value:
            return False
        self._value = value
        return True
