"""``model.yaml``: where it is looked for, what is refused, and what comes of it in the signatures."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelLoadError
from service.meaning import CHANNELS, InputMeaning, Layout, ModelMeaning, OutputMeaning, image_layout
from service.registry.meaning import explained, read_meaning, with_meaning
from service.tensors import DataType, Signature, TensorSpec
from tests.fakes import DOUBLE


def write(path: Path, text: str = "description: mine\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def read(folder: Path, text: str) -> ModelMeaning:
    write(folder / "model.yaml", text)
    meaning = read_meaning(folder)
    assert meaning is not None
    return meaning


def signature(inputs: dict[str, Any], outputs: dict[str, Any], name: str = "serving_default") -> Signature:
    """Of ``{name: (type, shape)}``."""

    def specs(side: dict[str, Any]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(each, dtype, shape) for each, (dtype, shape) in side.items())

    return Signature(name, specs(inputs), specs(outputs))


def test_the_one_in_the_versions_folder_wins(tmp_path: Path):
    """A new version brings its own; the model's is for versions without one."""
    write(tmp_path / "m/1/model.yaml", "description: of version 1\n")
    write(tmp_path / "m/model.yaml", "description: of the model\n")
    assert (read_meaning(tmp_path / "m/1/model.keras") or ModelMeaning()).description == "of version 1"
    assert (read_meaning(tmp_path / "m/2/model.keras") or ModelMeaning()).description == "of the model"


def test_no_file_no_meaning(tmp_path: Path):
    """The folder above is the model's only if this one is a version's."""
    write(tmp_path / "model.yaml")
    (tmp_path / "m").mkdir()
    assert read_meaning(tmp_path / "m/model.keras") is None


def test_an_empty_file_says_nothing(tmp_path: Path):
    """And is not broken."""
    assert read(tmp_path, "# later\n") == ModelMeaning()


def test_words_and_numbers_are_as_they_are_written(tmp_path: Path):
    """No and yes are words, as in many a table; labels may be numbers; a date is a text."""
    meaning = read(
        tmp_path,
        "inputs: {a: {values: [no, yes]}, b: {values: [true, 1, 2.5]}}\n"
        "outputs: {c: {labels: [0, 1.5, no]}}\n"
        "example: {day: 2024-01-31}\n",
    )
    assert meaning.inputs["a"].values == ("no", "yes")
    assert meaning.inputs["b"].values == (True, 1, 2.5)
    assert meaning.outputs["c"].labels == ("0", "1.5", "no")
    assert meaning.example == {"day": "2024-01-31"}


def test_labels_from_a_file(tmp_path: Path):
    """Beside ``model.yaml``."""
    write(tmp_path / "names.txt", "a\nb\n")
    assert read(tmp_path, "outputs: {c: {labels_file: names.txt}}").outputs["c"].labels == ("a", "b")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("inputs: {x: {unt: m}}", r"inputs\.x\.unt: unknown field: one of .*, unit, .* expected"),
        ("outputs: {x: {min: 1}}", r"outputs\.x\.min: unknown field: one of .*, top_k, .* expected"),
        ("input: {}", r"input: unknown field: one of .*, inputs, .* expected"),
        ("inputs: {x: {kind: picture}}", r"inputs\.x\.kind: .*'image', got 'picture'"),
        ("outputs: {x: {top_k: 0}}", r"outputs\.x\.top_k: .* greater than or equal to 1, got '0'"),
        ("outputs: {x: {labels: [true]}}", r"outputs\.x\.labels\.0: Input should be a valid string, got 'True'"),
        ("inputs: {x: {size: [8]}}", r"inputs\.x\.size"),
        ("inputs: {x: {scale: .inf}}", r"inputs\.x\.scale"),
        ("[1]", r"the top: .*got '\[1\]'"),
        ("inputs: {", "no YAML"),
        ("a: &a [1]\nb: *a", "no aliases"),
        ("a: !!python/object:os.system {}", "no YAML"),
        ("a: !!set {b}", "plain values"),
        ("1: a", "plain values"),
        ("a: " + "[" * 5000, "at most 32 levels"),
        ("outputs: {x: {labels: [a], labels_file: b}}", "one of labels and labels_file expected, got both"),
        ("outputs: {x: {labels_file: none.txt}}", r"none\.txt cannot be read"),
        ("outputs: {x: {labels_file: ../../secret.txt}}", "leads out of the model's folder"),
    ],
)
def test_what_is_broken_is_told(tmp_path: Path, text: str, reason: str):
    """With the place, what was expected and what came."""
    write(tmp_path / "secret.txt", "secret")
    with pytest.raises(ModelLoadError, match=r"(?s)model\.yaml: .*" + reason) as caught:
        read(tmp_path / "m" / "1" / "in", text)
    assert "secret'" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    """Not text, too long, or a link to somewhere else."""
    (tmp_path / "1").mkdir()
    file = tmp_path / "1" / "model.yaml"
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        read_meaning(tmp_path / "1")
    file.write_text("#" * (2**18 + 1))
    with pytest.raises(ModelLoadError, match="at most 262144 bytes"):
        read_meaning(tmp_path / "1")
    file.unlink()
    file.symlink_to(__file__)
    with pytest.raises(ModelLoadError, match="leads out"):
        read_meaning(tmp_path / "1")


