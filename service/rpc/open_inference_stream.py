"""``ModelStreamInfer``: requests and answers of the Open Inference Protocol on one stream.

Source: Triton's ``grpc_service.proto``. A request that fails is answered with ``error_message``, its
id in ``infer_response``, and the stream goes on.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial

from service.bounds import Bounds
from service.errors import INTERNAL_ERROR, KilnError, TooLarge
from service.extensions.parameters import flag
from service.predictor import Predictor
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc.handlers import CallLimits, StreamHandlers
from service.rpc.messages import parse_tensors
from service.rpc.open_inference import SERVICE, answer_infer
from service.rpc.open_inference_codec import plain_parameters
from service.rpc.stream import in_order
from service.shared_memory import SharedMemory

Infer = Callable[[pb.ModelInferRequest, float], Awaitable[bytes]]
"""Answers one request by a deadline."""

_log = logging.getLogger("kiln.rpc")
_METHOD = f"/{SERVICE}/ModelStreamInfer"
_MOST_IN_FLIGHT = 64
"""Messages of one stream that are being answered at once; as many rows as a batch has by default."""
_FINAL_WANTED = "triton_enable_empty_final_response"
_FINAL = pb.ModelInferResponse(parameters={"triton_final_response": pb.InferParameter(bool_param=True)})
_FINAL_BYTES = _FINAL.SerializeToString()


def open_inference_streams(predictor: Predictor, memory: SharedMemory, bounds: Bounds) -> StreamHandlers:
    """Byte-level stream handlers by full method path."""
    infer = partial(answer_infer, predictor, memory=memory, bounds=bounds)

    def stream(messages: AsyncIterator[bytes], limits: CallLimits) -> AsyncGenerator[bytes, None]:
        async def answer(data: bytes) -> bytes:
            return await _answer(predictor, infer, data, limits)

        return in_order(messages, answer, most=_MOST_IN_FLIGHT)

    return {_METHOD: stream}


async def _answer(predictor: Predictor, infer: Infer, data: bytes, limits: CallLimits) -> bytes:
    """The bytes of a `ModelStreamInferResponse`: an answer or an error, never an exception.

    Each request has one answer, so that is the final one too.
    """
    request = pb.ModelInferRequest()
    try:
        if len(data) > limits.max_message_bytes:
            raise TooLarge(f"the message has {len(data)} bytes, over the limit of {limits.max_message_bytes}")
        request = parse_tensors(pb.ModelInferRequest, data)
        wants_final = flag(plain_parameters(request.parameters), _FINAL_WANTED)
        answer = await infer(request, limits.deadline())
        return _wrapped(answer + _FINAL_BYTES if wants_final else answer)  # messages one after another are merged
    except KilnError as error:
        predictor.refused("grpc-v2", error)
        text = str(error)
    except Exception:  # noqa: BLE001 - whatever it is, its caller is told
        _log.exception("%s failed", _METHOD)
        text = INTERNAL_ERROR
    failure = pb.ModelStreamInferResponse(error_message=text, infer_response=pb.ModelInferResponse(id=request.id))
    return failure.SerializeToString()


def _wrapped(answer: bytes) -> bytes:
    """A `ModelStreamInferResponse` around the bytes of its ``infer_response``, without parsing them again."""
    size, prefix = len(answer), bytearray(b"\x12")  # field 2, a message
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix) + answer
