"""Regions of shared memory objects: what may be registered, and what reading and writing them can run into."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import AlreadyExists, FailedPrecondition, InvalidArgument, KilnError, NotFound, TooLarge
from service.rest import openinference_codec as rest
from service.rpc import open_inference_codec as rpc
from service.rpc._generated.inference import open_inference_pb2 as pb
from service.shared_memory import MAX_REGIONS, OFF, Extent, SharedMemory
from service.tensors import DataType, pack_strings
from tests.signatures import many, one, only, prediction

LIMIT = 1 << 20
PARAMETERS = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


@pytest.fixture
def memory(tmp_path: Path) -> SharedMemory:
    """A folder that stands for /dev/shm, with an object of 64 bytes, 0 to 63."""
    (tmp_path / "object").write_bytes(bytes(range(64)))
    return SharedMemory(enabled=True, max_tensor_bytes=LIMIT, directory=tmp_path)


def place(region: Any = "r", byte_size: Any = 8, offset: Any = None) -> dict[str, Any]:
    """Parameters of a tensor; None leaves one out."""
    values = zip(PARAMETERS, (region, byte_size, offset), strict=True)
    return {name: value for name, value in values if value is not None}


def extent(memory: SharedMemory, *args: Any) -> Extent:
    found = memory.extent(place(*args), "input 'x'")
    assert found is not None
    return found


def descriptors(folder: Path) -> list[str]:
    """The files of `folder` that this process has open."""
    links = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sorted(link for link in links if link.startswith(f"{folder}/"))


# Registering


@pytest.mark.parametrize("key", ["/object", "object"])
def test_a_region_is_a_part_of_an_object(memory: SharedMemory, key: str):
    """Offsets of a tensor count from the region's start; the slash may be left out, as shm_open has it."""
    memory.register("r", key, 8, 16)
    (region,) = memory.status()
    assert (region.name, region.key, region.offset, region.byte_size) == ("r", key, 8, 16)
    assert memory.status("r") == [region]
    assert extent(memory, "r", 4, 2).read() == bytes([10, 11, 12, 13])
    assert extent(memory, "r", 0).read() == b""


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "key: a name of up to 255 bytes after one slash expected"),
        ("/", "key: a name"),
        ("//object", "key: a name"),
        ("/a/object", "key: a name"),
        ("/../object", "key: a name"),
        ("..", "key: a name"),
        ("/.", "key: a name"),
        ("/a\0b", "key: a name"),
        ("/" + "é" * 128, "key: a name"),
        ("/nothing", "cannot be opened: No such file or directory"),
        ("/link", "cannot be opened: Too many levels of symbolic links"),
        ("/folder", "cannot be opened: Is a directory"),
        ("/pipe", "is no shared memory object"),
    ],
)
def test_what_is_no_object_of_the_folder_is_refused(memory: SharedMemory, tmp_path: Path, key: str, text: str):
    """No way out of the folder, nothing new in it, and nothing but plain files; no descriptor stays open."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "object")
    os.mkfifo(tmp_path / "pipe")
    before = set(tmp_path.iterdir())
    with pytest.raises(InvalidArgument) as refused:
        memory.register("r", key, 0, 1)
    assert text in str(refused.value)
    assert memory.status() == []
    assert set(tmp_path.iterdir()) == before
    assert descriptors(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "offset", "byte_size", "text"),
    [
        ("", 0, 1, "a region's name has 1 to 255 characters, got 0"),
        ("r" * 256, 0, 1, "a region's name has 1 to 255 characters, got 256"),
        ("r", 0, 0, "offset from 0 and byte_size from 1 expected, got 0 and 0"),
        ("r", -1, 1, "offset from 0 and byte_size from 1 expected, got -1 and 1"),
        ("r", 0, 65, "at most 64 bytes in all expected, which '/object' has, got 0 and 65"),
        ("r", 64, 1, "at most 64 bytes in all expected, which '/object' has, got 64 and 1"),
        ("r", 2**64 - 1, 2**64 - 1, "at most 64 bytes in all expected"),
    ],
)
def test_a_region_lies_within_its_object(
    memory: SharedMemory, tmp_path: Path, name: str, offset: int, byte_size: int, text: str
):
    """Sizes are held against the object's; one that is refused leaves no descriptor behind."""
    with pytest.raises(InvalidArgument) as refused:
        memory.register(name, "/object", offset, byte_size)
    assert text in str(refused.value)
    assert memory.status() == []
    assert descriptors(tmp_path) == []