FP, TEXT, INT, BOOL = DataType.FP32, DataType.BYTES, DataType.INT32, DataType.BOOL
MANY = signature(
    {
        "n": (FP, (None,)),
        "i": (INT, (None, 1)),
        "b": (BOOL, (None,)),
        "t": (TEXT, (None,)),
        "v": (FP, (None, 3)),
        "p": (FP, (None, 8, 8, 1)),
    },
    {"five": (FP, (None, 5)), "one": (FP, (None, 1)), "word": (TEXT, (None,)), "image": (FP, (None, 4, 4, 3))},
)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"signature": "other"}, "unknown signature 'other': there are serving_default"),
        ({"inputs": {"z": {}}}, "unknown input 'z': there are b, i, n, p, t, v"),
        ({"outputs": {"z": {}}}, "unknown output 'z': there are five, image, one, word"),
        ({"example": {"z": 1}}, "unknown field of the example 'z'"),
        ({"inputs": {"n": {"kind": "text"}}}, "inputs.n: kind text is of BYTES, and this is FP32"),
        ({"inputs": {"t": {"kind": "number"}}}, "inputs.t: kind number is of numbers"),
        ({"inputs": {"n": {"kind": "image"}}}, "inputs.n: an image lies in 2 or 3 dimensions"),
        ({"inputs": {"p": {"kind": "image", "mode": "RGB"}}}, "inputs.p: mode RGB does not fit"),
        ({"inputs": {"t": {"values": [1]}}}, "inputs.t: values of type BYTES expected, got 1"),
        ({"inputs": {"i": {"values": [True]}}}, "inputs.i: values of type INT32 expected, got True"),
        ({"inputs": {"b": {"values": [1]}}}, "inputs.b: values of type BOOL expected, got 1"),
        ({"inputs": {"t": {"min": 1}}}, "inputs.t: min and max go with numbers"),
        ({"inputs": {"i": {"min": 5, "max": 1}}}, "inputs.i: min of at most max expected, got 5 and 1"),
        ({"inputs": {"v": {"columns": ["a", "a"]}}}, "inputs.v: columns of different names expected, got a, a"),
        ({"inputs": {"v": {"columns": ["a"]}}}, "inputs.v: columns name the elements of a vector"),
        ({"outputs": {"five": {"labels": ["a", "b"]}}}, "outputs.five: 5 labels expected, got 2"),
        ({"outputs": {"one": {"labels": ["a"] * 3}}}, "outputs.one: 2 labels .* expected, got 3"),
        ({"outputs": {"word": {"kind": "labels"}}}, "outputs.word: kind labels is of numbers"),
        ({"outputs": {"five": {"kind": "image"}}}, "outputs.five: an image lies in"),
    ],
)
def test_what_does_not_fit_the_signatures(said: dict[str, Any], reason: str):
    """With the names there are."""
    with pytest.raises(ModelLoadError, match=reason):
        with_meaning({"serving_default": MANY}, ModelMeaning.model_validate(said))


