"""Both gRPC codecs: messages become the tensors that they carry, and tensors the messages that clients read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import FailedPrecondition, InvalidArgument
from service.predictor import ModelInfo, ModelRef
from service.registry.lifecycle import State, VersionStatus
from service.rpc import open_inference_codec as oip
from service.rpc import tfserving_codec as tfs
from service.rpc._generated.inference import open_inference_pb2 as oip_pb
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as tfs_pb
from service.rpc.messages import parse
from service.tensors import Array, DataType, Signature, TensorSpec, pack_strings
from tests.signatures import NUMERIC, arrays_of, assert_same, many, one, only, prediction

PAIR = many(a=DataType.FP32, b=DataType.BYTES)
WITH_CONTENTS = [dtype for dtype in DataType if dtype not in {DataType.FP16, DataType.BF16}]


def values_of(dtype: DataType, array: Array) -> list[Any]:
    """Elements as TensorFlow's typed lists hold them: half precision as bit patterns."""
    if dtype in {DataType.FP16, DataType.BF16}:
        return array.reshape(-1).view(np.uint16).tolist()
    return array.reshape(-1).tolist()


def tfs_request(
    dtype: DataType = DataType.FP32,
    shape: tuple[int, ...] = (1, 3),
    values: Any = (),
    content: bytes = b"",
    **spec: Any,
) -> tfs_pb.PredictRequest:
    """One input ``x``, as a typed list or as content."""
    request = tfs_pb.PredictRequest(model_spec=tfs_pb.ModelSpec(name="m", **spec))
    proto = request.inputs["x"]
    proto.dtype = dtype.number  # type: ignore[assignment]
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    proto.tensor_content = content
    getattr(proto, tfs.VALUES[dtype]).extend(values)
    return request


def oip_request(
    dtype: str = "FP32", shape: tuple[int, ...] = (1, 3), raw: bytes | None = None, **contents: Any
) -> oip_pb.ModelInferRequest:
    """One input ``x``, raw or typed."""
    request = oip_pb.ModelInferRequest(model_name="m", id="42")
    tensor = request.inputs.add(name="x", datatype=dtype, shape=shape)
    if raw is not None:
        request.raw_input_contents.append(raw)
    if contents:
        tensor.contents.CopyFrom(oip_pb.InferTensorContents(**contents))
    return request


def tfs_refusal(request: tfs_pb.PredictRequest, signature: Signature) -> str:
    with pytest.raises(InvalidArgument) as refused:
        tfs.decode_predict(request, only(signature))
    return str(refused.value)


def oip_refusal(request: oip_pb.ModelInferRequest, signature: Signature) -> str:
    with pytest.raises(InvalidArgument) as refused:
        oip.decode_infer(request, only(signature))
    return str(refused.value)


# TensorFlow Serving


@pytest.mark.parametrize("dtype", DataType)
@settings(max_examples=25)
@given(data=st.data())
def test_tfs_tensors_of_every_type_come_back_as_they_went(dtype: DataType, data: st.DataObject):
    """What is answered for a tensor, sent back as an input, is that tensor."""
    array = data.draw(arrays_of(dtype))
    answer = tfs_pb.PredictResponse.FromString(
        tfs.encode_predict(tfs_pb.PredictRequest(), prediction(one(dtype, None), array))
    )
    request = tfs_pb.PredictRequest()
    request.inputs["x"].CopyFrom(answer.outputs["y"])
    decoded = tfs.decode_predict(request, only(one(dtype, None)))
    assert not decoded.strict_shapes
    assert_same(decoded.inputs["x"], array)


