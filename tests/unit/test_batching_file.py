"""TensorFlow Serving's batching parameters in text format, and the settings that they stand for."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching_file import BatchingFileError, batching_settings
from service.settings import SettingsError, load_settings

GUIDE = """
# as in TensorFlow Serving's guide
max_batch_size { value: 128 }
batch_timeout_micros { value: 1500 }
max_enqueued_batches { value: 10 }
num_batch_threads { value: 8 }
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (GUIDE, {"max_batch_rows": 128, "batch_wait_ms": 1.5, "max_queue_rows": 1280}),
        ("max_batch_size: { value : 4 }; max_enqueued_batches <value: 3>", {"max_batch_rows": 4, "max_queue_rows": 12}),
        ("max_enqueued_batches: 2", {"max_queue_rows": 2000}),
        ("batch_timeout_micros { value: 0 }", {"batch_wait_ms": 0.0}),
        ("allowed_batch_sizes: 2 allowed_batch_sizes: 8", {"buckets": (2, 8), "max_batch_rows": 8}),
        ("allowed_batch_sizes: [2, 8], max_batch_size{value:8}", {"buckets": (2, 8), "max_batch_rows": 8}),
        ("allowed_batch_sizes: []", {}),
        (
            "enable_large_batch_splitting { value: true } max_batch_size: 64 max_execution_batch_size: 16 "
            'allowed_batch_sizes: 16 max_enqueued_batches: 4 thread_pool_name { value: "pool" }',
            {"buckets": (16,), "max_batch_rows": 16, "max_queue_rows": 64, "oversize": "split"},
        ),
        ("enable_large_batch_splitting: false pad_variable_length_inputs: false", {"oversize": "refuse"}),
    ],
)
def test_parameters_stand_for_settings(text: str, expected: dict[str, Any]):
    """Bare or in their wrapper, repeated or in a list, with comments and separators."""
    assert batching_settings(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch { value: 1 }", "max_batch: there is no such batching parameter; known are max_batch_size, "),
        ("max_batch_size { value: 0 }", "max_batch_size: a whole number of at least 1 expected, got 0"),
        ("batch_timeout_micros { value: -5 }", "batch_timeout_micros: a whole number of at least 0 expected, got -5"),
        ("max_batch_size { value: 1.5 }", "max_batch_size: a whole number of at least 1 expected, got 1.5"),
        ("max_batch_size: 1 max_batch_size: 2", "max_batch_size: one value expected, got several"),
        ("max_batch_size: [1, 2]", "max_batch_size: one value expected, got several"),
        ("max_batch_size { size: 1 }", "max_batch_size: 'value: …' expected in the wrapper, got 'size'"),
        ("max_batch_size { value 1 }", "max_batch_size: 'value: …' expected in the wrapper, got 'value'"),
        ("max_batch_size {", "max_batch_size: 'value: …' expected in the wrapper, got 'the end'"),
        ("max_batch_size { value: 1", "max_batch_size: '}' expected after '1', got 'the end'"),
        ("max_batch_size { value: 1 >", "max_batch_size: '}' expected after '1', got '>'"),
        ("max_batch_size 1", "max_batch_size: ':' or '{' expected, got '1'"),
        ("max_batch_size", "max_batch_size: ':' or '{' expected, got 'the end'"),
        ("max_batch_size:", "max_batch_size: a value expected, got 'the end'"),
        ("allowed_batch_sizes: [1", "allowed_batch_sizes: a value expected, got 'the end'"),
        ("max_batch_size: 1\n\n=", "line 3: a field expected, got '='"),
        ("allowed_batch_sizes: [4, 2]", r"allowed_batch_sizes: each larger than the one before expected, got [4, 2]"),
        (
            "max_batch_size: 8 allowed_batch_sizes: 4",
            "allowed_batch_sizes: the last one must be the largest batch, 8, got [4]",
        ),
        ("enable_large_batch_splitting: maybe", "enable_large_batch_splitting: true or false expected, got maybe"),
        ("pad_variable_length_inputs: true", "pad_variable_length_inputs: Kiln fuses only inputs of the same length"),
        ("thread_pool_name: pool", "thread_pool_name: a string in quotes expected, got pool"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str):
    """The field, what was expected and what came."""
    with pytest.raises(BatchingFileError) as refused:
        batching_settings(text)
    assert str(refused.value).startswith(message)


@given(st.text(alphabet="abmx_: {}[]<>#\n,;0123456789'\"value", max_size=60))
def test_any_text_is_read_or_refused(text: str):
    """Nothing else is raised, and it ends."""
    with contextlib.suppress(BatchingFileError):
        assert isinstance(batching_settings(text), dict)


def test_a_setting_goes_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Flag, environment, YAML, then the batching file, then the default; the file may be named by any of the first."""
    (tmp_path / "batching.txt").write_text(GUIDE + "allowed_batch_sizes: [32, 128]")
    (tmp_path / "kiln.yaml").write_text(f"batching_parameters_file: {tmp_path / 'batching.txt'}\nmax_queue_rows: 77\n")
    monkeypatch.setenv("KILN_BATCH_WAIT_MS", "9")
    settings = load_settings({"models": "models", "config": str(tmp_path / "kiln.yaml"), "max_batch_rows": "256"})
    assert (settings.max_batch_rows, settings.batch_wait_ms, settings.max_queue_rows) == (256, 9.0, 77)
    assert settings.buckets == (32, 128)
    monkeypatch.setenv("KILN_BATCHING_PARAMETERS_FILE", str(tmp_path / "batching.txt"))
    assert load_settings({"models": "models"}).max_queue_rows == 1280


@pytest.mark.parametrize("text", [None, "batch_size: 3", "max_batch_size: 100000"])
def test_a_file_that_cannot_be_followed_is_a_wrong_setting(tmp_path: Path, text: str | None):
    """One that is missing, and one that says what is not known, or is out of the setting's range."""
    file = tmp_path / "batching.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingsError, match=r"batching_parameters_file: .*batching\.txt|max_batch_rows: .* 65536"):
        load_settings({"models": "models", "batching_parameters_file": str(file)})


@pytest.mark.parametrize(
    ("given", "expected"), [("8,16", (8, 16)), ([" 16", "8, 8"], (8, 16)), ([4, 2], (2, 4)), (5, (5,)), ("", ())]
)
def test_buckets_are_numbers_of_rows(given: Any, expected: tuple[int, ...]):
    """From flags, from the environment as one text, from YAML as a list."""
    assert load_settings({"models": "models", "buckets": given}).buckets == expected


@pytest.mark.parametrize("given", ["0", "a", ["4", "70000"], {"a": 1}, None])
def test_other_buckets_are_refused(given: Any):
    """The text names the setting and what came."""
    with pytest.raises(SettingsError, match="buckets: value error, numbers of rows"):
        load_settings({"models": "models", "buckets": given})


def test_buckets_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    """As one text with commas."""
    monkeypatch.setenv("KILN_BUCKETS", "4,2")
    assert load_settings({"models": "models"}).buckets == (2, 4)
