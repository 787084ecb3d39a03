"""Files that keep what was compiled for a plan."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def program_name(plan: str, rows: int) -> str:
    """The file that keeps what was compiled of a plan for a bucket; 0 for all buckets."""
    return f"{plan}-{rows}.program"


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as target:
        target.write(data)
    Path(name).replace(file)
