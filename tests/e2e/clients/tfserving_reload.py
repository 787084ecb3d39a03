"""TensorFlow Serving's own stubs reload the config: ``ADDRESS BASE_PATH``, what was seen as JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
)

_TIMEOUT_S = 60


def main(address: str, base_path: str) -> None:
    seen: dict[str, Any] = {}
    with grpc.insecure_channel(address) as channel:
        service = model_service_pb2_grpc.ModelServiceStub(channel)
        request = model_management_pb2.ReloadConfigRequest()
        config = request.config.model_config_list.config.add(name="numbers", base_path=base_path)
        config.model_platform = "tensorflow"
        config.model_version_policy.specific.versions.extend([1, 2])
        config.version_labels["stable"] = 1
        answer = service.HandleReloadConfigRequest(request, timeout=_TIMEOUT_S)
        seen["reloaded"] = answer.status.error_code
        status = get_model_status_pb2.GetModelStatusRequest()
        status.model_spec.name = "numbers"
        versions = service.GetModelStatus(status, timeout=_TIMEOUT_S).model_version_status
        seen["available"] = sorted(v.version for v in versions if v.state == 30)
        status.model_spec.version_label = "stable"
        seen["stable"] = [v.version for v in service.GetModelStatus(status, timeout=_TIMEOUT_S).model_version_status]
        config.base_path = "/etc"
        try:
            service.HandleReloadConfigRequest(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            seen["refused"] = [error.code().name, error.details()]
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