def test_a_name_is_taken_until_it_is_given_up(memory: SharedMemory, tmp_path: Path):
    """Registering it again is refused, unregistering what is not there is no error; descriptors are closed."""
    memory.register("r", "/object", 0, 8)
    memory.register("s", "/object", 8, 8)
    with pytest.raises(AlreadyExists, match="shared memory region 'r' is registered already"):
        memory.register("r", "/object", 0, 8)
    memory.unregister("r")
    memory.unregister("r")
    with pytest.raises(NotFound, match="there is no shared memory region 'r'; there are s"):
        memory.status("r")
    assert len(descriptors(tmp_path)) == 1
    memory.unregister()
    assert memory.status() == []
    assert descriptors(tmp_path) == []


def test_regions_are_counted(memory: SharedMemory):
    """Each holds a descriptor; they must not use up the process's."""
    for number in range(MAX_REGIONS):
        memory.register(str(number), "/object", 0, 8)
    with pytest.raises(FailedPrecondition, match=f"there are {MAX_REGIONS} shared memory regions already"):
        memory.register("r", "/object", 0, 8)
    memory.unregister("0")
    memory.register("r", "/object", 0, 8)


# Tensors in regions


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        (place(None), InvalidArgument, "parameter shared_memory_region: the name of a region expected, got None"),
        (place(7), InvalidArgument, "parameter shared_memory_region: the name of a region expected, got 7"),
        (place("s"), NotFound, "there is no shared memory region 's'; there are r"),
        (place("r", None), InvalidArgument, "parameter shared_memory_byte_size: a number of bytes expected, got None"),
        (place("r", True), InvalidArgument, "parameter shared_memory_byte_size: a number of bytes expected, got True"),
        (place("r", -1), InvalidArgument, "parameter shared_memory_byte_size: a number of bytes expected, got -1"),
        (place("r", 8.0), InvalidArgument, "parameter shared_memory_byte_size: a number of bytes expected, got 8.0"),
        (place("r", 8, "0"), InvalidArgument, "parameter shared_memory_offset: a number of bytes expected, got '0'"),
        (place("r", 17), InvalidArgument, "17 bytes at 0 go past the end of shared memory region 'r' of 16 bytes"),
        (place("r", 8, 9), InvalidArgument, "8 bytes at 9 go past the end of shared memory region 'r' of 16 bytes"),
        ({PARAMETERS[2]: 8}, InvalidArgument, "parameter shared_memory_region: the name of a region expected"),
    ],
)
def test_a_tensor_lies_within_its_region(
    memory: SharedMemory, parameters: dict[str, Any], error: type[KilnError], text: str
):
    """Each parameter is checked, and named."""
    memory.register("r", "/object", 0, 16)
    with pytest.raises(error) as refused:
        memory.extent(parameters, "input 'x'")
    assert text in str(refused.value)


def test_other_parameters_are_none_of_its_business(memory: SharedMemory):
    """With it on or off."""
    for each in (memory, OFF):
        assert each.extent({"binary_data_size": 12}, "input 'x'") is None
        assert each.extent({}, "input 'x'") is None


def test_a_sparse_object_makes_no_large_copy(memory: SharedMemory, tmp_path: Path):
    """It may be larger than the machine's memory."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    memory.register("r", "/sparse", 0, 1 << 40)
    with pytest.raises(TooLarge, match=f"{1 << 40} is over the limit of {LIMIT}"):
        extent(memory, "r", 1 << 40)
    assert extent(memory, "r", LIMIT, 1 << 39).read() == bytes(LIMIT)


def test_an_object_cut_short_is_an_error(memory: SharedMemory, tmp_path: Path):
    """Reading and writing past its new end are refused, and it is not made longer; within it all is well."""
    memory.register("r", "/object", 8, 16)
    inside, outside = extent(memory, "r", 4), extent(memory, "r", 8, 8)
    os.truncate(tmp_path / "object", 20)
    assert inside.read() == bytes([8, 9, 10, 11])
    text = "region 'r' ends at byte 24 of '/object', which has been cut to 20 bytes since it was registered"
    with pytest.raises(FailedPrecondition, match=text):
        outside.read()
    with pytest.raises(FailedPrecondition, match=text):
        outside.write(bytes(8))
    assert (tmp_path / "object").stat().st_size == 20


def test_an_object_cut_short_while_it_is_read_is_an_error(
    memory: SharedMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Between two parts of a read, after its size was checked."""
    memory.register("r", "/object", 0, 64)
    pread = os.pread

    def first_half(descriptor: int, byte_size: int, at: int) -> bytes:
        part = pread(descriptor, min(byte_size, 32), at)
        os.truncate(tmp_path / "object", 32)
        return part

    monkeypatch.setattr(os, "pread", first_half)
    with pytest.raises(FailedPrecondition, match="cut to 32 bytes"):
        extent(memory, "r", 64).read()


