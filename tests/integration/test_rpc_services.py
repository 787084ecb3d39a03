"""The gRPC services beside the dialects: health and server reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.integration.conftest import Kiln
from tests.integration.rpc import HEALTH, MODEL, OIP, PREDICTION, REFLECTION, Caller


@pytest_asyncio.fixture
async def caller(kiln: Kiln) -> AsyncIterator[Caller]:
    """A client of the running server."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        yield Caller(channel)


@pytest.mark.parametrize("service", ["", OIP, PREDICTION, MODEL])
async def test_the_health_service(kiln: Kiln, caller: Caller, service: str):
    """SERVING while the server takes requests, for the server and for each service."""
    for serving in (True, False):
        await kiln.rpc.set_serving(serving=serving)
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await caller.ask(f"{HEALTH}/Check", request, health_pb2.HealthCheckResponse)
        assert health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == (
            "SERVING" if serving else "NOT_SERVING"
        )


async def reflect(caller: Caller, **request: str) -> Any:
    stream = caller.channel.stream_stream(f"/{REFLECTION}/ServerReflectionInfo")()
    await stream.write(reflection_pb2.ServerReflectionRequest(**request).SerializeToString())
    answer = reflection_pb2.ServerReflectionResponse.FromString(await stream.read())
    await stream.done_writing()
    return answer


async def test_reflection_lists_the_public_names(caller: Caller):
    """Those that clients know, not those that the messages have within this process."""
    answer = await reflect(caller, list_services="")
    names = {service.name for service in answer.list_services_response.service}
    assert names == {OIP, PREDICTION, MODEL, HEALTH, REFLECTION}


@pytest.mark.parametrize(
    ("symbol", "fields"),
    [
        ("tensorflow.serving.PredictRequest", {"model_spec", "inputs", "output_filter"}),
        ("tensorflow.TensorProto", {"dtype", "tensor_shape", "tensor_content", "half_val"}),
        ("inference.ModelInferRequest", {"model_name", "inputs", "raw_input_contents"}),
    ],
)
async def test_reflection_describes_messages(caller: Caller, symbol: str, fields: set[str]):
    """A client can build the message from the files that it is given, one after another."""
    files: dict[str, FileDescriptorProto] = {}

    async def fetch(**request: str) -> str:
        answer = await reflect(caller, **request)
        received = [FileDescriptorProto.FromString(f) for f in answer.file_descriptor_response.file_descriptor_proto]
        assert received, answer
        files.update({file.name: file for file in received})
        for file in received:
            for dependency in file.dependency:
                if dependency not in files:
                    await fetch(file_by_filename=dependency)
        return received[0].name

    await fetch(file_containing_symbol=symbol)
    pool = DescriptorPool()

    def add(name: str) -> None:
        for dependency in files[name].dependency:
            add(dependency)
        pool.Add(files[name])  # again does no harm

    for name in files:
        add(name)
    assert not [name for name in files if "kiln" in name]
    assert fields <= set(pool.FindMessageTypeByName(symbol).fields_by_name)


async def test_reflection_describes_methods(caller: Caller):
    """The request and response types of a method are public names too."""
    answer = await reflect(caller, file_containing_symbol="tensorflow.serving.PredictionService")
    (data,) = answer.file_descriptor_response.file_descriptor_proto[:1]
    service = next(s for s in FileDescriptorProto.FromString(data).service if s.name == "PredictionService")
    predict = next(method for method in service.method if method.name == "Predict")
    assert predict.input_type == ".tensorflow.serving.PredictRequest"
    assert predict.output_type == ".tensorflow.serving.PredictResponse"
