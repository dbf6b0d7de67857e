"""The fast path: Append and Attend in fixed binary frames over a Unix socket.

Tensors travel through memory that both sides map (sealed memfds), so that a call costs one send
and one receive of some hundred bytes. docs/protocol.md specifies every byte; the structs below
are its tables.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from kvtier.errors import (
    DeadlineExceededError,
    KvtierError,
    UnavailableError,
    error_from_text,
    make_error,
)
from kvtier.types import Account, Ack, AttendItem, AttendMode, AttendResult, Budget, element_type_of

__all__ = ["FastClient"]

MAGIC = 0x31465654
VERSION = 5
MAX_BODY = 268_435_456
MAX_REGION = 1 << 30

OP_HELLO, OP_REGION, OP_UNREGION, OP_OPEN, OP_APPEND, OP_ATTEND = 1, 2, 3, 4, 5, 6
REPLY = 0x80

# Frame: magic, version, op, zero, request id, status, body length.
FRAME = struct.Struct("<IBBHIIQ")
# Append: handle, start, layer, n, dtype, flags, zero, m, number of ids, region, offset, bytes
# there, zero.
APPEND = struct.Struct("<QQIIBBHIIIQII")
# Attend: layer, dtype, mode, items, share, target error, tokens, timeout in ms, region, offset,
# results' region, bytes of the data, results' offset, longest wait for reads in us, zero.
ATTEND = struct.Struct("<IBBHffQIIQIIQII")
# Item: handle, start, n, flags.
ITEM = struct.Struct("<QQII")
# Result: code, message length, ack x 4, account x 8, 2 errors, 5 times, mode, flags,
# 95th percentile of the error, audits behind it, bytes read by a GPU, tokens and bytes late.
RESULT = struct.Struct("<II4Q8Q2f5QIIfI3Q")
ACK = struct.Struct("<QQQQ")

FLAG_CONVERT, FLAG_SPARSE = 1, 2
FLAG_KV, FLAG_PARTIAL, FLAG_IDS = 1, 2, 4

_TARGET_MISSED = 1
_INITIAL_REGION = 1 << 20
_DEFAULT_TIMEOUT = 30.0
# The daemon keeps the deadline itself; the client waits a little longer so that it reads the
# daemon's own answer instead of giving up on the connection.
_GRACE = 5.0
_DEFAULT_BUDGET = Budget()


class _Region:
    """A sealed memfd, mapped here and known to the daemon under `region_id`."""

    __slots__ = ("bytes", "fd", "map", "region_id", "size")

    def __init__(self, region_id: int, size: int) -> None:
        self.region_id = region_id
        self.size = size
        self.fd = os.memfd_create(f"kvtier-{region_id}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            # Without these seals we could shrink it under the daemon, which would fault.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.map = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.bytes: NDArray[np.uint8] | None = np.frombuffer(self.map, np.uint8)

    def close(self) -> None:
        self.bytes = None  # the map cannot be closed while an array looks into it
        self.map.close()
        os.close(self.fd)


class FastClient:
    """A fast-path connection, with the same ``append`` and ``attend`` as ``kvtier.Client``.

    Args:
        path: the socket (``<data>/fast.sock``).
        timeout: seconds for each call that is not given its own.
        regions: exchange tensors through shared memory; False sends them inline.

    The connection is a lease: what was opened through it is released when it closes. Calls from
    several threads are served one after the other. After an UnavailableError or a
    DeadlineExceededError raised by the client itself the connection is closed (``closed``).
    """

    def __init__(self, path: str, *, timeout: float = _DEFAULT_TIMEOUT, regions: bool = True) -> None:
        self.path = path
        self.timeout = timeout
        self.closed = False
        self._lock = threading.Lock()
        self._handles: dict[str, int] = {}
        self._request_id = 0
        self._region_id = 0
        self._use_regions = regions and hasattr(os, "memfd_create")
        self._input: _Region | None = None
        self._output: _Region | None = None
        self._receive = bytearray(64 << 10)
        self._receive_view = memoryview(self._receive)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket_timeout = timeout + _GRACE
        self._socket.settimeout(self._socket_timeout)
        try:
            self._socket.connect(path)
            body = self._call(OP_HELLO, struct.pack("<I", VERSION))
            version, self.max_body = struct.unpack_from("<IQ", body)
            if version != VERSION:
                raise make_error(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"the daemon speaks fast path version {version}, this client {VERSION}",
                )
        except OSError as error:
            self._abandon()
            raise _unavailable(f"cannot connect to {path}: {error}") from error
        except BaseException:
            self._abandon()
            raise

    def close(self) -> None:
        """Close the connection and free its shared memory."""
        with self._lock:
            self._abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- calls ----------------------------------------------------------------------------------

    def open(self, sequence_id: str) -> Ack:
        """Open a sequence on this connection. Other calls do it by themselves when needed."""
        with self._lock:
            return self._open(sequence_id)[1]

    def forget(self, sequence_id: str) -> None:
        """Drop the handle of a sequence that was closed or deleted."""
        with self._lock:
            self._handles.pop(sequence_id, None)

    def append(
        self,
        sequence_id: str,
        layer: int,
        start: int,
        k: NDArray[Any],
        v: NDArray[Any],
        *,
        token_ids: Sequence[int] | NDArray[Any] | None = None,
        queries: NDArray[Any] | None = None,
        convert: bool = False,
        sparse_provenance: bool = False,
        timeout: float | None = None,
    ) -> Ack:
        """As ``Client.append``, without token text and spans, which go by gRPC only."""
        element = element_type_of(k)
        if k.ndim != 3 or v.shape != k.shape or v.dtype != k.dtype:
            raise _invalid(f"k {k.shape} and v {v.shape} must be equal [n, kv_heads, head_dim] of one dtype")
        n = k.shape[0]
        parts: list[NDArray[Any]] = [k, v]
        m = 0
        if queries is not None:
            if queries.ndim != 3 or queries.dtype != k.dtype:
                raise _invalid("queries must be [m, query_heads, head_dim] of k's dtype")
            m = queries.shape[0]
            parts.append(queries)
        ids = 0
        if token_ids is not None and len(token_ids):
            ids = len(token_ids)
            if ids != n:
                raise _invalid(f"{ids} token ids for {n} tokens")
            parts.append(np.asarray(token_ids, np.uint64))
        flags = (FLAG_CONVERT if convert else 0) | (FLAG_SPARSE if sparse_provenance else 0)
        with self._lock:
            handle = self._handle(sequence_id)
            region, size, inline = self._place(parts)
            head = APPEND.pack(
                handle, start, layer, n, element, flags, 0, m, ids, region, 0, size, 0
            )  # fmt: skip
            body = self._call(OP_APPEND, head, inline, timeout)
            return Ack(*ACK.unpack_from(body))

    def attend(
        self,
        sequence_id: str,
        layer: int,
        start: int,
        q: NDArray[Any],
        *,
        k: NDArray[Any] | None = None,
        v: NDArray[Any] | None = None,
        token_ids: Sequence[int] | NDArray[Any] | None = None,
        partial: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
        budget: Budget | None = None,
        timeout: float | None = None,
    ) -> AttendResult:
        """As ``Client.attend``."""
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
        """As ``Client.attend_many``."""
        if not items:
            raise _invalid("at least one item is needed")
        budget = budget or _DEFAULT_BUDGET
        parts: list[NDArray[Any]] = []
        element = None
        out_bytes = 0
        flags: list[int] = []
        for item in items:
            own = item.check()
            if element is not None and own != element:
                raise _invalid("all items must have one dtype")
            element = own
            q = item.q
            flag = 0
            parts.append(q)
            if item.k is not None and item.v is not None:
                flag |= FLAG_KV
                parts += (item.k, item.v)
            if item.partial is not None:
                flag |= FLAG_PARTIAL
                parts += (np.asarray(p, np.float32) for p in item.partial)
            if item.token_ids is not None and len(item.token_ids):
                flag |= FLAG_IDS
                parts.append(np.asarray(item.token_ids, np.uint64))
            flags.append(flag)
            n, heads, dim = q.shape
            out_bytes += n * heads * (dim + 1) * 4
        seconds = self.timeout if timeout is None else timeout
        with self._lock:
            handles = [self._handle(item.sequence_id) for item in items]
            region, size, inline = self._place(parts)
            out_region = self._reserve_output(out_bytes)
            head = bytearray(ATTEND.size + ITEM.size * len(items))
            ATTEND.pack_into(
                head, 0, layer, element, budget.mode, len(items), budget.share_of_bytes,
                budget.target_error, budget.token_count, max(1, int(seconds * 1000)),
                region, 0, out_region, size, 0, budget.read_wait_us, 0,
            )  # fmt: skip
            for i, item in enumerate(items):
                offset = ATTEND.size + ITEM.size * i
                ITEM.pack_into(head, offset, handles[i], item.start, item.q.shape[0], flags[i])
            body = self._call(OP_ATTEND, head, inline, seconds)
            return self._results(body, items, bool(out_region))

    # -- replies --------------------------------------------------------------------------------

    def _results(self, body: memoryview, items: Sequence[AttendItem], in_region: bool) -> list[AttendResult]:
        (count,) = struct.unpack_from("<I", body)
        if count != len(items):
            self._abandon()
            raise _unavailable(f"{count} results for {len(items)} items")
        # The receive buffer is used again by the next call: keep only copies of it.
        records = bytes(body[8 : 8 + RESULT.size * count])
        text_at = 8 + RESULT.size * count
        unpacked = [RESULT.unpack_from(records, RESULT.size * i) for i in range(count)]
        if in_region:
            assert self._output is not None and self._output.bytes is not None
            data: Any = self._output.bytes
            at = 0
        else:
            data = body
            at = text_at + sum(record[1] for record in unpacked)
        results = []
        for item, record in zip(items, unpacked, strict=True):
            code, text_length = record[0], record[1]
            ack = Ack(*record[2:6])
            if code:
                text = bytes(body[text_at : text_at + text_length]).decode("utf-8", "replace")
                text_at += text_length
                error = error_from_text(code, text)
                empty = np.empty(0, np.float32)
                results.append(AttendResult(empty, empty, ack, Account(), error))
                continue
            text_at += text_length
            n, heads, dim = item.q.shape
            output = np.empty((n, heads, dim), np.float32)
            lse = np.empty((n, heads), np.float32)
            for array in (output, lse):
                flat = array.reshape(-1).view(np.uint8)
                flat[:] = data[at : at + flat.size]
                at += flat.size
            results.append(AttendResult(output, lse, ack, _account_of(record)))
        return results

    # -- memory ---------------------------------------------------------------------------------

    def _place(self, parts: Sequence[NDArray[Any]]) -> tuple[int, int, bytes]:
        """Lay the arrays one after the other into the input region, or join them for inline.

        Returns (region id, bytes there, b"") or (0, 0, the bytes). The data always begin at offset 0: the
        connection has one request under way at a time, so the region is free again.
        """
        if not self._use_regions:
            return 0, 0, b"".join(part.tobytes() for part in parts)
        total = sum(part.nbytes for part in parts)
        region = self._input = self._grown(self._input, total)
        target = region.bytes
        assert target is not None
        at = 0
        for part in parts:
            end = at + part.nbytes
            target[at:end] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
            at = end
        return region.region_id, total, b""

    def _reserve_output(self, size: int) -> int:
        if not self._use_regions:
            return 0
        self._output = self._grown(self._output, size)
        return self._output.region_id

    def _grown(self, region: _Region | None, size: int) -> _Region:
        """The region if it is large enough, or else a larger one that takes its place."""
        if region is not None and region.size >= size:
            return region
        if size > MAX_REGION:
            raise _invalid(f"{size} bytes in one call; a region holds at most {MAX_REGION}")
        wanted = min(MAX_REGION, max(_INITIAL_REGION, 1 << (size - 1).bit_length()))
        self._region_id += 1
        grown = _Region(self._region_id, wanted)
        try:
            self._call(OP_REGION, struct.pack("<IQ", grown.region_id, wanted), descriptor=grown.fd)
            if region is not None:
                self._call(OP_UNREGION, struct.pack("<I", region.region_id))
        except BaseException:
            grown.close()
            raise
        if region is not None:
            region.close()
        return grown

    # -- frames ---------------------------------------------------------------------------------

    def _handle(self, sequence_id: str) -> int:
        handle = self._handles.get(sequence_id)
        return self._open(sequence_id)[0] if handle is None else handle

    def _open(self, sequence_id: str) -> tuple[int, Ack]:
        body = self._call(OP_OPEN, sequence_id.encode())
        handle, *ack = struct.unpack_from("<QQQQQ", body)
        self._handles[sequence_id] = handle
        return handle, Ack(*ack)

    def _call(
        self,
        op: int,
        body: bytes | bytearray,
        inline: bytes = b"",
        timeout: float | None = None,
        descriptor: int = -1,
    ) -> memoryview:
        """One request and its reply. Returns the reply's body, valid until the next call."""
        if self.closed:
            raise _unavailable(f"the connection to {self.path} is closed")
        length = len(body) + len(inline)
        if length > MAX_BODY:
            raise _invalid(f"{length} bytes in one frame; at most {MAX_BODY}")
        self._request_id = request_id = (self._request_id + 1) & 0xFFFFFFFF
        frame = FRAME.pack(MAGIC, VERSION, op, 0, request_id, 0, length) + body
        waits = (self.timeout if timeout is None else timeout) + _GRACE
        if waits != self._socket_timeout:
            self._socket.settimeout(waits)
            self._socket_timeout = waits
        try:
            if descriptor >= 0:
                sent = socket.send_fds(self._socket, [frame], [descriptor])
                if sent < len(frame):
                    self._socket.sendall(frame[sent:])
            else:
                self._socket.sendall(frame)
            if inline:
                self._socket.sendall(inline)
            status, reply = self._read_reply(op, request_id)
        except TimeoutError as error:
            # A late reply would be taken for the next request's: this connection is done.
            self._abandon()
            raise DeadlineExceededError(
                f"no reply within {waits:.1f} s", code=grpc.StatusCode.DEADLINE_EXCEEDED
            ) from error
        except OSError as error:
            self._abandon()
            raise _unavailable(f"the connection to {self.path} broke: {error}") from error
        except KvtierError:
            raise
        except BaseException:  # KeyboardInterrupt amid a reply: as a timeout
            self._abandon()
            raise
        if status:
            raise error_from_text(status, bytes(reply).decode("utf-8", "replace"))
        return reply

    def _read_reply(self, op: int, request_id: int) -> tuple[int, memoryview]:
        receive = self._socket.recv_into
        view = self._receive_view
        # Replies are read one at a time, so whatever arrives belongs to this one.
        have = receive(view)
        while 0 < have < FRAME.size:
            got = receive(view[have:])
            if not got:
                have = 0
            have += got
        if have == 0:
            self._abandon()
            raise _unavailable(f"the daemon closed the connection to {self.path}")
        magic, version, got_op, _, got_id, status, length = FRAME.unpack_from(view)
        if (
            magic != MAGIC or version != VERSION or got_op != op | REPLY
            or got_id != request_id or length > MAX_BODY
        ):  # fmt: skip
            self._abandon()
            raise _unavailable(
                f"not a reply to request {request_id}: magic {magic:#x}, version {version}, "
                f"op {got_op:#x}, id {got_id}, length {length}"
            )
        total = FRAME.size + length
        if total > len(self._receive):
            larger = bytearray(1 << (total - 1).bit_length())
            larger[:have] = view[:have]
            self._receive, self._receive_view = larger, memoryview(larger)
            view = self._receive_view
        while have < total:
            got = receive(view[have:total])
            if not got:
                self._abandon()
                raise _unavailable("the daemon closed the connection amid a reply")
            have += got
        return status, view[FRAME.size : total]

    def _abandon(self) -> None:
        self.closed = True
        self._handles.clear()
        self._socket.close()
        for region in (self._input, self._output):
            if region is not None:
                region.close()
        self._input = self._output = None


def _account_of(record: tuple[Any, ...]) -> Callable[[], Account]:
    return lambda: Account(*(*record[6:21], AttendMode(record[21]), record[23], record[24], bool(record[22] & _TARGET_MISSED), *record[25:28]))


def _unavailable(message: str) -> UnavailableError:
    return UnavailableError(message, code=grpc.StatusCode.UNAVAILABLE)


def _invalid(message: str) -> KvtierError:
    return make_error(grpc.StatusCode.INVALID_ARGUMENT, message)
