"""What decoding takes: four times the body at most, and beyond that only so much per element as an object needs.

Elements are bounded by ``max_tensor_elements``, of which a string takes 16, so that what objects need is bounded too.
Traced are Python's and NumPy's allocations; simdjson's and protobuf's own are not.
"""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from service.errors import KilnError
from service.rpc._generated.inference import open_inference_pb2 as v2_pb
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs_pb
from service.tensors import DataType, Signature, TensorSpec
from tests.signatures import many, one, only
from tests.unit.test_decoders_fuzz import DECODERS

SIZE = 100_000
"""Bytes of each body, about."""
_CONSTANT_BYTES = 2**18
"""Texts are scanned in pieces of 8 KiB."""


@dataclass(frozen=True)
class Body:
    """A body, and how many elements it has that become objects."""

    name: str
    dialect: str
    data: bytes
    signature: Signature
    elements: int = 0
    element_bytes: int = 0


def flat(dtype: DataType) -> Signature:
    return one(dtype, (None,))


def any_rank(dtype: DataType) -> Signature:
    return Signature("serving_default", (TensorSpec("x", dtype, None),), ())


def _listed(item: bytes) -> tuple[bytes, int]:
    count = SIZE // (len(item) + 1)
    return b"[" + b",".join([item] * count) + b"]", count


def _tfs(items: bytes, form: bytes = b"instances") -> bytes:
    return b'{"' + form + b'":' + items + b"}"


def _v2(items: bytes, dtype: DataType, shape: bytes) -> bytes:
    head: bytes = b'{"inputs":[{"name":"x","datatype":"' + dtype.value.encode() + b'","shape":' + shape
    return b"\0\0" + head + b',"data":' + items + b"}]}"


def json_numbers() -> Iterator[Body]:
    """Of one digit (read as doubles, then cast), nested, too big, and those that Python must read."""
    for name, item, dtype, element_bytes in (
        ("digits", b"0", DataType.FP32, 12),
        ("digits", b"0", DataType.FP64, 8),
        ("digits", b"0", DataType.UINT8, 9),
        ("negative", b"-1", DataType.UINT8, 32),
        ("fractions for integers", b"0.5", DataType.INT64, 40),
        ("huge", b"1" * 30, DataType.FP32, 100),
        ("infinite", b"1e308", DataType.FP32, 12),
        ("tokens", b"NaN", DataType.FP32, 40),
        ("truths", b"true", DataType.BOOL, 24),
    ):
        items, count = _listed(item)
        yield Body(f"{name} {dtype.value}", "rest-tfs", _tfs(items), flat(dtype), count, element_bytes)
        yield Body(
            f"{name} {dtype.value}", "rest-v2", _v2(items, dtype, b"[%d]" % count), flat(dtype), count, element_bytes
        )
    for item, element_bytes in ((b"[]", 24), (b"[0]", 32), (b"[[[0]]]", 64), (b"[true]", 120)):
        items, count = _listed(item)
        dtype = DataType.BOOL if b"t" in item else DataType.FP32
        yield Body(f"nested {item.decode()}", "rest-tfs", _tfs(items), any_rank(dtype), count, element_bytes)


