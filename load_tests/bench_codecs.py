"""Decode and encode one tensor in every dialect, form, type and size; print the table of README.md.

``python -m load_tests.bench_codecs [--rounds 7] [--forms …] [--types FP32,…] [--out FILE.json]``

All is measured in turns within one round: Kiln's codec, a copy of the tensor's bytes, and what a client does for the
same message (orjson + NumPy for JSON; tritonclient and tensorflow-serving-api for the rest, in a child process).
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from load_tests.codec_yardsticks import Question, Work, measure
from service.predictor import Prediction
from service.rest import openinference_codec as rest_v2
from service.rest import tfserving_codec as rest_tfs
from service.rest.known_headers import KnownHeaders
from service.rpc import open_inference_codec as rpc_v2
from service.rpc import tfserving_codec as rpc_tfs
from service.rpc._generated.inference import open_inference_pb2 as v2_pb
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs_pb
from service.rpc.messages import parse
from service.tensors import Array, DataType, Signature, TensorSpec, pack_strings

_BY_NAME = {dtype.value: dtype for dtype in DataType}
TYPES = ("FP32", "FP64", "INT32", "INT64", "UINT8", "BOOL", "FP16", "BYTES")
FLAT, NESTED = ((1, 784), (1, 150_528)), (1, 224, 224, 3)
_DEPTH = 100
_TARGET = "150,528 nested floats as TensorFlow Serving's rows"
_TARGET_MS = 5.0
Coder = tuple[Callable[[], Any], Callable[[], bytes], Question]
"""Decoding the request, encoding the answer, and what to ask the client."""


@dataclass(frozen=True)
class Row:
    """One line of the table: for each kind of work, its seconds in each round."""

    form: str
    dtype: str
    shape: tuple[int, ...]
    tensor_bytes: int
    seconds: Mapping[str, list[float]]


def tensor(dtype: DataType, shape: tuple[int, ...]) -> Array:
    """Values that JSON writes with as many digits as measured ones have."""
    rng = np.random.default_rng(1)
    if dtype is DataType.BYTES:
        words = [b"%07d" % number for number in rng.integers(0, 10**7, math.prod(shape))]
        array = np.empty(len(words), object)
        array[:] = words
        return array.reshape(shape)
    if dtype.is_float:
        return rng.random(shape, np.float32).astype(dtype.numpy)
    return rng.integers(0, 2 if dtype is DataType.BOOL else 256, shape).astype(dtype.numpy)


def _values(array: Array) -> Any:
    """Nested lists as a caller writes them: text for strings, and float32 no longer than it must be."""
    if array.dtype.kind == "O":
        return np.vectorize(bytes.decode, otypes=[object])(array).tolist()
    if array.dtype == np.float32:
        return orjson.loads(orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY))
    return array.tolist()


def _ask(dtype: DataType, array: Array) -> tuple[dict[str, Signature], Prediction]:
    spec = TensorSpec("x", dtype, (None, *array.shape[1:]))
    signature = Signature("serving_default", (spec,), (TensorSpec("y", dtype, spec.shape),))
    return {signature.name: signature}, Prediction("m", 1, signature, {"y": array})


def rest_tfs_form(form: str, dtype: DataType, array: Array) -> Coder:
    signatures, prediction = _ask(dtype, array)
    key = "instances" if "instances" in form else "inputs"
    body = orjson.dumps({key: _values(array)})
    return (
        lambda: rest_tfs.decode_predict(body, signatures, _DEPTH),
        lambda: rest_tfs.encode_predict(prediction, key),
        Question(form, dtype, array, body),
    )


def rest_v2_form(form: str, dtype: DataType, array: Array) -> Coder:
    signatures, prediction = _ask(dtype, array)
    entry: dict[str, Any] = {"name": "x", "shape": array.shape, "datatype": dtype.value}
    wanted = rest_v2.Wanted(binary="binary" in form)
    if not wanted.binary:
        entry["data"] = _values(array if "nested" in form else array.reshape(-1))
        body = orjson.dumps({"inputs": [entry]})
        return (
            lambda: rest_v2.decode_infer(body, None, signatures, _DEPTH),
            lambda: rest_v2.encode_infer(prediction, wanted)[0],
            Question(form, dtype, array, body),
        )
    blob = _raw(array)
    text = orjson.dumps({"inputs": [entry | {"parameters": {"binary_data_size": len(blob)}}]})
    message = text + blob
    answer, header_length = rest_v2.encode_infer(prediction, wanted)
    known_headers = KnownHeaders(_DEPTH)
    return (
        lambda: known_headers.decode(message, len(text), signatures),
        lambda: rest_v2.encode_infer(prediction, wanted)[0],
        Question(form, dtype, array, answer, header_length),
    )


def rpc_v2_form(form: str, dtype: DataType, array: Array) -> Coder:
    signatures, prediction = _ask(dtype, array)
    request = v2_pb.ModelInferRequest(model_name="m")
    given = request.inputs.add(name="x", datatype=dtype.value, shape=array.shape)
    if "raw" in form:
        request.raw_input_contents.append(_raw(array))
    else:
        field = {"BOOL": "bool", "UINT8": "uint", "INT32": "int", "INT64": "int64"}.get(dtype.value)
        field = field or dtype.value.lower()
        getattr(given.contents, f"{field}_contents").extend(array.reshape(-1).tolist())
    data = request.SerializeToString()
    return (
        lambda: rpc_v2.decode_infer(parse(v2_pb.ModelInferRequest, data), signatures),
        lambda: rpc_v2.encode_infer(request, prediction),
        Question(form, dtype, array, rpc_v2.encode_infer(request, prediction)),
    )


def rpc_tfs_form(form: str, dtype: DataType, array: Array) -> Coder:
    signatures, prediction = _ask(dtype, array)
    request = tfs_pb.PredictRequest(model_spec={"name": "m"})
    proto = request.inputs["x"]
    proto.dtype = dtype.number  # type: ignore[assignment]
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    flat = array.reshape(-1)
    if "content" in form:
        proto.tensor_content = array.tobytes()
    else:
        fields = {
            "FP32": "float",
            "FP64": "double",
            "INT64": "int64",
            "BOOL": "bool",
            "FP16": "half",
            "BYTES": "string",
        }
        values = flat.view(np.uint16) if dtype is DataType.FP16 else flat
        getattr(proto, f"{fields.get(dtype.value, 'int')}_val").extend(values.tolist())
    data = request.SerializeToString()
    answer = tfs_pb.PredictResponse()
    answer.outputs["y"].CopyFrom(proto)
    return (
        lambda: rpc_tfs.decode_predict(parse(tfs_pb.PredictRequest, data), signatures),
        lambda: rpc_tfs.encode_predict(request, prediction),
        Question(form, dtype, array, answer.SerializeToString()),
    )


def _raw(array: Array) -> bytes:
    return pack_strings(array) if array.dtype.kind == "O" else array.tobytes()


FORMS: dict[str, tuple[Callable[[str, DataType, Array], Coder], tuple[tuple[int, ...], ...]]] = {
    "REST TFS, instances": (rest_tfs_form, (*FLAT, NESTED)),
    "REST TFS, inputs": (rest_tfs_form, (*FLAT, NESTED)),
    "REST v2, JSON flat": (rest_v2_form, FLAT),
    "REST v2, JSON nested": (rest_v2_form, (NESTED,)),
    "REST v2, binary": (rest_v2_form, FLAT),
    "gRPC v2, raw": (rpc_v2_form, FLAT),
    "gRPC v2, typed": (rpc_v2_form, FLAT),
    "gRPC TFS, content": (rpc_tfs_form, FLAT),
    "gRPC TFS, lists": (rpc_tfs_form, FLAT),
}
_NOT_THERE = {("gRPC v2, typed", DataType.FP16), ("gRPC TFS, content", DataType.BYTES)}
"""Forms that the dialect does not have for a type."""


def cells(forms: list[str], types: list[DataType]) -> Iterator[tuple[str, DataType, tuple[int, ...]]]:
    """What to measure."""
    for form in forms:
        for dtype in types:
            if (form, dtype) not in _NOT_THERE:
                yield from ((form, dtype, shape) for shape in FORMS[form][1])


class Clients:
    """The child process with the public clients' code."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "load_tests.codec_yardsticks"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, question: Question | None) -> list[float | None]:
        """Seconds to decode and to encode; None asks for one more round of the last question."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        pickle.dump(question, self._child.stdin)
        self._child.stdin.flush()
        seconds: list[float | None] = pickle.load(self._child.stdout)  # noqa: S301 - our own child
        return seconds

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def _orjson(question: Question) -> tuple[Work, Work]:
    """The plain way with JSON: lists of Python numbers."""
    dtype = np.dtype(str) if question.dtype is DataType.BYTES else question.dtype.numpy
    key = next(iter(orjson.loads(question.answer)))

    def decode() -> object:
        value = orjson.loads(question.answer)[key]
        return np.array(value[0]["data"] if "v2" in question.form else value, dtype).reshape(question.array.shape)

    def encode() -> object:
        array = question.array
        values = np.char.decode(array.astype(bytes)).tolist() if dtype.kind == "U" else array.tolist()
        return orjson.dumps({key: values})

    return decode, encode


def _has_no_answer(form: str, dtype: DataType) -> bool:
    """Whether answers never have this form: FP16 as JSON numbers of v2, and lists where content is shorter."""
    if form == "gRPC TFS, lists":
        return dtype is not DataType.BYTES
    return form.startswith("REST v2, JSON") and dtype is DataType.FP16


def measure_cell(form: str, dtype: DataType, shape: tuple[int, ...], rounds: int, clients: Clients) -> Row:
    """All kinds of work on one tensor, in turns."""
    array = tensor(dtype, shape)
    decode, encode, question = FORMS[form][0](form, dtype, array)
    data = bytearray(sum(map(len, array.flat)) if dtype is DataType.BYTES else array.nbytes)
    has_answer = not _has_no_answer(form, dtype)
    own: dict[str, Work] = {"copy": lambda: bytes(data), "decode": decode}
    if has_answer:
        own["encode"] = encode
    is_json = form.startswith("REST") and "binary" not in form
    if is_json:
        own["client decode"], own["client encode"] = _orjson(question)
        own = {kind: work for kind, work in own.items() if has_answer or not kind.endswith("encode")}
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):  # the first is for caches
        taken = {kind: measure(work) for kind, work in own.items()}
        if not is_json:
            asked = clients.ask(None if number else question)
            names = ("client decode", "client encode")
            taken |= {name: each for name, each in zip(names, asked, strict=True) if each is not None}
            if not has_answer:
                taken.pop("client encode", None)
        for kind, each in taken.items() if number else ():
            seconds.setdefault(kind, []).append(each)
    return Row(form, dtype.value, shape, len(data), seconds)


def _micros(row: Row, kind: str) -> str:
    if kind not in row.seconds:
        return "–"
    return f"{min(row.seconds[kind]) * 1e6:,.1f} / {statistics.median(row.seconds[kind]) * 1e6:,.1f}"


def _rate(row: Row, kind: str) -> str:
    return f"{row.tensor_bytes / min(row.seconds[kind]) / 1e6:,.0f}" if kind in row.seconds else "–"


def table(rows: list[Row]) -> str:
    """Markdown: for each kind of work microseconds, least / median, and megabytes of tensor a second."""
    head = "| form | type | shape | copy, µs | decode, µs | MB/s | client's | encode, µs | MB/s | client's |"
    lines = [head, "|---|---|---|" + "--:|" * 7]
    for row in rows:
        shape = "×".join(map(str, row.shape))
        cells = [_micros(row, "decode"), _rate(row, "decode"), _micros(row, "client decode")]
        cells += [_micros(row, "encode"), _rate(row, "encode"), _micros(row, "client encode")]
        copy = f"{min(row.seconds['copy']) * 1e6:,.1f}"
        lines.append(f"| {row.form} | {row.dtype} | {shape} | {copy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def target(rows: list[Row]) -> str:
    """The one number that is to be reached, beside what orjson and NumPy take here."""
    for row in rows:
        if (row.form, row.dtype, row.shape) == ("REST TFS, instances", "FP32", NESTED):
            own, plain = (min(row.seconds[kind]) * 1e3 for kind in ("decode", "client decode"))
            verdict = "reached" if own <= _TARGET_MS else "missed"
            return f"{_TARGET}: {own:.2f} ms (orjson + NumPy {plain:.2f} ms); at most {_TARGET_MS:.0f} ms is {verdict}."
    return f"{_TARGET}: not measured."


def _as_json(row: Row) -> dict[str, Any]:
    kinds = {
        kind: [round(min(each) * 1e6, 1), round(statistics.median(each) * 1e6, 1)] for kind, each in row.seconds.items()
    }
    return {"form": row.form, "type": row.dtype, "shape": row.shape, "bytes": row.tensor_bytes, "us": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forms", default=";".join(FORMS), help="names with ; between them")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "codecs.json")
    options = parser.parse_args()
    clients = Clients()
    rows = []
    for cell in cells(options.forms.split(";"), [_BY_NAME[name] for name in options.types.split(",")]):
        rows.append(measure_cell(*cell, options.rounds, clients))
        print(f"{len(rows)}: {', '.join(map(str, cell))}", file=sys.stderr, flush=True)
    clients.close()
    lines = ",\n".join(json.dumps(_as_json(row)) for row in rows)
    options.out.write_text(f'{{"us": "least and median of {options.rounds} rounds", "rows": [\n{lines}\n]}}\n', "utf-8")
    print(table(rows))
    print(f"\n{target(rows)}")


if __name__ == "__main__":
    main()
