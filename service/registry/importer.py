"""``.keras`` and ``.h5`` files → SavedModel, in a child process, cached by content.

The child imports the modules that are trusted to define further classes, scans the file, then lets
Keras load and export it. Nothing of the file or of those modules is ever run, or even parsed, in the
server's own process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from service.errors import ModelLoadError
from service.registry.exporting import export_model
from service.registry.legacy import HARD_SIGMOID, modernise
from service.registry.repository import Kind, Source
from service.registry.scan import scan_file
from service.runtime.warmup import WARM_UP_FILE

_log = logging.getLogger("kiln.importer")
_FORMAT = 3
"""Part of the cache's key: raise it when what the importer writes changes."""
_MODULE = "service.registry.importer"
_MANIFEST = "kiln.json"
_WORK_PREFIX = ".import-"
_MAX_FILE_BYTES = 64 * 2**30
_REFUSED = 3
"""Exit code of a child that says itself, on stdout, why it does not convert the file."""
_NOISE = ("I0000", "W0000", "E0000", "WARNING: All log messages", "Could not find", "This TensorFlow binary")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")
_WHERE = re.compile(r"Exception encountered when calling .*\n+(?=\S)")
"""What Keras puts before a layer's own error."""

RunChild = Callable[[list[str], float, dict[str, str]], "subprocess.CompletedProcess[str]"]


def import_model(
    source: Source,
    *,
    cache_dir: Path,
    timeout_s: float,
    imports: Sequence[str] = (),
    run_child: RunChild | None = None,
) -> Path:
    """The SavedModel folder for `source`; blocks while it is converted.

    A SavedModel is its own; the others are converted once per content and kept in `cache_dir`, with
    the warm-up file that lies beside them. `imports` are modules whose Keras classes may be used.

    Raises:
        ModelLoadError: the file is refused or cannot be converted; the text says why.
    """
    if source.kind is Kind.SAVED_MODEL:
        return source.path
    try:
        warm_up = _warm_up_file(source.path.parent)
        key = _cache_key(source.path, warm_up, imports)
        target = cache_dir / key
        if (target / _MANIFEST).is_file():
            _log.info("%s v%d was imported before", source.model, source.version)
            return target
        cache_dir.mkdir(parents=True, exist_ok=True)
        _log.info("importing %s v%d from %s", source.model, source.version, source.path.name)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=cache_dir) as work:
            converted = Path(work) / "model"
            ask_child(_MODULE, [*imports, str(source.path), str(converted)], Path(work), timeout_s, run_child)
            if warm_up is not None:
                (converted / WARM_UP_FILE).parent.mkdir(exist_ok=True)
                shutil.copyfile(warm_up, converted / WARM_UP_FILE)
            (converted / _MANIFEST).write_text(json.dumps({"source_sha256": key.partition("-")[0], **_versions()}))
            _publish(converted, target)
    except OSError as error:
        raise ModelLoadError(f"cannot be imported: {error}") from error
    _log.info("imported %s v%d in %.1f s", source.model, source.version, time.monotonic() - start)
    return target


def _warm_up_file(folder: Path) -> Path | None:
    """The warm-up requests beside a model's file, if there are any."""
    path = folder / WARM_UP_FILE
    if not path.is_file():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ModelLoadError(f"{WARM_UP_FILE} is a link out of the version's folder")
    return path


def _cache_key(path: Path, warm_up: Path | None, imports: Sequence[str]) -> str:
    """Content and converter: another Keras, or other modules, may export another graph."""
    parts = [str(_FORMAT), *_versions().values(), path.suffix, *imports]
    if warm_up is not None:
        parts.append(_digest(warm_up))
    return f"{_digest(path)}-{hashlib.sha256('-'.join(parts).encode()).hexdigest()[:12]}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for package in ("keras", "tensorflow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _publish(converted: Path, target: Path) -> None:
    """Move into place whole; another process may have been first with the same content."""
    try:
        converted.rename(target)
    except OSError:
        if not (target / _MANIFEST).is_file():
            raise
        shutil.rmtree(converted, ignore_errors=True)


def ask_child(
    module: str, arguments: Sequence[str], home: Path, timeout_s: float, run_child: RunChild | None = None
) -> None:
    """Run `module` in a child that may open model files, with `arguments`; `home` is a folder of its own.

    Raises:
        ModelLoadError: it says no, fails, or takes longer than `timeout_s` seconds; the text says why.
    """
    # -P: whatever is called service or keras in the working directory is not ours
    command = [sys.executable, "-P", "-m", module, *arguments]
    run_child = run_child or _run_child
    try:
        child = run_child(command, timeout_s, _child_environment(home))
    except subprocess.TimeoutExpired:
        raise ModelLoadError(f"the import took longer than {timeout_s:.0f} s and was stopped") from None
    if child.returncode == 0:
        return
    if child.returncode == _REFUSED:
        raise ModelLoadError(child.stdout.strip())
    how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else f"failed ({child.returncode})"
    raise ModelLoadError(f"the import process {how}: {_last_words(child.stderr)}")


def _child_environment(home: Path) -> dict[str, str]:
    """Ours, less what could change how Keras behaves; conversion needs no GPU."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("KERAS_", "TF_", "KILN_"))}
    package_parent = str(Path(__file__).parents[2])
    search_path = os.pathsep.join(filter(None, (package_parent, os.environ.get("PYTHONPATH"))))
    return {
        **keep,
        "PYTHONPATH": search_path,
        "HOME": str(home),
        "KERAS_HOME": str(home),
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
    }


def _run_child(command: list[str], timeout_s: float, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run in a process group of its own, which is killed whole when time is up.

    Its stdin is a pipe that stays open as long as this process lives: see `_end_with_parent`.
    """
    read_end, write_end = os.pipe()
    try:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=read_end,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        os.close(read_end)
        with child:
            try:
                stdout, stderr = child.communicate(timeout=timeout_s)
            except BaseException:
                os.killpg(child.pid, signal.SIGKILL)
                raise
    finally:
        os.close(write_end)
    return subprocess.CompletedProcess(command, child.returncode, stdout, stderr)


