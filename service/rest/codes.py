"""The one table from what went wrong to an HTTP status."""

from __future__ import annotations

from service.errors import Code

HTTP_STATUS = {
    Code.INVALID_ARGUMENT: 400,
    Code.TOO_LARGE: 413,
    Code.UNSUPPORTED_TYPE: 415,
    Code.NOT_ACCEPTABLE: 406,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.FAILED_PRECONDITION: 400,
    Code.OVERLOADED: 429,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
    Code.CANCELLED: 499,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
}
