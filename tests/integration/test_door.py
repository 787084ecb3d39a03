"""``POST /predict``: the real app before models whose inputs and outputs mean something."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from service.batching.queue import Limits
from service.meaning import ModelMeaning
from service.metrics import Metrics
from service.registry.meaning import read_meaning, with_meaning
from service.registry.registry import Registry
from service.registry.repository import Kind, Repository, Source
from service.registry.version import RegistryOptions
from service.tensors import DataType, Signature, TensorSpec
from tests.fakes import FakeModel
from tests.integration.asgi import Client
from tests.integration.conftest import MAX_MESSAGE_BYTES, Kiln, start_kiln
from tests.signatures import many, one, only

FP32, BYTES = DataType.FP32, DataType.BYTES


def meant(signature: Signature, **said: Any) -> dict[str, Signature]:
    return with_meaning(only(signature), ModelMeaning.model_validate(said))


def picture_signature() -> Signature:
    """The picture, doubled."""
    return Signature(
        "serving_default",
        (TensorSpec("image", FP32, (None, 2, 2, 1)),),
        (TensorSpec("picture", FP32, (None, 2, 2, 1)),),
    )


MODELS = {
    "house": meant(
        many(area=FP32, driveway=BYTES),
        description="Price of a house",
        inputs={"area": {"unit": "m²", "min": 1, "max": 1000}, "driveway": {"values": ["yes", "no"]}},
        outputs={"out_area": {"unit": "CAD", "decimals": 0}},
        example={"area": 120, "driveway": "yes"},
    ),
    "picture": meant(
        picture_signature(),
        inputs={"image": {"kind": "image", "mode": "L"}},
        outputs={"picture": {"kind": "image", "scale": 0.5}},
    ),
    "topic": meant(one(BYTES, (None,)), inputs={"x": {"kind": "text"}}),
    "classes": meant(one(FP32, (None, 2)), outputs={"y": {"labels": ["cat", "dog"], "logits": True, "top_k": 1}}),
    "scalar": only(one(FP32, ())),
    "vector": meant(
        Signature(
            "serving_default",
            (TensorSpec("x", FP32, (None, 2)), TensorSpec("cold", FP32, (None,)), TensorSpec("mood", BYTES, (None,))),
            (
                TensorSpec("y", FP32, (None, 2)),
                TensorSpec("colder", FP32, (None,)),
                TensorSpec("moods", BYTES, (None,)),
            ),
        ),
        inputs={
            "x": {"columns": ["left", "right"]},
            "cold": {"max": -1, "description": "in winter"},
            "mood": {"values": ["glad"]},
        },
        outputs={"y": {"kind": "series", "unit": "m", "description": "both sides"}},
    ),
    "plain": {"serving_default": one(), "half": one(DataType.INT32, (None,), name="half")},
}


@pytest_asyncio.fixture
async def kiln() -> AsyncIterator[Kiln]:
    """A server of `MODELS`, each of which doubles its inputs."""
    kiln = await start_kiln({name: FakeModel(signatures) for name, signatures in MODELS.items()})
    yield kiln
    await kiln.stop(5.0, 0.0)


@pytest.fixture
def client(kiln: Kiln) -> Client:
    return Client(kiln.app)


def png(*values: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array(values, np.uint8).reshape(2, -1)).save(file, "PNG")
    return file.getvalue()


HOUSE = {"area": 100.4, "driveway": "yes"}
PRICE = {"out_area": {"value": 201, "unit": "CAD"}, "out_driveway": "yesyes"}


@pytest.mark.usefixtures("placed")
@pytest.mark.parametrize(
    ("model", "kind", "body", "expected"),
    [
        ("house", "application/json", json.dumps(HOUSE).encode(), PRICE),
        ("house", "application/json", json.dumps([HOUSE, HOUSE]).encode(), [PRICE, PRICE]),
        ("house", "text/csv", b"driveway,area\nyes,100.4\n", [PRICE]),
        ("plain", "text/csv", b"1,2,3\n4,5,6\n", [{"y": [2, 4, 6]}, {"y": [8, 10, 12]}]),
        ("house", "application/x-www-form-urlencoded", b"area=100.4&driveway=yes", PRICE),
        ("topic", "text/plain; charset=utf-8", "é".encode(), {"y": "éé"}),
        ("classes", "application/json", b'{"x": [0, 9]}', {"y": [{"label": "dog", "id": 1, "probability": 1.0}]}),
        ("scalar", "application/json", b'[{"x": 1}, {"x": 2.5}]', [{"y": 2.0}, {"y": 5.0}]),
        ("plain", "application/json", b'{"x": [1, 2, 3]}', {"y": [2, 4, 6]}),
        ("plain?signature=half", "application/json", b'{"x": 3}', {"y": 6}),
        ("plain/versions/1", "application/json", b'{"x": [1, 2, 3]}', {"y": [2, 4, 6]}),
    ],
)
async def test_answers(client: Client, model: str, kind: str, body: bytes, expected: Any):
    """Of each kind of body."""
    response = await client.post(f"/predict/{model}", body, content_type=kind)
    assert (response.status, response.json) == (200, expected)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["vary"] == "accept"
    assert response.headers["server-timing"].startswith("queue;dur=")


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "multipart/form-data; boundary=x"])
async def test_a_picture_in_and_out(client: Client, kind: str):
    """Raw or in a form; the answer is a PNG for whoever accepts it."""
    body = png(0, 100, 200, 250)
    if kind.startswith("multipart"):
        head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        body = head + body + b"\r\n--x--\r\n"
    response = await client.post("/predict/picture", body, content_type=kind, accept="image/*")
    assert (response.status, response.headers["content-type"]) == (200, "image/png")
    assert np.asarray(Image.open(io.BytesIO(response.body))).tolist() == [[0, 100], [200, 250]]


@pytest.mark.parametrize(
    ("accept", "kind", "text"),
    [
        ("text/csv", "text/csv; charset=utf-8", "out_area,out_driveway\r\n201,yesyes\r\n"),
        ("text/plain", "text/plain; charset=utf-8", "out_area: 201 CAD, out_driveway: yesyes\n"),
    ],
)
async def test_other_answers(client: Client, accept: str, kind: str, text: str):
    """By the Accept header."""
    response = await client.post("/predict/house", HOUSE, accept=accept)
    assert (response.status, response.headers["content-type"], response.body.decode()) == (200, kind, text)


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "text"),
    [
        ("house", {"area": 1}, {}, 400, "field 'driveway' is missing: a text expected; got \"area\""),
        ("house", {**HOUSE, "rooms": 3}, {}, 400, 'unknown field "rooms": area, driveway expected'),
        ("house", {**HOUSE, "area": "1"}, {}, 400, "field 'area': a number expected, got \"1\""),
        ("house", {**HOUSE, "area": 0}, {}, 400, "field 'area': at least 1 m² expected, got 0.0"),
        ("house", {**HOUSE, "driveway": "x"}, {}, 400, "field 'driveway': one of yes, no expected, got \"x\""),
        ("house", [HOUSE, {}], {}, 400, "record 1: field 'area' is missing: a number expected; got none"),
        ("house", HOUSE, {"kiln_timeout_ms": "x"}, 400, "header Kiln-Timeout-Ms"),
        ("house", HOUSE, {"accept": "image/png"}, 406, "header Accept: one of application/json, text/csv"),
        ("house", b"x", {"content_type": "text/plain"}, 415, "header Content-Type: one of application/json"),
        ("house", b"x", {"content_type": "image/png"}, 415, "expected for the fields area (number), driveway (text)"),
        ("house", b"x", {"content_type": "video/mp4"}, 415, "got 'video/mp4'"),
        ("house", b" " * (MAX_MESSAGE_BYTES + 1), {}, 413, "over the limit"),
        ("house?signature=x", HOUSE, {}, 400, 'Serving signature name: "x" not found'),
        ("house?signature=x&signature=y", HOUSE, {}, 400, "query: the parameter 'signature' once expected"),
        ("house?a=1", HOUSE, {}, 400, "query: the parameter 'signature' once expected, got 'a'"),
        ("house?" + "a=1&" * 17, HOUSE, {}, 400, "query: "),
        ("picture", b"\x89PNG", {"content_type": "image/png"}, 400, "field 'image': a PNG or JPEG image expected"),
        ("nobody", HOUSE, {}, 404, "Servable not found"),
        ("house/versions/2", HOUSE, {}, 404, "model 'house' has version 1"),
        ("house/versions/x", HOUSE, {}, 404, "versions are integers"),
        ("house/labels/x", HOUSE, {}, 400, "x"),
        ("house/x", HOUSE, {}, 404, "there is no /predict/house/x"),
    ],
)
async def test_refusals(client: Client, path: str, body: Any, headers: dict[str, str], status: int, text: str):
    """In the shape of the other dialects' errors."""
    response = await client.post(f"/predict/{path}", body, **headers)
    assert response.status == status
    assert text in response.error


