"""Shared memory over REST and gRPC: regions are registered, and tensors go through real objects of /dev/shm."""

from __future__ import annotations

import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing.shared_memory import SharedMemory as Object
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc import StatusCode

from service.rpc._generated.inference import open_inference_pb2 as oip
from service.shared_memory import SharedMemory
from service.tensors import DataType
from tests.fakes import FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import MAX_MESSAGE_BYTES, Kiln, start_kiln
from tests.integration.rpc import INFER, OIP, Caller, infer_request
from tests.signatures import many, only

SYSTEM, CUDA = "/v2/systemsharedmemory", "/v2/cudasharedmemory"
HELLO = b"\2\0\0\0he\3\0\0\0llo"
HELLO_TWICE = b"\4\0\0\0hehe\6\0\0\0llollo"
INTS = np.array([7, 8], np.int32)


@pytest_asyncio.fixture
async def shared() -> AsyncIterator[Kiln]:
    """A server that takes shared memory, with models of FP32 ``double``, and of INT32 and BYTES ``pair``."""
    models = {"double": FakeModel(), "pair": FakeModel(only(many(a=DataType.INT32, b=DataType.BYTES)))}
    kiln = await start_kiln(models, memory=SharedMemory(enabled=True, max_tensor_bytes=MAX_MESSAGE_BYTES))
    yield kiln
    await kiln.stop(5.0, 0.5)


@pytest.fixture
def client(shared: Kiln) -> Client:
    return Client(shared.app)


@pytest_asyncio.fixture
async def caller(shared: Kiln) -> AsyncIterator[Caller]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{shared.grpc_port}") as channel:
        yield Caller(channel)


@pytest.fixture
def memory() -> Iterator[Any]:
    """A client's object of 4096 bytes."""
    memory = Object(create=True, size=4096)
    yield memory
    memory.close()
    memory.unlink()


def put(memory: Any, at: int, data: bytes) -> None:
    memory.buf[at : at + len(data)] = data


def got(memory: Any, at: int, size: int) -> bytes:
    return bytes(memory.buf[at : at + size])


def descriptors(memory: Any) -> int:
    """How often this process, with the client and the server in it, has the object open."""
    links = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return links.count(f"/dev/shm/{memory.name}")


Register = Callable[[str], Awaitable[None]]


@pytest.fixture(params=["rest", "grpc"])
def register(request: pytest.FixtureRequest, client: Client, caller: Caller, memory: Any) -> Register:
    """Registers the whole object, over either protocol: the regions are the same."""

    async def register(name: str) -> None:
        if request.param == "rest":
            body = {"key": "/" + memory.name.lstrip("/"), "offset": 0, "byte_size": 4096}
            answer = await client.post(f"{SYSTEM}/region/{name}/register", body)
            assert (answer.status, answer.json) == (200, {})
        else:
            message = oip.SystemSharedMemoryRegisterRequest(name=name, key="/" + memory.name, byte_size=4096)
            await caller.ask(f"{OIP}/SystemSharedMemoryRegister", message, oip.SystemSharedMemoryRegisterResponse)

    return register


async def statuses(caller: Caller, name: str = "") -> dict[str, tuple[str, str, int, int]]:
    request = oip.SystemSharedMemoryStatusRequest(name=name)
    answer = await caller.ask(f"{OIP}/SystemSharedMemoryStatus", request, oip.SystemSharedMemoryStatusResponse)
    return {name: (r.name, r.key, r.offset, r.byte_size) for name, r in answer.regions.items()}


# Regions


