"""A small daemon in this process: stores rows as they come and attends densely.

It is written from docs/protocol.md and the .proto files, independently of the client, with its own
struct formats; so client and server cannot be wrong in the same way by sharing code.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import itertools
import mmap
import os
import socket
import struct
import threading
from pathlib import Path

import grpc
import numpy as np
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from kvtier.bf16 import from_bf16
from kvtier.types import ModelSpec
from kvtier.v1 import inspection_pb2 as ipb
from kvtier.v1 import inspection_pb2_grpc as irpc
from kvtier.v1 import sequence_pb2 as spb
from kvtier.v1 import sequence_pb2_grpc as srpc
from kvtier.v1 import types_pb2 as pb

_DTYPES = {1: np.float32, 2: np.uint16, 3: np.float16}


class Refusal(Exception):
    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message


def rows_of(data: bytes, dtype: int, heads: int, dim: int) -> np.ndarray:
    array = np.frombuffer(data, _DTYPES[dtype or 1])
    array = from_bf16(array) if dtype == 2 else array.astype(np.float32)
    if array.size % (heads * dim):
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "BAD_SHAPE", "the data do not fill whole rows")
    return array.reshape(-1, heads, dim)


class Store:
    """Sequences by id, and what they are asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.specs: dict[str, ModelSpec] = {}
        self.rows: dict[str, list[list[np.ndarray]]] = {}
        self.token_ids: dict[str, dict[int, int]] = {}
        self.token_text: dict[str, dict[int, bytes]] = {}
        self.spans: dict[str, list[pb.Span]] = {}
        self.queries: list[tuple[str, int, int, np.ndarray]] = []
        self.handles: dict[int, str] = {}
        self.budgets: list[tuple[int, float, int, float, int]] = []
        self.counter = itertools.count(1)
        self.refuse_appends = 0

    def spec(self, sequence: str) -> ModelSpec:
        if sequence not in self.specs:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "SEQUENCE_NOT_FOUND", f"no sequence {sequence!r}")
        return self.specs[sequence]

    def create(self, spec: ModelSpec) -> str:
        sequence = f"seq-{next(self.counter)}"
        self.specs[sequence] = spec
        empty = np.empty((0, spec.kv_heads, spec.head_dim), np.float32)
        self.rows[sequence] = [[empty, empty] for _ in range(spec.layers)]
        self.token_ids[sequence], self.token_text[sequence] = {}, {}
        self.spans[sequence] = []
        return sequence

    def fork(self, source: str, at: int) -> str:
        spec = self.spec(source)
        sequence = self.create(spec)
        at = at or self.accepted(source)
        self.rows[sequence] = [[k[:at], v[:at]] for k, v in self.rows[source]]
        return sequence

    def accepted(self, sequence: str) -> int:
        return min(len(k) for k, _ in self.rows[sequence])

    def truncate(self, sequence: str, length: int) -> None:
        self.rows[sequence] = [[k[:length], v[:length]] for k, v in self.rows[sequence]]

    def delete(self, sequence: str) -> None:
        del self.rows[sequence]

    def append(self, sequence: str, layer: int, start: int, k: np.ndarray, v: np.ndarray) -> None:
        if self.refuse_appends:
            self.refuse_appends -= 1
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "TAIL_FULL", "no room for open tails")
        rows = self.rows[sequence][layer]
        have = len(rows[0])
        if start > have:
            raise Refusal(grpc.StatusCode.OUT_OF_RANGE, "GAP", f"layer {layer} ends at {have}")
        known = min(have - start, len(k))
        if not (
            np.array_equal(rows[0][start : start + known], k[:known])
            and np.array_equal(rows[1][start : start + known], v[:known])
        ):
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "ROWS_DIFFER", "other bytes are stored")
        rows[0] = np.concatenate([rows[0], k[known:]])
        rows[1] = np.concatenate([rows[1], v[known:]])

    def attend(self, sequence: str, layer: int, start: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        spec = self.spec(sequence)
        k, v = self.rows[sequence][layer]
        if start + len(q) > len(k):
            raise Refusal(grpc.StatusCode.OUT_OF_RANGE, "PAST_END", f"layer {layer} ends at {len(k)}")
        share = spec.query_heads // spec.kv_heads
        scores = np.einsum("nhd,thd->nht", q, np.repeat(k, share, 1)) * (spec.scale or spec.head_dim**-0.5)
        distance = (start + np.arange(len(q)))[:, None] - np.arange(len(k))[None]
        hidden = distance < 0
        if window := spec.window(layer):
            hidden |= distance >= window
        scores = np.where(hidden[:, None], -np.inf, scores)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = np.einsum("nht,thd->nhd", weights / total, np.repeat(v, share, 1))
        return out.astype(np.float32), (top + np.log(total))[..., 0].astype(np.float32)


class GrpcServer(srpc.SequenceServiceServicer, irpc.InspectionServiceServicer):
    """The store over gRPC, as far as the tests need it."""

    def __init__(self, store: Store, path: Path) -> None:
        self.store = store
        size = 256 << 20
        self.server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(4),
            options=[("grpc.max_receive_message_length", size), ("grpc.max_send_message_length", size)],
        )
        srpc.add_SequenceServiceServicer_to_server(self, self.server)
        irpc.add_InspectionServiceServicer_to_server(self, self.server)
        self.server.add_insecure_port(f"unix://{path}")
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()

    def _refuse(self, context: grpc.ServicerContext, refusal: Refusal) -> None:
        status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message)
        for detail in (
            error_details_pb2.ErrorInfo(reason=refusal.reason, domain="kvtier"),
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=250_000_000)),
        ):
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(refusal.code, refusal.message)

    def _ack(self, sequence: str) -> pb.Ack:
        return pb.Ack(accepted=self.store.accepted(sequence), crash_safe=1, power_safe=2, sealed=3)

    def CreateLease(self, request, context):
        return spb.CreateLeaseResponse(lease_id=7, ttl_seconds=request.ttl_seconds or 60)

    def RenewLease(self, request, context):
        return spb.RenewLeaseResponse(ttl_seconds=60)

    def RevokeLease(self, request, context):
        return spb.RevokeLeaseResponse()

    def OpenSequence(self, request, context):
        with self.store.lock:
            try:
                if request.fork_of:
                    sequence = self.store.fork(request.fork_of, request.fork_at)
                elif request.sequence_id:
                    sequence = request.sequence_id
                    spec = self.store.spec(sequence)
                    if request.HasField("spec") and ModelSpec.from_proto(request.spec) != spec:
                        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "SPEC_DIFFERS", "another spec")
                else:
                    sequence = self.store.create(ModelSpec.from_proto(request.spec))
            except Refusal as refusal:
                self._refuse(context, refusal)
            accepted = self.store.accepted(sequence)
            return spb.OpenSequenceResponse(
                sequence_id=sequence, ack=self._ack(sequence), spec=self.store.spec(sequence).to_proto(),
                profile=request.profile, name=request.name, exact_until=accepted,
            )  # fmt: skip

    def Append(self, request, context):
        store, sequence = self.store, request.sequence_id
        with store.lock:
            try:
                spec = store.spec(sequence)
                if request.k:
                    k = rows_of(request.k, request.dtype, spec.kv_heads, spec.head_dim)
                    v = rows_of(request.v, request.dtype, spec.kv_heads, spec.head_dim)
                    store.append(sequence, request.layer, request.start, k, v)
                if request.queries:
                    q = rows_of(request.queries, request.dtype, spec.query_heads, spec.head_dim)
                    store.queries.append((sequence, request.layer, request.start, q))
            except Refusal as refusal:
                self._refuse(context, refusal)
            for i, token in enumerate(request.token_ids):
                store.token_ids[sequence][request.start + i] = token
            for i, text in enumerate(request.token_text):
                store.token_text[sequence][request.start + i] = text
            store.spans[sequence] += request.spans
            return spb.AppendResponse(ack=self._ack(sequence))

    def _attend_one(self, request: spb.AttendRequest, item: spb.AttendItem) -> spb.AttendResult:
        store = self.store
        spec = store.spec(item.sequence_id)
        if item.k:
            k = rows_of(item.k, request.dtype, spec.kv_heads, spec.head_dim)
            v = rows_of(item.v, request.dtype, spec.kv_heads, spec.head_dim)
            store.append(item.sequence_id, request.layer, item.start, k, v)
        q = rows_of(item.q, request.dtype, spec.query_heads, spec.head_dim)
        output, lse = store.attend(item.sequence_id, request.layer, item.start, q)
        for i, token in enumerate(item.token_ids):
            store.token_ids[item.sequence_id][item.start + i] = token
        return spb.AttendResult(
            output=output.tobytes(), lse=lse.tobytes(), ack=self._ack(item.sequence_id),
            account=pb.Account(tokens_exact=len(q), bytes_ram=5, bytes_nvme=6, bytes_full=44, mode=1),
        )  # fmt: skip

    def _attend(self, request: spb.AttendRequest) -> spb.AttendResponse:
        budget = request.budget
        results = []
        with self.store.lock:
            self.store.budgets.append((budget.mode, budget.share, budget.tokens, budget.target_error, budget.read_wait_us))
            for item in request.items:
                try:
                    results.append(self._attend_one(request, item))
                except Refusal as refusal:
                    if len(request.items) == 1:
                        raise
                    results.append(spb.AttendResult(error_code=refusal.code.value[0], error_message=refusal.message))
        return spb.AttendResponse(results=results)

    def Attend(self, request, context):
        try:
            return self._attend(request)
        except Refusal as refusal:
            self._refuse(context, refusal)

    def AttendStream(self, request_iterator, context):
        for message in request_iterator:
            try:
                yield spb.AttendStreamResponse(response=self._attend(message.request))
            except Refusal as refusal:
                yield spb.AttendStreamResponse(error_code=refusal.code.value[0], error_message=refusal.message)

    def Truncate(self, request, context):
        with self.store.lock:
            self.store.truncate(request.sequence_id, request.length)
            return spb.TruncateResponse(ack=self._ack(request.sequence_id))

    def Flush(self, request, context):
        return spb.FlushResponse(ack=self._ack(request.sequence_id))

    def CloseSequence(self, request, context):
        return spb.CloseSequenceResponse(ack=self._ack(request.sequence_id))

    def DeleteSequence(self, request, context):
        with self.store.lock:
            self.store.delete(request.sequence_id)
        return spb.DeleteSequenceResponse()

    def MatchPrefix(self, request, context):
        return spb.MatchPrefixResponse()

    def ReadKV(self, request, context):
        k, v = self.store.rows[request.sequence_id][request.layer]
        part = slice(request.start, request.start + request.count)
        return spb.ReadKVResponse(k=k[part].tobytes(), v=v[part].tobytes(), dtype=1, exact=True)

    def DescribeSequence(self, request, context):
        try:
            spec = self.store.spec(request.sequence_id)
        except Refusal as refusal:
            self._refuse(context, refusal)
        return ipb.DescribeSequenceResponse(spec=spec.to_proto())

    def GetStatus(self, request, context):
        return ipb.GetStatusResponse(version="reference")


