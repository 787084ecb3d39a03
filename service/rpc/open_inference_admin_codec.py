"""Messages of Triton's extensions ↔ plain values, pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import ParseDict

from service.registry.lifecycle import INDEX_STATES, VersionStatus
from service.rpc._generated.inference import open_inference_pb2 as pb


def encode_config(config: Mapping[str, Any]) -> bytes:
    """`ModelConfigResponse` of what `model_configuration` tells; fields that the message lacks are defaults."""
    return ParseDict({"config": config}, pb.ModelConfigResponse(), ignore_unknown_fields=True).SerializeToString()


def encode_statistics(statistics: dict[str, Any]) -> bytes:
    """`ModelStatisticsResponse` of what `statistics_of` tells."""
    return ParseDict(statistics, pb.ModelStatisticsResponse()).SerializeToString()


def decode_trace_settings(request: pb.TraceSettingRequest) -> dict[str, list[str]]:
    """Each setting's values; none for one that is to be cleared."""
    return {name: list(setting.value) for name, setting in request.settings.items()}


def encode_trace_settings(settings: Mapping[str, str | list[str]]) -> bytes:
    """`TraceSettingResponse` of these settings, each a value or several."""
    response = pb.TraceSettingResponse()
    for name, values in settings.items():
        response.settings[name].value.extend([values] if isinstance(values, str) else values)
    return response.SerializeToString()


def decode_log_settings(request: pb.LogSettingsRequest) -> dict[str, object]:
    """Each setting's value; None where none is given."""
    choices = {name: setting.WhichOneof("parameter_choice") for name, setting in request.settings.items()}
    return {name: choice and getattr(request.settings[name], choice) for name, choice in choices.items()}


def encode_log_settings(settings: Mapping[str, Any]) -> bytes:
    """`LogSettingsResponse` of these settings."""
    response = pb.LogSettingsResponse()
    for name, value in settings.items():
        kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(response.settings[name], kind, value)
    return response.SerializeToString()


def encode_index(statuses: list[VersionStatus]) -> bytes:
    """`RepositoryIndexResponse` of these versions."""
    response = pb.RepositoryIndexResponse()
    for status in statuses:
        response.models.add(
            name=status.model,
            version=str(status.version),
            state=INDEX_STATES[status.state],
            reason=status.reason,
        )
    return response.SerializeToString()
