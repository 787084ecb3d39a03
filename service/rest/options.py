"""What the HTTP front end is told by its settings."""

from __future__ import annotations

from dataclasses import dataclass

from service.bounds import DEFAULT_BOUNDS, Bounds
from service.shared_memory import OFF, SharedMemory


@dataclass(frozen=True)
class RestOptions:
    """Limits of the HTTP front end: see the settings of the same names; and the shared memory it may use."""

    max_message_bytes: int
    max_json_depth: int
    request_timeout_s: float
    gzip_min_bytes: int
    memory: SharedMemory = OFF
    bounds: Bounds = DEFAULT_BOUNDS