class FastServer:
    """The store over the fast path. One thread a connection."""

    def __init__(self, store: Store, path: Path) -> None:
        self.store = store
        self.ops: list[int] = []
        self.answer: bytes | None = None  # raw bytes sent instead of the next reply
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        regions: dict[int, mmap.mmap] = {}
        with connection:
            while True:
                head, descriptors, _, _ = socket.recv_fds(connection, 24, 1)
                while head and len(head) < 24:
                    head += connection.recv(24 - len(head))
                if not head:
                    return
                magic, version, op, zero, request_id, status, length = struct.unpack("<4sBBHIIQ", head)
                assert (magic, version, zero, status) == (b"TVF1", 5, 0, 0)
                body = b""
                while len(body) < length:
                    body += connection.recv(length - len(body))
                self.ops.append(op)
                with self.store.lock:
                    try:
                        code, reply = 0, self._answer(op, body, descriptors, regions)
                    except Refusal as refusal:
                        code = refusal.code.value[0]
                        reply = f"{refusal.reason}: {refusal.message}".encode()
                if self.answer is not None:
                    connection.sendall(self.answer)
                    return
                frame = struct.pack("<4sBBHIIQ", b"TVF1", 5, op | 0x80, 0, request_id, code, len(reply))
                # In two parts: a reply may arrive in pieces.
                connection.sendall(frame[:10])
                connection.sendall(frame[10:] + reply)

    def _answer(self, op: int, body: bytes, descriptors: list[int], regions: dict[int, mmap.mmap]) -> bytes:
        store = self.store
        if op == 1:
            assert struct.unpack("<I", body) == (5,)
            return struct.pack("<IQ", 5, 268435456)
        if op == 2:
            region, size = struct.unpack("<IQ", body)
            (descriptor,) = descriptors
            assert region != 0 and os.fstat(descriptor).st_size == size
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            want = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            if seals & want != want:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "REGION_UNSEALED", "seal it")
            regions[region] = mmap.mmap(descriptor, size)
            os.close(descriptor)
            return b""
        if op == 3:
            regions.pop(struct.unpack("<I", body)[0]).close()
            return b""
        if op == 4:
            sequence = body.decode()
            store.spec(sequence)
            handle = next(store.counter)
            store.handles[handle] = sequence
            return struct.pack("<QQQQQ", handle, store.accepted(sequence), 1, 2, 3)
        if op == 5:
            return self._append(body, regions)
        if op == 6:
            return self._attend(body, regions)
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "OP_UNKNOWN", f"op {op}")

    def _append(self, body: bytes, regions: dict[int, mmap.mmap]) -> bytes:
        (handle, start, layer, n, dtype, flags, zero, m, ids, region, offset, size,
         last) = struct.unpack_from("<QQIIBBHIIIQII", body)  # fmt: skip
        assert zero == last == 0 and bool(size) == bool(region) and flags in (0, 1, 2, 3) and offset % 64 == 0
        data = bytes(regions[region][offset : offset + size]) if region else body[56:]
        sequence = self.store.handles[handle]
        spec = self.store.spec(sequence)
        width = {1: 4, 2: 2, 3: 2}[dtype] * spec.head_dim
        kv, qs = n * spec.kv_heads * width, m * spec.query_heads * width
        k, v, q = data[:kv], data[kv : 2 * kv], data[2 * kv : 2 * kv + qs]
        assert len(data) == 2 * kv + qs + 8 * ids
        k, v = (rows_of(x, dtype, spec.kv_heads, spec.head_dim) for x in (k, v))
        self.store.append(sequence, layer, start, k, v)
        if m:
            queries = rows_of(q, dtype, spec.query_heads, spec.head_dim)
            self.store.queries.append((sequence, layer, start, queries))
        for i, token in enumerate(np.frombuffer(data, np.uint64, ids, 2 * kv + qs)):
            self.store.token_ids[sequence][start + i] = int(token)
        return struct.pack("<QQQQ", self.store.accepted(sequence), 1, 2, 3)

    def _attend(self, body: bytes, regions: dict[int, mmap.mmap]) -> bytes:
        (layer, dtype, mode, count, share, target, tokens, timeout, region, offset, out_region, size,
         out_offset, wait, zero) = struct.unpack_from("<IBBHffQIIQIIQII", body)  # fmt: skip
        assert zero == 0 and bool(size) == bool(region) and offset % 64 == 0 and out_offset % 64 == 0 and timeout > 0
        self.store.budgets.append((mode, share, tokens, target, wait))
        items = [struct.unpack_from("<QQII", body, 64 + 24 * i) for i in range(count)]
        data = bytes(regions[region][offset : offset + size]) if region else body[64 + 24 * count :]
        at, records, messages, outputs = 0, [], [], []
        for handle, start, n, flags in items:
            sequence = self.store.handles[handle]
            spec = self.store.spec(sequence)
            width = {1: 4, 2: 2, 3: 2}[dtype] * spec.head_dim * n

            def take(size: int) -> bytes:
                nonlocal at
                at += size
                return data[at - size : at]

            q = rows_of(take(spec.query_heads * width), dtype, spec.query_heads, spec.head_dim)
            try:
                if flags & 1:
                    k, v = (rows_of(take(spec.kv_heads * width), dtype, spec.kv_heads, spec.head_dim) for _ in range(2))
                    self.store.append(sequence, layer, start, k, v)
                partial = None
                if flags & 2:
                    o = np.frombuffer(take(q.size * 4), np.float32).reshape(q.shape)
                    partial = o, np.frombuffer(take(n * spec.query_heads * 4), np.float32).reshape(n, -1)
                if flags & 4:
                    for i, token in enumerate(np.frombuffer(take(8 * n), np.uint64)):
                        self.store.token_ids[sequence][start + i] = int(token)
                output, lse = self.store.attend(sequence, layer, start, q)
                if partial is not None:
                    both = np.logaddexp(lse, partial[1])
                    output = output * np.exp(lse - both)[..., None]
                    output = output + partial[0] * np.exp(partial[1] - both)[..., None]
                    lse = both
                code, message = 0, b""
                outputs += [output.astype("<f4").tobytes(), lse.astype("<f4").tobytes()]
            except Refusal as refusal:
                if count == 1:
                    raise
                code, message = refusal.code.value[0], f"{refusal.reason}: {refusal.message}".encode()
            messages.append(message)
            records.append(
                struct.pack("<II", code, len(message))
                + struct.pack("<4Q", self.store.accepted(sequence), 1, 2, 3)
                + struct.pack("<8Q", 11, 12, 13, 14, 15, 16, 17, 18)
                + struct.pack("<2f", 0.25, 0.5)
                + struct.pack("<5Q", 21, 22, 23, 24, 25)
                + struct.pack("<II", 2, 1)
                + struct.pack("<fI3Q", 0.75, 26, 27, 28, 29)
            )
            assert len(records[-1]) == 192
        reply = struct.pack("<II", count, 0) + b"".join(records) + b"".join(messages)
        joined = b"".join(outputs)
        if out_region:
            regions[out_region][out_offset : out_offset + len(joined)] = joined
            return reply
        return reply + joined