def test_parts_make_a_whole(memory: SharedMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system may read and write less than was asked for."""
    memory.register("r", "/object", 0, 64)
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, min(size, 5), at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:5], at))
    whole = extent(memory, "r", 33, 1)
    assert whole.read() == bytes(range(1, 34))
    whole.write(bytes(range(100, 133)))
    assert (tmp_path / "object").read_bytes() == bytes([0, *range(100, 133), *range(34, 64)])


def test_a_full_machine_is_an_error(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch):
    """A sparse object takes memory when it is written to."""

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    memory.register("r", "/object", 0, 64)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FailedPrecondition, match="region 'r': '/object' cannot be used: No space left on device"):
        extent(memory, "r").write(b"1")


def test_a_result_is_written_and_told(memory: SharedMemory, tmp_path: Path):
    """Its own size, which may be less than there is room for; more than that is refused."""
    memory.register("r", "/object", 8, 16)
    there = extent(memory, "r", 4, 2)
    assert there.write(b"abc") == {PARAMETERS[0]: "r", PARAMETERS[1]: 3, PARAMETERS[2]: 2}
    assert (tmp_path / "object").read_bytes() == bytes(range(10)) + b"abc" + bytes(range(13, 64))
    with pytest.raises(InvalidArgument, match="shared_memory_byte_size of at least 5 expected, which the result has"):
        there.write(b"abcde")


def test_what_was_read_stays(memory: SharedMemory, tmp_path: Path):
    """A copy: what the client writes afterwards is for the next request."""
    memory.register("r", "/object", 0, 8)
    read = extent(memory, "r").read()
    (tmp_path / "object").write_bytes(bytes(64))
    assert read == bytes(range(8))


def test_a_region_in_use_can_be_unregistered(memory: SharedMemory, tmp_path: Path):
    """The request that has begun ends well; then the object is let go, though it has been unlinked before."""
    memory.register("r", "/object", 0, 8)
    there = extent(memory, "r")
    memory.unregister()
    (tmp_path / "object").unlink()
    there.write(b"12345678")
    assert there.read() == b"12345678"
    assert len(descriptors(tmp_path)) == 1
    del there
    assert descriptors(tmp_path) == []


def test_without_its_folder_it_cannot_be_turned_on(tmp_path: Path):
    """Told at the start, not at the first request."""
    with pytest.raises(FailedPrecondition, match="setting shared_memory: this machine has no"):
        SharedMemory(enabled=True, directory=tmp_path / "nothing")


def test_off_refuses_everything():
    """With the setting's name."""
    for attempt in (
        lambda: OFF.register("r", "/object", 0, 8),
        lambda: OFF.unregister("r"),
        OFF.unregister,
        OFF.status,
        lambda: OFF.extent(place(), "input 'x'"),
    ):
        with pytest.raises(FailedPrecondition, match=r"shared memory is off.* the setting shared_memory turns it on"):
            attempt()
    assert OFF.extensions == ()


# The codecs


def rest_body(**parameters: Any) -> bytes:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", **parameters}
    return json.dumps({"inputs": [tensor]}).encode()


def rpc_body(raw: bytes | None = None, **contents: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    tensor.parameters[PARAMETERS[0]].string_param = "r"
    tensor.parameters[PARAMETERS[1]].int64_param = 8
    if contents:
        tensor.contents.CopyFrom(pb.InferTensorContents(**contents))
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


FP32 = one(shape=(None, 2))


@pytest.mark.parametrize("more", [{"data": [1, 2]}, {"parameters": {**place(), "binary_data_size": 8}}])
def test_rest_data_comes_one_way(memory: SharedMemory, more: dict[str, Any]):
    """In shared memory or in the body."""
    memory.register("r", "/object", 0, 64)
    with pytest.raises(InvalidArgument, match="input 'x': data beside shared_memory_region: one of them expected"):
        rest.decode_infer(rest_body(**{"parameters": place(), **more}), None, only(FP32), 100, memory)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (rpc_body(fp32_contents=[1, 2]), "input 'x': contents beside shared_memory_region: one of them expected"),
        (rpc_body(bytes(8)), "raw_input_contents: 0 expected, one per input that is not in shared memory, got 1"),
    ],
)
def test_grpc_data_comes_one_way(memory: SharedMemory, request_: pb.ModelInferRequest, text: str):
    """In shared memory or in the message."""
    memory.register("r", "/object", 0, 64)
    with pytest.raises(InvalidArgument) as refused:
        rpc.decode_infer(request_, only(FP32), memory)
    assert str(refused.value) == text


