"""What the gRPC front end is told by its settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.rpc.handlers import Handler
from service.shared_memory import OFF, SharedMemory


@dataclass(frozen=True)
class RpcOptions:
    """Where it listens, and its limits: see the settings of the same names; and the shared memory it may use.

    With `is_shared` other processes accept on the same port. `around` is what becomes of a handler, by the
    path of its method.
    """

    address: str
    max_message_bytes: int
    request_timeout_s: float
    memory: SharedMemory = OFF
    bounds: Bounds = DEFAULT_BOUNDS
    is_shared: bool = False
    around: Callable[[str, Handler], Handler] | None = None
