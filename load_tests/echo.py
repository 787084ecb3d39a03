"""Servers of the same stack that decode nothing and run no model: the yardstick of the bench.

``python -m load_tests.echo REST_PORT GRPC_PORT``
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import uvicorn

from service.rest.http import JSON, Receive, Scope, Send, answer, read_body

_ANSWER = b'{"predictions":[[0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1,0.1]]}'
_MESSAGE = bytes(130)


async def echo_http(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body, answer the same as ever."""
    if scope["type"] == "http":
        await read_body(scope, receive, 1 << 30)
        await answer(send, 200, _ANSWER, [JSON])


class EchoHandler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers every method with the same bytes."""

    def service(self, details: Any) -> Any:  # noqa: ARG002
        async def call(data: bytes, context: Any) -> bytes:  # noqa: ARG001
            return _MESSAGE

        return grpc.unary_unary_rpc_method_handler(call)


async def main(rest_port: int, grpc_port: int) -> None:
    """Serve until killed."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((EchoHandler(),))
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    await server.start()
    config = uvicorn.Config(echo_http, port=rest_port, log_level="error", access_log=False, lifespan="off")
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(int(sys.argv[1]), int(sys.argv[2])))
