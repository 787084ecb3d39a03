"""Every way a request or a model can fail, free of any transport.

Each class carries one :class:`Code`; `rest/` and `rpc/` hold one table each from code to status.
"""

from __future__ import annotations

from enum import Enum

INTERNAL_ERROR = "an internal error occurred; the server's log has it"
"""What a caller is told of an exception that nobody foresaw."""


class Code(Enum):
    """What went wrong, in the vocabulary that both front ends translate from."""

    INVALID_ARGUMENT = "invalid_argument"
    TOO_LARGE = "too_large"
    UNSUPPORTED_TYPE = "unsupported_type"
    NOT_ACCEPTABLE = "not_acceptable"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    FAILED_PRECONDITION = "failed_precondition"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    UNIMPLEMENTED = "unimplemented"
    INTERNAL = "internal"


class KilnError(Exception):
    """Base of all errors that a caller may see; ``str(error)`` is the text that is sent."""

    code = Code.INTERNAL
    is_counted = False
    """Whether the metrics have it already: a request may be refused before it is one."""

    def again(self) -> KilnError:
        """A fresh exception with the same meaning.

        One exception object must never be raised to two waiters: each raise would add to the
        traceback of the other.
        """
        return type(self)(*self.args)


class InvalidArgument(KilnError):
    """The request itself is wrong; sending it again cannot help."""

    code = Code.INVALID_ARGUMENT


class TooLarge(KilnError):
    """The body or message is over the configured limit."""

    code = Code.TOO_LARGE


class UnsupportedType(KilnError):
    """This model takes no body of that media type."""

    code = Code.UNSUPPORTED_TYPE


class NotAcceptable(KilnError):
    """The answer can be made in none of the media types that the caller accepts."""

    code = Code.NOT_ACCEPTABLE


class NotFound(KilnError):
    """No such model, version or shared memory region."""

    code = Code.NOT_FOUND


class AlreadyExists(KilnError):
    """The name is taken: it must be given up before it can be given again."""

    code = Code.ALREADY_EXISTS


class FailedPrecondition(KilnError):
    """The request is well formed, but this model cannot answer it."""

    code = Code.FAILED_PRECONDITION


class Overloaded(KilnError):
    """The queue is full; `retry_after_s` is when trying again makes sense."""

    code = Code.OVERLOADED

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class Unavailable(KilnError):
    """Not ready, or stopping."""

    code = Code.UNAVAILABLE


class DeadlineExceeded(KilnError):
    """The deadline passed before the request was run."""

    code = Code.DEADLINE_EXCEEDED


class Cancelled(KilnError):
    """The caller went away."""

    code = Code.CANCELLED


class Unimplemented(KilnError):
    """A part of a protocol that Kiln does not answer."""

    code = Code.UNIMPLEMENTED


class Internal(KilnError):
    """A fault of Kiln or of the model, not of the request."""

    code = Code.INTERNAL


class ModelLoadError(KilnError):
    """A model version could not be imported, loaded or warmed up; the text is the reason shown."""

    code = Code.FAILED_PRECONDITION