@pytest.mark.parametrize("dtype", DataType)
@settings(max_examples=25)
@given(data=st.data(), missing=st.integers(0, 27))
def test_tfs_typed_lists_repeat_their_last_value(dtype: DataType, data: st.DataObject, missing: int):
    """A list shorter than the shape is filled up with its last value, an empty one with zeros."""
    array = data.draw(arrays_of(dtype))
    values = values_of(dtype, array)
    given_values = values[: max(len(values) - missing, 0)]
    decoded = tfs.decode_predict(tfs_request(dtype, array.shape, given_values), only(one(dtype, None)))
    default: Any = b"" if dtype is DataType.BYTES else 0
    last = given_values[-1] if given_values else default
    expected = given_values + [last] * (len(values) - len(given_values))
    assert decoded.inputs["x"].dtype == array.dtype
    assert decoded.inputs["x"].shape == array.shape
    np.testing.assert_array_equal(values_of(dtype, decoded.inputs["x"]), expected)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (tfs_request(DataType.INT32), "expected datatype DT_FLOAT, got DT_INT32"),
        (tfs_request(values=[1] * 4), "float_val with up to 3 values expected for shape [1, 3], got 4"),
        (tfs_request(content=bytes(8)), "12 bytes expected for FP32 [1, 3], got 8"),
        (tfs_request(shape=(1, -1)), "a shape has no negative sizes, got [1, -1]"),
        (tfs_request(shape=(1,) * 65), "a shape has at most 64 dimensions, got 65"),
        (
            tfs_request(shape=(2**21,), values=[1]),
            "1 values cannot stand for 2097152 elements, only for up to 1048576",
        ),
        (
            tfs_request(shape=(2**41,)),
            "at most 16777216 elements expected (max_tensor_elements), got shape [2199023255552]",
        ),
    ],
)
def test_tfs_tensors_that_do_not_fit_are_refused(request_: tfs_pb.PredictRequest, text: str):
    """Names the input, what was expected and what came; a few bytes never become gigabytes."""
    assert tfs_refusal(request_, one()) == f"input 'x': {text}"


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(DataType.INT8, 128), (DataType.INT16, -(2**15) - 1), (DataType.UINT8, -1), (DataType.UINT16, 2**16)],
)
def test_tfs_narrow_integers_are_checked(dtype: DataType, value: int):
    """``int_val`` carries 32 bits; what the input cannot hold is refused, not cut."""
    assert (
        tfs_refusal(tfs_request(dtype, (1,), [value]), one(dtype)) == f"input 'x': {value} does not fit {dtype.value}"
    )


def test_tfs_strings_are_not_taken_as_content():
    """They have a list of their own."""
    request = tfs_request(DataType.BYTES, (1,), content=b"abc")
    assert "strings are expected in string_val" in tfs_refusal(request, one(DataType.BYTES))


def test_tfs_a_type_that_no_model_takes_is_told_by_number():
    """Numbers beyond those that the messages name are kept."""
    request = tfs_request()
    request.inputs["x"].dtype = 21  # type: ignore[assignment]
    assert tfs_refusal(request, one()) == "input 'x': expected datatype DT_FLOAT, got DataType 21"


def test_tfs_an_unknown_rank_is_refused():
    """A request's tensor has a shape."""
    request = tfs_request()
    request.inputs["x"].tensor_shape.unknown_rank = True
    assert tfs_refusal(request, one()) == "input 'x': a shape is expected, got one of unknown rank"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a"], "input 'b' is missing: signature 'serving_default' takes a, b; received a"),
        (["a", "b", "c"], "unknown input 'c': signature 'serving_default' takes a, b"),
        ([], "input 'a' is missing: signature 'serving_default' takes a, b; received none"),
    ],
)
def test_inputs_go_by_name_in_both(names: list[str], text: str):
    """Exactly the signature's inputs are expected."""
    request, infer = tfs_pb.PredictRequest(), oip_pb.ModelInferRequest()
    for name in names:
        request.inputs[name].dtype = DataType.FP32.number  # type: ignore[assignment]
        infer.inputs.add(name=name, datatype="FP32")
    assert tfs_refusal(request, PAIR) == text
    assert oip_refusal(infer, PAIR) == text


