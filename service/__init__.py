"""Kiln: serves trained Keras models over HTTP and gRPC, in fused batches."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("kiln")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