def _last_words(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.lstrip().startswith(_NOISE)]
    return lines[-1] if lines else "it said nothing"


def _limit_resources() -> None:
    """Bounds for this process, so that a file made to exhaust the machine does not."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = _MAX_FILE_BYTES if hard == resource.RLIM_INFINITY else min(_MAX_FILE_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def _end_with_parent(work: Path) -> None:
    """End this process when its parent has ended and so closed the pipe at our stdin.

    `work`, the parent's temporary folder, goes with it: a parent that left in a hurry has not removed it.
    """

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter shuts down
        if work.name.startswith(_WORK_PREFIX):
            shutil.rmtree(work, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def custom_objects(modules: Sequence[str]) -> dict[str, Any]:
    """What `modules` define for Keras, by the names under which it looks for them.

    These are the classes and functions that they registered with Keras, and their other classes
    that Keras can make from a config. What they import from elsewhere is not theirs.

    Raises:
        ModelLoadError: a module cannot be imported.
    """
    if not modules:
        return {}
    import keras

    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ModelLoadError(f"--import {name}: {type(error).__name__}: {_first_line(error)}") from error
    registered = {
        name: each for name, each in keras.saving.get_custom_objects().items() if _is_defined_in(each, modules)
    }
    others = [each for name in modules for each in vars(sys.modules[name]).values() if _is_defined_in(each, modules)]
    known = set(map(id, registered.values()))
    classes = {
        each.__name__: each
        for each in others
        if isinstance(each, type) and hasattr(each, "from_config") and id(each) not in known
    }
    return classes | registered


def _is_defined_in(item: Any, modules: Sequence[str]) -> bool:
    where = str(getattr(item, "__module__", ""))
    return any(where == name or where.startswith(f"{name}.") for name in modules)


def _load(path: Path, custom: Mapping[str, Any]) -> Any:
    import keras

    try:
        model = keras.saving.load_model(path, custom_objects=dict(custom), compile=False, safe_mode=True)
        is_complete = getattr(model, "built", False) and _has_inputs(model)
    except Exception as error:
        raise ModelLoadError(f"Keras cannot load it: {type(error).__name__}: {_reason(error)}") from error
    if not is_complete:
        raise ModelLoadError("the model has no input shape: call or build it once before saving it")
    return model


def _has_inputs(model: Any) -> bool:
    """Whether Keras knows what to export it for.

    A subclass of Model is exported for the shape that it was called with, which loading does not do.
    """
    if getattr(model, "inputs", None):
        return True
    config: dict[str, Any] | None = getattr(model, "get_build_config", dict)()
    shape = config.get("input_shape") if config else None
    if not isinstance(shape, list | tuple) or not all(size is None or isinstance(size, int) for size in shape):
        return False
    import keras

    model(keras.Input(batch_shape=(None, *shape[1:]), dtype=model.input_dtype))
    return True


def _export(model: Any, target: Path) -> None:
    """Write the SavedModel, with each input named as its Input layer is."""
    try:
        export_model(model, target)
    except Exception as error:
        raise ModelLoadError(f"Keras cannot export it: {type(error).__name__}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line of Keras's text that says what was wrong, and what else may be behind it."""
    text = _COLOURS.sub("", str(error)).strip()
    inner = _WHERE.sub("", text.rpartition("Exception encountered: ")[2])
    lines = [line for line in (inner or text).splitlines() if line.strip()]
    reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    found = re.search(r"\b(jax|torch)\b", text, re.IGNORECASE)
    if found is not None:
        where = "" if found[0] in reason else f" (in code for {found[0]})"
        reason += (
            f"{where}; Kiln runs layers on TensorFlow: write the layer with keras.ops, which runs on every backend"
        )
    return reason


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def open_model(modules: Sequence[str], source: Path, work: Path) -> Any:
    """The Keras model of a file, looked over and, if Keras 2 wrote it, translated; in a child process only.

    `work` is a folder for what is needed meanwhile.

    Raises:
        ModelLoadError: the file is refused, or Keras cannot load it.
    """
    custom = custom_objects(modules)
    opened = modernise(source, work)
    if opened != source:
        custom |= _functions_of_keras_2()
    scan_file(opened, custom)
    return _load(opened, custom)


def _functions_of_keras_2() -> dict[str, Any]:
    """What Keras 2 called by a name under which Keras 3 has another function."""
    import keras

    @keras.saving.register_keras_serializable("keras2", "hard_sigmoid")  # type: ignore[untyped-decorator]
    def hard_sigmoid(x: Any) -> Any:
        return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)

    return {HARD_SIGMOID: hard_sigmoid}


def run_as_child(work: Path, task: Callable[[], None]) -> int:
    """Run `task` within this child's bounds; its exit code. Refusals go to stdout, and nothing else does."""
    _limit_resources()
    _end_with_parent(work)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            task()
    except ModelLoadError as error:
        sys.stdout.write(str(error))
        return _REFUSED
    return 0


def main(argv: list[str]) -> int:
    """The child: ``[MODULE …] SOURCE TARGET``."""
    modules, source, target = argv[:-2], Path(argv[-2]), Path(argv[-1])
    return run_as_child(target.parent, lambda: _export(open_model(modules, source, target.parent), target))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
