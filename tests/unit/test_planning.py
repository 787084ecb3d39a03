"""What the child that plans is asked, and how its samples get there; the process itself is tested with TensorFlow."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.runtime.planning import _ADAPTER, PlanningOptions, Request, read_samples, write_samples
from service.tensors import DataType, Signature, TensorSpec
from tests.signatures import one


@pytest.mark.parametrize(
    ("options", "buckets"),
    [
        ({}, (1, 2, 4, 8, 12)),
        ({"buckets": (4, 1)}, (1, 4, 12)),
        ({"buckets": (4, 100)}, (4, 12)),
        ({"deterministic": True}, (8,)),
        ({"deterministic": True, "buckets": (2, 4)}, (4,)),
        ({"deterministic": True, "buckets": (64,)}, (12,)),
    ],
)
def test_buckets_are_powers_of_two_or_those_given(options: dict[str, Any], buckets: tuple[int, ...]) -> None:
    """Never more than a batch may have, which is one of them; where answers must not depend on company there is one."""
    assert PlanningOptions(12, **options).all_buckets == buckets


def test_a_request_is_read_as_it_was_sent() -> None:
    """One line of JSON."""
    options = PlanningOptions(8, "xla", (1, 8), 1.5, deterministic=True)
    request = Request(
        "path", "CPU:0", "key", "cache", "xla", {"cores": 2}, options,
        ("ReadFile",), "samples.npz", {"frozen": "it took too long"},
    )  # fmt: skip
    assert _ADAPTER.validate_json(json.dumps(asdict(request))) == request


@pytest.mark.parametrize("dtype", list(DataType))
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()])
def test_samples_of_each_type_arrive_bit_by_bit(tmp_path: Path, dtype: DataType, shape: tuple[int, ...]) -> None:
    """Also what NumPy has no type for, strings that are no text, and arrays without elements or dimensions."""
    signature = one(dtype, (None, 3))
    if dtype is DataType.BYTES:
        array = np.empty(shape, object)
        array[...] = np.array([b"", b"\x00\xff", b"caf\xc3\xa9", b"a\x00", b"x" * 300, b"\x00"], object)[
            : array.size
        ].reshape(shape)
    else:
        array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype.numpy)
    write_samples(tmp_path / "samples.npz", {"s": {"x": array}})
    found = read_samples(tmp_path / "samples.npz", {"s": signature})["s"]["x"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tolist() == array.tolist()


def test_samples_keep_their_signatures_and_names(tmp_path: Path) -> None:
    """Whatever characters those have."""
    specs = (TensorSpec("x/a", DataType.FP32, (None,)), TensorSpec('y "', DataType.BYTES, (None,)))
    signatures = {name: Signature(name, specs, specs) for name in ("a_name", "ß 0_0")}
    samples = {
        name: {"x/a": np.array([value], np.float32), 'y "': np.array([name.encode()], object)}
        for value, name in enumerate(signatures)
    }
    write_samples(tmp_path / "samples.npz", samples)
    found = read_samples(tmp_path / "samples.npz", signatures)
    assert {s: {n: a.tolist() for n, a in tensors.items()} for s, tensors in found.items()} == {
        "a_name": {"x/a": [0.0], 'y "': [b"a_name"]},
        "ß 0_0": {"x/a": [1.0], 'y "': ["ß 0_0".encode()]},
    }


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_any_strings_are_samples(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes]) -> None:
    """Written and read they are the same."""
    file = tmp_path_factory.getbasetemp() / "any.npz"
    array = np.empty(len(texts), object)
    array[:] = texts
    write_samples(file, {"s": {"x": array}})
    assert read_samples(file, {"s": one(DataType.BYTES, (None,))})["s"]["x"].tolist() == texts


def test_samples_hold_no_code(tmp_path: Path) -> None:
    """The file is read without pickles."""
    write_samples(tmp_path / "samples.npz", {"s": {"x": np.array([b"a"], object)}})
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as stored:
        assert all(stored[name].dtype.kind in "uiU" for name in stored.files)
