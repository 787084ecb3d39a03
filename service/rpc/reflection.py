"""Server reflection, with descriptors under public names."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable

from google.protobuf import any_pb2, wrappers_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import aio

from service.rpc._generated.inference import open_inference_pb2
from service.rpc._generated.kiln.tensorflow import example_pb2, tensor_pb2
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2
from service.rpc.handlers import CallLimits, StreamHandlers
from service.rpc.messages import parse

_MODULES = (
    any_pb2,
    wrappers_pb2,
    health_pb2,
    reflection_pb2,
    open_inference_pb2,
    tensor_pb2,
    example_pb2,
    serving_pb2,
)
_PREFIX = "kiln."
_V1ALPHA, _V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
REFLECTION_SERVICES = (f"{_V1}.ServerReflection", f"{_V1ALPHA}.ServerReflection")
"""One protocol under two names: version 1 has the messages of v1alpha, field by field."""


def reflection_streams(services: Iterable[str]) -> StreamHandlers:
    """Byte-level stream handlers by full method path; `services` are those that are listed."""
    servicer = aio.ReflectionServicer(services, pool=public_pool())

    async def info(messages: AsyncIterator[bytes], limits: CallLimits) -> AsyncGenerator[bytes, None]:  # noqa: ARG001
        requests = (parse(reflection_pb2.ServerReflectionRequest, data) async for data in messages)
        async for response in servicer.ServerReflectionInfo(requests, None):
            yield response.SerializeToString()

    return {f"/{name}/ServerReflectionInfo": info for name in REFLECTION_SERVICES}


def public_pool() -> DescriptorPool:
    """A pool of its own with every message and service as clients know it.

    TensorFlow Serving's are ours under the prefix ``kiln.``; without it the names are the public
    ones. In a pool apart they clash with nothing, not even with TensorFlow's own.
    """
    pool = DescriptorPool()
    for module in _MODULES:
        file = FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb)
        _rename(file, _public)
        file.name = file.name.removeprefix("kiln/")
        for index, dependency in enumerate(file.dependency):
            file.dependency[index] = dependency.removeprefix("kiln/")
        pool.Add(file)
    pool.Add(_reflection_v1())
    return pool


def _reflection_v1() -> FileDescriptorProto:
    file = FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    _rename(file, lambda name: name.replace(_V1ALPHA, _V1))
    file.name = file.name.replace("v1alpha", "v1")
    return file


def _rename(file: FileDescriptorProto, rename: Callable[[str], str]) -> None:
    """Give the package and all types that are referred to other names."""
    file.package = rename(file.package)
    messages = list(file.message_type)
    while messages:
        message = messages.pop()
        messages.extend(message.nested_type)
        for field in message.field:
            if field.type_name:  # assigning even "" to a scalar's would make it a message's
                field.type_name = "." + rename(field.type_name[1:])
    for service in file.service:
        for method in service.method:
            method.input_type = "." + rename(method.input_type[1:])
            method.output_type = "." + rename(method.output_type[1:])


def _public(name: str) -> str:
    return name.removeprefix(_PREFIX)
