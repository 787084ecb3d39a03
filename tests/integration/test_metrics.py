"""What the metrics tell of requests in every dialect."""

from __future__ import annotations

import grpc
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from service.rpc._generated.inference import open_inference_pb2 as oip
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs
from tests.integration.asgi import Client
from tests.integration.conftest import MAX_MESSAGE_BYTES, Kiln
from tests.integration.rpc import INFER, OIP, PREDICT, PREDICTION, Caller, infer_request, predict_request

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
ROW = [1.0, 2.0, 3.0]
TFS_BODY = {"instances": [ROW]}
OIP_BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": ROW}]}
PROTOCOLS = {"rest-tfs", "rest-v2", "grpc-tfs", "grpc-v2"}
MADE_UP = 500
"""Names for each of several ways to ask: a few thousand requests."""


async def ask_each_dialect(client: Client, caller: Caller) -> None:
    """One right request in each."""
    for path, body in (("/v1/models/double:predict", TFS_BODY), ("/v2/models/double/infer", OIP_BODY)):
        assert (await client.post(path, body)).status == 200
    await caller.start(INFER, infer_request())
    await caller.start(PREDICT, predict_request(name="double"))


def samples(kiln: Kiln, name: str) -> dict[str, float]:
    """Of `double`'s version, by protocol."""
    families = text_string_to_metric_families(kiln.metrics.page("application/openmetrics-text")[0].decode())
    return {
        sample.labels["protocol"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and sample.labels.get("model") == "double"
    }


@pytest.mark.parametrize(
    "name",
    [
        "kiln_requests_total",
        "kiln_request_duration_seconds_count",
        "kiln_decode_seconds_count",
        "kiln_encode_seconds_count",
    ],
)
async def test_each_part_of_a_request_is_counted_once(kiln: Kiln, caller: Caller, name: str):
    """In every dialect; the parts take no more time than the whole."""
    await ask_each_dialect(Client(kiln.app), caller)
    assert samples(kiln, name) == dict.fromkeys(PROTOCOLS, 1.0)
    whole = samples(kiln, "kiln_request_duration_seconds_sum")
    decode, encode = (samples(kiln, f"kiln_{part}_seconds_sum") for part in ("decode", "encode"))
    for protocol in PROTOCOLS:
        assert 0 < decode[protocol] + encode[protocol] < whole[protocol]


async def test_made_up_names_make_no_series(kiln: Kiln, caller: Caller):
    """Thousands of models, versions, labels, signatures and methods that there are not, in every dialect."""
    client = Client(kiln.app)
    await ask_each_dialect(client, caller)
    for number in range(-1, MADE_UP):
        if number == 0:
            before = lines(kiln)
        name = f"model-{number}"
        paths = (
            f"/v1/models/{name}:predict",
            f"/v1/models/{name}/labels/{name}:classify",
            f"/v1/models/double/versions/{number + 7}:predict",
            f"/v1/models/double/labels/{name}:predict",
            f"/v1/{name}",
            f"/v2/models/{name}/infer",
            f"/v2/models/double/versions/{number + 7}/infer",
            f"/v2/models/double/versions/{name}/infer",
            f"/v2/{name}",
        )
        for path in paths:
            assert (await client.post(path, OIP_BODY)).status in (400, 404)
        body = {**TFS_BODY, "signature_name": name}
        assert (await client.post("/v1/models/double:predict", body)).status == 400
        refusals = (
            (INFER, infer_request(name)),
            (INFER, infer_request("double", str(number + 7))),
            (PREDICT, predict_request(name=name)),
            (PREDICT, predict_request(name="double", signature_name=name)),
            (PREDICT, predict_request(name="double", version_label=name)),
            (f"inference.GRPCInferenceService/{name}", oip.ServerLiveRequest()),
            ("tensorflow.serving.PredictionService/Classify", tfs.ClassificationRequest(model_spec={"name": name})),
        )
        for method, request in refusals:
            with pytest.raises(grpc.aio.AioRpcError):
                await caller.start(method, request)
    assert lines(kiln) == before
    assert b"model-1" not in kiln.metrics.render()


def lines(kiln: Kiln) -> list[str]:
    """The page's series without their values."""
    page = kiln.metrics.render().decode().splitlines()
    return [line.rpartition(" ")[0] for line in page if line.startswith("kiln_")]


async def test_a_trace_is_the_example_of_a_latency(kiln: Kiln, transport: str):
    """In each dialect the trace id of ``traceparent``, on the page in OpenMetrics; requests without one have none."""
    client = Client(kiln.app)
    async with kiln.channel(transport) as channel:
        await ask_each_dialect(client, Caller(channel))
        assert exemplars(await page(client)) == {}
        traces = {protocol: f"{number:032x}" for number, protocol in enumerate(sorted(PROTOCOLS), 1)}
        parents = {protocol: f"00-{trace}-00f067aa0ba902b7-01" for protocol, trace in traces.items()}
        await client.post("/v1/models/double:predict", TFS_BODY, traceparent=parents["rest-tfs"])
        await client.post("/v2/models/double/infer", OIP_BODY, traceparent=parents["rest-v2"])
        for method, request, protocol in (
            (INFER, infer_request(), "grpc-v2"),
            (PREDICT, predict_request(name="double"), "grpc-tfs"),
        ):
            call = channel.unary_unary(f"/{method}")
            await call(request.SerializeToString(), metadata=(("traceparent", parents[protocol]),))
        assert exemplars(await page(client)) == traces


async def page(client: Client) -> str:
    response = await client.get("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    return response.body.decode()


def exemplars(text: str) -> dict[str, str]:
    """Trace ids by protocol."""
    return {
        sample.labels["protocol"]: sample.exemplar.labels["trace_id"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }


async def test_a_stream_is_of_one_trace(kiln: Kiln, transport: str):
    """All messages of a stream belong to the trace of its call."""
    client = Client(kiln.app)
    async with kiln.channel(transport) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        call = stream(metadata=(("traceparent", PARENT),))
        for _ in range(2):
            await call.write(infer_request().SerializeToString())
            await call.read()
        await call.done_writing()
    assert exemplars(await page(client)) == {"grpc-v2": TRACE}


async def test_the_plain_page_has_no_traces(kiln: Kiln):
    """Prometheus's own text format has no place for them."""
    client = Client(kiln.app)
    await client.post("/v2/models/double/infer", OIP_BODY, traceparent=PARENT)
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert TRACE not in response.body.decode()


async def test_a_padded_batch_is_not_full(kiln: Kiln):
    """What a plan was given beyond the callers' rows lowers the fill, and not the rows."""
    kiln.model.bucket = 4
    await Client(kiln.app).post("/v2/models/double/infer", OIP_BODY)
    labels = {"model": "double", "version": "1"}
    assert kiln.metrics.registry.get_sample_value("kiln_batch_fill_ratio_sum", labels) == 0.25
    assert kiln.metrics.registry.get_sample_value("kiln_batch_rows_sum", labels) == 1


def refusals(kiln: Kiln) -> dict[tuple[str, str], float]:
    """Requests that are of no model, by protocol and code."""
    families = {family.name: family for family in kiln.metrics.registry.collect()}
    return {
        (sample.labels["protocol"], sample.labels["code"]): sample.value
        for sample in families["kiln_requests"].samples
        if sample.labels["model"] == ""
    }


@pytest.mark.parametrize(
    ("method", "protocol"),
    [
        (INFER, "grpc-v2"),
        (PREDICT, "grpc-tfs"),
        (f"{PREDICTION}/Classify", "grpc-tfs"),
        (f"{PREDICTION}/Regress", "grpc-tfs"),
        (f"{PREDICTION}/MultiInference", "grpc-tfs"),
    ],
)
async def test_messages_that_are_no_requests_are_counted(kiln: Kiln, caller: Caller, method: str, protocol: str):
    """One that cannot be parsed, and one that is too large, of no model; other methods are not counted."""
    await caller.refusal(method, b"\xff")
    await caller.refusal(method, b"\0" * (MAX_MESSAGE_BYTES + 1))
    await caller.refusal(f"{OIP}/ModelMetadata", b"\xff")
    assert refusals(kiln) == {(protocol, "invalid_argument"): 1, (protocol, "too_large"): 1}


async def test_messages_of_a_stream_that_are_no_requests_are_counted(kiln: Kiln, transport: str):
    """Each of them; one that is a request counts for its model."""
    async with kiln.channel(transport) as channel:
        call = channel.stream_stream(f"/{OIP}/ModelStreamInfer")()
        messages = (b"\xff", b"\0" * (MAX_MESSAGE_BYTES + 1), infer_request("double", "x").SerializeToString())
        for message in (*messages, infer_request().SerializeToString()):
            await call.write(message)
            await call.read()
        await call.done_writing()
    codes = ("invalid_argument", "too_large", "not_found")
    assert refusals(kiln) == {("grpc-v2", code): 1 for code in codes}
    assert samples(kiln, "kiln_requests_total") == {"grpc-v2": 1}


async def test_versions_that_there_cannot_be_are_counted(kiln: Kiln, caller: Caller):
    """As requests for no model, in each dialect that has them, once each."""
    client = Client(kiln.app)
    for path in (
        "/v2/models/double/versions/x/infer",
        f"/v1/models/double/versions/{2**63}:predict",
        "/predict/double/versions/x",
    ):
        assert (await client.post(path, OIP_BODY)).status == 404
    assert (await client.get(f"/v1/models/double/versions/{2**63}")).status == 404
    await caller.refusal(INFER, infer_request("double", "x"))
    protocols = ("rest-v2", "rest-tfs", "rest-predict", "grpc-v2")
    assert refusals(kiln) == {(protocol, "not_found"): 1 for protocol in protocols}
