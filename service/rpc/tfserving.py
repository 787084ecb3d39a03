"""TensorFlow Serving's ``PredictionService`` and ``ModelService``, under their public names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from service.bounds import Bounds
from service.examples import Method, decode_examples
from service.predictor import Decoded, Prediction, Predictor
from service.rpc._generated.kiln.tensorflow.serving import serving_pb2 as pb
from service.rpc.examples_codec import (
    ProtoExamples,
    encode_classification,
    encode_regression,
    encode_results,
    tasks_of,
)
from service.rpc.handlers import Handler, Handlers, Timed
from service.rpc.known_requests import KnownRequest, KnownRequests
from service.rpc.messages import parse, parse_tensors
from service.rpc.tfserving_codec import (
    decode_predict,
    decode_reload,
    encode_metadata,
    encode_predict,
    encode_statuses,
    model_ref,
)
from service.tensors import Signature
from service.timing import longest

PREDICTION_SERVICE = "tensorflow.serving.PredictionService"
MODEL_SERVICE = "tensorflow.serving.ModelService"
_OfExamples = TypeVar("_OfExamples", pb.ClassificationRequest, pb.RegressionRequest)


def tfserving_handlers(predictor: Predictor, bounds: Bounds) -> Handlers:
    """Byte-level handlers by full method path."""
    engine = predictor.engine

    def of_examples(method: Method, kind: type[_OfExamples], encode: Callable[[Prediction, int], bytes]) -> Handler:
        async def answer(data: bytes, deadline: float) -> Timed:
            request = parse(kind, data)
            spec, examples = request.model_spec, ProtoExamples(request.input, bounds)
            with predictor.request(model_ref(spec), "grpc-tfs") as counted:
                decode = partial(decode_examples, method, examples, name=spec.signature_name, bounds=bounds)
                prediction = await counted.predict(deadline, decode)
                return Timed(encode(prediction, len(examples)), prediction.spent)

        return answer

    classify = of_examples(Method.CLASSIFY, pb.ClassificationRequest, encode_classification)
    regress = of_examples(Method.REGRESS, pb.RegressionRequest, encode_regression)

    async def multi_inference(data: bytes, deadline: float) -> Timed:
        request = parse(pb.MultiInferenceRequest, data)
        tasks, examples = tasks_of(request), ProtoExamples(request.input, bounds)
        with predictor.request(model_ref(request.tasks[0].model_spec), "grpc-tfs") as counted:
            decoders = [partial(decode_examples, method, examples, name=name, bounds=bounds) for method, name in tasks]
            predictions = await counted.predict_all(deadline, decoders)
            answer = encode_results(predictions, [method for method, _ in tasks], len(examples))
            return Timed(answer, longest([prediction.spent for prediction in predictions]))

    async def metadata(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.GetModelMetadataRequest, data)
        return encode_metadata(request, engine.describe(model_ref(request.model_spec)))

    async def status(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        request = parse(pb.GetModelStatusRequest, data)
        return encode_statuses(engine.statuses(model_ref(request.model_spec)))

    async def reload(data: bytes, deadline: float) -> bytes:  # noqa: ARG001
        await engine.configure(decode_reload(parse(pb.ReloadConfigRequest, data)))
        return pb.ReloadConfigResponse(status=pb.StatusProto()).SerializeToString()

    return {
        f"/{PREDICTION_SERVICE}/Predict": _predict_handler(predictor, bounds),
        f"/{PREDICTION_SERVICE}/GetModelMetadata": metadata,
        f"/{PREDICTION_SERVICE}/Classify": classify,
        f"/{PREDICTION_SERVICE}/Regress": regress,
        f"/{PREDICTION_SERVICE}/MultiInference": multi_inference,
        f"/{MODEL_SERVICE}/GetModelStatus": status,
        f"/{MODEL_SERVICE}/HandleReloadConfigRequest": reload,
    }


def _predict_handler(predictor: Predictor, bounds: Bounds) -> Handler:
    known_requests = KnownRequests()

    async def predict(data: bytes, deadline: float) -> Timed:
        known = known_requests.find(data)
        if known is not None:
            return await again(known, data, deadline)
        request = parse_tensors(pb.PredictRequest, data)
        ref = model_ref(request.model_spec)
        with predictor.request(ref, "grpc-tfs") as counted:

            def decode(signatures: Mapping[str, Signature]) -> Decoded:
                decoded = decode_predict(request, signatures, bounds)
                if len(request.inputs) == 1:
                    (tensor,) = request.inputs.values()
                    rest = pb.PredictRequest(output_filter=request.output_filter)
                    known_requests.add(data, tensor.tensor_content, ref, decoded, partial(encode_predict, rest))
                return decoded

            prediction = await counted.predict(deadline, decode)
            return Timed(encode_predict(request, prediction), prediction.spent)

    async def again(known: KnownRequest, data: bytes, deadline: float) -> Timed:
        with predictor.request(known.ref, "grpc-tfs") as counted:

            def decode(signatures: Mapping[str, Signature]) -> Decoded:
                decoded = known.decode(data, signatures)
                return decoded or decode_predict(parse_tensors(pb.PredictRequest, data), signatures, bounds)

            prediction = await counted.predict(deadline, decode)
            return Timed(known.encode(prediction), prediction.spent)

    return predict