def test_unknown_outputs_are_refused_in_both():
    """Before anything is run."""
    request, infer = tfs_request(values=[1]), oip_request(raw=bytes(12))
    request.output_filter.append("z")
    infer.outputs.add(name="z")
    assert tfs_refusal(request, one()) == "unknown output 'z' in output_filter: signature 'serving_default' gives y"
    assert oip_refusal(infer, one()) == "unknown output 'z': signature 'serving_default' gives y"


def test_the_signature_may_be_named_in_both():
    """By the model spec, or by the parameter ``signature_name``; one that is not there is a failed precondition."""
    signatures = {name: one(name=name) for name in ("serving_default", "other")}
    infer = oip_request(raw=bytes(12))
    assert oip.decode_infer(infer, signatures).signature.name == "serving_default"
    infer.parameters["signature_name"].string_param = "other"
    assert oip.decode_infer(infer, signatures).signature.name == "other"
    assert tfs.decode_predict(tfs_request(signature_name="other"), signatures).signature.name == "other"
    infer.parameters["signature_name"].string_param = "no"
    with pytest.raises(FailedPrecondition, match='"no" not found'):
        oip.decode_infer(infer, signatures)
    with pytest.raises(FailedPrecondition, match='"no" not found'):
        tfs.decode_predict(tfs_request(signature_name="no"), signatures)


def test_tfs_an_answer_says_who_made_it_and_has_the_outputs_asked_for():
    """All outputs, or those of the filter."""
    answer = prediction(PAIR, [1], ["é"])
    response = tfs_pb.PredictResponse.FromString(tfs.encode_predict(tfs_pb.PredictRequest(), answer))
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("m", 3, "serving_default")
    assert set(response.outputs) == {"out_a", "out_b"}
    assert response.outputs["out_b"].string_val == ["é".encode()]
    request = tfs_pb.PredictRequest(output_filter=["out_b"])
    assert set(tfs_pb.PredictResponse.FromString(tfs.encode_predict(request, answer)).outputs) == {"out_b"}


@pytest.mark.parametrize(
    ("spec", "ref"),
    [
        (tfs_pb.ModelSpec(name="m"), ModelRef("m")),
        (tfs_pb.ModelSpec(name="m", version={"value": 0}), ModelRef("m", 0)),
        (tfs_pb.ModelSpec(name="m", version_label="stable"), ModelRef("m", None, "stable")),
    ],
)
def test_tfs_a_model_spec_means_a_version_a_label_or_the_default(spec: tfs_pb.ModelSpec, ref: ModelRef):
    """Version 0 is a version."""
    assert tfs.model_ref(spec) == ref


@pytest.mark.parametrize(("fields", "got"), [([], "none"), (["signature_def", "x"], "signature_def, x")])
def test_tfs_metadata_has_one_field_only(fields: list[str], got: str):
    """As TensorFlow Serving has it."""
    request = tfs_pb.GetModelMetadataRequest(metadata_field=fields)
    with pytest.raises(InvalidArgument) as refused:
        tfs.encode_metadata(request, ModelInfo("m", 3, (3,), "keras", only(one())))
    assert str(refused.value) == f"metadata_field: 'signature_def' expected, got {got}"


def test_tfs_metadata_describes_every_signature():
    """Sizes are -1 where open; a rank that is open has none."""
    signature = Signature(
        "s", (TensorSpec("x", DataType.FP16, (None, 3), "x:0"),), (TensorSpec("y", DataType.BYTES, None),)
    )
    request = tfs_pb.GetModelMetadataRequest(metadata_field=["signature_def"])
    info = ModelInfo("m", 3, (3,), "keras", only(signature))
    response = tfs_pb.GetModelMetadataResponse.FromString(tfs.encode_metadata(request, info))
    assert (response.model_spec.name, response.model_spec.version.value) == ("m", 3)
    packed = response.metadata["signature_def"]
    assert packed.type_url == "type.googleapis.com/tensorflow.serving.SignatureDefMap"
    definition = tfs_pb.SignatureDefMap.FromString(packed.value).signature_def["s"]
    assert definition.method_name == "tensorflow/serving/predict"
    x, y = definition.inputs["x"], definition.outputs["y"]
    assert (x.name, x.dtype, [dim.size for dim in x.tensor_shape.dim]) == ("x:0", 19, [-1, 3])
    assert (y.dtype, y.tensor_shape.unknown_rank, len(y.tensor_shape.dim)) == (7, True, 0)


