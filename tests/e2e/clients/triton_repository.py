"""The repository extension by tritonclient: ``http|grpc ADDRESS``, what was seen as JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any


def main(protocol: str, address: str) -> None:
    client: Any
    if protocol == "http":
        import tritonclient.http

        client = tritonclient.http.InferenceServerClient(address)
    else:
        import tritonclient.grpc

        client = tritonclient.grpc.InferenceServerClient(address)
    seen: dict[str, Any] = {"before": _states(protocol, client)}
    client.load_model("digits")
    seen["loaded"] = _states(protocol, client)
    seen["ready"] = client.is_model_ready("digits")
    client.unload_model("digits")
    seen["after"] = _states(protocol, client)
    try:
        client.load_model("nothing")
    except Exception as error:  # noqa: BLE001 - each protocol has its own kind
        seen["refused"] = str(error)
    json.dump(seen, sys.stdout)


def _states(protocol: str, client: Any) -> list[list[str]]:
    index = client.get_model_repository_index()
    if protocol == "http":
        return [[model["name"], model["version"], model["state"]] for model in index]
    return [[model.name, model.version, model.state] for model in index.models]


if __name__ == "__main__":
    main(*sys.argv[1:])
