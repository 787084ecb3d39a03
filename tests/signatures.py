"""Signatures, arrays and predictions for tests of the dialects."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from service.predictor import Prediction
from service.tensors import Array, DataType, Signature, TensorSpec

Shape = tuple[int | None, ...] | None
NUMERIC = [dtype for dtype in DataType if dtype is not DataType.BYTES]


def one(dtype: DataType = DataType.FP32, shape: Shape = (None, 3), name: str = "serving_default") -> Signature:
    """A signature from ``x`` to ``y``, both of that type and shape."""
    return Signature(name, (TensorSpec("x", dtype, shape, "x:0"),), (TensorSpec("y", dtype, shape, "y:0"),))


def many(**dtypes: DataType) -> Signature:
    """A signature of one column for each name; output ``out_NAME`` for input ``NAME``."""
    return Signature(
        "serving_default",
        tuple(TensorSpec(name, dtype, (None,)) for name, dtype in dtypes.items()),
        tuple(TensorSpec(f"out_{name}", dtype, (None,)) for name, dtype in dtypes.items()),
    )


def only(signature: Signature) -> dict[str, Signature]:
    """The signatures of a model that has just this one."""
    return {signature.name: signature}


def prediction(signature: Signature, *outputs: Any) -> Prediction:
    """An answer of version 3 of model ``m`` with these outputs, in the signature's order."""
    arrays = {
        spec.name: array if isinstance(array, np.ndarray) else np.array(array, spec.dtype.numpy)
        for spec, array in zip(signature.outputs, outputs, strict=True)
    }
    return Prediction("m", 3, signature, arrays)


def elements_of(dtype: DataType) -> st.SearchStrategy[Any] | None:
    """Elements of arrays of `dtype` that every dialect can carry: None for all there are."""
    if dtype is DataType.BYTES:
        return st.binary(max_size=5)
    if dtype is DataType.BF16:
        return st.floats(width=16, allow_nan=False)
    return None


@st.composite
def arrays_of(draw: st.DrawFn, dtype: DataType) -> Array:
    """An array of `dtype` and of up to three dimensions."""
    shape = draw(npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    if dtype is DataType.BF16:
        return draw(npst.arrays(np.float32, shape, elements=elements_of(dtype))).astype(dtype.numpy)
    return draw(npst.arrays(dtype.numpy, shape, elements=elements_of(dtype)))


def assert_same(array: Array, expected: Array) -> None:
    """Same type, shape and bits (strings: bytes)."""
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    if array.dtype.kind == "O":
        assert array.tolist() == expected.tolist()
    else:
        assert array.tobytes() == expected.tobytes()