async def test_it_is_asked_with_post(client: Client):
    """Nothing else."""
    response = await client.get("/predict/house")
    assert (response.status, response.headers["allow"]) == (405, "POST")
    assert response.error == "/predict/house is asked with POST, not GET"


@pytest.mark.usefixtures("placed")
async def test_a_list_is_one_batch(kiln: Kiln, client: Client):
    """Of several rows; what cannot be fused is a run for each."""
    await client.post("/predict/plain", [{"x": [1, 2, 3]}] * 4)
    await client.post("/predict/scalar", [{"x": 1}] * 3)
    response = (await client.get("/metrics")).body.decode()
    assert 'kiln_requests_total{code="ok",model="plain",protocol="rest-predict",version="1"} 1.0' in response
    assert 'kiln_batch_rows_sum{model="plain",version="1"} 4.0' in response
    assert 'kiln_batch_rows_count{model="plain",version="1"} 1.0' in response
    assert 'kiln_batch_rows_count{model="scalar",version="1"} 3.0' in response


async def test_a_deadline_that_has_passed():
    """Is told as elsewhere, and the version is given back."""
    model = FakeModel()
    kiln = await start_kiln({"double": model})
    model.block()
    client = Client(kiln.app)
    first = asyncio.create_task(client.post("/predict/double", {"x": [1, 2, 3]}))
    await asyncio.to_thread(model.entered.acquire)
    late = await client.post("/predict/double", {"x": [1, 2, 3]}, kiln_timeout_ms="1")
    assert late.status == 504
    instant = await client.post("/predict/double", {"x": [1, 2, 3]}, kiln_timeout_ms="0.000001")
    assert (instant.status, instant.error) == (504, "the deadline passed before the request was queued")
    model.unblock()
    assert (await first).status == 200
    assert await kiln.stop(5.0, 0.0)


