"""The one table from what went wrong to a gRPC status."""

from __future__ import annotations

from grpc import StatusCode

from service.errors import Code

GRPC_STATUS = {
    Code.INVALID_ARGUMENT: StatusCode.INVALID_ARGUMENT,
    Code.TOO_LARGE: StatusCode.INVALID_ARGUMENT,
    Code.UNSUPPORTED_TYPE: StatusCode.INVALID_ARGUMENT,
    Code.NOT_ACCEPTABLE: StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: StatusCode.NOT_FOUND,
    Code.ALREADY_EXISTS: StatusCode.ALREADY_EXISTS,
    Code.FAILED_PRECONDITION: StatusCode.FAILED_PRECONDITION,
    Code.OVERLOADED: StatusCode.RESOURCE_EXHAUSTED,
    Code.UNAVAILABLE: StatusCode.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED: StatusCode.DEADLINE_EXCEEDED,
    Code.CANCELLED: StatusCode.CANCELLED,
    Code.UNIMPLEMENTED: StatusCode.UNIMPLEMENTED,
    Code.INTERNAL: StatusCode.INTERNAL,
}