def test_a_size_that_is_not_the_shapes_is_refused(memory: SharedMemory):
    """As with any raw tensor."""
    memory.register("r", "/object", 0, 64)
    request = rpc_body()
    request.inputs[0].parameters[PARAMETERS[1]].int64_param = 12
    with pytest.raises(InvalidArgument, match="input 'x': 8 bytes expected for FP32 \\[1, 2\\], got 12"):
        rpc.decode_infer(request, only(FP32), memory)
    body = rest_body(parameters=place("r", 12))
    with pytest.raises(InvalidArgument, match="input 'x': 8 bytes expected for FP32 \\[1, 2\\], got 12"):
        rest.decode_infer(body, None, only(FP32), 100, memory)


def test_a_grpc_parameter_without_a_value_is_refused(memory: SharedMemory):
    """The message can carry one; and an unsigned one is a number too."""
    memory.register("r", "/object", 0, 64)
    request = rpc_body()
    request.inputs[0].parameters[PARAMETERS[2]].uint64_param = 56
    assert rpc.decode_infer(request, only(FP32), memory).inputs["x"].tobytes() == bytes(range(56, 64))
    request.inputs[0].parameters["other"].bool_param = True
    request.inputs[0].parameters[PARAMETERS[1]].ClearField("int64_param")
    with pytest.raises(InvalidArgument, match=r"input 'x': parameter shared_memory_byte_size: .* got None"):
        rpc.decode_infer(request, only(FP32), memory)


def test_grpc_raw_contents_are_of_the_other_inputs(memory: SharedMemory):
    """In their order; and the answer is raw, with an empty place for an output in shared memory."""
    signature = many(a=DataType.FP32, b=DataType.BYTES, c=DataType.INT16)
    memory.register("r", "/object", 0, 64)
    request = pb.ModelInferRequest(model_name="m")
    for name, datatype in (("c", "INT16"), ("b", "BYTES"), ("a", "FP32")):
        request.inputs.add(name=name, datatype=datatype, shape=[1])
    request.inputs[1].parameters[PARAMETERS[0]].string_param = "r"
    request.inputs[1].parameters[PARAMETERS[1]].int64_param = 7
    request.raw_input_contents.extend([b"\1\0", np.float32(1.5).tobytes()])
    extent(memory, "r", 7).write(pack_strings(np.array([b"abc"], object)))
    decoded = rpc.decode_infer(request, only(signature), memory)
    assert [decoded.inputs[name].tolist() for name in "abc"] == [[1.5], [b"abc"], [1]]
    for name in ("out_a", "out_b", "out_c"):
        request.outputs.add(name=name)
    request.outputs[1].parameters[PARAMETERS[0]].string_param = "r"
    request.outputs[1].parameters[PARAMETERS[1]].int64_param = 16
    request.outputs[1].parameters[PARAMETERS[2]].int64_param = 32
    answer = prediction(signature, [1.5], np.array([b"de"], object), [7])
    data = rpc.encode_infer(request, answer, rpc.output_extents(request, memory))
    response = pb.ModelInferResponse.FromString(data)
    assert list(response.raw_output_contents) == [np.float32(1.5).tobytes(), b"", b"\7\0"]
    assert rpc.plain_parameters(response.outputs[1].parameters) == place("r", 6, 32)
    assert extent(memory, "r", 6, 32).read() == b"\2\0\0\0de"


def test_grpc_typed_answers_stay_typed(memory: SharedMemory):
    """Where no input was raw, an output beside one in shared memory has its contents."""
    signature = many(a=DataType.FP32, b=DataType.FP32)
    memory.register("r", "/object", 0, 64)
    request = pb.ModelInferRequest(model_name="m")
    for name in ("out_a", "out_b"):
        request.outputs.add(name=name)
    request.outputs[1].parameters["other"].bool_param = True  # is none of its business
    request.outputs[0].parameters[PARAMETERS[0]].string_param = "r"
    request.outputs[0].parameters[PARAMETERS[1]].int64_param = 4
    data = rpc.encode_infer(request, prediction(signature, [1.5], [2.5]), rpc.output_extents(request, memory))
    response = pb.ModelInferResponse.FromString(data)
    assert not response.raw_output_contents
    assert not response.outputs[0].HasField("contents")
    assert list(response.outputs[1].contents.fp32_contents) == [2.5]


def test_a_grpc_answer_to_inputs_in_shared_memory_is_raw():
    """Real clients look for nothing else, and half precision has no other form."""
    response = pb.ModelInferResponse.FromString(rpc.encode_infer(rpc_body(), prediction(FP32, [[1, 2]])))
    assert list(response.raw_output_contents) == [np.array([1, 2], np.float32).tobytes()]
