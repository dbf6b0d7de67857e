"""What calls take and return: the protocol's messages as small Python values.

Shapes use these letters: n tokens or query positions, H query heads, G KV heads, d head
dimension. Tensors are C-contiguous, little-endian numpy arrays of float32, float16, or uint16
holding bfloat16 bit patterns (``kvtier.to_bf16``).
"""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from kvtier.errors import InvalidArgumentError, KvtierError
from kvtier.v1 import types_pb2 as pb

__all__ = [
    "Account",
    "Ack",
    "AttendItem",
    "AttendMode",
    "AttendResult",
    "Budget",
    "ElementType",
    "ModelSpec",
    "Profile",
    "Span",
    "SpanKind",
    "element_type_of",
]

_INVALID = grpc.StatusCode.INVALID_ARGUMENT
_WAIT_FOREVER = 0xFFFFFFFF

if sys.byteorder != "little":  # the protocol is little-endian and arrays are sent as they lie
    raise ImportError("kvtier needs a little-endian machine")


class ElementType(enum.IntEnum):
    """Element type of K and V rows and of queries."""

    UNSPECIFIED = pb.ELEMENT_TYPE_UNSPECIFIED
    F32 = pb.ELEMENT_TYPE_F32
    BF16 = pb.ELEMENT_TYPE_BF16
    F16 = pb.ELEMENT_TYPE_F16

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype that carries it; BF16 travels as uint16."""
        return _NUMPY_OF[self]


_NUMPY_OF: dict[int, np.dtype[Any]] = {
    ElementType.F32: np.dtype(np.float32),
    ElementType.BF16: np.dtype(np.uint16),
    ElementType.F16: np.dtype(np.float16),
}
_ELEMENT_OF = {dtype: ElementType(code) for code, dtype in _NUMPY_OF.items()}


def element_type_of(array: NDArray[Any]) -> ElementType:
    """The element type an array has on the wire. Raises InvalidArgumentError for any other."""
    try:
        return _ELEMENT_OF[array.dtype]
    except KeyError:
        raise InvalidArgumentError(
            f"arrays must be float32, float16, or uint16 holding bfloat16 bits, not {array.dtype}",
            code=_INVALID,
        ) from None


class Profile(enum.IntEnum):
    """How the sealed tokens of a sequence are stored."""

    UNSPECIFIED = pb.PROFILE_UNSPECIFIED
    EXACT = pb.PROFILE_EXACT
    NEUTRAL = pb.PROFILE_NEUTRAL
    BALANCED = pb.PROFILE_BALANCED


class AttendMode(enum.IntEnum):
    """How much of the stored context one query may read."""

    UNSPECIFIED = pb.ATTEND_MODE_UNSPECIFIED
    EXACT = pb.ATTEND_MODE_EXACT
    BUDGET = pb.ATTEND_MODE_BUDGET
    TARGET = pb.ATTEND_MODE_TARGET


class SpanKind(enum.IntEnum):
    """What a labelled span holds."""

    UNSPECIFIED = pb.SPAN_KIND_UNSPECIFIED
    TEXT = pb.SPAN_KIND_TEXT
    FILE = pb.SPAN_KIND_FILE
    IMAGE = pb.SPAN_KIND_IMAGE
    VIDEO = pb.SPAN_KIND_VIDEO


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """Bounds what one query may read. Use one of the constructors below."""

    mode: AttendMode = AttendMode.UNSPECIFIED
    share_of_bytes: float = 0.0
    token_count: int = 0
    target_error: float = 0.0
    read_wait: float | None = None

    @classmethod
    def default(cls) -> Budget:
        """The daemon's configured share."""
        return cls()

    @classmethod
    def exact(cls) -> Budget:
        """Everything stored is read; the answer is bit-reproducible."""
        return cls(AttendMode.EXACT)

    @classmethod
    def share(cls, share: float) -> Budget:
        """What a share, in (0, 1], of the sealed body's 4-bit bytes buys line by line; see the protocol's Budget."""
        return cls(AttendMode.BUDGET, share_of_bytes=share)

    @classmethod
    def tokens(cls, tokens: int) -> Budget:
        """At most as many bytes as this many tokens have at 4 bits, beside page means."""
        return cls(AttendMode.BUDGET, token_count=tokens)

    @classmethod
    def target(cls, error: float, *, at_most: float = 0.0) -> Budget:
        """Widens until 95 % of calls have a relative error, in (0, 1), of at most this.

        `at_most` limits the share of bytes that an answer may read, in (0, 1]; 0: no limit. Where
        limits forbid it, ``Account.target_missed`` says so.
        """
        return cls(AttendMode.TARGET, share_of_bytes=at_most, target_error=error)

    def waiting(self, seconds: float | None) -> Budget:
        """The same budget for a call that waits so long for keys and values from disk, and no longer.

        What has not come by then is late: its tokens are estimated by what is known of them already,
        and ``Account.tokens_late`` and ``bytes_late`` say how much that was. None is the daemon's
        ``--read-wait``, ``math.inf`` as long as it takes. Of budgets by share or tokens only; in
        the other modes everything is waited for.
        """
        if seconds is not None and not seconds > 0:
            raise InvalidArgumentError(
                f"a call cannot wait {seconds} s: give a time above 0, math.inf, or None", code=_INVALID
            )
        return dataclasses.replace(self, read_wait=seconds)

    @property
    def read_wait_us(self) -> int:
        """``read_wait`` as the protocol has it."""
        if self.read_wait is None:
            return 0
        if math.isinf(self.read_wait):
            return _WAIT_FOREVER
        return min(max(1, round(self.read_wait * 1e6)), _WAIT_FOREVER - 1)

    def to_proto(self) -> pb.Budget:
        return pb.Budget(
            mode=int(self.mode),  # type: ignore[arg-type]
            share=self.share_of_bytes,
            tokens=self.token_count,
            target_error=self.target_error,
            read_wait_us=self.read_wait_us,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Ack:
    """How far a sequence is accepted; every field counts tokens from the start.

    Attributes:
        accepted: present in the daemon's memory, in every layer.
        crash_safe: would survive the daemon's death by kill -9.
        power_safe: would survive a power cut.
        sealed: sealed into segments.
    """

    accepted: int = 0
    crash_safe: int = 0
    power_safe: int = 0
    sealed: int = 0

    @classmethod
    def from_proto(cls, ack: pb.Ack) -> Ack:
        return cls(ack.accepted, ack.crash_safe, ack.power_safe, ack.sealed)


@dataclasses.dataclass(frozen=True, slots=True)
class Account:
    """What an answer cost and how good it is believed to be.

    Token counts are sums over query positions and KV heads of the layer. Byte counts are those
    transferred for the call; ``bytes_full`` is what reading all sealed tokens once at 4 bits would
    transfer. Errors are relative (0.01 is one percent), times are nanoseconds. ``estimated_error``
    and ``error_p95`` are against reading everything stored: what audits of such calls find in the
    middle case, and what 95 % of them stay under; ``calibration_audits`` is how many audits of the
    layer stand behind both. ``target_missed`` says that a target may not be met. ``tokens_late`` are
    known less well than was asked for, because ``bytes_late`` did not come in time
    (``Budget.waiting``); the errors count them so.
    """

    tokens_exact: int = 0
    tokens_scanned: int = 0
    tokens_read: int = 0
    tokens_estimated: int = 0
    bytes_ram: int = 0
    bytes_nvme: int = 0
    bytes_full: int = 0
    bytes_exact_zone: int = 0
    estimated_error: float = 0.0
    codec_error: float = 0.0
    ns_score: int = 0
    ns_scan: int = 0
    ns_fetch: int = 0
    ns_exact_zone: int = 0
    ns_total: int = 0
    mode: AttendMode = AttendMode.UNSPECIFIED
    error_p95: float = 0.0
    calibration_audits: int = 0
    target_missed: bool = False
    bytes_gpu: int = 0
    tokens_late: int = 0
    bytes_late: int = 0

    @property
    def bytes_sealed(self) -> int:
        """Sealed bytes transferred, from every tier."""
        return self.bytes_gpu + self.bytes_ram + self.bytes_nvme

    @property
    def share_read(self) -> float:
        """Sealed bytes transferred as a share of ``bytes_full``; 0 if nothing is sealed."""
        return self.bytes_sealed / self.bytes_full if self.bytes_full else 0.0

    @classmethod
    def from_proto(cls, account: pb.Account) -> Account:
        a = account
        return cls(
            a.tokens_exact, a.tokens_scanned, a.tokens_read, a.tokens_estimated,
            a.bytes_ram, a.bytes_nvme, a.bytes_full, a.bytes_exact_zone,
            a.estimated_error, a.codec_error,
            a.ns_score, a.ns_scan, a.ns_fetch, a.ns_exact_zone, a.ns_total,
            AttendMode(a.mode), a.error_p95, a.calibration_audits, a.target_missed, a.bytes_gpu,
            a.tokens_late, a.bytes_late,
        )  # fmt: skip

    @classmethod
    def total(cls, accounts: Iterable[Account]) -> Account:
        """Counts, bytes and times added; errors averaged; EXACT only if every answer was; the
        least of the audits behind the errors; a target missed if any was.
        """
        accounts = list(accounts)
        if not accounts:
            return cls()
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            column = [getattr(account, field.name) for account in accounts]
            if field.name == "mode":
                values["mode"] = column[0] if len(set(column)) == 1 else AttendMode.BUDGET
            elif field.name.endswith("_error") or field.name == "error_p95":
                values[field.name] = sum(column) / len(column)
            elif field.name == "target_missed":
                values[field.name] = any(column)
            elif field.name == "calibration_audits":
                values[field.name] = min(column)
            else:
                values[field.name] = sum(column)
        return cls(**values)


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """A named range of tokens [start, end): a file, an image, a chapter."""

    start: int
    end: int
    label: str
    kind: SpanKind = SpanKind.TEXT

    def to_proto(self) -> pb.Span:
        return pb.Span(start=self.start, end=self.end, kind=int(self.kind), label=self.label)  # type: ignore[arg-type]

    @classmethod
    def from_proto(cls, span: pb.Span) -> Span:
        return cls(span.start, span.end, span.label, SpanKind(span.kind))


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is needed to attend as the model does.

    Attributes:
        layers, query_heads (H), kv_heads (G), head_dim (d): the model's geometry.
        sliding_windows: for each layer 0 (full) or the number of last tokens it attends to, the
            query's own included. One entry holds for all layers, none means all full.
        scale: factor on q.k; 0 means 1/sqrt(head_dim).
        softcap: scores become cap*tanh(score/cap); 0 is none.
        sink_logits: learned sinks, layers*query_heads values, or empty.
        kv_dtype: element type in which K and V are held before sealing.
        fingerprint: digest of what changes K and V for equal tokens; 1 to 256 bytes.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    fingerprint: bytes
    sliding_windows: tuple[int, ...] = ()
    scale: float = 0.0
    softcap: float = 0.0
    sink_logits: tuple[float, ...] = ()
    kv_dtype: ElementType = ElementType.BF16

    def window(self, layer: int) -> int:
        """The sliding window of a layer, 0 if it attends to everything."""
        if not self.sliding_windows:
            return 0
        return self.sliding_windows[layer if len(self.sliding_windows) > 1 else 0]

    def to_proto(self) -> pb.ModelSpec:
        return pb.ModelSpec(
            layers=self.layers,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            layer_kinds=[pb.LayerKind(sliding_window=w) for w in self.sliding_windows],
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=self.sink_logits,
            kv_dtype=int(self.kv_dtype),  # type: ignore[arg-type]
            fingerprint=self.fingerprint,
        )

    @classmethod
    def from_proto(cls, spec: pb.ModelSpec) -> ModelSpec:
        return cls(
            layers=spec.layers,
            query_heads=spec.query_heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            fingerprint=spec.fingerprint,
            sliding_windows=tuple(kind.sliding_window for kind in spec.layer_kinds),
            scale=spec.scale,
            softcap=spec.softcap,
            sink_logits=tuple(spec.sink_logits),
            kv_dtype=ElementType(spec.kv_dtype),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class AttendItem:
    """The query of one sequence; with k and v it appends first.

    Attributes:
        sequence_id: which sequence.
        start: position of the first query; query i attends to positions <= start+i.
        q: [n, H, d], post-RoPE, not yet scaled.
        k, v: new rows [n, G, d] of q's dtype for positions [start, start+n); both or neither.
        token_ids: ids of these tokens, length n.
        partial: the worker's own (output [n, H, d], lse [n, H]), float32, over tokens that the
            daemon does not hold, to be merged.
    """

    sequence_id: str
    start: int
    q: NDArray[Any]
    k: NDArray[Any] | None = None
    v: NDArray[Any] | None = None
    token_ids: Sequence[int] | NDArray[np.uint64] | None = None
    partial: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None

    def check(self) -> ElementType:
        """The item's element type. Raises InvalidArgumentError if shapes or dtypes disagree."""
        q, k, v = self.q, self.k, self.v
        if q.ndim != 3 or q.shape[0] < 1:
            raise _invalid(f"q must be [n, query_heads, head_dim] with n >= 1, not {q.shape}")
        if (k is None) != (v is None):
            raise _invalid("k and v must be given together")
        n = q.shape[0]
        if k is not None and v is not None:
            if k.ndim != 3 or k.shape[0] != n or k.shape[2] != q.shape[2] or v.shape != k.shape:
                raise _invalid(f"k {k.shape} and v {v.shape} must be [n, kv_heads, head_dim] for q {q.shape}")
            if k.dtype != q.dtype or v.dtype != q.dtype:
                raise _invalid(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
        if self.token_ids is not None and len(self.token_ids) not in (0, n):
            raise _invalid(f"{len(self.token_ids)} token ids for {n} tokens")
        if self.partial is not None:
            output, lse = self.partial
            if output.shape != q.shape or lse.shape != q.shape[:2]:
                raise _invalid(f"partial {output.shape}, {lse.shape} does not fit q {q.shape}")
        return element_type_of(q)


class AttendResult:
    """The answer to one query.

    Attributes:
        output: [n, H, d] float32; empty if the item failed.
        lse: [n, H] float32, natural log of the sum of exp(score).
        ack: how far the sequence is accepted after the append.
        error: why this item failed, where several were asked; None if it did not.
    """

    __slots__ = ("_account_source", "ack", "error", "lse", "output")

    def __init__(
        self,
        output: NDArray[np.float32],
        lse: NDArray[np.float32],
        ack: Ack,
        account: Account | Callable[[], Account],
        error: KvtierError | None = None,
    ) -> None:
        self.output = output
        self.lse = lse
        self.ack = ack
        self.error = error
        # A callable defers the decoding: a decode step makes one account per layer, and most
        # callers look at none of them.
        self._account_source = account

    @property
    def account(self) -> Account:
        """What the answer cost."""
        if not isinstance(self._account_source, Account):
            self._account_source = self._account_source()
        return self._account_source


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, code=_INVALID)
