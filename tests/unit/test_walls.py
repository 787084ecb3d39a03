"""The walls between the rooms of ``service/``: who may import what, and in which direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = "service/rpc/_generated/"

ORDER = (
    ("service.__main__",),
    ("service.cli", "service.embedded"),
    ("service.inspection", "service.bench"),
    ("service.server",),
    ("service.frontend",),
    ("service.observers",),
    ("service.rest", "service.rpc"),
    ("service.examples", "service.extensions", "service.timing"),
    ("service.predictor",),
    ("service.following",),
    ("service.registry",),
    ("service.batching",),
    ("service.runtime",),
    ("service.bounds",),
    ("service.tensors",),
    ("service.meaning", "service.padding"),
    ("service.errors", "service.batching_file"),
)
"""The rooms from above to below; a room imports only those further down, and none beside it."""

LEAVES = {
    "service.registry.lifecycle": "the states of a version, which the front ends and the metrics show",
    "service.batching.queue": "what a lane is, and the bounds of a queue",
    "service.runtime.records": "what is known of plans, which the front ends and the metrics show",
}
"""Modules without imports of their own but errors and tensors; any room may look at what they define."""

INVERSIONS = {
    ("service.registry.catalogue", "service.predictor"): "it answers what the `Engine` is asked of its models",
    ("service.registry.registry", "service.predictor"): "it is the `Engine` that the predictor declares",
}
"""Where the protocol stands above what fulfils it."""

ASIDE = {
    "service.metrics": {
        "service.server",
        "service.frontend",
        "service.observers",
        "service.predictor",
        "service.registry",
    },
    "service.settings": {
        "service.cli",
        "service.embedded",
        "service.inspection",
        "service.server",
        "service.frontend",
        "service.observers",
    },
    "service.logs": {"service.cli", "service.embedded", "service.frontend", "service.extensions"},
    "service.health": {"service.server"},
    "service.warm_cache": {"service.server"},
    "service.trace_context": {
        "service.frontend",
        "service.rest",
        "service.rpc",
        "service.timing",
        "service.predictor",
        "service.following",
        "service.logs",
    },
    "service.shared_memory": {"service.frontend", "service.rest", "service.rpc"},
}
"""What stands beside the rooms, and which of them are handed it."""

OPENERS = tuple(f"service/registry/{name}.py" for name in ("exporting", "importer", "reference", "training"))
"""What opens Keras files in a child process, and what the process that trains calls."""

WALLS = {
    "fastapi": ("service/rest/",),
    "starlette": ("service/rest/",),
    "uvicorn": ("service/rest/server.py",),
    "grpc": ("service/rpc/", "service/bench/clients.py"),
    "grpc_health": ("service/rpc/",),
    "grpc_reflection": ("service/rpc/",),
    "google.protobuf": ("service/rpc/",),
    "tensorflow": ("service/runtime/", *OPENERS),
    "keras": ("service/runtime/", *OPENERS),
    "openvino": ("service/runtime/", "service/registry/importer.py"),
    "ai_edge_litert": ("service/runtime/",),
    "prometheus_client": ("service/metrics.py", "service/tallies.py", "service/gauges.py", "service/bench/asked.py"),
    "pynvml": ("service/gpus.py",),
    "opentelemetry": ("service/following/tracing.py",),
    "fsspec": ("service/registry/store.py",),
    "aiohttp": ("service/registry/store.py",),
    "pydantic": (
        "service/settings.py",
        "service/meaning.py",
        "service/registry/config.py",
        "service/registry/meaning.py",
        "service/runtime/plan_record.py",
        "service/runtime/planning.py",
        "service/rest/",
    ),
    "PIL": (
        "service/rest/door_images.py",
        "service/rest/door_openapi.py",
        "service/registry/samples.py",
        "service/runtime/drawing.py",
    ),
    "python_multipart": ("service/rest/door_body_codec.py",),
    "pydantic_settings": ("service/settings.py",),
}
"""Which package is known where."""

LAZY = ("tensorflow", "keras", "openvino", "ai_edge_litert", "h5py", "fsspec", "aiohttp", "pynvml", "opentelemetry")
"""Packages that are imported in functions alone, so that they are not loaded in vain."""

PURE = (
    "service/batching/queue.py",
    "service/batching/slo.py",
    "service/batching/curve.py",
    "service/batching_file.py",
    "service/frontend/ring.py",
    "service/registry/policy.py",
    "service/registry/memory.py",
    "service/examples.py",
    "service/meaning.py",
    "service/padding.py",
    "service/tensors.py",
    "service/errors.py",
)
IMPURE = ("asyncio", "threading", "time", "socket", "subprocess", "multiprocessing", "concurrent", "queue")


@dataclass(frozen=True)
class Import:
    """One import of one module by another; `lazy` where it stands in a function."""

    path: str
    importer: str
    imported: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.path} imports {self.imported}"


def _nodes(node: ast.AST, *, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, lazy
        yield from _nodes(child, lazy=lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


@cache
def imports() -> tuple[Import, ...]:
    """All imports of ``service/``, less those of generated code."""
    found = []
    for file in sorted((ROOT / "service").rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        if path.startswith(GENERATED):
            continue
        importer = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node, lazy in _nodes(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                # `from service import logs` means service.logs; `from x import name` may mean the module x.name
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            found += [Import(path, importer, name, lazy) for name in names]
    return tuple(found)


def is_of(name: str, package: str) -> bool:
    """Whether `name` is `package` or something in it."""
    return name == package or name.startswith(package + ".")


def level_of(module: str) -> int | None:
    """How far down the room of `module` is; None for what stands aside."""
    return next((level for level, rooms in enumerate(ORDER) if any(is_of(module, room) for room in rooms)), None)


def room_of(module: str) -> str | None:
    rooms = (*(room for rooms in ORDER for room in rooms), *ASIDE)
    return next((room for room in rooms if is_of(module, room)), None)


def inner() -> Iterator[Import]:
    """Imports between rooms of ``service/``."""
    for each in imports():
        if is_of(each.imported, "service") and room_of(each.imported) not in (None, room_of(each.importer)):
            yield each


def module_in(name: str, modules: object) -> str | None:
    """The module of `modules` that `name` is, or that it stands in."""
    assert isinstance(modules, dict)
    return next((module for module in modules if is_of(name, module)), None)


def test_the_walk_finds_imports():
    """The walls below are of things that are there: known imports are found, lazy ones told from others."""
    found = {(each.path, each.imported, each.lazy) for each in imports()}
    assert ("service/rest/app.py", "fastapi.FastAPI", False) in found
    assert ("service/rest/server.py", "uvicorn", False) in found
    assert any(path == "service/runtime/savedmodel.py" and name == "tensorflow" and lazy for path, name, lazy in found)
    assert len({each.path for each in imports()}) > 30


@pytest.mark.parametrize("package", WALLS)
def test_a_package_is_known_only_behind_its_wall(package: str):
    """Each of the large packages is imported in its own room alone."""
    using = [each for each in imports() if is_of(each.imported, package)]
    assert [str(each) for each in using if not each.path.startswith(WALLS[package])] == []


@pytest.mark.parametrize("package", LAZY)
def test_what_models_need_is_imported_in_functions(package: str):
    """TensorFlow and its like are loaded when a model needs them, not with the module."""
    using = [each for each in imports() if is_of(each.imported, package)]
    assert using
    assert [str(each) for each in using if not each.lazy] == []


def test_pure_modules_know_neither_clock_nor_loop_nor_thread():
    """The queue, the policy, the tensors, the errors and all codecs can be tested without waiting."""
    codecs = {each.path for each in imports() if each.path.endswith("_codec.py")}
    assert len(codecs) == 15
    offences = [
        str(each)
        for each in imports()
        if each.path in {*PURE, *codecs} and any(is_of(each.imported, module) for module in IMPURE)
    ]
    assert offences == []


def test_codecs_know_their_wire_alone():
    """A codec turns bytes into tensors and back: it knows no server, no front end, no web framework."""
    packages = ("fastapi", "starlette", "grpc", "service.server", "service.metrics", "service.rest.http")
    codecs = [each for each in imports() if each.path.endswith("_codec.py")]
    assert [str(each) for each in codecs if any(is_of(each.imported, package) for package in packages)] == []


def test_imports_go_one_way():
    """A room imports only what is further down, the shared leaves, and what stands aside for it."""
    offences = []
    for each in inner():
        above, below = level_of(each.importer), level_of(each.imported)
        if module_in(each.imported, LEAVES) or module_in(each.imported, ASIDE):
            continue
        if any(each.importer == high and is_of(each.imported, low) for high, low in INVERSIONS):
            continue
        if room_of(each.importer) in ASIDE:
            above = len(ORDER) - 2  # as low as the tensors: they know errors and leaves
        if above is None or below is None or above >= below:
            offences.append(str(each))
    assert offences == []


def test_what_stands_aside_is_handed_down_not_looked_up():
    """Metrics, settings, logs and health are imported only where they are built or taken."""
    offences = [
        str(each)
        for each in inner()
        if (aside := module_in(each.imported, ASIDE)) and room_of(each.importer) not in ASIDE[aside]
    ]
    assert offences == []


def test_leaves_import_nothing_but_errors_and_tensors():
    """What any room may look at leads nowhere else."""
    below = ("service.errors", "service.tensors")
    offences = [
        str(each)
        for each in imports()
        if each.importer in LEAVES and is_of(each.imported, "service")
        if not any(is_of(each.imported, module) for module in below)
    ]
    assert offences == []


def test_every_exception_is_needed():
    """An exception that nobody uses any more is taken off the list."""
    upward = [
        each
        for each in inner()
        if (above := level_of(each.importer)) is None or (below := level_of(each.imported)) is None or above >= below
    ]
    for leaf in LEAVES:
        assert any(is_of(each.imported, leaf) for each in upward), leaf
    for importer, imported in INVERSIONS:
        assert any(each.importer == importer and is_of(each.imported, imported) for each in upward), importer
    for aside, rooms in ASIDE.items():
        assert {room_of(each.importer) for each in inner() if is_of(each.imported, aside)} == rooms


def test_the_predictor_sees_models_only_through_its_protocol():
    """The use case knows a version's states, statistics and plans and a model's config, and nothing else from below."""
    mine = {each.imported for each in imports() if each.importer == "service.predictor"}
    engine = {name for name in mine if room_of(name) in ("service.registry", "service.batching", "service.runtime")}
    assert engine == {
        "service.batching.queue.Spent",
        "service.batching.statistics.VersionStatistics",
        "service.registry.lifecycle.VersionStatus",
        "service.registry.config.ModelConfig",
        "service.runtime.records.SignatureRecord",
    }


def test_the_order_is_that_of_contributing():
    """CONTRIBUTING.md draws the rooms in the order that is checked here."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("cli, embedded → "))
    drawn = [room.strip() for part in line.split("→") for room in part.split(",")]
    checked = [room.removeprefix("service.") for rooms in ORDER for room in rooms if room != "service.__main__"]
    assert drawn == checked
