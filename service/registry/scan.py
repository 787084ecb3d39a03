"""Look a ``.keras`` or ``.h5`` file over before Keras opens it: such a file is a program.

Keras's own ``safe_mode`` has been got round before (CVE-2025-1550, -8747, -9906, -12058) and ``.h5``
files ignore it (CVE-2025-9905), so whatever a config names is held against the tables below first.
"""

from __future__ import annotations

import json
import re
import stat
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from service.errors import ModelLoadError

_MAX_CONFIG_BYTES = 64 * 2**20
_MAX_UNPACKED_BYTES = 64 * 2**30
_MAX_DEPTH = 200

ALLOWED_MODULES: dict[str, str] = {
    # module: which of its classes (a regular expression)
    "keras": "DTypePolicy|FloatDTypePolicy|QuantizedDTypePolicy|DTypePolicyMap|Sequential|Functional|Model",
    "keras.activations": ".*",
    "keras.constraints": ".*",
    "keras.dtype_policies": ".*",
    "keras.initializers": ".*",
    "keras.layers": ".*",
    "keras.losses": ".*",
    "keras.metrics": ".*",
    "keras.models": "Sequential|Functional|Model",
    "keras.optimizers": ".*",
    "keras.optimizers.schedules": ".*",
    "keras.quantizers": ".*",
    "keras.random": "SeedGenerator",
    "keras.regularizers": ".*",
    "keras.src.models.functional": "Functional",
    "keras.src.models.model": "Model",
    "keras.src.models.sequential": "Sequential",
}
"""Where the objects of a config may come from."""

ALLOWED_MODULE_FAMILIES = re.compile(
    r"keras\.src\.(ops|layers|initializers|regularizers|constraints|activations|dtype_policies|quantizers)(\.[a-z0-9_]+)+"
)
"""Where Keras keeps the operations and layers that have no public name; their classes are CamelCase."""

ALLOWED_MARKERS = {
    "__keras_tensor__",
    "__tensor__",
    "__numpy__",
    "__bytes__",
    "__tuple__",
    "__ellipsis__",
    "__slice__",
    "__tf_tensorshape__",
}
"""What Keras writes in place of a class for plain values."""

REFUSED_CLASSES: dict[str, str] = {
    "Lambda": "holds Python code",
    "__lambda__": "holds Python code",
    "function": "refers to a Python function",
    "TFSMLayer": "loads another model from a path",
    "TorchModuleWrapper": "holds pickled Python objects, and runs under the torch backend only",
    "JaxLayer": "holds Python code, and runs under the JAX backend only",
    "FlaxLayer": "holds Python code, and runs under the JAX backend only",
}
"""Classes that run, or fetch, what no scan can judge; and what they do."""

PATH_FIELDS = ("vocabulary", "idf_weights")
"""Fields that Keras reads a file for if they are text: only lists are data."""

H5_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""What h5py raises for a damaged file, and what a group that holds itself comes to."""

ZIP_FAULTS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError)
"""What reading a damaged archive raises."""

_ADVICE = "replace it by layers of Keras, or export a SavedModel with model.export() and serve that"
_FOREIGN_ADVICE = f"name the module that defines it with --import if you trust it, {_ADVICE}"


def scan_file(path: Path, trusted: Collection[str] = ()) -> None:
    """Check a ``.keras`` or ``.h5`` file.

    `trusted` are names under which Keras has been given classes and functions that may be used as
    well: ``package>Name`` of registered ones, ``Name`` of other classes.

    Raises:
        ModelLoadError: it is damaged, or names something that is not allowed; the text names the
            layer and what to do.
    """
    if path.suffix == ".keras":  # by name, as Keras decides: a file can be valid as both
        _scan_zip(path, trusted)
    else:
        _scan_h5(path, trusted)


def scan_config(config: Any, trusted: Collection[str] = ()) -> None:
    """Check a model's config, as parsed JSON; see `scan_file` for what is raised."""
    if not isinstance(config, dict):
        raise ModelLoadError("the model's config is not an object")
    # load_model(compile=False) drops the outermost compile_config unread: custom losses do no harm there
    _walk({key: value for key, value in config.items() if key != "compile_config"}, "the model", 0, trusted)


