"""``/v2/systemsharedmemory`` and ``/v2/cudasharedmemory``: Triton's shared memory extension over REST."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Path, Request

from service.errors import InvalidArgument
from service.rest.admin import answers, body_of, json_object
from service.rest.json_elements import quote
from service.rest.openapi import REGION, REGIONS
from service.rest.options import RestOptions
from service.shared_memory import Region, cuda_unknown, cuda_unsupported

_SYSTEM, _CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
_TAG = "Shared memory"
RegionName = Path(description="name of the region, as it was registered", examples=["input"])


def shared_memory_router(options: RestOptions) -> APIRouter:
    """Regions of system shared memory: what there are, a new one, one or all gone."""
    memory = options.memory
    router = APIRouter(tags=[_TAG])

    @router.get(f"{_SYSTEM}/status", summary="All registered regions", responses=answers(REGIONS, 400))
    async def status() -> list[dict[str, Any]]:
        return [_told(region) for region in memory.status()]

    @router.get(
        f"{_SYSTEM}/region/{{region}}/status",
        summary="One registered region",
        responses=answers(REGIONS, 400, 404),
    )
    async def region_status(region: str = RegionName) -> list[dict[str, Any]]:
        return [_told(each) for each in memory.status(region)]

    @router.post(
        f"{_SYSTEM}/region/{{region}}/register",
        summary="Give a name to a part of a shared memory object",
        responses=answers({}, 400, 409),
        openapi_extra=body_of(REGION),
    )
    async def register(request: Request, region: str = RegionName) -> dict[str, Any]:
        body = await json_object(request, options.max_message_bytes)
        key = body.get("key")
        if not isinstance(key, str):
            raise InvalidArgument(f"'key': the name of a shared memory object expected, got {quote(key)}")
        memory.register(
            region, key, _bytes(body.get("offset", 0), "offset"), _bytes(body.get("byte_size"), "byte_size")
        )
        return {}

    @router.post(
        f"{_SYSTEM}/region/{{region}}/unregister",
        summary="Let a region go; one that is not there is no error",
        responses=answers({}, 400),
        openapi_extra=body_of({}),
    )
    async def unregister(region: str = RegionName) -> dict[str, Any]:
        memory.unregister(region)
        return {}

    @router.post(
        f"{_SYSTEM}/unregister",
        summary="Let all regions go",
        responses=answers({}, 400),
        openapi_extra=body_of({}),
    )
    async def unregister_all() -> dict[str, Any]:
        memory.unregister()
        return {}

    _add_cuda(router)
    return router


def _add_cuda(router: APIRouter) -> None:
    """What a client that cleans up or probes asks of CUDA memory: there is none, and none can be registered."""

    @router.get(f"{_CUDA}/status", summary="No regions: GPU memory is not shared", responses=answers([]))
    async def status() -> list[dict[str, Any]]:
        return []

    @router.get(f"{_CUDA}/region/{{region}}/status", summary="No such region", responses=answers([], 404))
    async def region_status(region: str = RegionName) -> list[dict[str, Any]]:
        raise cuda_unknown(region)

    @router.post(
        f"{_CUDA}/region/{{region}}/register",
        summary="Refused: GPU memory is not shared",
        responses=answers({}, 501),
        openapi_extra=body_of({"raw_handle": {"b64": ""}, "device_id": 0, "byte_size": 256}),
    )
    async def register(region: str = RegionName) -> dict[str, Any]:  # noqa: ARG001
        raise cuda_unsupported()

    @router.post(
        f"{_CUDA}/region/{{region}}/unregister",
        summary="Nothing to let go",
        responses=answers({}),
        openapi_extra=body_of({}),
    )
    async def unregister(region: str = RegionName) -> dict[str, Any]:  # noqa: ARG001
        return {}

    @router.post(
        f"{_CUDA}/unregister",
        summary="Nothing to let go",
        responses=answers({}),
        openapi_extra=body_of({}),
    )
    async def unregister_all() -> dict[str, Any]:
        return {}


def _told(region: Region) -> dict[str, Any]:
    return {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}


def _bytes(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgument(f"{name!r}: a number of bytes expected, got {quote(value)}")
    return value
