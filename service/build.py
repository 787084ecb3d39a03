"""What this Kiln is made of, found without importing any of it: TensorFlow alone would take seconds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from service import __version__

_TENSORFLOW = ("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tensorflow-rocm")
"""TensorFlow's distributions, which all bring the same module."""


def versions() -> dict[str, str]:
    """Versions of Kiln (``version``), ``python``, ``tensorflow`` and ``openvino``; empty for what is not installed."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "tensorflow": _installed(_TENSORFLOW),
        "openvino": _installed(("openvino",)),
    }


def _installed(names: Sequence[str]) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""
