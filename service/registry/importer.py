"""``.keras`` and ``.h5`` files → SavedModel, in a child process, cached by content.

The child scans the file, then lets Keras load and export it. Nothing of the file is ever run, or
even parsed, in the server's own process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from service.errors import ModelLoadError
from service.registry.repository import Kind, Source
from service.registry.scan import scan_file

_log = logging.getLogger("kiln.importer")
_FORMAT = 1
"""Part of the cache's key: raise it when what the importer writes changes."""
_MANIFEST = "kiln.json"
_WORK_PREFIX = ".import-"
_MAX_FILE_BYTES = 64 * 2**30
_REFUSED = 3
"""Exit code of a child that says itself, on stdout, why it does not convert the file."""
_NOISE = ("I0000", "W0000", "E0000", "WARNING: All log messages", "Could not find", "This TensorFlow binary")

RunChild = Callable[[list[str], float, dict[str, str]], "subprocess.CompletedProcess[str]"]


def import_model(source: Source, *, cache_dir: Path, timeout_s: float, run_child: RunChild | None = None) -> Path:
    """The SavedModel folder for `source`; blocks while it is converted.

    A SavedModel is its own; the others are converted once per content and kept in `cache_dir`.

    Raises:
        ModelLoadError: the file is refused or cannot be converted; the text says why.
    """
    if source.kind is Kind.SAVED_MODEL:
        return source.path
    try:
        key = _cache_key(source.path)
        target = cache_dir / key
        if (target / _MANIFEST).is_file():
            _log.info("%s v%d was imported before", source.model, source.version)
            return target
        cache_dir.mkdir(parents=True, exist_ok=True)
        _log.info("importing %s v%d from %s", source.model, source.version, source.path.name)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=cache_dir) as work:
            converted = Path(work) / "model"
            _convert(source.path, converted, Path(work), timeout_s, run_child or _run_child)
            (converted / _MANIFEST).write_text(json.dumps({"source_sha256": key.partition("-")[0], **_versions()}))
            _publish(converted, target)
    except OSError as error:
        raise ModelLoadError(f"cannot be imported: {error}") from error
    _log.info("imported %s v%d in %.1f s", source.model, source.version, time.monotonic() - start)
    return target


def _cache_key(path: Path) -> str:
    """Content and converter: another Keras may export another graph."""
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    converter = "-".join((str(_FORMAT), *_versions().values(), path.suffix))
    return f"{content}-{hashlib.sha256(converter.encode()).hexdigest()[:12]}"


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


def _convert(path: Path, target: Path, home: Path, timeout_s: float, run_child: RunChild) -> None:
    # -P: whatever is called service or keras in the working directory is not ours
    command = [sys.executable, "-P", "-m", "service.registry.importer", str(path), str(target)]
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


def _load(path: Path) -> Any:
    import keras

    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise ModelLoadError(f"Keras cannot load it: {type(error).__name__}: {first_line}") from error
    if not getattr(model, "built", False) or not _has_inputs(model):
        raise ModelLoadError("the model has no input shape: call or build it once before saving it")
    return model


def _has_inputs(model: Any) -> bool:
    return bool(getattr(model, "inputs", None))


def _export(model: Any, target: Path) -> None:
    """Write the SavedModel, with each input named as its Input layer is."""
    try:
        model.export(str(target), format="tf_saved_model", verbose=False)
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise ModelLoadError(f"Keras cannot export it: {type(error).__name__}: {first_line}") from error


def main(argv: list[str]) -> int:
    """The child: ``SOURCE TARGET``; refusals go to stdout."""
    source, target = Path(argv[0]), Path(argv[1])
    _limit_resources()
    _end_with_parent(target.parent)
    try:
        scan_file(source)
        _export(_load(source), target)
    except ModelLoadError as error:
        sys.stdout.write(str(error))
        return _REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