async def test_regions_are_those_of_both_protocols(client: Client, caller: Caller, memory: Any, register: Register):
    """What is registered over one is told, and unregistered, over the other."""
    key = "/" + memory.name
    await register("first")
    await client.post(f"{SYSTEM}/region/second/register", {"key": key, "offset": 8, "byte_size": 16})
    await register("third part")
    first = {"name": "first", "key": key, "offset": 0, "byte_size": 4096}
    second = {"name": "second", "key": key, "offset": 8, "byte_size": 16}
    assert (await client.get(f"{SYSTEM}/status")).json == [first, second, {**first, "name": "third part"}]
    assert (await client.get(f"{SYSTEM}/region/second/status")).json == [second]
    assert await statuses(caller, "first") == {"first": tuple(first.values())}
    assert set(await statuses(caller)) == {"first", "second", "third part"}

    await caller.start(f"{OIP}/SystemSharedMemoryUnregister", oip.SystemSharedMemoryUnregisterRequest(name="first"))
    assert [each["name"] for each in (await client.get(f"{SYSTEM}/status")).json] == ["second", "third part"]
    for _ in range(2):  # the second time it is not there, which is no error
        assert (await client.post(f"{SYSTEM}/region/second/unregister", b"")).json == {}
    assert set(await statuses(caller)) == {"third part"}
    assert (await client.post(f"{SYSTEM}/unregister", b"")).status == 200
    assert await statuses(caller) == {}
    await register("first")
    await caller.start(f"{OIP}/SystemSharedMemoryUnregister", b"")
    assert (await client.get(f"{SYSTEM}/status")).json == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"byte_size": 8}, "'key': the name of a shared memory object expected, got null"),
        ({"key": 7, "byte_size": 8}, "'key': the name of a shared memory object expected, got 7"),
        ({"key": "/x"}, "'byte_size': a number of bytes expected, got null"),
        ({"key": "/x", "byte_size": True}, "'byte_size': a number of bytes expected, got true"),
        ({"key": "/x", "byte_size": 8, "offset": "0"}, "'offset': a number of bytes expected, got \"0\""),
        ({"key": "/x/y", "byte_size": 8}, "key: a name of up to 255 bytes after one slash expected"),
        ({"key": "/kiln no such object", "byte_size": 8}, "cannot be opened: No such file or directory"),
        (b"[]", "a JSON object expected, got []"),
        (b"{", "JSON Parse error"),
    ],
)
async def test_a_wrong_registration_is_told(client: Client, body: Any, text: str):
    """The field, what was expected and what came."""
    answer = await client.post(f"{SYSTEM}/region/r/register", body)
    assert answer.status == 400
    assert text in answer.error


async def test_a_name_is_registered_once(client: Client, caller: Caller, memory: Any, register: Register):
    """409 and ALREADY_EXISTS; a region that is not there is 404 and NOT_FOUND."""
    await register("r")
    answer = await client.post(f"{SYSTEM}/region/r/register", {"key": memory.name, "byte_size": 8})
    assert (answer.status, answer.error) == (409, "shared memory region 'r' is registered already")
    request = oip.SystemSharedMemoryRegisterRequest(name="r", key=memory.name, byte_size=8)
    code, _ = await caller.refusal(f"{OIP}/SystemSharedMemoryRegister", request)
    assert code is StatusCode.ALREADY_EXISTS
    answer = await client.get(f"{SYSTEM}/region/s/status")
    assert (answer.status, answer.error) == (404, "there is no shared memory region 's'; there are r")
    code, text = await caller.refusal(f"{OIP}/SystemSharedMemoryStatus", oip.SystemSharedMemoryStatusRequest(name="s"))
    assert (code, text) == (StatusCode.NOT_FOUND, answer.error)


async def test_the_extension_is_advertised(client: Client, caller: Caller):
    """In the server's metadata, over both protocols."""
    assert "system_shared_memory" in (await client.get("/v2")).json["extensions"]
    metadata = await caller.ask(f"{OIP}/ServerMetadata", b"", oip.ServerMetadataResponse)
    assert "system_shared_memory" in metadata.extensions


# Tensors


def place(byte_size: int, offset: int = 0, region: str = "r") -> dict[str, Any]:
    where = {"shared_memory_offset": offset} if offset else {}
    return {"shared_memory_region": region, "shared_memory_byte_size": byte_size, **where}


def entry(name: str, datatype: str, shape: list[int], **keys: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, **keys}


async def test_rest_from_and_to_shared_memory(client: Client, memory: Any, register: Register):
    """Numbers and strings, both ways; the answer has no data, and no parameters, which C++ clients misread."""
    await register("r")
    put(memory, 16, INTS.tobytes())
    put(memory, 64, HELLO)
    body = {
        "id": "one",
        "inputs": [
            entry("a", "INT32", [2], parameters=place(8, 16)),
            entry("b", "BYTES", [2], parameters=place(len(HELLO), 64)),
        ],
        "outputs": [
            {"name": "out_b", "parameters": {"binary_data": True, **place(100, 128)}},
            {"name": "out_a", "parameters": {"binary_data": False, **place(8)}},
        ],
    }
    answer = await client.post("/v2/models/pair/infer", body)
    assert answer.json == {
        "model_name": "pair",
        "model_version": "1",
        "id": "one",
        "outputs": [
            entry("out_b", "BYTES", [2]),
            entry("out_a", "INT32", [2]),
        ],
    }
    assert "inference-header-content-length" not in answer.headers
    assert got(memory, 0, 8) == (INTS * 2).tobytes()
    assert got(memory, 128, len(HELLO_TWICE)) == HELLO_TWICE


