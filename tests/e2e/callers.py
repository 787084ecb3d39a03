"""Callers of every dialect, each on a connection of its own, that tell an answer from a refusal and a cut."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from service.rpc._generated.inference import open_inference_pb2 as pb

TIMEOUT_S = 45.0
"""Longer than any test holds a request; a caller that waits this long reports a hang."""
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_ONE_IMAGE = (1, 8, 8, 1)

Image = NDArray[np.float32]


class Refused(Exception):
    """Told to go elsewhere: 503 or UNAVAILABLE with a text, or no connection at all."""


class Cut(Exception):
    """No answer, or only a part of one (`is_torn`), to a request that was sent."""

    def __init__(self, message: str, *, is_torn: bool = False) -> None:
        super().__init__(message)
        self.is_torn = is_torn


class Caller(Protocol):
    """Asks for one digit at a time."""

    def ask(self, image: Image) -> NDArray[np.float32]:
        """The probabilities (10,) of `image` (8, 8, 1); `Refused` or `Cut` if there are none."""

    def close(self) -> None: ...


class _HttpCaller:
    """A keep-alive connection, opened again when the server has closed it after an answer."""

    path: str

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[bytes, http.client.HTTPResponse]:
        if self._connection.sock is None:
            try:
                self._connection.connect()
            except ConnectionError as error:
                raise Refused(str(error)) from error
        response = None
        try:
            self._connection.request("POST", self.path, body, headers)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Cut(f"{type(error).__name__}: {error}", is_torn=response is not None) from error
        if response.status == 503:
            raise Refused(json.loads(answer)["error"])
        assert response.status == 200, answer
        return answer, response

    def close(self) -> None:
        self._connection.close()


class TfServingJson(_HttpCaller):
    path = "/v1/models/digits:predict"

    def ask(self, image: Image) -> NDArray[np.float32]:
        answer, _ = self._post(json.dumps({"instances": [image.tolist()]}).encode(), {})
        (row,) = json.loads(answer)["predictions"]
        return np.array(row, np.float32)


class OpenInferenceJson(_HttpCaller):
    path = "/v2/models/digits/infer"

    def ask(self, image: Image) -> NDArray[np.float32]:
        tensor = {"name": "image", "shape": _ONE_IMAGE, "datatype": "FP32", "data": image.ravel().tolist()}
        answer, _ = self._post(json.dumps({"inputs": [tensor]}).encode(), {})
        (output,) = json.loads(answer)["outputs"]
        return np.array(output["data"], np.float32)


class OpenInferenceBinary(_HttpCaller):
    path = "/v2/models/digits/infer"

    def ask(self, image: Image) -> NDArray[np.float32]:
        size = {"binary_data_size": image.nbytes}
        tensor = {"name": "image", "shape": _ONE_IMAGE, "datatype": "FP32", "parameters": size}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        length = "Inference-Header-Content-Length"
        answer, response = self._post(head + image.tobytes(), {length: str(len(head))})
        return np.frombuffer(answer[int(response.headers[length]) :], np.float32)


class OpenInferenceGrpc:
    """A channel of its own, with raw bytes in and out."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])
        self._infer = self._channel.unary_unary(_INFER)

    def ask(self, image: Image) -> NDArray[np.float32]:
        tensor = pb.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=_ONE_IMAGE)
        request = pb.ModelInferRequest(model_name="digits", inputs=[tensor], raw_input_contents=[image.tobytes()])
        try:
            answer = self._infer(request.SerializeToString(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            failure: Any = error
            text = f"{failure.code().name}: {failure.details()}"
            is_told = "the server" in failure.details() or "failed to connect" in failure.details().lower()
            if failure.code() is grpc.StatusCode.UNAVAILABLE and is_told:
                raise Refused(text) from error
            raise Cut(text) from error
        (raw,) = pb.ModelInferResponse.FromString(answer).raw_output_contents
        return np.frombuffer(raw, np.float32)

    def close(self) -> None:
        self._channel.close()


def callers(rest_port: int, grpc_port: int, count: int) -> list[Caller]:
    """`count` callers, the four kinds in turn."""
    kinds = (
        lambda: TfServingJson(rest_port),
        lambda: OpenInferenceJson(rest_port),
        lambda: OpenInferenceBinary(rest_port),
        lambda: OpenInferenceGrpc(grpc_port),
    )
    return [kinds[number % len(kinds)]() for number in range(count)]


@dataclass
class Outcome:
    """What became of one caller's requests: how many were answered, which wrongly, and how it ended."""

    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: str | None = None
    cut: str | None = None
    cut_began: float = 0.0
    """When the request was begun that was cut, on `time.monotonic`."""
    is_torn: bool = False

    def ask(self, caller: Caller, image: Image, expected: NDArray[np.float32]) -> bool:
        """Ask once and note what came; whether to go on."""
        began = time.monotonic()
        try:
            got = caller.ask(image)
        except Refused as error:
            self.refused = str(error)
        except Cut as error:
            self.cut, self.cut_began, self.is_torn = str(error), began, error.is_torn
        else:
            self.answered += 1
            if not np.allclose(got, expected, rtol=0, atol=1e-4):
                self.wrong.append(f"{type(caller).__name__}: {expected} expected, got {got}")
        return self.refused is None and self.cut is None