def json_strings() -> Iterator[Body]:
    """Empty and short, each an object and a place that points to it; in objects, two, and three places."""
    for item in (b'""', b'"a"', b'"ab"', '"é"'.encode(), b'{"b64":""}', b'{"b64":"YQ=="}', b"{}", b"null", b"[]"):
        items, count = _listed(item)
        element_bytes = 360 if item.startswith(b"{") else 80
        for form in (b"instances", b"inputs"):
            name = f"{form.decode()} {item.decode()}"
            yield Body(name, "rest-tfs", _tfs(items, form), flat(DataType.BYTES), count, element_bytes)
        body = _v2(items, DataType.BYTES, b"[%d]" % count)
        yield Body(item.decode(), "rest-v2", body, flat(DataType.BYTES), count, element_bytes)
    for name, text in (
        ("long", b"a" * SIZE),
        ("escapes", b"\\u0041" * (SIZE // 6)),
        ("two bytes each", "é".encode() * (SIZE // 2)),
        ("brackets", b"[" * SIZE),
    ):
        yield Body(f"one {name}", "rest-tfs", _tfs(b'["' + text + b'"]'), flat(DataType.BYTES))
        yield Body(f"one {name}, NaN", "rest-tfs", b'{"instances":["' + text + b'"],"a":NaN}', flat(DataType.BYTES))
    coded = b'[{"b64":"' + b"YWFh" * (SIZE // 4) + b'"}]'
    yield Body("one of base64", "rest-tfs", _tfs(coded), flat(DataType.BYTES))


def json_structures() -> Iterator[Body]:
    """Depth, keys, rows and lists where they are not looked for."""
    numbers, count = _listed(b"0")
    lists, list_count = _listed(b"[]")
    x = flat(DataType.FP32)
    yield Body("deep lists", "rest-tfs", _tfs(b"[" * (SIZE // 2) + b"]" * (SIZE // 2)), x)
    yield Body("deep objects", "rest-tfs", _tfs(b'{"a":' * (SIZE // 6) + b"1" + b"}" * (SIZE // 6)), x)
    yield Body("never closed", "rest-tfs", _tfs(b"[" * SIZE), x)
    yield Body("a long number", "rest-tfs", _tfs(b"[" + b"1" * SIZE + b"]"), x)
    yield Body("a long fraction", "rest-tfs", _tfs(b"[0." + b"1" * SIZE + b"]"), x)
    yield Body("a long key", "rest-tfs", b'{"' + b"k" * SIZE + b'":0,"instances":[1]}', x)
    keys = b",".join(b'"%x":0' % number for number in range(SIZE // 10))
    yield Body("keys", "rest-tfs", b"{" + keys + b',"instances":[1]}', x, SIZE // 10, 160)
    yield Body("unknown inputs", "rest-tfs", b'{"inputs":{' + keys + b"}}", x, SIZE // 10, 240)
    rows, row_count = _listed(b'{"x":0,"y":0}')
    yield Body("rows", "rest-tfs", _tfs(rows), many(x=DataType.FP32, y=DataType.FP32), row_count, 320)
    yield Body("a long shape", "rest-v2", _v2(b"[1]", DataType.FP32, numbers), x)
    for name, header, element_count in (
        ("numbers as parameters", b'"parameters":' + numbers, count),
        ("lists in parameters", b'"parameters":{"a":' + lists + b"}", list_count),
    ):
        body = b"\0\0{" + header + b',"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[1]}]}'
        yield Body(name, "rest-v2", body, x, element_count, 80)
    entries = b",".join(b'{"name":"%x"}' % number for number in range(SIZE // 16))
    yield Body("inputs", "rest-v2", b'\0\0{"inputs":[' + entries + b"]}", x, SIZE // 16, 320)


def _v2_binary(dtype: DataType, count: int, tail: bytes) -> bytes:
    text = b'{"inputs":[{"name":"x","datatype":"%s","shape":[%d],"parameters":{"binary_data_size":%d}}]}' % (
        dtype.value.encode(),
        count,
        len(tail),
    )
    return (len(text) + 1).to_bytes(2, "big") + text + tail


def binary() -> Iterator[Body]:
    """Strings of 0 to 2 bytes (CPython keeps one object of those of 0 and 1), and truths of any bits."""
    for word, element_bytes in ((b"", 8), (b"a", 8), (b"ab", 48)):
        item = len(word).to_bytes(4, "little") + word
        count = SIZE // len(item)
        signature = flat(DataType.BYTES)
        body = _v2_binary(DataType.BYTES, count, item * count)
        yield Body(f"strings of {len(word)}", "rest-v2", body, signature, count, element_bytes)
        request = v2_pb.ModelInferRequest(raw_input_contents=[item * count])
        request.inputs.add(name="x", datatype="BYTES", shape=[count])
        data = request.SerializeToString()
        yield Body(f"strings of {len(word)}", "grpc-v2", data, signature, count, element_bytes)
    yield Body("truths", "rest-v2", _v2_binary(DataType.BOOL, SIZE, b"\2" * SIZE), flat(DataType.BOOL))


LISTS: tuple[tuple[DataType, str, str, Any, int], ...] = (
    (DataType.BOOL, "bool_contents", "bool_val", True, 0),
    (DataType.INT8, "int_contents", "int_val", 1, 9),
    (DataType.INT64, "int64_contents", "int64_val", 1, 8),
    (DataType.UINT8, "uint_contents", "int_val", 1, 9),
    (DataType.FP32, "fp32_contents", "float_val", 1.0, 0),
    (DataType.FP64, "fp64_contents", "double_val", 1.0, 0),
    (DataType.BYTES, "bytes_contents", "string_val", b"", 16),
    (DataType.BYTES, "bytes_contents", "string_val", b"ab", 56),
)


def typed_lists() -> Iterator[Body]:
    """A byte or two of the message for each element."""
    count = SIZE // 2
    for dtype, v2_field, tfs_field, value, element_bytes in LISTS:
        infer = v2_pb.ModelInferRequest()
        getattr(infer.inputs.add(name="x", datatype=dtype.value, shape=[count]).contents, v2_field).extend(
            [value] * count
        )
        yield Body(f"{dtype.value} {value}", "grpc-v2", infer.SerializeToString(), flat(dtype), count, element_bytes)
        predict = _tfs_tensor(dtype, [count])
        getattr(predict.inputs["x"], tfs_field).extend([value] * count)
        yield Body(f"{dtype.value} {value}", "grpc-tfs", predict.SerializeToString(), flat(dtype), count, element_bytes)


def _tfs_tensor(dtype: DataType, shape: list[int]) -> tfs_pb.PredictRequest:
    request = tfs_pb.PredictRequest()
    request.inputs["x"].dtype = dtype.number  # type: ignore[assignment]
    for size in shape:
        request.inputs["x"].tensor_shape.dim.add(size=size)
    return request


def protobuf_structures() -> Iterator[Body]:
    """Shapes, inputs and contents without end, and tensors of which only the shape is there."""
    x = flat(DataType.FP32)
    yield Body("shape", "grpc-v2", _v2_request(inputs=[{"name": "x", "datatype": "FP32", "shape": [1] * SIZE}]), x)
    yield Body("inputs", "grpc-v2", _v2_request(inputs=[{}] * (SIZE // 2)), x)
    raws = _v2_request(inputs=[{"name": "x", "datatype": "FP32", "shape": [1]}], raw_input_contents=[b""] * SIZE)
    yield Body("raw contents", "grpc-v2", raws, x)
    yield Body("shape", "grpc-tfs", _tfs_tensor(DataType.FP32, [1] * (SIZE // 4)).SerializeToString(), x)
    for dtype in (DataType.FP64, DataType.BYTES):
        for size in (2**20 + 1, 2**24, 2**40):
            nothing = _tfs_tensor(dtype, [size]).SerializeToString()
            yield Body(f"{size} elements of nothing {dtype.value}", "grpc-tfs", nothing, flat(dtype))
    request = _tfs_tensor(DataType.FP32, [1])
    request.output_filter.extend([""] * (SIZE // 2))
    yield Body("output filter", "grpc-tfs", request.SerializeToString(), x)


def _v2_request(**fields: Any) -> bytes:
    return v2_pb.ModelInferRequest(**fields).SerializeToString()


BODIES = [
    body
    for bodies in (json_numbers, json_strings, json_structures, binary, typed_lists, protobuf_structures)
    for body in bodies()
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: f"{body.dialect}: {body.name}")
def test_memory_of_decoding(body: Body):
    """Whether it is taken or refused."""
    signatures = only(body.signature)
    tracemalloc.start()
    try:
        with contextlib.suppress(KilnError):
            DECODERS[body.dialect](body.data, signatures)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    objects = body.elements * body.element_bytes
    assert peak <= 4 * len(body.data) + objects + _CONSTANT_BYTES, (peak / len(body.data), peak / (body.elements or 1))


_MEASURE = """
import sys
from service.rest import openinference_codec, tfserving_codec
from service.tensors import DataType, Signature, TensorSpec
signatures = {"serving_default": Signature("serving_default", (TensorSpec("x", DataType.FP32, None),), ())}
decode = {
    "tfs": lambda body: tfserving_codec.decode_predict(body, signatures, 100),
    "v2": lambda body: openinference_codec.decode_infer(body, None, signatures, 100),
}[sys.argv[1]]
head, item, count, tail = (text.encode() for text in sys.argv[2:])
body = lambda count: head.replace(b"COUNT", b"%d" % count) + b"[" + (item + b",") * (count - 1) + item + b"]" + tail
decode(body(2**20))
large = body(int(count))
def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
resident = status("VmRSS")
decode(large)
print((status("VmHWM") - resident) / len(large))
"""


@pytest.mark.parametrize(
    ("dialect", "head", "item", "tail"),
    [
        ("tfs", '{"instances":', "0", "}"),
        ("tfs", '{"inputs":{"x":', "[0]", "}}"),
        ("v2", '{"inputs":[{"name":"x","datatype":"FP32","shape":[COUNT],"data":', "0", "}]}"),
    ],
)
def test_resident_memory_of_many_small_numbers(dialect: str, head: str, item: str, tail: str):
    """At most four times the body, the array and the parser's own memory included: measured in a process of its own."""
    command = [sys.executable, "-c", _MEASURE, dialect, head, item, str(2**22), tail]
    times = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < times <= 4, times


def test_nothing_stays_of_what_was_decoded():
    """No cache keeps what a caller sent: sixty bodies of different shapes leave nothing behind."""
    signatures = only(any_rank(DataType.FP32))
    bodies = [_tfs(b"[" + b",".join([b"[" + b",".join([b"0"] * 50) + b"]"] * rows) + b"]") for rows in range(400, 460)]
    DECODERS["rest-tfs"](bodies[0], signatures)
    gc.collect()
    tracemalloc.start()
    try:
        for body in bodies:
            DECODERS["rest-tfs"](body, signatures)
        gc.collect()
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert left < len(bodies[0])
