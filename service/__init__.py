"""Kiln: serves trained Keras models over HTTP and gRPC, in fused batches."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("kiln")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """`export` and `ExportCallback` are loaded when they are asked for: ``import service`` costs nothing."""
    if name == "export":
        return import_module("service.registry.training").export
    if name == "ExportCallback":
        return import_module("service.registry.training").callback_class()
    raise AttributeError(f"module 'service' has no attribute {name!r}")
