"""What is tried again, how often, and how long after."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import pytest

from service.errors import InvalidArgument, ModelLoadError
from service.registry.retry import Retry, may_pass
from service.registry.store import BrokenDownload


class StatusError(Exception):
    """As aiohttp's, gcsfs's or Azure's: the status under one of three names."""

    def __init__(self, name: str, status: object) -> None:
        super().__init__("refused")
        setattr(self, name, status)


class NoCredentialsError(Exception):
    """As botocore's."""


def failing(*errors: Exception) -> Callable[[], str]:
    """Raises each of `errors` in turn, then returns."""
    left = list(errors)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action


def test_what_fails_in_passing_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """Waits double up to their limit, less a random half; each attempt is logged with its reason."""
    waits: list[float] = []
    retry = Retry(attempts=5, first_delay_s=1, max_delay_s=3, sleep=waits.append)
    caplog.set_level(logging.WARNING, "kiln.remote")
    assert retry.run("s3://b/cat", failing(*(ConnectionResetError("gone") for _ in range(4)))) == "done"
    assert len(waits) == 4
    for wait, most in zip(waits, (1, 2, 3, 3), strict=True):
        assert most / 2 <= wait <= most
    assert [m.partition(" failed")[0] for m in caplog.messages] == [
        f"s3://b/cat: attempt {n} of 5" for n in (1, 2, 3, 4)
    ]
    assert caplog.messages[0].endswith(f"the next is in {waits[0]:.1f} s: ConnectionResetError: gone")


def test_the_last_failure_is_told() -> None:
    """When no attempt works, the error names what was asked for, the last reason and the number of attempts."""
    retry = Retry(attempts=2, sleep=lambda _: None)
    with pytest.raises(ModelLoadError, match=r"^s3://b/cat: OSError: second \(2 attempts\)$"):
        retry.run("s3://b/cat", failing(OSError("first"), OSError("second")))


def test_what_is_final_is_not_tried_again() -> None:
    """A failure that no second attempt can mend is told at once."""
    retry = Retry(sleep=lambda _: pytest.fail("it waited"))
    with pytest.raises(ModelLoadError, match=r"^s3://b/cat: there is nothing there$"):
        retry.run("s3://b/cat", failing(FileNotFoundError("b/cat")))
    with pytest.raises(InvalidArgument, match=r"^as it was$"):
        retry.run("s3://b/cat", failing(InvalidArgument("as it was")))


def test_an_error_shows_no_signature_and_no_password() -> None:
    """URLs within a reason lose their query and their user."""
    retry = Retry(attempts=1)
    error = OSError("Cannot get 'https://me:secret@host/cat.zip?X-Signature=secret'")
    with pytest.raises(ModelLoadError) as caught:
        retry.run("cat", failing(error))
    assert str(caught.value) == "cat: OSError: Cannot get 'https://host/cat.zip'"


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError("?"), True),
        (TimeoutError(), True),
        (BrokenDownload("short"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (OSError(errno.ENOSPC, "full"), False),
        (PermissionError("denied"), False),
        (ValueError("no bucket"), False),
        (NoCredentialsError(), False),
        (StatusError("status", 503), True),
        (StatusError("status", 429), True),
        (StatusError("status", 403), False),
        (StatusError("status_code", 404), False),
        (StatusError("code", 401), False),
        (StatusError("code", "weird"), True),
    ],
)
def test_failures_are_told_apart(error: Exception, passes: bool) -> None:
    """Networks, busy servers and short downloads may mend; refusals, wrong URLs and full disks do not."""
    assert may_pass(error) is passes