async def test_ids_come_back(client: Client):
    """As in the other dialects."""
    response = await client.post("/predict/house", HOUSE, x_request_id="42")
    assert response.headers["x-request-id"] == "42"


@pytest.mark.usefixtures("placed")
async def test_the_document_has_each_model(client: Client):
    """In its own terms: fields with units and values, its example, what it takes and answers."""
    paths = (await client.get("/openapi.json")).json["paths"]
    house = paths["/predict/house"]["post"]
    assert house["summary"] == "house: Price of a house"
    content = house["requestBody"]["content"]["application/json"]
    assert content["example"] == {"area": 120, "driveway": "yes"}
    record = content["schema"]["oneOf"][0]
    assert record["required"] == ["area", "driveway"]
    assert record["properties"]["area"] == {"type": "number", "minimum": 1.0, "maximum": 1000.0, "description": "in m²"}
    assert record["properties"]["driveway"] == {"type": "string", "enum": ["yes", "no"]}
    answer = house["responses"]["200"]["content"]["application/json"]
    assert answer["example"] == {"out_area": {"value": 0, "unit": "CAD"}, "out_driveway": "text"}
    assert set(paths["/predict/picture"]["post"]["responses"]["200"]["content"]) == {"application/json", "image/png"}
    assert "image/png" in paths["/predict/picture"]["post"]["requestBody"]["content"]
    assert "text/plain" in paths["/predict/topic"]["post"]["requestBody"]["content"]
    labels = paths["/predict/classes"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]["oneOf"][0]
    assert labels["properties"]["y"]["items"]["properties"]["label"]["enum"] == ["cat", "dog"]
    vector = paths["/predict/vector"]["post"]["requestBody"]["content"]["application/json"]
    assert vector["schema"]["oneOf"][0]["required"] == ["left", "right", "cold", "mood"]
    assert vector["example"] == {"x": [0, 0], "cold": -1, "mood": "glad"}
    series = paths["/predict/vector"]["post"]["responses"]["200"]["content"]["application/json"]
    assert series["example"]["y"] == {"values": [0, 0], "unit": "m"}
    assert series["schema"]["oneOf"][0]["properties"]["y"]["description"] == "both sides"
    assert {f"/predict/{name}" for name in MODELS} < set(paths)


@pytest.mark.parametrize("model", MODELS)
async def test_the_example_of_the_document_works(client: Client, model: str):
    """As it is shown."""
    paths = (await client.get("/openapi.json")).json["paths"]
    example = paths[f"/predict/{model}"]["post"]["requestBody"]["content"]["application/json"]["example"]
    response = await client.post(f"/predict/{model}", example)
    assert response.status == 200, response.body
    shown = paths[f"/predict/{model}"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    assert list(response.json) == list(shown)


async def load(tmp_path: Path, text: str) -> tuple[Registry, Any]:
    """A version whose folder has that ``model.yaml``, and its status."""
    (tmp_path / "model.yaml").write_text(text)
    options = RegistryOptions(
        materialize=lambda source: source.path,
        load=lambda path, config: FakeModel(),
        limits=Limits(8, 64, 1 << 20),
        meaning=lambda source: read_meaning(source.path),
    )
    registry = Registry(Repository((Source("double", 1, Kind.SAVED_MODEL, tmp_path),)), options, Metrics())
    await registry.load_all()
    (status,) = registry.all_statuses()
    return registry, status.told()


async def test_a_version_is_read_with_its_meaning(tmp_path: Path):
    """From its folder, when it is loaded."""
    registry, status = await load(tmp_path, "inputs: {x: {unit: m}}")
    assert (status["state"], status["left_out"]) == ("READY", "")
    await registry.stop(5.0)


async def test_a_broken_file_does_not_keep_a_model_from_being_served(tmp_path: Path):
    """The status tells of it."""
    registry, status = await load(tmp_path, "inputs: {z: {}}")
    assert status["state"] == "READY"
    assert status["left_out"] == "model.yaml: unknown input 'z': there are x"
    await registry.stop(5.0)
