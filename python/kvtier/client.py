"""The gRPC client: everything the daemon offers, numpy in and numpy out.

For the two calls that are made once per layer and token there is a faster way
(``kvtier.fastpath``); ``kvtier.session.Session`` uses both.
"""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from kvtier.errors import UnavailableError, error_from_rpc, error_from_text, make_error
from kvtier.types import (
    Account,
    Ack,
    AttendItem,
    AttendResult,
    Budget,
    ElementType,
    ModelSpec,
    Profile,
    Span,
    element_type_of,
)
from kvtier.v1 import inspection_pb2 as ipb
from kvtier.v1 import inspection_pb2_grpc as irpc
from kvtier.v1 import sequence_pb2 as spb
from kvtier.v1 import sequence_pb2_grpc as srpc
from kvtier.v1 import types_pb2 as pb

__all__ = ["AttendStream", "Client", "OpenedSequence", "PrefixMatch"]

MAX_MESSAGE = 256 << 20
DEFAULT_TIMEOUT = 60.0

T = TypeVar("T")
TokenIds = Sequence[int] | NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class OpenedSequence:
    """A sequence as OpenSequence answered it.

    Attributes:
        exact_until: first token whose K/V came from sparse attention; ``ack.accepted`` if none.
        handle: its number on the fast path, valid until the daemon ends.
    """

    sequence_id: str
    ack: Ack
    spec: ModelSpec
    profile: Profile
    name: str
    exact_until: int
    handle: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A stored prefix, as MatchPrefix found it.

    Attributes:
        tokens: how many were matched, a multiple of 64; 0: none.
        sequence_id: a sequence that begins with them, to be forked there or before; empty if none.
        name: names what was matched, so that a fork can be refused that would begin otherwise.
    """

    tokens: int
    sequence_id: str
    name: bytes


class Client:
    """A connection to the daemon over gRPC. Safe for use by several threads.

    Args:
        target: ``unix:///path/to/kvtier.sock`` or ``host:port``.
        timeout: seconds for each call that is not given its own.
        credentials: TLS credentials for ``host:port``; None is plain text.

    Every method raises a ``KvtierError`` subclass when the daemon refuses or cannot be reached.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        options = [
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            # A daemon that was restarted should be found at once, not after a growing back-off.
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self.target = target
        self.timeout = timeout
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=options)
        self._sequences = srpc.SequenceServiceStub(self._channel)
        self._inspection = irpc.InspectionServiceStub(self._channel)

    def close(self) -> None:
        """Close the connection. Leases and sequences are not touched."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait_ready(self, timeout: float) -> None:
        """Wait until the daemon can be reached. Raises UnavailableError after `timeout` seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError:
            raise UnavailableError(f"no daemon answers at {self.target}", code=grpc.StatusCode.UNAVAILABLE) from None

    def _call(self, method: Callable[..., T], request: Any, timeout: float | None) -> T:
        try:
            return method(request, timeout=self.timeout if timeout is None else timeout)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error

    # -- leases ---------------------------------------------------------------------------------

    def create_lease(self, ttl_seconds: int = 60, holder: str = "") -> tuple[int, int]:
        """Start a lease of 1 to 3600 seconds. Returns (lease id, seconds it lives unrenewed)."""
        request = spb.CreateLeaseRequest(ttl_seconds=ttl_seconds, holder=holder)
        response = self._call(self._sequences.CreateLease, request, None)
        return response.lease_id, response.ttl_seconds

    def renew_lease(self, lease_id: int) -> int:
        """Renew a lease. Returns the seconds it lives from now; NotFoundError if it has ended."""
        request = spb.RenewLeaseRequest(lease_id=lease_id)
        return self._call(self._sequences.RenewLease, request, None).ttl_seconds

    def revoke_lease(self, lease_id: int) -> None:
        """End a lease and release what is held through it."""
        self._call(self._sequences.RevokeLease, spb.RevokeLeaseRequest(lease_id=lease_id), None)

    # -- sequences ------------------------------------------------------------------------------

    def create(
        self,
        spec: ModelSpec,
        *,
        name: str = "",
        profile: Profile = Profile.UNSPECIFIED,
        lease_id: int = 0,
    ) -> OpenedSequence:
        """Make an empty sequence. ``name`` is for people, at most 256 bytes of UTF-8."""
        return self._open(
            spb.OpenSequenceRequest(
                spec=spec.to_proto(),
                name=name,
                profile=int(profile),  # type: ignore[arg-type]
                lease_id=lease_id,
            )
        )

    def open(self, sequence_id: str, *, spec: ModelSpec | None = None, lease_id: int = 0) -> OpenedSequence:
        """Open a sequence that exists; with `spec`, only if the sequence's is equal to it."""
        request = spb.OpenSequenceRequest(sequence_id=sequence_id, lease_id=lease_id)
        if spec is not None:
            request.spec.CopyFrom(spec.to_proto())
        return self._open(request)

    def fork(
        self,
        sequence_id: str,
        at: int = 0,
        *,
        name: str = "",
        match: PrefixMatch | None = None,
        lease_id: int = 0,
    ) -> OpenedSequence:
        """Make a sequence that begins as the first `at` tokens of another; 0 means all of them.

        With `match`, what ``match_prefix`` found there, NotFoundError says that the sequence was
        changed since: match again. Raises FailedPreconditionError where a sliding-window layer
        cannot continue from `at`.
        """
        request = spb.OpenSequenceRequest(fork_of=sequence_id, fork_at=at, name=name, lease_id=lease_id)
        if match is not None:
            request.fork_prefix.tokens = match.tokens
            request.fork_prefix.name = match.name
        return self._open(request)

    def _open(self, request: spb.OpenSequenceRequest) -> OpenedSequence:
        response = self._call(self._sequences.OpenSequence, request, None)
        return OpenedSequence(
            response.sequence_id,
            Ack.from_proto(response.ack),
            ModelSpec.from_proto(response.spec),
            Profile(response.profile),
            response.name,
            response.exact_until,
            response.handle,
        )

    def match_prefix(
        self,
        spec: ModelSpec,
        token_ids: TokenIds,
        *,
        profile: Profile = Profile.UNSPECIFIED,
        allow_sparse: bool = False,
    ) -> PrefixMatch:
        """The longest stored prefix of `token_ids` from which every layer can continue.

        Give it to ``fork``, lest others change the sequence before that.
        """
        request = spb.MatchPrefixRequest(
            spec=spec.to_proto(),
            profile=int(profile),  # type: ignore[arg-type]
            token_ids=_ids(token_ids),
            allow_sparse=allow_sparse,
        )
        response = self._call(self._sequences.MatchPrefix, request, None)
        return PrefixMatch(response.matched, response.sequence_id, response.prefix.name)

    def append(
        self,
        sequence_id: str,
        layer: int,
        start: int,
        k: NDArray[Any] | None = None,
        v: NDArray[Any] | None = None,
        *,
        token_ids: TokenIds | None = None,
        token_text: Sequence[bytes] | None = None,
        spans: Sequence[Span] = (),
        queries: NDArray[Any] | None = None,
        convert: bool = False,
        sparse_provenance: bool = False,
        timeout: float | None = None,
    ) -> Ack:
        """Add K and V rows [n, G, d] of one layer for positions [start, start+n).

        Args:
            k, v: both, or neither to send labels, ids or queries alone.
            token_ids: ids of the n tokens; any layer may carry them.
            token_text: text of each token, for people; needs token_ids.
            spans: labelled spans that end at or before start+n.
            queries: a sample [m, H, d] of the layer's queries at these positions, of k's dtype.
            convert: allow rounding to the sequence's kv_dtype; without it rows must be
                representable in it.
            sparse_provenance: the rows came from sparse attention, as far as the caller knows.

        Raises:
            AlreadyExistsError: other bytes are stored for one of these positions.
            OutOfRangeError: `start` lies past the layer's end.
            ResourceExhaustedError: no room; retry after ``retry_delay`` seconds.
        """
        request = spb.AppendRequest(
            sequence_id=sequence_id,
            layer=layer,
            start=start,
            convert=convert,
            sparse_provenance=sparse_provenance,
            spans=[span.to_proto() for span in spans],
        )
        if k is not None and v is not None:
            request.dtype = int(element_type_of(k))  # type: ignore[assignment]
            request.k, request.v = k.tobytes(), v.tobytes()
        if queries is not None:
            request.dtype = int(element_type_of(queries))  # type: ignore[assignment]
            request.queries = queries.tobytes()
        if token_ids is not None:
            request.token_ids.extend(_ids(token_ids))
        if token_text is not None:
            request.token_text.extend(token_text)
        return Ack.from_proto(self._call(self._sequences.Append, request, timeout).ack)

    def attend(
        self,
        sequence_id: str,
        layer: int,
        start: int,
        q: NDArray[Any],
        *,
        k: NDArray[Any] | None = None,
        v: NDArray[Any] | None = None,
        token_ids: TokenIds | None = None,
        partial: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
        budget: Budget | None = None,
        timeout: float | None = None,
    ) -> AttendResult:
        """Attend from the queries q [n, H, d]; query i sees positions <= start+i.

        With k and v [n, G, d] these rows are appended first. See ``AttendItem`` for the
        arguments. Raises OutOfRangeError unless positions [0, start+n) are there.
        """
        item = AttendItem(sequence_id, start, q, k, v, token_ids, partial)
        return self.attend_many(layer, [item], budget=budget, timeout=timeout)[0]

    def attend_many(
        self,
        layer: int,
        items: Sequence[AttendItem],
        *,
        budget: Budget | None = None,
        timeout: float | None = None,
    ) -> list[AttendResult]:
        """Attend for several sequences at one layer. All items must have one dtype.

        A single item that fails raises; among several, ``AttendResult.error`` is set on the one
        that failed and the others are answered.
        """
        request = _attend_request(layer, items, budget)
        response = self._call(self._sequences.Attend, request, timeout)
        return _attend_results(response, items)

    def attend_stream(self, *, timeout: float | None = None) -> AttendStream:
        """Open a stream on which attends are answered in order; `timeout` bounds all of it."""
        return AttendStream(self._sequences, timeout)

    def prefetch(self, sequence_id: str, layers: Sequence[int]) -> int:
        """Bring what these layers' last queries chose into RAM, in the background.

        Returns the bytes asked for that are not yet in RAM.
        """
        request = spb.PrefetchRequest(sequence_id=sequence_id, layers=layers)
        return self._call(self._sequences.Prefetch, request, None).bytes_queued

    def read_kv(self, sequence_id: str, layer: int, start: int, count: int) -> tuple[NDArray[Any], NDArray[Any], bool]:
        """Read rows [start, start+count) of a layer back.

        Returns:
            (k, v, exact): k and v are [count, G*d] reshaped to [count, G, d] by the sequence's
            spec, in its kv_dtype (uint16 for BF16); `exact` tells whether the bytes are identical
            to what was appended.
        """
        request = spb.ReadKVRequest(sequence_id=sequence_id, layer=layer, start=start, count=count)
        response = self._call(self._sequences.ReadKV, request, None)
        dtype = ElementType(response.dtype).numpy
        head_dim = self.describe(sequence_id).spec.head_dim
        k = np.frombuffer(response.k, dtype).reshape(count, -1, head_dim)
        v = np.frombuffer(response.v, dtype).reshape(count, -1, head_dim)
        return k, v, response.exact

    def truncate(self, sequence_id: str, length: int) -> Ack:
        """Keep the first `length` tokens."""
        request = spb.TruncateRequest(sequence_id=sequence_id, length=length)
        return Ack.from_proto(self._call(self._sequences.Truncate, request, None).ack)

    def flush(self, sequence_id: str, *, seal: bool = False, timeout: float | None = None) -> Ack:
        """Make all accepted tokens power-safe; with `seal`, also seal what lies behind the window."""
        request = spb.FlushRequest(sequence_id=sequence_id, seal=seal)
        return Ack.from_proto(self._call(self._sequences.Flush, request, timeout).ack)

    def close_sequence(self, sequence_id: str) -> Ack:
        """End this worker's use of the sequence; what is committed stays."""
        request = spb.CloseSequenceRequest(sequence_id=sequence_id)
        return Ack.from_proto(self._call(self._sequences.CloseSequence, request, None).ack)

    def delete(self, sequence_id: str) -> None:
        """Remove a sequence and what only it holds."""
        request = spb.DeleteSequenceRequest(sequence_id=sequence_id)
        self._call(self._sequences.DeleteSequence, request, None)

    def pin(self, sequence_id: str, lease_id: int, start: int = 0, end: int = 0) -> tuple[int, int]:
        """Keep positions [start, end) in RAM while the lease lives; end 0 means all.

        Returns (pin id, bytes now held in RAM for it).
        """
        request = spb.PinRequest(sequence_id=sequence_id, lease_id=lease_id, start=start, end=end)
        response = self._call(self._sequences.Pin, request, None)
        return response.pin_id, response.bytes

    def unpin(self, pin_id: int) -> None:
        """End a pin."""
        self._call(self._sequences.Unpin, spb.UnpinRequest(pin_id=pin_id), None)

    # -- inspection -----------------------------------------------------------------------------

    def status(self) -> ipb.GetStatusResponse:
        """The daemon's state: tiers, counts, audits, memory."""
        return self._call(self._inspection.GetStatus, ipb.GetStatusRequest(), None)

    def list(self) -> list[ipb.SequenceInfo]:
        """All sequences."""
        response = self._call(self._inspection.ListSequences, ipb.ListSequencesRequest(), None)
        return [*response.sequences]

    def describe(self, sequence_id: str, *, token_ids: bool = False) -> ipb.DescribeSequenceResponse:
        """One sequence: its spec, sealed spans, labels and, if asked, token ids."""
        request = ipb.DescribeSequenceRequest(sequence_id=sequence_id, token_ids=token_ids)
        return self._call(self._inspection.DescribeSequence, request, None)

    def explain(self, sequence_id: str, layer: int, top: int = 0, top_spans: int = 0) -> ipb.ExplainResponse:
        """What a layer's last query did, and its true error.

        `top` tokens for each query head, and the `top_spans` labelled spans that received most
        attention (0: 16 of either).
        """
        request = ipb.ExplainRequest(sequence_id=sequence_id, layer=layer, top=top, top_spans=top_spans)
        return self._call(self._inspection.Explain, request, None)

    def audits(self, sequence_id: str = "", *, after: int = 0, limit: int = 0) -> ipb.ListAuditsResponse:
        """The newest audits with a number above `after` (`limit` 0: 4,096), and how stated errors held by layer."""
        request = ipb.ListAuditsRequest(sequence_id=sequence_id, after=after, limit=limit)
        return self._call(self._inspection.ListAudits, request, None)

    def residency(self, sequence_id: str) -> ipb.ResidencyResponse:
        """Where a sequence's planes lie."""
        request = ipb.ResidencyRequest(sequence_id=sequence_id)
        return self._call(self._inspection.Residency, request, None)

    def verify(self, sequence_id: str = "", *, timeout: float = 3600) -> Iterator[ipb.VerifyResponse]:
        """Read and check every stored byte, of one sequence or of all; yields progress."""
        try:
            yield from self._inspection.Verify(ipb.VerifyRequest(sequence_id=sequence_id), timeout=timeout)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error


