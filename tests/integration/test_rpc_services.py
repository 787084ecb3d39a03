"""The gRPC services beside the dialects: health and server reflection."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc.aio import AioRpcError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.integration.conftest import Kiln
from tests.integration.rpc import HEALTH, MODEL, OIP, PREDICTION, REFLECTION, Caller

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"


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


async def test_health_of_an_unknown_service(caller: Caller):
    """NOT_FOUND, with its name."""
    request = health_pb2.HealthCheckRequest(service="no")
    assert await caller.refusal(f"{HEALTH}/Check", request) == (StatusCode.NOT_FOUND, "there is no service 'no'")


async def test_watching_health(kiln: Kiln, caller: Caller):
    """Each change is told to all who watch, after the status at the start; one who leaves takes nobody along."""
    watch = caller.channel.unary_stream(f"/{HEALTH}/Watch")
    first, second = watch(b""), watch(health_pb2.HealthCheckRequest(service=OIP).SerializeToString())

    async def status(call: Any) -> str:
        answer = health_pb2.HealthCheckResponse.FromString(await call.read())
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    assert [await status(first), await status(second)] == ["SERVING", "SERVING"]
    await kiln.rpc.set_serving(serving=False)
    assert [await status(first), await status(second)] == ["NOT_SERVING", "NOT_SERVING"]
    first.cancel()
    await kiln.rpc.set_serving(serving=True)
    assert await status(second) == "SERVING"
    second.cancel()


async def test_watching_an_unknown_service(kiln: Kiln, caller: Caller):
    """SERVICE_UNKNOWN, and nothing more until it is there; a watch without a request is refused."""
    unknown = health_pb2.HealthCheckRequest(service="no").SerializeToString()
    call = caller.channel.unary_stream(f"/{HEALTH}/Watch")(unknown)
    answer = health_pb2.HealthCheckResponse.FromString(await call.read())
    assert answer.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    more = asyncio.ensure_future(call.read())
    await kiln.rpc.set_serving(serving=False)
    done, _ = await asyncio.wait({more}, timeout=0.01)
    assert not done
    call.cancel()
    await asyncio.wait({more})
    empty = caller.channel.stream_stream(f"/{HEALTH}/Watch")()
    await empty.done_writing()
    with pytest.raises(AioRpcError) as refused:
        await empty.read()
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "one message expected, got none"


async def reflect(caller: Caller, service: str = REFLECTION, **request: str) -> Any:
    stream = caller.channel.stream_stream(f"/{service}/ServerReflectionInfo")()
    await stream.write(reflection_pb2.ServerReflectionRequest(**request).SerializeToString())
    answer = reflection_pb2.ServerReflectionResponse.FromString(await stream.read())
    await stream.done_writing()
    return answer


async def test_reflection_lists_the_public_names(caller: Caller):
    """Those that clients know, not those that the messages have within this process."""
    answer = await reflect(caller, list_services="")
    names = {service.name for service in answer.list_services_response.service}
    assert names == {OIP, PREDICTION, MODEL, HEALTH, REFLECTION, REFLECTION_V1}


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


async def test_reflection_of_version_1(caller: Caller):
    """The same answers under the protocol's newer name, which describes itself."""
    answer = await reflect(caller, REFLECTION_V1, file_containing_symbol=REFLECTION_V1)
    (data,) = answer.file_descriptor_response.file_descriptor_proto[:1]
    file = FileDescriptorProto.FromString(data)
    assert (file.name, file.package) == ("grpc_reflection/v1/reflection.proto", "grpc.reflection.v1")
    (method,) = file.service[0].method
    assert method.input_type == ".grpc.reflection.v1.ServerReflectionRequest"
