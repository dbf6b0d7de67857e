"""kvtier: attention over contexts that a daemon holds.

A worker sends the keys and values of its tokens to the daemon (``append``) and asks it for
attention over them (``attend``): it keeps no K/V of its own.

``Client`` speaks gRPC, ``FastClient`` the fast path, ``Session`` uses both under a lease.
``kvtier.worker`` runs GGUF models in numpy with attention delegated.
"""

from kvtier.bf16 import from_bf16, round_bf16, to_bf16
from kvtier.client import AttendStream, Client, OpenedSequence, PrefixMatch
from kvtier.errors import (
    AlreadyExistsError,
    CancelledError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    KvtierError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnavailableError,
)
from kvtier.fastpath import FastClient
from kvtier.session import Session
from kvtier.types import (
    Account,
    Ack,
    AttendItem,
    AttendMode,
    AttendResult,
    Budget,
    ElementType,
    ModelSpec,
    Profile,
    Span,
    SpanKind,
)

__all__ = [
    "Account",
    "Ack",
    "AlreadyExistsError",
    "AttendItem",
    "AttendMode",
    "AttendResult",
    "AttendStream",
    "Budget",
    "CancelledError",
    "Client",
    "DataLossError",
    "DeadlineExceededError",
    "ElementType",
    "FailedPreconditionError",
    "FastClient",
    "InvalidArgumentError",
    "KvtierError",
    "ModelSpec",
    "NotFoundError",
    "OpenedSequence",
    "OutOfRangeError",
    "PrefixMatch",
    "Profile",
    "ResourceExhaustedError",
    "Session",
    "Span",
    "SpanKind",
    "UnavailableError",
    "from_bf16",
    "round_bf16",
    "to_bf16",
]