class AttendStream:
    """One AttendStream call. Not safe for several threads at once.

    ``attend`` and ``attend_many`` wait for their answer; ``send`` and ``receive`` allow several
    requests to be under way, answered in order. Close it, or use it as a context manager.
    """

    def __init__(self, stub: srpc.SequenceServiceStub, timeout: float | None) -> None:
        self._requests: queue.SimpleQueue[spb.AttendStreamRequest | None] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[Sequence[AttendItem]] = queue.SimpleQueue()
        self._responses = stub.AttendStream(iter(self._requests.get, None), timeout=timeout)

    def send(self, layer: int, items: Sequence[AttendItem], budget: Budget | None = None) -> None:
        """Send a request without waiting for its answer."""
        request = spb.AttendStreamRequest(request=_attend_request(layer, items, budget))
        self._pending.put(items)
        self._requests.put(request)

    def receive(self) -> list[AttendResult]:
        """The answer to the oldest request not yet answered. A request's failure raises here and
        leaves the stream usable."""
        items = self._pending.get_nowait()
        try:
            message = next(self._responses)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from error
        except StopIteration:
            raise UnavailableError("the daemon ended the stream", code=grpc.StatusCode.UNAVAILABLE) from None
        if message.error_code:
            raise error_from_text(message.error_code, message.error_message)
        return _attend_results(message.response, items)

    def attend_many(
        self, layer: int, items: Sequence[AttendItem], *, budget: Budget | None = None
    ) -> list[AttendResult]:
        """As ``Client.attend_many``."""
        self.send(layer, items, budget)
        return self.receive()

    def attend(
        self,
        sequence_id: str,
        layer: int,
        start: int,
        q: NDArray[Any],
        *,
        k: NDArray[Any] | None = None,
        v: NDArray[Any] | None = None,
        token_ids: TokenIds | None = None,
        partial: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
        budget: Budget | None = None,
    ) -> AttendResult:
        """As ``Client.attend``."""
        item = AttendItem(sequence_id, start, q, k, v, token_ids, partial)
        return self.attend_many(layer, [item], budget=budget)[0]

    def close(self) -> None:
        """End the stream; answers not received are dropped."""
        self._requests.put(None)
        self._responses.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _ids(token_ids: TokenIds) -> list[int]:
    return token_ids.tolist() if isinstance(token_ids, np.ndarray) else [*token_ids]


