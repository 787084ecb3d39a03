"""What a model is asked: inputs made up by its signature until it takes some, or those of a file of records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from service.bench.asked import Address
from service.bench.clients import Answer, Client, GrpcClient, RestClient
from service.bench.wire import PROTOCOLS
from service.errors import FailedPrecondition, InvalidArgument, KilnError, Unimplemented
from service.registry.samples import draws
from service.rpc.warmup_codec import decode_warm_up
from service.runtime.warmup import records
from service.tensors import Array, Signature, Tensors

DIFFERENT = 64
"""Different requests, sent in turn."""
_PROBES = ("rest-v2-binary", "rest-tfs")
"""By what made-up inputs are tried, the first that the server knows."""


def open_client(address: Address, protocol: str, requests: Sequence[bytes]) -> Client:
    """A client that sends `requests` in turn; in an event loop."""
    method = PROTOCOLS[protocol].method
    if method:
        return GrpcClient(address.grpc, method, requests)
    return RestClient(address.host, address.rest_port, requests)


def read_records(path: Path, signature: Signature) -> list[Tensors]:
    """Inputs of a warm-up file or a request log, at most `DIFFERENT` of them.

    Raises:
        ModelLoadError, InvalidArgument: it cannot be read, or has no record that fits the signature.
    """
    found: list[Tensors] = []
    for number, record in enumerate(records(path), start=1):
        try:
            found += [inputs for _, inputs in decode_warm_up(record, {signature.name: signature})]
        except Unimplemented:
            continue
        except KilnError as error:
            raise InvalidArgument(f"{path}: record {number}: {error}") from None
        if len(found) >= DIFFERENT:
            break
    if not found:
        raise InvalidArgument(f"{path}: records of predict requests expected, it has none")
    return found[:DIFFERENT]


async def made_up(address: Address, model: str, signature: Signature, rows: int) -> list[Tensors]:
    """Inputs of so many rows that the server takes, each different where the signature has rows.

    Raises:
        FailedPrecondition: it refuses whatever is made up; the text has its reason for the first.
    """
    first_error = ""
    for draw in draws(signature):
        inputs = cut(draw.batch(signature, rows * DIFFERENT), signature, rows)
        error = await _refusal(address, model, signature, inputs[0])
        if error is None:
            return inputs
        first_error = first_error or error
    raise FailedPrecondition(
        f"model {model!r} refuses inputs that are made up for {signature.describe()}: {first_error}; "
        "give a warm-up file or a request log with --records"
    )


async def _refusal(address: Address, model: str, signature: Signature, inputs: Tensors) -> str | None:
    """Why the server does not answer `inputs`; None if it does."""
    error = ""
    for protocol in _PROBES:
        try:
            request = PROTOCOLS[protocol].build(model, signature, inputs)
        except (KilnError, ValueError) as reason:
            error = error or str(reason)
            continue
        client = open_client(address, protocol, [request])
        try:
            answer = await client.send(0)
        finally:
            await client.close()
        if answer is Answer.OK:
            return None
        error = error or client.error
    return error


def cut(inputs: Tensors, signature: Signature, rows: int) -> list[Tensors]:
    """Batches of `rows` rows each; `inputs` themselves where the signature has no rows."""
    if not signature.batched:
        return [inputs]
    count = len(next(iter(inputs.values()))) // rows
    parts: list[list[Array]] = [np.split(array[: count * rows], count) for array in inputs.values()]
    return [dict(zip(inputs, part, strict=True)) for part in zip(*parts, strict=True)]