@pytest.mark.parametrize("state", State)
def test_tfs_every_state_has_its_counterpart(state: State):
    """A version that failed has ended, with its reason and an error code."""
    response = tfs_pb.GetModelStatusResponse.FromString(tfs.encode_statuses([VersionStatus("m", 3, state, "why")]))
    (status,) = response.model_version_status
    assert status.version == 3
    assert status.state != tfs_pb.ModelVersionStatus.UNKNOWN
    assert status.status.error_message == "why"
    assert status.status.error_code == (9 if state is State.FAILED else 0)
    assert (status.state == tfs_pb.ModelVersionStatus.AVAILABLE) is (state is State.READY)


# Open Inference Protocol


@pytest.mark.parametrize("dtype", DataType)
@settings(max_examples=25)
@given(data=st.data())
def test_oip_raw_tensors_of_every_type_come_back_as_they_went(dtype: DataType, data: st.DataObject):
    """A raw request gets a raw answer, which sent back is the same tensor."""
    array = data.draw(arrays_of(dtype))
    raw = pack_strings(array) if dtype is DataType.BYTES else array.tobytes()
    request = oip_request(dtype.value, array.shape, raw)
    decoded = oip.decode_infer(request, only(one(dtype, None)))
    assert decoded.strict_shapes
    assert_same(decoded.inputs["x"], array)
    answer = oip_pb.ModelInferResponse.FromString(oip.encode_infer(request, prediction(one(dtype, None), array)))
    assert answer.raw_output_contents == [raw]
    (output,) = answer.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("y", dtype.value, array.shape)
    assert not output.HasField("contents")


@pytest.mark.parametrize("dtype", WITH_CONTENTS)
@settings(max_examples=25)
@given(data=st.data())
def test_oip_typed_tensors_come_back_as_they_went(dtype: DataType, data: st.DataObject):
    """A typed request gets a typed answer, which sent back is the same tensor."""
    array = data.draw(arrays_of(dtype))
    answer = oip_pb.ModelInferResponse.FromString(
        oip.encode_infer(oip_pb.ModelInferRequest(id="42"), prediction(one(dtype, None), array))
    )
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", "42")
    assert not answer.raw_output_contents
    request = oip_request(dtype.value, array.shape)
    request.inputs[0].contents.CopyFrom(answer.outputs[0].contents)
    decoded = oip.decode_infer(request, only(one(dtype, None)))
    assert decoded.inputs["x"].dtype == array.dtype
    np.testing.assert_array_equal(decoded.inputs["x"], array)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (oip_request("INT32", raw=bytes(12)), "expected datatype FP32, got 'INT32'"),
        (oip_request(shape=(-1, 3), raw=b""), "a shape has no negative sizes, got [-1, 3]"),
        (oip_request(raw=bytes(8)), "12 bytes expected for FP32 [1, 3], got 8"),
        (
            oip_request(raw=bytes(12), fp32_contents=[1, 2, 3]),
            "contents beside raw_input_contents: one of them expected",
        ),
        (oip_request(fp32_contents=[1, 2]), "3 elements expected for shape [1, 3], got 2"),
        (oip_request(), "3 elements expected for shape [1, 3], got 0"),
        (oip_request(int_contents=[1], fp32_contents=[1]), "fp32_contents expected for FP32, got int_contents, fp32_"),
    ],
)
def test_oip_tensors_that_do_not_fit_are_refused(request_: oip_pb.ModelInferRequest, text: str):
    """Names the input, what was expected and what came."""
    assert oip_refusal(request_, one()).startswith(f"input 'x': {text}")