def _attend_request(layer: int, items: Sequence[AttendItem], budget: Budget | None) -> spb.AttendRequest:
    request = spb.AttendRequest(layer=layer)
    if budget is not None:
        request.budget.CopyFrom(budget.to_proto())
    for item in items:
        element = item.check()
        if request.items and int(element) != int(request.dtype):
            raise make_error(grpc.StatusCode.INVALID_ARGUMENT, "all items must have one dtype")
        request.dtype = int(element)  # type: ignore[assignment]
        message = request.items.add(sequence_id=item.sequence_id, start=item.start, q=item.q.tobytes())
        if item.k is not None and item.v is not None:
            message.k, message.v = item.k.tobytes(), item.v.tobytes()
        if item.token_ids is not None:
            message.token_ids.extend(_ids(item.token_ids))
        if item.partial is not None:
            output, lse = item.partial
            message.partial_output = np.asarray(output, np.float32).tobytes()
            message.partial_lse = np.asarray(lse, np.float32).tobytes()
    return request


def _attend_results(response: spb.AttendResponse, items: Sequence[AttendItem]) -> list[AttendResult]:
    return [_attend_result(message, item) for message, item in zip(response.results, items, strict=True)]


def _attend_result(message: spb.AttendResult, item: AttendItem) -> AttendResult:
    error = None
    output: NDArray[np.float32]
    lse: NDArray[np.float32]
    if message.error_code:
        error = error_from_text(message.error_code, message.error_message)
        output = lse = np.empty(0, np.float32)
    else:
        output = np.frombuffer(message.output, np.float32).reshape(item.q.shape)
        lse = np.frombuffer(message.lse, np.float32).reshape(item.q.shape[:2])
    account: pb.Account = message.account
    return AttendResult(output, lse, Ack.from_proto(message.ack), lambda: Account.from_proto(account), error)
