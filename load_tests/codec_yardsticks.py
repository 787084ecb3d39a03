"""What the public clients take for a tensor, in a process of their own: they and Kiln define the same messages.

Reads one pickled `Question` after another from standard input, and writes the seconds that each took.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.tensors import Array, DataType

Work = Callable[[], object]
SAMPLE_S = 0.002
"""One sample repeats its work for at least so long."""
_TYPED = {
    DataType.BOOL: "bool_contents",
    DataType.UINT8: "uint_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}


@dataclass(frozen=True)
class Question:
    """One tensor `x`, and the answer that holds it as output ``y``, in one form of one dialect."""

    form: str
    dtype: DataType
    array: Array
    answer: bytes
    header_length: int | None = None


def measure(work: Work) -> float:
    """Seconds that `work` takes once, as the mean of one sample."""
    start = time.perf_counter()
    work()
    once = time.perf_counter() - start
    repeats = max(1, int(SAMPLE_S / max(once, 1e-7)))
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def works(question: Question) -> tuple[Work | None, Work | None]:
    """Decoding the answer, and encoding the tensor as a request; None for what the client has no code for."""
    return {
        "REST v2, binary": _triton_http,
        "gRPC v2, raw": _triton_grpc,
        "gRPC v2, typed": _triton_typed,
        "gRPC TFS, content": _tensorflow,
        "gRPC TFS, lists": _tensorflow,
    }[question.form](question)


def _triton_http(question: Question) -> tuple[Work, Work]:
    from tritonclient import http

    def decode() -> object:
        result = http.InferResult.from_response_body(question.answer, header_length=question.header_length)
        return result.as_numpy("y")

    def encode() -> object:
        tensor = http.InferInput("x", list(question.array.shape), question.dtype.value)
        tensor.set_data_from_numpy(question.array)
        return http.InferenceServerClient.generate_request_body([tensor])

    return decode, encode


def _triton_grpc(question: Question) -> tuple[Work, Work]:
    from tritonclient import grpc
    from tritonclient.grpc import service_pb2

    def decode() -> object:
        return grpc.InferResult(service_pb2.ModelInferResponse.FromString(question.answer)).as_numpy("y")

    def encode() -> object:
        tensor = grpc.InferInput("x", list(question.array.shape), question.dtype.value)
        tensor.set_data_from_numpy(question.array)
        request = service_pb2.ModelInferRequest(model_name="m", inputs=[tensor._get_tensor()])
        request.raw_input_contents.append(tensor._get_content())
        return request.SerializeToString()

    return decode, encode


def _triton_typed(question: Question) -> tuple[Work, None]:
    """The client reads no typed contents but strings, and writes none: NumPy of the message's list."""
    from tritonclient.grpc import service_pb2

    field = _TYPED[question.dtype]

    def decode() -> object:
        (output,) = service_pb2.ModelInferResponse.FromString(question.answer).outputs
        return np.array(getattr(output.contents, field), question.dtype.numpy).reshape(output.shape)

    return decode, None


def _tensorflow(question: Question) -> tuple[Work, Work]:
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2

    def decode() -> object:
        return tf.make_ndarray(predict_pb2.PredictResponse.FromString(question.answer).outputs["y"])

    def encode() -> object:
        request = predict_pb2.PredictRequest()
        request.inputs["x"].CopyFrom(tf.make_tensor_proto(question.array))
        return request.SerializeToString()

    return decode, encode


def main() -> None:
    """Answer until standard input ends: for each `Question`, seconds to decode and to encode."""
    last: Any = None
    work: tuple[Work | None, Work | None] = (None, None)
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
        except EOFError:
            return
        if question is not None:  # None asks for one more round of the last
            last, work = question, works(question)
        assert last is not None
        pickle.dump([None if each is None else measure(each) for each in work], sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