@pytest.mark.parametrize(
    ("dtype", "contents", "value"),
    [(DataType.INT8, "int", 128), (DataType.INT16, "int", -(2**15) - 1), (DataType.UINT8, "uint", 256)],
)
def test_oip_narrow_integers_are_checked(dtype: DataType, contents: str, value: int):
    """The lists carry 32 bits; what the input cannot hold is refused, not cut."""
    fields: dict[str, Any] = {f"{contents}_contents": [value]}
    request = oip_request(dtype.value, (1,), **fields)
    assert oip_refusal(request, one(dtype)) == f"input 'x': {value} does not fit {dtype.value}"


@pytest.mark.parametrize("dtype", [DataType.FP16, DataType.BF16])
def test_oip_half_precision_is_raw_both_ways(dtype: DataType):
    """There are no typed contents for it; the text says what to do."""
    assert (
        oip_refusal(oip_request(dtype.value), one(dtype)) == f"input 'x': {dtype.value} must come in raw_input_contents"
    )
    answer, request = prediction(one(dtype), [[1, 2, 3]]), oip_pb.ModelInferRequest()
    with pytest.raises(InvalidArgument, match="the parameter binary_data_output"):
        oip.encode_infer(request, answer)
    request.parameters["binary_data_output"].bool_param = True
    raw = oip_pb.ModelInferResponse.FromString(oip.encode_infer(request, answer)).raw_output_contents
    assert raw == [answer.outputs["y"].tobytes()]


def test_oip_raw_contents_are_one_per_input():
    """All of the inputs are raw or none is."""
    request = oip_request(raw=bytes(12))
    request.raw_input_contents.append(b"")
    assert oip_refusal(request, one()) == "raw_input_contents: 1 expected, one per input, got 2"


def test_oip_an_input_is_given_once():
    """Twice would leave it open which is meant."""
    request = oip_request()
    request.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    assert oip_refusal(request, one()) == "an input is given twice"


def test_oip_outputs_come_in_the_order_asked_for():
    """Else in that of the signature; strings as bytes."""
    request = oip_pb.ModelInferRequest()
    for name in ("out_b", "out_a"):
        request.outputs.add(name=name)
    answer = oip_pb.ModelInferResponse.FromString(oip.encode_infer(request, prediction(PAIR, [1.5], ["é"])))
    assert [output.name for output in answer.outputs] == ["out_b", "out_a"]
    assert answer.outputs[0].contents.bytes_contents == ["é".encode()]


def test_oip_metadata_is_that_of_the_default_signature():
    """Versions are text, and -1 is any size."""
    status = VersionStatus("m", 3, State.READY, rows=7)
    data = oip.encode_metadata(ModelInfo("m", 3, (2, 3), "keras", only(one())), status)
    answer = oip_pb.ModelMetadataResponse.FromString(data)
    assert (answer.name, list(answer.versions), answer.platform) == ("m", ["2", "3"], "keras")
    (x,), (y,) = answer.inputs, answer.outputs
    assert (x.name, x.datatype, list(x.shape)) == ("x", "FP32", [-1, 3])
    assert (y.name, y.datatype, list(y.shape)) == ("y", "FP32", [-1, 3])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (tfs_pb.PredictRequest, "tensorflow.serving.PredictRequest"),
        (oip_pb.ModelInferRequest, "inference.ModelInferRequest"),
    ],
)
def test_bytes_that_are_no_message_are_refused_by_its_public_name(kind: Any, name: str):
    """Not by the name that it has within this process."""
    with pytest.raises(InvalidArgument) as refused:
        parse(kind, b"\xff")
    assert str(refused.value) == f"the request cannot be parsed as {name}"


def test_every_type_has_its_list():
    """TensorFlow's tensors have a list for each type, the Open Inference Protocol's for all but half precision."""
    assert set(tfs.VALUES) == {*NUMERIC, DataType.BYTES}
    assert set(oip._CONTENTS) == set(WITH_CONTENTS)
