"""Trying again what may work the next time: downloads and listings."""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from service.errors import KilnError, ModelLoadError
from service.registry.store import shown

_log = logging.getLogger("kiln.remote")
_FINAL_ERRNO = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip
_FINAL_ERRORS = (
    ArithmeticError, AttributeError, FileNotFoundError, ImportError, LookupError, NotImplementedError, PermissionError,
    TypeError, ValueError,
)  # fmt: skip
_FINAL_NAMES = ("Credential", "Authentication")
_PASSING_STATUS = {408, 425, 429}

Result = TypeVar("Result")


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a step is tried.

    After attempt `n` a step waits for ``first_delay_s * 2**(n - 1)`` seconds, at most `max_delay_s`,
    less a random share of up to a half, so that servers that failed together do not come back together.
    """

    attempts: int = 5
    first_delay_s: float = 0.5
    max_delay_s: float = 20.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, what: str, action: Callable[[], Result]) -> Result:
        """What `action` returns, at the last attempt at the latest.

        Raises:
            ModelLoadError: no attempt worked, or it is plain that none will; begins with `what`.
        """
        attempt = 1
        while True:
            try:
                return action()
            except KilnError:
                raise
            except Exception as error:
                if attempt == self.attempts or not may_pass(error):
                    times = f" ({attempt} attempts)" if attempt > 1 else ""
                    raise ModelLoadError(f"{what}: {_reason(error)}{times}") from error
                delay_s = min(self.first_delay_s * 2 ** (attempt - 1), self.max_delay_s) * random.uniform(0.5, 1)  # noqa: S311
                _log.warning("%s: attempt %d of %d failed, the next is in %.1f s: %s",
                             what, attempt, self.attempts, delay_s, _reason(error))  # fmt: skip
                self.sleep(delay_s)
                attempt += 1


def may_pass(error: Exception) -> bool:
    """Whether the next attempt may do better. What is not known to be final may: each client has errors of its own."""
    if isinstance(error, _FINAL_ERRORS) or any(word in type(error).__name__ for word in _FINAL_NAMES):
        return False
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNO:
        return False
    statuses = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    status = next((status for status in statuses if isinstance(status, int)), 0)
    return not 400 <= status < 500 or status in _PASSING_STATUS


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is nothing there"
    text = shown(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
