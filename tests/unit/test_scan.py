"""The scanner, without Keras: what a config may name, and which archives are refused."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelLoadError
from service.registry.scan import ALLOWED_MARKERS, REFUSED_CLASSES, scan_config, scan_file

ADVICE = "replace it by layers of Keras, or export a SavedModel with model.export() and serve that"
DENSE = {
    "module": "keras.layers",
    "class_name": "Dense",
    "config": {"name": "dense", "units": 2, "activation": "relu"},
    "registered_name": None,
    "build_config": {"input_shape": [None, 3]},
}


def layer(class_name: Any, **fields: Any) -> dict[str, Any]:
    """A layer called ``bad``, with Keras's own module unless told otherwise."""
    return {"module": "keras.layers", "class_name": class_name, "config": {"name": "bad"}, **fields}


def model(*layers: Any, **fields: Any) -> dict[str, Any]:
    """A Sequential of `layers`, as Keras writes it."""
    config = {"name": "net", "layers": list(layers)}
    return {"module": "keras", "class_name": "Sequential", "config": config, "registered_name": None, **fields}


def refusal(config: Any) -> str:
    """Why `config` is refused."""
    with pytest.raises(ModelLoadError) as caught:
        scan_config(config)
    return str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        model(DENSE),
        model({"class_name": "Dense", "config": {"name": "dense"}}),
        model(DENSE, module="keras.src.models.functional", class_name="Functional"),
        model(layer("Add", module="keras.src.ops.numpy", registered_name="Add")),
        model(layer("Dense", config={"name": "d", "dtype": {"module": "keras", "class_name": "DTypePolicy"}})),
        model(layer("TextVectorization", config={"name": "t", "vocabulary": ["a"], "idf_weights": None})),
        model(layer("StringLookup", config={"name": "s", "vocabulary": ""})),
        model(DENSE, compile_config={"loss": {"class_name": "function", "module": "builtins", "config": "mine"}}),
        model({"class_name": 3, "config": {}}),
        model({"module": "just a word"}),
        *[model({"class_name": marker, "config": {}}) for marker in sorted(ALLOWED_MARKERS)],
    ],
)
def test_what_keras_writes_passes(config: dict[str, Any]) -> None:
    """Keras's own classes, its markers for plain values and the outermost compile_config are let through."""
    scan_config(config)


@pytest.mark.parametrize(("class_name", "what"), sorted(REFUSED_CLASSES.items()))
@pytest.mark.parametrize("form", ["{}", "Custom>{}"])
def test_a_class_that_runs_code_is_refused(class_name: str, what: str, form: str) -> None:
    """Lambda, wrapped foreign layers and references to functions are refused by name, in any package."""
    name = form.format(class_name)
    assert refusal(model(layer(name))) == f"layer 'bad' ({name}) is refused: it {what}; {ADVICE}"


@pytest.mark.parametrize("class_name", sorted(REFUSED_CLASSES))
def test_a_class_is_refused_by_its_registered_name_too(class_name: str) -> None:
    """Another class name does not hide it, for Keras may look the class up by either."""
    assert f"it {REFUSED_CLASSES[class_name]}" in refusal(model(layer("Dense", registered_name=class_name)))


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (layer("Thing", module="os"), "Thing of the module 'os' is foreign to Keras"),
        (layer("get_file", module="keras.utils"), "get_file of the module 'keras.utils' is foreign to Keras"),
        (layer("load_model", module="keras.models"), "load_model of the module 'keras.models' is foreign to Keras"),
        (layer("Dense", module="keras.layers.x"), "Dense of the module 'keras.layers.x' is foreign to Keras"),
        (
            layer("load_op", module="keras.src.ops.numpy"),
            "load_op of the module 'keras.src.ops.numpy' is foreign to Keras",
        ),
        (layer("X", module="keras.src.saving.lib"), "X of the module 'keras.src.saving.lib' is foreign to Keras"),
        (layer("X", module="keras.src.ops.a;b"), "X of the module 'keras.src.ops.a;b' is foreign to Keras"),
        (layer("", module="keras.src.ops.core"), " of the module 'keras.src.ops.core' is foreign to Keras"),
        (layer("Dense", module=["keras.layers"]), "Dense of the module ['keras.layers'] is foreign to Keras"),
        (layer("Mine", module=None), "Mine is no class of Keras"),
        (layer("mine>Layer"), "mine>Layer is no class of Keras"),
        (layer("Dense", registered_name="mine>Dense"), "mine>Dense is no class of Keras"),
        (
            layer("__typespec__", module="os", spec_name="Thing"),
            "__typespec__ of the module 'os' is foreign to Keras",
        ),
    ],
)
def test_a_foreign_class_is_refused(bad: dict[str, Any], text: str) -> None:
    """What does not come from the modules of the tables is refused with layer, class and advice."""
    where = f"layer 'bad' ({bad['class_name']})" if bad["class_name"] else "layer 'net' (Sequential)"
    advice = f"name the module that defines it with --import if you trust it, {ADVICE}"
    assert refusal(model(DENSE, bad)) == f"{where} is refused: {text}; {advice}"