@pytest.mark.parametrize("is_binary", [False, True])
async def test_rest_beside_other_tensors(client: Client, memory: Any, register: Register, is_binary: bool):
    """One input and one output in shared memory, the others in the body."""
    await register("r")
    put(memory, 0, HELLO)
    form = {"parameters": {"binary_data_size": 8}} if is_binary else {"data": INTS.tolist()}
    head = {
        "inputs": [entry("a", "INT32", [2], **form), entry("b", "BYTES", [2], parameters=place(len(HELLO)))],
        "outputs": [
            {"name": "out_a", "parameters": place(8, 100)},
            {"name": "out_b", "parameters": {"binary_data": is_binary}},
        ],
    }
    text = json.dumps(head).encode()
    if is_binary:
        length = {"inference_header_content_length": str(len(text))}
        answer = await client.post("/v2/models/pair/infer", text + INTS.tobytes(), **length)
        assert answer.body.endswith(HELLO_TWICE)
        outputs = json.loads(answer.body[: -len(HELLO_TWICE)])["outputs"]
        assert outputs[1]["parameters"] == {"binary_data_size": len(HELLO_TWICE)}
    else:
        outputs = (await client.post("/v2/models/pair/infer", text)).json["outputs"]
        assert outputs[1]["data"] == ["hehe", "llollo"]
    assert outputs[0] == entry("out_a", "INT32", [2])
    assert got(memory, 100, 8) == (INTS * 2).tobytes()


def grpc_request(*, raw: bool) -> oip.ModelInferRequest:
    """``a`` in the message, ``b`` in shared memory; ``out_a`` there, ``out_b`` in the message."""
    request = oip.ModelInferRequest(model_name="pair")
    a = request.inputs.add(name="a", datatype="INT32", shape=[2])
    if raw:
        request.raw_input_contents.append(INTS.tobytes())
    else:
        a.contents.int_contents.extend(INTS.tolist())
    b = request.inputs.add(name="b", datatype="BYTES", shape=[2])
    tell(b, place(len(HELLO)))
    tell(request.outputs.add(name="out_a"), place(8, 100))
    request.outputs.add(name="out_b")
    return request


