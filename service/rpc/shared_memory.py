"""The shared memory part of ``inference.GRPCInferenceService``: Triton's extension."""

from __future__ import annotations

from service.rpc._generated.inference import open_inference_pb2 as pb
from service.rpc.handlers import Handlers
from service.rpc.messages import parse
from service.shared_memory import SharedMemory, cuda_unknown, cuda_unsupported


def shared_memory_handlers(service: str, memory: SharedMemory) -> Handlers:
    """Byte-level handlers by full method path of `service`."""

    async def status(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.SystemSharedMemoryStatusRequest, data)
        response = pb.SystemSharedMemoryStatusResponse()
        for region in memory.status(request.name):
            told = response.regions[region.name]
            told.name, told.key, told.offset, told.byte_size = region.name, region.key, region.offset, region.byte_size
        return response.SerializeToString()

    async def register(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.SystemSharedMemoryRegisterRequest, data)
        memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse().SerializeToString()

    async def unregister(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        memory.unregister(parse(pb.SystemSharedMemoryUnregisterRequest, data).name)
        return pb.SystemSharedMemoryUnregisterResponse().SerializeToString()

    async def cuda_status(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        name = parse(pb.CudaSharedMemoryStatusRequest, data).name
        if name:
            raise cuda_unknown(name)
        return pb.CudaSharedMemoryStatusResponse().SerializeToString()

    async def cuda_register(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        raise cuda_unsupported()

    async def cuda_unregister(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        parse(pb.CudaSharedMemoryUnregisterRequest, data)
        return pb.CudaSharedMemoryUnregisterResponse().SerializeToString()

    methods = {
        "SystemSharedMemoryStatus": status,
        "SystemSharedMemoryRegister": register,
        "SystemSharedMemoryUnregister": unregister,
        "CudaSharedMemoryStatus": cuda_status,
        "CudaSharedMemoryRegister": cuda_register,
        "CudaSharedMemoryUnregister": cuda_unregister,
    }
    return {f"/{service}/{name}": method for name, method in methods.items()}
