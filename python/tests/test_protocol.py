"""Both paths against the reference server: framing, values, errors."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from reference_server import FastServer, Store

import kvtier
from kvtier import AttendItem, Budget, Client, FastClient, ModelSpec, Session, Span

SPEC = ModelSpec(2, 4, 2, 16, b"model", sliding_windows=(0, 8))


@pytest.fixture(params=["grpc", "fast", "fast-inline"])
def way(request: pytest.FixtureRequest, grpc_server: str, fast_server: tuple[FastServer, str]):
    if request.param == "grpc":
        client: Client | FastClient = Client(grpc_server, timeout=10)
    else:
        client = FastClient(fast_server[1], timeout=10, regions=request.param == "fast")
    yield client
    client.close()


@pytest.fixture
def sequence(store: Store) -> str:
    return store.create(SPEC)


def rows(rng: np.random.Generator, n: int, heads: int = 2) -> np.ndarray:
    return kvtier.round_bf16(rng.standard_normal((n, heads, 16)).astype(np.float32))


def test_append_and_attend(way: Client | FastClient, store: Store, sequence: str) -> None:
    rng = np.random.default_rng(1)
    k, v, sample = rows(rng, 20), rows(rng, 20), rows(rng, 3, 4)
    ids = np.arange(100, 120)
    for layer in range(2):
        ack = way.append(
            sequence, layer, 0, kvtier.to_bf16(k), kvtier.to_bf16(v),
            token_ids=ids, queries=kvtier.to_bf16(sample),
        )  # fmt: skip
    assert (ack.accepted, ack.crash_safe, ack.power_safe, ack.sealed) == (20, 1, 2, 3)
    assert store.token_ids[sequence] == {i: 100 + i for i in range(20)}
    assert np.array_equal(store.queries[0][3], sample)
    q, k1, v1 = rows(rng, 3, 4), rows(rng, 3), rows(rng, 3)
    for layer in range(2):
        result = way.attend(sequence, layer, 20, q, k=k1, v=v1, token_ids=[7, 8, 9], budget=Budget.share(0.2).waiting(0.02))
        output, lse = store.attend(sequence, layer, 20, q)
        assert np.array_equal(result.output, output) and np.array_equal(result.lse, lse)
        assert result.output.dtype == np.float32 and result.account.bytes_sealed > 0
    assert result.ack.accepted == 23 and store.token_ids[sequence][22] == 9
    mode, share, tokens, target, wait = store.budgets[-1]
    assert (mode, tokens, target, wait) == (2, 0, 0.0, 20_000) and share == pytest.approx(0.2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_element_types(way: Client | FastClient, store: Store, sequence: str, dtype: type) -> None:
    rng = np.random.default_rng(2)
    k, v, q = rows(rng, 5), rows(rng, 5), rows(rng, 5, 4)
    cast = kvtier.to_bf16 if dtype == np.uint16 else lambda x: x.astype(dtype)
    result = way.attend(sequence, 0, 0, cast(q), k=cast(k), v=cast(v))
    assert np.allclose(result.output, store.attend(sequence, 0, 0, q)[0], atol=1e-2)


def test_errors_map(way: Client | FastClient, sequence: str) -> None:
    rng = np.random.default_rng(3)
    k, q = rows(rng, 4), rows(rng, 1, 4)
    way.append(sequence, 0, 0, k, k)
    with pytest.raises(kvtier.AlreadyExistsError) as caught:
        way.append(sequence, 0, 0, k + 1, k)
    assert caught.value.reason == "ROWS_DIFFER" and caught.value.code == grpc.StatusCode.ALREADY_EXISTS
    with pytest.raises(kvtier.OutOfRangeError, match="GAP"):
        way.append(sequence, 0, 9, k, k)
    with pytest.raises(kvtier.OutOfRangeError):
        way.attend(sequence, 0, 50, q)
    with pytest.raises(kvtier.NotFoundError, match="nowhere"):
        way.attend("nowhere", 0, 0, q)
    # The connection lives on.
    assert way.attend(sequence, 0, 3, q).output.shape == (1, 4, 16)


def test_retry_info(grpc_server: str) -> None:
    with Client(grpc_server) as client, pytest.raises(kvtier.NotFoundError) as caught:
        client.open("nowhere")
    assert caught.value.retry_delay == pytest.approx(0.25)


def test_many_items(way: Client | FastClient, store: Store) -> None:
    rng = np.random.default_rng(4)
    ids = [store.create(SPEC) for _ in range(3)]
    items = [
        AttendItem(sequence, 0, rows(rng, n, 4), rows(rng, n), rows(rng, n), token_ids=range(n))
        for sequence, n in zip(ids, (1, 5, 2), strict=True)
    ]
    items[1] = AttendItem(ids[1], 40, items[1].q)  # past the end
    results = way.attend_many(0, items)
    assert isinstance(results[1].error, kvtier.OutOfRangeError)
    for i in (0, 2):
        assert results[i].error is None
        assert np.array_equal(results[i].output, store.attend(ids[i], 0, 0, items[i].q)[0])


def test_partial_is_merged(fast_server: tuple[FastServer, str], store: Store, sequence: str) -> None:
    rng = np.random.default_rng(5)
    k, v, q = rows(rng, 12), rows(rng, 12), rows(rng, 1, 4)
    whole = store.create(SPEC)
    store.append(whole, 0, 0, k, v)
    other = store.create(SPEC)
    store.append(other, 0, 0, k[:8], v[:8])
    store.append(sequence, 0, 0, k[8:], v[8:])
    partial = store.attend(other, 0, 7, q)
    with FastClient(fast_server[1]) as fast:
        result = fast.attend(sequence, 0, 3, q, partial=partial)
    want = store.attend(whole, 0, 11, q)
    assert np.allclose(result.output, want[0], atol=1e-6) and np.allclose(result.lse, want[1], atol=1e-6)


def test_stream_survives_a_failed_request(grpc_server: str, store: Store, sequence: str) -> None:
    rng = np.random.default_rng(6)
    k, q = rows(rng, 4), rows(rng, 1, 4)
    store.append(sequence, 0, 0, k, k)
    with Client(grpc_server) as client, client.attend_stream() as stream:
        with pytest.raises(kvtier.OutOfRangeError):
            stream.attend(sequence, 0, 10, q)
        stream.send(0, [AttendItem(sequence, 3, q)])
        stream.send(0, [AttendItem(sequence, 2, q)])
        for start in (3, 2):
            assert np.array_equal(stream.receive()[0].output, store.attend(sequence, 0, start, q)[0])


def test_account_fields(fast_server: tuple[FastServer, str], store: Store, sequence: str) -> None:
    store.append(sequence, 0, 0, *[np.zeros((1, 2, 16), np.float32)] * 2)
    with FastClient(fast_server[1]) as fast:
        account = fast.attend(sequence, 0, 0, np.zeros((1, 4, 16), np.float32)).account
    assert account == kvtier.Account(
        11, 12, 13, 14, 15, 16, 17, 18, 0.25, 0.5, 21, 22, 23, 24, 25, kvtier.AttendMode.BUDGET,
        0.75, 26, True, 27, 28, 29,
    )  # fmt: skip


def test_regions_grow(fast_server: tuple[FastServer, str], store: Store) -> None:
    server, path = fast_server
    spec = ModelSpec(1, 8, 8, 256, b"wide")
    sequence = store.create(spec)
    big = np.zeros((200, 8, 256), np.float32)
    with FastClient(path) as fast:
        fast.append(sequence, 0, 0, big[:1], big[:1])
        fast.append(sequence, 0, 1, big, big)
        fast.append(sequence, 0, 201, big[:5], big[:5])
        result = fast.attend(sequence, 0, 200, big[:1])
    assert result.ack.accepted == 206
    # One region, then a larger one in its place; one for the results.
    assert server.ops.count(2) == 3 and server.ops.count(3) == 1


def test_handles_are_opened_once(fast_server: tuple[FastServer, str], store: Store, sequence: str) -> None:
    server, path = fast_server
    k = np.zeros((1, 2, 16), np.float32)
    with FastClient(path) as fast:
        for _ in range(3):
            fast.append(sequence, 0, 0, k, k)
        fast.forget(sequence)
        fast.append(sequence, 0, 0, k, k)
    assert server.ops.count(4) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"TVF1",
        struct.pack("<4sBBHIIQ", b"XXXX", 1, 0x85, 0, 3, 0, 0),
        struct.pack("<4sBBHIIQ", b"TVF1", 9, 0x85, 0, 3, 0, 0),
        struct.pack("<4sBBHIIQ", b"TVF1", 5, 0x86, 0, 3, 0, 0),
        struct.pack("<4sBBHIIQ", b"TVF1", 5, 0x85, 0, 999, 0, 0),
        struct.pack("<4sBBHIIQ", b"TVF1", 5, 0x85, 0, 3, 0, 1 << 40),
        struct.pack("<4sBBHIIQ", b"TVF1", 5, 0x85, 0, 3, 0, 32) + b"short",
    ],
)  # fmt: skip
def test_broken_replies_close_the_connection(fast_server: tuple[FastServer, str], sequence: str, answer: bytes) -> None:
    server, path = fast_server
    k = np.zeros((1, 2, 16), np.float32)
    fast = FastClient(path, timeout=5, regions=False)
    fast.open(sequence)
    server.answer = answer
    with pytest.raises(kvtier.UnavailableError):
        fast.append(sequence, 0, 0, k, k)
    assert fast.closed
    with pytest.raises(kvtier.UnavailableError):
        fast.append(sequence, 0, 0, k, k)


def test_connect_to_nothing(socket_folder: Path) -> None:
    with pytest.raises(kvtier.UnavailableError):
        FastClient(str(socket_folder / "none.sock"))
    client = Client(f"unix://{socket_folder}/none.sock", timeout=0.5)
    with client, pytest.raises((kvtier.UnavailableError, kvtier.DeadlineExceededError)):
        client.status()


def test_no_descriptors_leak(fast_server: tuple[FastServer, str], store: Store, sequence: str) -> None:
    k = np.zeros((1, 2, 16), np.float32)

    def mine() -> int:
        count = 0
        for fd in os.listdir("/proc/self/fd"):
            # The server's thread may close a descriptor after it was listed.
            with contextlib.suppress(FileNotFoundError):
                count += "kvtier-" in os.readlink(f"/proc/self/fd/{fd}")
        return count

    before = mine()
    for _ in range(5):
        with FastClient(fast_server[1]) as fast:
            fast.attend(sequence, 0, 0, np.zeros((1, 4, 16), np.float32), k=k, v=k)
    # The reference server maps the same memory in this process and lets go in its own time.
    deadline = time.monotonic() + 5
    while mine() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mine() == before


def test_threads_share_a_connection(fast_server: tuple[FastServer, str], store: Store) -> None:
    ids = [store.create(SPEC) for _ in range(4)]
    failures: list[BaseException] = []
    with FastClient(fast_server[1]) as fast:

        def work(sequence: str, seed: int) -> None:
            own = np.random.default_rng(seed)
            try:
                for i in range(30):
                    q, k, v = rows(own, 1, 4), rows(own, 1), rows(own, 1)
                    got = fast.attend(sequence, 0, i, q, k=k, v=v).output
                    with store.lock:
                        want = store.attend(sequence, 0, i, q)[0]
                    assert np.array_equal(got, want)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(s, i)) for i, s in enumerate(ids)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_session_uses_both(grpc_server: str, fast_server: tuple[FastServer, str], store: Store) -> None:
    server, _ = fast_server
    rng = np.random.default_rng(7)
    with Session(grpc_server) as session:
        assert session.uses_fast_path and session.lease_id == 7
        opened = session.create(SPEC, name="n")
        k, v, q = rows(rng, 6), rows(rng, 6), rows(rng, 1, 4)
        for layer in range(2):
            ack = session.append(
                opened.sequence_id, layer, 0, k, v, token_ids=range(6),
                token_text=[b"%d" % i for i in range(6)], spans=[Span(0, 6, "all")],
            )  # fmt: skip
        assert ack.accepted == 6
        assert store.token_text[opened.sequence_id][5] == b"5"
        assert store.spans[opened.sequence_id][0].label == "all"
        fast = session.attend(opened.sequence_id, 1, 5, q)
        slow = session.client.attend(opened.sequence_id, 1, 5, q)
        assert np.array_equal(fast.output, slow.output)
        forked = session.fork(opened.sequence_id, 3)
        assert forked.ack.accepted == 3
        read_k, _, exact = session.client.read_kv(opened.sequence_id, 0, 2, 3)
        assert exact and np.array_equal(read_k, k[2:5])
    assert 5 in server.ops and 6 in server.ops


def test_session_without_fast_path(grpc_server: str, store: Store) -> None:
    with Session(grpc_server) as session:
        assert not session.uses_fast_path
        opened = session.create(SPEC)
        k = np.zeros((1, 2, 16), np.float32)
        assert session.append(opened.sequence_id, 0, 0, k, k).accepted == 0
        q = np.zeros((1, 4, 16), np.float32)
        assert session.attend(opened.sequence_id, 0, 0, q).output.shape == (1, 4, 16)


@pytest.mark.parametrize("fast", [True, False])
def test_session_waits_for_room(
    grpc_server: str, fast_server: tuple[FastServer, str], store: Store, fast: bool
) -> None:
    k = np.zeros((1, 2, 16), np.float32)
    with Session(grpc_server, fast_path=None if fast else "", patience=2.0) as session:
        opened = session.create(SPEC)
        store.refuse_appends = 2
        assert session.append(opened.sequence_id, 0, 0, k, k).accepted == 0
        assert store.refuse_appends == 0
        session.patience = 0.0
        store.refuse_appends = 1
        with pytest.raises(kvtier.ResourceExhaustedError):
            session.append(opened.sequence_id, 0, 0, k, k)