@pytest.mark.parametrize("class_name", [None, ["Dense"], {"a": 1}])
def test_a_class_must_be_a_name(class_name: Any) -> None:
    """An object with a module whose class is no text is refused."""
    assert f"is refused: its class is {class_name!r}, not a name" in refusal(model(layer(class_name)))


@pytest.mark.parametrize("field", ["vocabulary", "idf_weights"])
def test_a_field_that_names_a_file_is_refused(field: str) -> None:
    """A vocabulary that is a path would make Keras read any file of the server."""
    bad = layer("TextVectorization", config={"name": "text", field: "/etc/passwd"})
    expected = f"layer 'text' (TextVectorization) is refused: it reads its {field} from the file '/etc/passwd'"
    assert refusal(model(bad)) == expected


@pytest.mark.parametrize(
    "place",
    [
        model,
        lambda bad: model(model(DENSE, bad)),
        lambda bad: model(layer("Bidirectional", config={"name": "outer", "layer": bad})),
        lambda bad: model(layer("Dense", config={"name": "outer", "kernel_initializer": bad})),
        lambda bad: model(layer("Dense", build_config={"shape": [bad]})),
        lambda bad: model(model(DENSE, compile_config={"loss": bad})),
        lambda bad: model(DENSE, inbound_nodes=[[{"args": [[bad]], "kwargs": {}}]]),
        lambda bad: {"config": [bad]},
        lambda bad: bad,
    ],
)
def test_nesting_hides_nothing(place: Any) -> None:
    """A refused class is found in inner models, wrappers, arguments of calls and inner compile_configs."""
    assert "layer 'hidden' (Lambda) is refused" in refusal(place(layer("Lambda", config={"name": "hidden"})))


def test_the_layer_is_named_around_its_parts() -> None:
    """A refused object without a name of its own is reported under the layer that holds it."""
    config = {"name": "outer", "activation": {"class_name": "function", "config": "f"}}
    expected = f"layer 'outer' (Dense) is refused: it refers to a Python function; {ADVICE}"
    assert refusal(model(layer("Dense", config=config))) == expected


@pytest.mark.parametrize("config", [[], "text", None, 1])
def test_a_config_is_an_object(config: Any) -> None:
    """A config that is any other JSON is refused."""
    assert refusal(config) == "the model's config is not an object"


def test_depth_is_bounded() -> None:
    """Nesting that no model has is refused before it can exhaust the stack."""
    config: Any = DENSE
    for _ in range(300):
        config = {"config": config}
    assert refusal(config) == "the model's config is nested deeper than 200 levels"


def keras_file(path: Path, members: dict[str, bytes | str]) -> Path:
    """A ``.keras`` file with the given members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def file_refusal(path: Path) -> str:
    """Why the file is refused."""
    with pytest.raises(ModelLoadError) as caught:
        scan_file(path)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.keras"


def test_a_good_archive_passes(path: Path) -> None:
    """A zip with a config of Keras's classes, metadata and assets is accepted."""
    members = {"metadata.json": "{}", "config.json": json.dumps(model(DENSE)), "assets/a/vocabulary.txt": "a\nb"}
    scan_file(keras_file(path, members))  # type: ignore[arg-type]


