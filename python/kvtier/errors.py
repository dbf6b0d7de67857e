"""Errors of the daemon as exceptions, the same ones on gRPC and on the fast path."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

__all__ = [
    "AlreadyExistsError",
    "CancelledError",
    "DataLossError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "InvalidArgumentError",
    "KvtierError",
    "NotFoundError",
    "OutOfRangeError",
    "ResourceExhaustedError",
    "UnavailableError",
    "error_from_rpc",
    "error_from_text",
    "make_error",
]


class KvtierError(Exception):
    """A call that the daemon refused or that did not reach it.

    Attributes:
        code: the gRPC status code (``grpc.StatusCode``), on the fast path too.
        reason: the daemon's constant for the cause (``ErrorInfo.reason``); "" if it gave none.
        message: what happened and what to do about it.
        retry_delay: seconds after which a retry may succeed; None if the daemon did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        cause = f"{self.code.name}/{self.reason}" if self.reason else self.code.name
        return f"{cause}: {self.message}"


class InvalidArgumentError(KvtierError, ValueError):
    """Wrong shape or size, NaN or infinity, a model spec out of range."""


class NotFoundError(KvtierError, LookupError):
    """Unknown sequence, lease, pin, handle or region."""


class AlreadyExistsError(KvtierError):
    """Different bytes for a position that exists."""


class OutOfRangeError(KvtierError, IndexError):
    """A gap in an append, or a query or read past the end."""


class FailedPreconditionError(KvtierError):
    """Another model spec than the sequence's, or a fork point that cannot be continued."""


class ResourceExhaustedError(KvtierError):
    """RAM for open tails or the disk is full; see ``retry_delay``."""


class DataLossError(KvtierError):
    """Stored bytes failed their checksum; nothing was answered from them."""


class DeadlineExceededError(KvtierError, TimeoutError):
    """The call took longer than its timeout."""


class CancelledError(KvtierError):
    """The call was cancelled."""


class UnavailableError(KvtierError, ConnectionError):
    """The daemon is not there, is shutting down, or the connection broke."""


_CLASSES: dict[grpc.StatusCode, type[KvtierError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


def make_error(
    code: int | grpc.StatusCode, message: str, reason: str = "", retry_delay: float | None = None
) -> KvtierError:
    """The exception for a gRPC code, given as a number or as ``grpc.StatusCode``."""
    if not isinstance(code, grpc.StatusCode):
        code = _CODES.get(code, grpc.StatusCode.UNKNOWN)
    return _CLASSES.get(code, KvtierError)(message, code=code, reason=reason, retry_delay=retry_delay)


def error_from_rpc(error: grpc.RpcError) -> KvtierError:
    """The exception for a failed gRPC call, with ErrorInfo and RetryInfo taken from its trailers."""
    reason, retry_delay = "", None
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key != "grpc-status-details-bin":
            continue
        status = status_pb2.Status()
        try:
            status.ParseFromString(value)
        except Exception:  # a malformed detail must not hide the error itself
            continue
        for detail in status.details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(retry):
                retry_delay = retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9
    return make_error(error.code(), error.details() or "", reason, retry_delay)


def error_from_text(code: int, text: str) -> KvtierError:
    """The exception for a code and the text ``REASON: message`` that replies and items carry."""
    reason, sep, message = text.partition(": ")
    # A reason is a constant; anything else is a message that happens to hold a colon.
    if not sep or not reason.replace("_", "").isalnum() or reason != reason.upper():
        reason, message = "", text
    return make_error(code, message, reason)
