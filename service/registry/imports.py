"""``kiln import``: a trained model becomes the next version of a served one, after it was seen to answer alike."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from service.errors import Internal, InvalidArgument, KilnError, ModelLoadError
from service.registry.importer import import_model
from service.registry.labels import LABELS_FILE, labelled
from service.registry.reference import answers_of_file
from service.registry.repository import Kind, Source, open_models, version_number
from service.registry.samples import BATCH_ROWS, draws, is_close, largest_difference, predict_body
from service.runtime.base import signatures_line
from service.runtime.savedmodel import SavedModel
from service.runtime.warmup import WARM_UP_FILE
from service.tensors import DEFAULT_SIGNATURE, Signature, Tensors

RTOL, ATOL = 1e-4, 1e-5
"""How far the served signature may be from Keras."""
EXAMPLE_FILE = "example.json"
_PASTED_CHARACTERS = 1000
"""Longest request that is shown in full; a longer one is written beside the model."""

Answers = Callable[[Sequence[Tensors]], list[Tensors]]
"""From batches of inputs to the outputs that Keras gives for each."""


@dataclass(frozen=True)
class ImportOptions:
    """How a file is opened: see the settings of the same names."""

    cache_dir: Path
    timeout_s: float = 600.0
    imports: tuple[str, ...] = ()
    rest_port: int = 8501


@dataclass(frozen=True)
class Imported:
    """A version that was written to `path`; as text, the report.

    `difference` is the largest one between Keras and the served signature, None where it was not
    compared; `parity` says it in words, `curl` is a command that asks for a prediction.
    """

    path: Path
    model: str
    version: int
    signatures: dict[str, Signature] = field(repr=False)
    difference: float | None
    parity: str
    curl: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return (
            f"{self.model} version {self.version}: {self.path}\n"
            f"signature: {signatures_line(self.signatures)}\n"
            f"parity: {self.parity}\n"
            f"ask it, once 'kiln serve {shlex.quote(str(self.path.parent.parent))}' is ready:\n{self.curl}"
        )


@dataclass(frozen=True)
class _Trial:
    """What a served signature said: inputs and outputs by batch, or why it took none."""

    signature: Signature
    batches: tuple[Tensors, ...] = ()
    outputs: tuple[Tensors, ...] = ()
    refusal: str = ""


def import_trained(
    trained: Path,
    models: Path,
    options: ImportOptions,
    *,
    name: str | None = None,
    labels: Path | None = None,
    answers: Answers | None = None,
) -> Imported:
    """Write ``models/<name>/<next version>/``: whole, or not at all; blocks while it is converted and tried.

    `trained` is a file or SavedModel folder, `labels` a file with the name of a class per line.
    `answers` asks Keras; if not given, the file itself does, in a child process.

    Raises:
        InvalidArgument: there is no such file, or name, folder or labels do not fit.
        ModelLoadError: the model is refused, or answers differently when served.
        OSError: the folder cannot be written.
    """
    source = _only_source(trained, name)
    _check_models(models)
    with _staging(models, source.model) as folder, tempfile.TemporaryDirectory(prefix=".import-") as work:
        staged = _copy(source, folder, labels)
        converted = import_model(
            staged, cache_dir=options.cache_dir, timeout_s=options.timeout_s, imports=options.imports
        )
        trial, signatures = _try(converted, folder)
        if answers is None and source.kind is not Kind.SAVED_MODEL:
            answers = lambda batches: answers_of_file(  # noqa: E731
                staged.path, batches, work=Path(work), timeout_s=options.timeout_s, imports=options.imports
            )
        difference, parity = _compare(trial, answers)
        body = predict_body(trial.signature, trial.batches[0]) if trial.batches else ""
        if len(body) > _PASTED_CHARACTERS:
            (folder / EXAMPLE_FILE).write_text(f"{body}\n", encoding="utf-8")
        version = _publish(folder, models / source.model)
    path = models / source.model / str(version)
    curl = _curl(source.model, body, path, options.rest_port)
    return Imported(path, source.model, version, signatures, difference, parity, curl)


def _only_source(trained: Path, name: str | None) -> Source:
    found = open_models(trained, name)
    if len(found.sources) == 1:
        return found.sources[0]
    why = "; ".join(problem.reason for problem in found.problems) or f"found {len(found.sources)}"
    raise InvalidArgument(f"{str(trained)!r}: one .keras or .h5 file or SavedModel folder expected: {why}")


def _check_models(models: Path) -> None:
    if "://" in str(models) or ":/" in str(models):
        raise InvalidArgument(f"--models: a folder on this machine expected, got {str(models)!r}")
    if models.is_dir() and any(version_number(child.name) is not None for child in models.iterdir()):
        raise InvalidArgument(f"--models: a folder of models expected, but {str(models)!r} holds versions of one")


@contextlib.contextmanager
def _staging(models: Path, name: str) -> Iterator[Path]:
    """A hidden folder on the file system of the version to come, which no server looks into.

    It is made without `tempfile`, whose folders only their owner can read.
    """
    models.mkdir(parents=True, exist_ok=True)
    place = models / name if (models / name).is_dir() else models
    folder = place / f".import-{uuid.uuid4().hex}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Source, folder: Path, labels: Path | None) -> Source:
    """What is to be served, and tried first: a later change of the original does not matter."""
    if source.kind is Kind.SAVED_MODEL:
        shutil.copytree(source.path, folder, dirs_exist_ok=True)
        path = folder
    else:
        path = folder / f"model{source.kind.value}"
        shutil.copyfile(source.path, path)
        if (warm_up := source.path.parent / WARM_UP_FILE).is_file():
            (folder / WARM_UP_FILE).parent.mkdir()
            shutil.copyfile(warm_up, folder / WARM_UP_FILE)
    if labels is not None:
        (folder / LABELS_FILE).write_text(_read_names(labels), encoding="utf-8")
    return Source(source.model, source.version, source.kind, path)


def _read_names(labels: Path) -> str:
    try:
        names = labels.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--labels: {str(labels)!r} cannot be read: {error}") from None
    while names and not names[-1].strip():
        names.pop()
    if not names or not all(name.strip() for name in names):
        raise InvalidArgument(f"--labels: a name on every line expected, got {len(names)} lines with empty ones")
    return "\n".join(names) + "\n"


def _try(converted: Path, folder: Path) -> tuple[_Trial, dict[str, Signature]]:
    """Run the SavedModel as the server does."""
    served = SavedModel(converted, "CPU:0")
    try:
        signatures = served.signatures
        if (file := folder / LABELS_FILE).is_file():
            names = tuple(file.read_text("utf-8").splitlines())
            signatures = labelled(signatures, names, "the import")
            if not any(spec.labels for signature in signatures.values() for spec in signature.outputs):
                raise InvalidArgument(f"--labels: {len(names)} names, which fit none of {signatures_line(signatures)}")
        signature = signatures.get(DEFAULT_SIGNATURE) or next(iter(signatures.values()))
        return _trial(served, signature), signatures
    finally:
        served.close()


def _trial(served: SavedModel, signature: Signature) -> _Trial:
    plan = served.plan(signature)
    refusal = ""
    for draw in draws(signature):
        rows = BATCH_ROWS if signature.batched else BATCH_ROWS[:1]
        batches = tuple(draw.batch(signature, count) for count in rows)
        try:
            return _Trial(signature, batches, tuple(plan.run(batch) for batch in batches))
        except Internal as error:
            raise ModelLoadError(str(error)) from error
        except KilnError as error:
            refusal = str(error)
    return _Trial(signature, refusal=refusal)


def _compare(trial: _Trial, answers: Answers | None) -> tuple[float | None, str]:
    """The largest difference between Keras and what is served, and the report's words for it."""
    if not trial.batches:
        return None, f"not compared: it takes none of the made-up inputs ({trial.refusal})"
    if answers is None:
        return None, "a SavedModel is served as it is; it answers made-up inputs"
    *expected, again = answers([*trial.batches, trial.batches[0]])
    if not is_close(expected[0], again, rtol=RTOL, atol=ATOL):
        return None, "not compared: Keras gives different answers to the same inputs"
    expected = [_renamed(each, trial.signature) for each in expected]
    difference = max(map(largest_difference, expected, trial.outputs))
    if not all(is_close(w, g, rtol=RTOL, atol=ATOL) for w, g in zip(expected, trial.outputs, strict=True)):
        raise ModelLoadError(
            f"the served signature differs from Keras by up to {difference:.3g} (rtol {RTOL:g}, atol {ATOL:g} allowed)"
        )
    rows = f"batches of {', '.join(map(str, BATCH_ROWS))} rows" if trial.signature.batched else "one request"
    return difference, f"the largest difference from Keras is {difference:.3g}, over {rows}"


def _renamed(outputs: Tensors, signature: Signature) -> Tensors:
    """Keras's only output is the served one, whatever it is called."""
    names = [spec.name for spec in signature.outputs]
    return dict(zip(names, outputs.values(), strict=True)) if len(outputs) == len(names) == 1 else outputs


def _publish(folder: Path, model: Path) -> int:
    """Rename `folder` to the model's next version; its number.

    A folder with something in it cannot be renamed over: who comes second takes the next number.
    """
    model.mkdir(exist_ok=True)
    while True:
        taken = [number for child in model.iterdir() if (number := version_number(child.name)) is not None]
        version = max(taken, default=0) + 1
        try:
            folder.rename(model / str(version))
        except OSError:
            if not os.path.lexists(model / str(version)):
                raise
            continue
        return version


def _curl(model: str, body: str, path: Path, port: int) -> str:
    start = f"curl -s localhost:{port or 8501}/v1/models/{model}:predict -d"
    if not body:
        return f"{start} @request.json  # with inputs of your own"
    return (
        f"{start} {shlex.quote(body)}"
        if len(body) <= _PASTED_CHARACTERS
        else (f"{start} {shlex.quote(f'@{path / EXAMPLE_FILE}')}")
    )