def _walk(value: Any, owner: str, depth: int, trusted: Collection[str]) -> None:
    if depth > _MAX_DEPTH:
        raise ModelLoadError(f"the model's config is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, list):
        for item in value:
            _walk(item, owner, depth + 1, trusted)
    elif isinstance(value, dict):
        owner = owner_of(value) or owner
        if not _is_trusted(value, trusted):
            _check_object(value, owner)
        for item in value.values():
            _walk(item, owner, depth + 1, trusted)


def owner_of(value: dict[str, Any]) -> str:
    """How to call the layer that `value` describes; ``""`` if it is none."""
    config = value.get("config")
    name = config.get("name") if isinstance(config, dict) else None
    if not isinstance(name, str) or not value.get("class_name") or value.get("class_name") == "DTypePolicy":
        return ""
    return f"layer {name!r} ({value['class_name']})"


def _is_trusted(value: dict[str, Any], trusted: Collection[str]) -> bool:
    """Whether Keras finds the class, or function, of `value` by a name that it was given, and looks no further."""
    name, registered = value.get("class_name"), value.get("registered_name")
    if name == registered == "function" and value.get("module") == "builtins":
        name = registered = value.get("config")
    if registered is None and "module" not in value:  # as .h5 files have it
        registered = name
    if not isinstance(name, str) or not isinstance(registered, str):
        return False
    return registered in trusted and name.rpartition(">")[2] == registered.rpartition(">")[2]


def _check_object(value: dict[str, Any], owner: str) -> None:
    for field in PATH_FIELDS:
        if isinstance(value.get(field), str) and value[field]:
            raise ModelLoadError(f"{owner} is refused: it reads its {field} from the file {value[field]!r}")
    if "class_name" not in value and "module" not in value:
        return
    class_name = value.get("class_name")
    if not isinstance(class_name, str):
        if "module" in value and "class_name" in value:
            raise ModelLoadError(f"{owner} is refused: its class is {class_name!r}, not a name")
        return  # a plain value that happens to have a field of that name
    registered = value.get("registered_name")
    _check_refused(class_name, owner)
    if isinstance(registered, str):  # some versions of Keras look a class up by either
        _check_refused(registered, owner)
    if class_name in ALLOWED_MARKERS:
        return
    if ">" in class_name or (isinstance(registered, str) and ">" in registered):
        raise ModelLoadError(f"{owner} is refused: {registered or class_name} is no class of Keras; {_FOREIGN_ADVICE}")
    if "module" in value:
        _check_module(value["module"], class_name, owner)


def _check_refused(name: str, owner: str) -> None:
    bare_name = name.rpartition(">")[2]
    if bare_name in REFUSED_CLASSES:
        raise ModelLoadError(f"{owner} is refused: it {REFUSED_CLASSES[bare_name]}; {_ADVICE}")


def _check_module(module: Any, class_name: str, owner: str) -> None:
    if module is None:
        raise ModelLoadError(f"{owner} is refused: {class_name} is no class of Keras; {_FOREIGN_ADVICE}")
    classes = ALLOWED_MODULES.get(module) if isinstance(module, str) else None
    if classes is not None and re.fullmatch(classes, class_name):
        return
    if isinstance(module, str) and ALLOWED_MODULE_FAMILIES.fullmatch(module) and class_name[:1].isupper():
        return
    what = f"{class_name} of the module {module!r}"
    raise ModelLoadError(f"{owner} is refused: {what} is foreign to Keras; {_FOREIGN_ADVICE}")


def _scan_zip(path: Path, trusted: Collection[str]) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive.infolist())
            if "config.json" not in archive.namelist():
                raise ModelLoadError("the .keras file has no config.json")
            scan_config(parse(archive.read("config.json")), trusted)
            for member in archive.namelist():
                if member.endswith(".h5"):
                    with archive.open(member) as file:
                        _check_h5_links(file)
    except ZIP_FAULTS as error:
        raise ModelLoadError(f"the .keras file is damaged: {error}") from None


def check_members(members: list[zipfile.ZipInfo]) -> None:
    """Raise `ModelLoadError` for members that lead out of the archive, are links, or unpack to too much."""
    total = 0
    for member in members:
        parts = PurePosixPath(member.filename).parts
        if member.filename.startswith(("/", "\\")) or ".." in parts or any(":" in part for part in parts[:1]):
            raise ModelLoadError(f"the .keras file is refused: its member {member.filename!r} leads out of it")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ModelLoadError(f"the .keras file is refused: its member {member.filename!r} is a link")
        if member.filename in ("config.json", "metadata.json") and member.file_size > _MAX_CONFIG_BYTES:
            what = member.filename.removesuffix(".json")
            raise ModelLoadError(f"the .keras file is refused: its {what} has {member.file_size} bytes")
        total += member.file_size
    if total > _MAX_UNPACKED_BYTES:
        raise ModelLoadError(f"the .keras file is refused: it unpacks to {total} bytes")


def _scan_h5(path: Path, trusted: Collection[str]) -> None:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            _check_links(file)
            config = file.attrs.get("model_config")
    except H5_FAULTS as error:
        raise ModelLoadError(f"the .h5 file is damaged: {error}") from None
    if config is None:
        raise ModelLoadError("the .h5 file has weights only: save the whole model with model.save()")
    scan_config(parse(config), trusted)


def _check_h5_links(file: IO[bytes]) -> None:
    import h5py

    try:
        with h5py.File(file, "r") as weights:
            _check_links(weights)
    except H5_FAULTS as error:
        raise ModelLoadError(f"the weights are damaged: {error}") from None


def _check_links(group: Any) -> None:
    """Refuse HDF5 features that read other files."""
    import h5py

    for place, kind in _links_out(group, h5py):
        raise ModelLoadError(f"the weights are refused: {place} is {kind}, which reads another file")


def _links_out(group: Any, h5py: Any) -> Iterator[tuple[str, str]]:
    for name in group:
        link = group.get(name, getlink=True)
        place = f"{group.name.rstrip('/')}/{name}"
        if isinstance(link, h5py.ExternalLink):
            yield place, "an external link"
        if not isinstance(link, h5py.HardLink):
            continue  # a soft link: its target is visited where it is
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _links_out(item, h5py)
        elif isinstance(item, h5py.Dataset):
            if item.external:
                yield place, "an external dataset"
            if item.is_virtual:
                yield place, "a virtual dataset"


def parse(text: bytes | str) -> Any:
    """A model's config, or what stands beside it, from JSON; raises `ModelLoadError` if it is none."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelLoadError(f"the model's config is no JSON: {error}") from None