def test_the_config_of_an_archive_is_scanned(path: Path) -> None:
    """What `scan_config` refuses is refused in a file."""
    bad = layer("Lambda")
    assert "layer 'bad' (Lambda)" in file_refusal(keras_file(path, {"config.json": json.dumps(model(bad))}))


@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/etc/passwd", "\\share\\x", "C:/windows/x", "assets/.."]
)
def test_a_member_that_leads_out_is_refused(path: Path, name: str) -> None:
    """No member's name may reach beyond the folder it is unpacked to."""
    expected = f"the .keras file is refused: its member {name!r} leads out of it"
    assert file_refusal(keras_file(path, {"config.json": "{}", name: "x"})) == expected


def test_a_member_that_is_a_link_is_refused(path: Path) -> None:
    """A symbolic link in the archive is refused."""
    link = zipfile.ZipInfo("assets/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.writestr("config.json", "{}")
    assert file_refusal(path) == "the .keras file is refused: its member 'assets/link' is a link"


@pytest.mark.parametrize(
    ("limit", "text"),
    [("_MAX_CONFIG_BYTES", "its config has 2000 bytes"), ("_MAX_UNPACKED_BYTES", "it unpacks to 2000 bytes")],
)
def test_sizes_are_bounded(path: Path, limit: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large a config, or a total that would fill the disk, is refused by what the archive declares."""
    monkeypatch.setattr(f"service.registry.scan.{limit}", 1000)
    assert file_refusal(keras_file(path, {"config.json": " " * 2000})) == f"the .keras file is refused: {text}"


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({}, "the .keras file has no config.json"),
        ({"": "x"}, "the .keras file has no config.json"),
        ({"config.json": "{"}, "the model's config is no JSON: "),
        ({"config.json": b"\xff\xfe\x00"}, "the model's config is no JSON: "),
        ({"config.json": "[" * 100_000}, "the model's config is no JSON: "),
        ({"config.json": "{}", "model.weights.h5": b"not HDF5"}, "the weights are damaged: "),
    ],
)
def test_a_broken_archive_is_refused(path: Path, members: dict[str, bytes | str], text: str) -> None:
    """A config or weights that cannot be read are refused with what is wrong."""
    assert file_refusal(keras_file(path, members)).startswith(text)


def damaged(data: bytes, what: str) -> bytes:
    """An archive's bytes, with one thing wrong."""
    directory = data.index(b"PK\x01\x02")
    if what == "truncated":
        return data[:-30]
    if what == "name":  # says that it is UTF-8, and is not
        data = data[: directory + 9] + b"\x08" + data[directory + 10 :]
        return data[: directory + 46] + b"\xff" + data[directory + 47 :]
    if what == "content":  # flips a byte of the deflated stream, which follows the name
        at = data.index(b"config.json") + len("config.json")
        return data[:at] + b"\xff\xff\xff" + data[at + 3 :]
    at, value = {"encrypted": (8, 1), "method": (10, 99)}[what]
    return data[: directory + at] + bytes([value]) + data[directory + at + 1 :]


@pytest.mark.parametrize("what", ["truncated", "content", "encrypted", "method", "name"])
def test_a_damaged_archive_is_refused(path: Path, what: str) -> None:
    """Cut off, corrupt, encrypted or packed in an unknown way: each is damage, none a crash."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(model(DENSE)))
    path.write_bytes(damaged(path.read_bytes(), what))
    assert file_refusal(path).startswith("the .keras file is damaged: ")


def test_a_file_that_is_no_archive_is_refused(path: Path) -> None:
    """Any other file under the name ``.keras`` is refused."""
    path.write_bytes(b"hello")
    assert file_refusal(path) == "the .keras file is damaged: File is not a zip file"