def test_what_fits_is_on_every_signature():
    """Labels are on the outputs of so many classes, where the classification extension finds them."""
    meaning = ModelMeaning.model_validate(
        {
            "inputs": {"p": {"kind": "image"}, "v": {"columns": ["a", "b", "c"]}},
            "outputs": {
                "five": {"labels": list("abcde")},
                "one": {"labels": ["no", "yes"]},
                "image": {"kind": "image"},
            },
            "example": {"a": 1, "n": 2},
        }
    )
    other = signature({"w": (TEXT, None)}, {"out": (FP, None)}, "other")
    told = with_meaning({"serving_default": MANY, "other": other}, meaning)
    assert [each.meaning for each in told.values()] == [meaning, meaning]
    assert {spec.name: spec.labels for spec in told["serving_default"].outputs} == {
        "five": tuple("abcde"),
        "one": (),
        "word": (),
        "image": (),
    }
    assert told == {"serving_default": MANY, "other": other}


def test_a_broken_file_leaves_the_signatures_as_they_were(caplog: pytest.LogCaptureFixture):
    """It is logged and handed back, for the status."""

    def broken() -> ModelMeaning:
        raise ModelLoadError("model.yaml: broken")

    with caplog.at_level(logging.ERROR, "kiln"):
        assert explained({"f": DOUBLE}, broken, "m v1") == ({"f": DOUBLE}, "model.yaml: broken")
    assert caplog.messages == ["m v1: model.yaml: broken: it is left out"]
    assert explained({"f": DOUBLE}, lambda: None, "m v1") == ({"f": DOUBLE}, "")
    told, problem = explained({"f": DOUBLE}, lambda: ModelMeaning(description="d"), "m v1")
    assert (problem, told["f"].meaning) == ("", ModelMeaning(description="d"))


@pytest.mark.parametrize(
    ("said", "sizes", "expected"),
    [
        ({}, (8, 9), Layout("L", (8, 9), "HW")),
        ({}, (8, 9, 1), Layout("L", (8, 9), "HWC")),
        ({}, (8, 9, 3), Layout("RGB", (8, 9), "HWC")),
        ({}, (4, 8, 9), Layout("RGBA", (8, 9), "CHW")),
        ({}, (None, None, None), Layout("RGB", None, "HWC")),
        ({"mode": "L"}, (None, None, None), Layout("L", None, "HWC")),
        ({"size": [5, 6]}, (None, None, 3), Layout("RGB", (5, 6), "HWC")),
        ({"size": [5, 6]}, (30,), Layout("L", (5, 6), "flat")),
        ({"size": [5, 6], "mode": "RGB"}, (90,), Layout("RGB", (5, 6), "flat")),
        ({"size": [5, 6], "mode": "RGB"}, None, Layout("RGB", (5, 6), "HWC")),
        ({}, (1, 8, 9, 3), Layout("RGB", (8, 9), "HWC")),
    ],
)
def test_how_an_image_lies_in_a_row(said: dict[str, Any], sizes: Any, expected: Layout):
    """Mode, size and order, from what is said and the shape."""
    for kind in (InputMeaning, OutputMeaning):
        assert image_layout(kind.model_validate(said), sizes) == expected
    assert expected.mode in CHANNELS


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ({"size": [5, 6]}, (31,)),
        ({}, (30,)),
        ({}, ()),
        ({}, (8, 9, 2)),
        ({"mode": "RGB"}, (8, 9)),
        ({"size": [5, 6]}, (8, 9)),
        ({}, (None, 9, 3)),
        ({}, (2, 8, 9, 3)),
    ],
)
def test_shapes_that_are_no_image(said: dict[str, Any], sizes: Any):
    """Or that do not tell enough."""
    with pytest.raises(ValueError, match=r"size|shape"):
        image_layout(InputMeaning.model_validate(said), sizes)