def tell(tensor: Any, parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        setattr(tensor.parameters[name], "string_param" if isinstance(value, str) else "int64_param", value)


@pytest.mark.parametrize("raw", [False, True])
async def test_grpc_beside_other_tensors(caller: Caller, memory: Any, register: Register, raw: bool):
    """One input and one output in shared memory, the others in the message: raw or typed, as the request was."""
    await register("r")
    put(memory, 0, HELLO)
    answer = await caller.ask(INFER, grpc_request(raw=raw), oip.ModelInferResponse)
    assert [(o.name, list(o.shape), list(o.contents.bytes_contents)) for o in answer.outputs] == [
        ("out_a", [2], []),
        ("out_b", [2], [] if raw else [b"hehe", b"llollo"]),
    ]
    assert list(answer.raw_output_contents) == ([b"", HELLO_TWICE] if raw else [])
    told = answer.outputs[0].parameters
    assert told["shared_memory_region"].string_param == "r"
    assert told["shared_memory_byte_size"].int64_param == 8
    assert told["shared_memory_offset"].int64_param == 100
    assert not answer.outputs[1].parameters
    assert got(memory, 100, 8) == (INTS * 2).tobytes()


# What can be wrong with them: shared memory of the input and the output, REST's and gRPC's status, the text
WRONG = [
    (place(12, region="s"), place(12), 404, StatusCode.NOT_FOUND, "there is no shared memory region 's'"),
    (place(12), place(12, region="s"), 404, StatusCode.NOT_FOUND, "there is no shared memory region 's'"),
    (place(8), place(12), 400, StatusCode.INVALID_ARGUMENT, "input 'x': 12 bytes expected for FP32 [1, 3], got 8"),
    (place(12, 4090), place(12), 400, StatusCode.INVALID_ARGUMENT, "input 'x': 12 bytes at 4090 go past the end"),
    (place(12), place(12, 4090), 400, StatusCode.INVALID_ARGUMENT, "output 'y': 12 bytes at 4090 go past the end"),
    (place(12), place(8), 400, StatusCode.INVALID_ARGUMENT, "output 'y': shared_memory_byte_size of at least 12"),
    (
        {"shared_memory_region": "r"},
        place(12),
        400,
        StatusCode.INVALID_ARGUMENT,
        "input 'x': parameter shared_memory_byte_size: a number of bytes expected, got None",
    ),
]


@pytest.mark.parametrize(("given", "wanted", "status", "code", "text"), WRONG)
async def test_a_wrong_place_is_told(
    shared: Kiln,
    client: Client,
    caller: Caller,
    memory: Any,
    register: Register,
    given: dict[str, Any],
    wanted: dict[str, Any],
    status: int,
    code: StatusCode,
    text: str,
):
    """In both protocols alike; and nothing of the object is touched."""
    await register("r")
    body = {
        "inputs": [entry("x", "FP32", [1, 3], parameters=given)],
        "outputs": [{"name": "y", "parameters": wanted}],
    }
    answer = await client.post("/v2/models/double/infer", body)
    assert answer.status == status
    assert text in answer.error
    request = oip.ModelInferRequest(model_name="double")
    tell(request.inputs.add(name="x", datatype="FP32", shape=[1, 3]), given)
    tell(request.outputs.add(name="y"), wanted)
    got_code, message = await caller.refusal(INFER, request)
    assert got_code is code
    assert text in message
    assert got(memory, 0, 4096) == bytes(4096)
    assert bool(shared.model.batches) == ("at least 12" in text)  # the others are refused before they are run


async def test_a_refused_request_holds_no_object(caller: Caller, memory: Any):
    """Once its region is unregistered the object is closed, without waiting for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        key = "/" + memory.name
        registration = oip.SystemSharedMemoryRegisterRequest(name="r", key=key, byte_size=4096)
        await caller.start(f"{OIP}/SystemSharedMemoryRegister", registration)
        request = infer_request()
        tell(request.outputs.add(name="y"), place(8))
        await caller.refusal(INFER, request)
        opened = descriptors(memory)
        await caller.start(f"{OIP}/SystemSharedMemoryUnregister", b"")
        left = descriptors(memory)
    finally:
        gc.enable()
    assert opened == left + 1


async def test_off_unless_asked_for(kiln: Kiln):
    """Routes, methods and parameters are refused alike, with the setting's name; CUDA's answers are the same."""
    client = Client(kiln.app)
    here = entry("x", "FP32", [1, 3], parameters=place(12))
    inline = entry("x", "FP32", [1, 3], data=[1, 2, 3])
    there = {"name": "y", "parameters": place(12)}
    request = infer_request()
    tell(request.outputs.add(name="y"), place(12))
    for answer in (
        await client.get(f"{SYSTEM}/status"),
        await client.get(f"{SYSTEM}/region/r/status"),
        await client.post(f"{SYSTEM}/region/r/register", {"key": "/x", "byte_size": 8}),
        await client.post(f"{SYSTEM}/region/r/unregister", b""),
        await client.post(f"{SYSTEM}/unregister", b""),
        await client.post("/v2/models/double/infer", {"inputs": [here]}),
        await client.post("/v2/models/double/infer", {"inputs": [inline], "outputs": [there]}),
    ):
        assert answer.status == 400
        assert "the setting shared_memory turns it on" in answer.error
    assert "system_shared_memory" not in (await client.get("/v2")).json["extensions"]
    assert (await client.get(f"{CUDA}/status")).json == []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{kiln.grpc_port}") as channel:
        caller = Caller(channel)
        for method, message in (
            ("SystemSharedMemoryStatus", b""),
            ("SystemSharedMemoryRegister", oip.SystemSharedMemoryRegisterRequest(name="r", key="/x", byte_size=8)),
            ("SystemSharedMemoryUnregister", b""),
            ("ModelInfer", request),
        ):
            code, text = await caller.refusal(f"{OIP}/{method}", message)
            assert code is StatusCode.FAILED_PRECONDITION
            assert "the setting shared_memory turns it on" in text


async def test_cuda_memory_is_not_shared(client: Client, caller: Caller):
    """No regions, none to be had, and nothing to clean up, which clients do as they start."""
    assert (await client.get(f"{CUDA}/status")).json == []
    answer = await client.get(f"{CUDA}/region/r/status")
    assert (answer.status, answer.error) == (404, "there is no CUDA shared memory region 'r'")
    handle = {"raw_handle": {"b64": "AA=="}, "device_id": 0, "byte_size": 8}
    answer = await client.post(f"{CUDA}/region/r/register", handle)
    assert answer.status == 501
    assert "memory of a GPU cannot be shared" in answer.error
    for path in (f"{CUDA}/region/r/unregister", f"{CUDA}/unregister"):
        assert (await client.post(path, b"")).json == {}
    status = await caller.ask(f"{OIP}/CudaSharedMemoryStatus", b"", oip.CudaSharedMemoryStatusResponse)
    assert not status.regions
    for method, message, expected in (
        ("Status", oip.CudaSharedMemoryStatusRequest(name="r"), StatusCode.NOT_FOUND),
        ("Register", oip.CudaSharedMemoryRegisterRequest(name="r"), StatusCode.UNIMPLEMENTED),
        ("Unregister", b"\xff", StatusCode.INVALID_ARGUMENT),
    ):
        code, _ = await caller.refusal(f"{OIP}/CudaSharedMemory{method}", message)
        assert code is expected
    request = oip.CudaSharedMemoryUnregisterRequest(name="r")
    await caller.ask(f"{OIP}/CudaSharedMemoryUnregister", request, oip.CudaSharedMemoryUnregisterResponse)
