"""What Kiln says that it is made of."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from service import __version__, build


def test_versions_are_those_installed():
    """Kiln's, the interpreter's, and those of the two libraries that run models."""
    python = ".".join(map(str, sys.version_info[:3]))
    expected = {"version": __version__, "python": python, "tensorflow": version("tensorflow")}
    assert build.versions() == expected | {"openvino": version("openvino")}


def test_a_library_goes_by_several_names_or_is_absent(monkeypatch: pytest.MonkeyPatch):
    """TensorFlow has a distribution for each kind of machine; what is not there is empty."""

    def installed(name: str) -> str:
        if name != "tensorflow-cpu":
            raise PackageNotFoundError(name)
        return "2.99"

    monkeypatch.setattr(build, "version", installed)
    versions = build.versions()
    assert (versions["tensorflow"], versions["openvino"]) == ("2.99", "")


def test_nothing_is_imported_for_it():
    """Neither library is loaded by asking for its version."""
    code = (
        "import sys; from service.build import versions; versions(); print({'tensorflow', 'openvino'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
