"""Trusted modules and warm-up files in the importer, with a child that is a function and a Keras that is none."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelLoadError
from service.registry import importer
from service.registry.importer import custom_objects, import_model
from service.registry.repository import Kind, Source
from service.registry.scan import scan_config
from service.runtime.warmup import WARM_UP_FILE


class FakeChild:
    """Leaves an empty SavedModel where it is asked to."""

    def __init__(self) -> None:
        self.arguments: list[list[str]] = []

    def __call__(
        self, command: list[str], timeout_s: float, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        self.arguments.append(command[4:])
        Path(command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "1" / "model.keras"
    path.parent.mkdir()
    path.write_bytes(b"content")
    return Source("cat", 1, Kind.KERAS, path)


def imported(source: Source, child: FakeChild, *modules: str) -> Path:
    cache = source.path.parents[1] / "cache"
    return import_model(source, cache_dir=cache, timeout_s=1.0, imports=modules, run_child=child)


def warm_up_of(source: Source, content: bytes) -> Path:
    file = source.path.parent / WARM_UP_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return file


def test_the_child_is_given_the_modules(source: Source) -> None:
    """They come before the file and the place to write."""
    child = FakeChild()
    imported(source, child, "one", "two.three")
    assert child.arguments[0][:3] == ["one", "two.three", str(source.path)]


def test_the_modules_are_part_of_the_cache_key(source: Source) -> None:
    """What was converted with a module is found with the same modules only."""
    child = FakeChild()
    folders = [imported(source, child, *modules) for modules in ([], ["one"], ["two"], ["one", "two"], ["one"])]
    assert len(set(folders)) == 4
    assert folders[1] == folders[4]
    assert len(child.arguments) == 4


def test_the_warm_up_file_goes_with_the_model(source: Source) -> None:
    """It lies beside the file as it would in a SavedModel, and is found there in what is loaded."""
    warm_up_of(source, b"records")
    folder = imported(source, FakeChild())
    assert (folder / WARM_UP_FILE).read_bytes() == b"records"


def test_another_warm_up_file_is_another_import(source: Source) -> None:
    """Two versions of the same content may be warmed up with different requests."""
    child = FakeChild()
    folders = [imported(source, child)]
    for content in (b"one", b"two", b"one"):
        warm_up_of(source, content)
        folders.append(imported(source, child))
    assert len(set(folders)) == 3
    assert not (folders[0] / WARM_UP_FILE).exists()


def test_a_warm_up_file_that_is_a_link_out_is_refused(source: Source) -> None:
    """Else the content of any file would be copied into the cache."""
    file = warm_up_of(source, b"")
    file.unlink()
    outside = source.path.parents[1] / "secret"
    outside.touch()
    file.symlink_to(outside)
    with pytest.raises(ModelLoadError) as caught:
        imported(source, FakeChild())
    assert str(caught.value) == f"{WARM_UP_FILE} is a link out of the version's folder"


class Base:
    """What Keras can make from a config."""

    @classmethod
    def from_config(cls, config: Any) -> Base:
        return cls()


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A Keras with a register, and the modules ``mine``, ``mine.deep`` and ``theirs`` that define classes."""
    register: dict[str, Any] = {}
    fake = types.SimpleNamespace(saving=types.SimpleNamespace(get_custom_objects=lambda: register), register=register)
    monkeypatch.setitem(sys.modules, "keras", fake)
    for name in ("mine", "mine.deep", "mineral"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def define(module: str, name: str, *bases: type) -> Any:
        made = type(name, bases, {"__module__": module})
        setattr(sys.modules[module], name, made)
        return made

    fake.define = define
    return fake


def test_nothing_is_imported_without_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual import knows Keras's own classes alone."""
    monkeypatch.setitem(sys.modules, "keras", None)
    assert custom_objects([]) == {}


def test_a_modules_own_classes_are_trusted(keras: types.SimpleNamespace) -> None:
    """Registered ones under their registered names, others under their own, those of submodules as well."""
    first, second = keras.define("mine", "First", Base), keras.define("mine", "Second", Base)
    deep = keras.define("mine.deep", "Deep", Base)
    keras.register |= {"pack>First": first, "pack>Deep": deep}
    assert custom_objects(["mine"]) == {"pack>First": first, "pack>Deep": deep, "Second": second}


def test_what_is_not_the_modules_own_is_not_trusted(keras: types.SimpleNamespace) -> None:
    """Neither what it imports, nor what others registered, nor what Keras cannot make from a config."""
    other = keras.define("mineral", "Other", Base)
    sys.modules["mine"].Other = other  # type: ignore[attr-defined]
    sys.modules["mine"].helper = lambda x: x  # type: ignore[attr-defined]
    keras.define("mine", "Plain")
    keras.register["pack>Other"] = other
    assert custom_objects(["mine"]) == {}


def test_a_module_that_fails_is_told(keras: types.SimpleNamespace) -> None:
    """The flag, the module and the reason are in one line."""
    with pytest.raises(ModelLoadError) as caught:
        custom_objects(["mine", "there_is_none"])
    assert str(caught.value) == "--import there_is_none: ModuleNotFoundError: No module named 'there_is_none'"


def function(name: Any, module: str = "builtins") -> dict[str, Any]:
    return {"module": module, "class_name": "function", "config": name, "registered_name": "function"}


TRUSTED = ("pack>Scale", "Shift", "pack>clip")
GOOD: list[dict[str, Any]] = [
    {"module": "mine", "class_name": "Scale", "registered_name": "pack>Scale", "config": {}},
    {"module": None, "class_name": "Scale", "registered_name": "pack>Scale", "config": {}},
    {"module": "mine", "class_name": "Shift", "registered_name": "Shift", "config": {}},
    {"class_name": "pack>Scale", "config": {}},
    {"class_name": "Shift", "config": {}},
    function("pack>clip"),
]
BAD: list[dict[str, Any]] = [
    {"module": "mine", "class_name": "Scale", "registered_name": "other>Scale", "config": {}},
    {"module": "mine", "class_name": "Other", "registered_name": "pack>Scale", "config": {}},
    {"module": "mine", "class_name": "Shift", "registered_name": None, "config": {}},
    {"module": "mine", "class_name": "Shift", "config": {}},
    {"module": "keras.layers", "class_name": "Lambda", "registered_name": "pack>Scale", "config": {}},
    {"class_name": "other>Scale", "config": {}},
    {"class_name": "__lambda__", "config": {}},
    function("eval"),
    function(["pack>clip"]),
    function("pack>clip", "os"),
    {"class_name": "pack>Scale", "config": {"inner": {"class_name": "Lambda", "config": {}}}},
    {"class_name": "pack>Scale", "config": {"vocabulary": "/etc/passwd"}},
]


@pytest.mark.parametrize("item", GOOD)
def test_a_trusted_name_passes(item: dict[str, Any]) -> None:
    """As Keras's two formats write them; none passes without trust, but for a bare name that is no class of Keras."""
    scan_config({"config": item}, TRUSTED)
    if item["class_name"] != "Shift" or "module" in item:
        with pytest.raises(ModelLoadError):
            scan_config({"config": item})


@pytest.mark.parametrize("item", BAD)
def test_trust_in_a_name_is_trust_in_no_other(item: dict[str, Any]) -> None:
    """Names that do not agree, other packages, and whatever lies within a trusted layer are judged as ever."""
    with pytest.raises(ModelLoadError, match="is refused"):
        scan_config({"config": item}, TRUSTED)


class Subclass:
    """A model of one's own as Keras loads it: built for a shape, but never called."""

    built = True
    input_dtype = "float32"

    def __init__(self, build_config: Any) -> None:
        self.build_config = build_config
        self.called_with: list[Any] = []

    def get_build_config(self) -> Any:
        return self.build_config

    def __call__(self, x: Any) -> None:
        self.called_with.append(x)


@pytest.mark.parametrize(
    ("build_config", "called_with"),
    [
        ({"input_shape": [1, 3, None]}, [((None, 3, None), "float32")]),
        ({"input_shape": (8, 2)}, [((None, 2), "float32")]),
        ({"input_shape": {"a": [1, 2]}}, []),
        ({"input_shape": [[1, 2], [1, 3]]}, []),
        ({"shapes_dict": {}}, []),
        (None, []),
    ],
)
def test_a_subclass_is_called_for_the_shape_it_was_built_for(
    monkeypatch: pytest.MonkeyPatch, build_config: Any, called_with: list[Any]
) -> None:
    """With any number of rows; without one plain shape nobody knows how to export it."""
    fake = types.SimpleNamespace(Input=lambda *, batch_shape, dtype: (batch_shape, dtype))
    monkeypatch.setitem(sys.modules, "keras", fake)
    model = Subclass(build_config)
    assert importer._has_inputs(model) == bool(called_with)
    assert model.called_with == called_with
