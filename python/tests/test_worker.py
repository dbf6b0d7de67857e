"""The worker against the reference server: delegated attention is the model's own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from conftest import REPOSITORY
from reference_server import FastServer, Store

from kvtier import Budget, Session, Span
from kvtier.demo import build_context, divergence
from kvtier.dense import DenseDecoder
from kvtier.worker import Worker


@pytest.fixture(params=["fast", "grpc"])
def session(request: pytest.FixtureRequest, grpc_server: str, fast_server: tuple[FastServer, str]):
    with Session(grpc_server, fast_path=fast_server[1] if request.param == "fast" else "") as session:
        assert session.uses_fast_path == (request.param == "fast")
        yield session


def test_life_of_a_context(session: Session, store: Store, load_model: Callable, corpus: str) -> None:
    model, tokenizer = load_model("smollm2")
    ids = tokenizer.encode(corpus)[:260]
    worker, oracle = Worker(model, session, tokenizer), DenseDecoder(model)
    context = worker.create(name="test")
    seen: list[tuple[int, int]] = []
    got = context.prefill(ids[:200], chunk=80, spans=[Span(0, 100, "a"), Span(100, 200, "b")],
                          progress=lambda *x: seen.append(x))  # fmt: skip
    want = oracle.prefill(ids[:200], chunk=80)
    assert np.abs(got - want).max() < 1e-4
    assert seen == [(80, 200), (160, 200), (200, 200)]
    assert context.ack.accepted == context.length == 200
    sequence = context.sequence_id
    assert [store.token_ids[sequence][i] for i in range(200)] == ids[:200]
    assert b"".join(store.token_text[sequence][i] for i in range(200)) == tokenizer.decode_bytes(ids[:200])
    assert [(span.start, span.end) for span in store.spans[sequence]] == [(0, 100), (100, 200)]
    # Every eighth position of every chunk of 80, 80 and 40.
    assert [len(q) for _, layer, _, q in store.queries if layer == 3] == [10, 10, 5]

    rows = context.extend(ids[200:], Budget.exact(), chunk=32, all_logits=True)
    kl, same = divergence(oracle.score(ids[200:]), rows)
    assert kl.max() < 1e-3 and same > 0.97
    assert len(context.accounts) == 2 * model.config.layers

    fork = context.fork()
    assert fork.length == 260
    generation = fork.generate(rows[-1], 5, Budget.exact(), tokenizer.stop_ids)
    assert generation.ids == oracle.generate(rows[-1], 5, [*tokenizer.stop_ids])
    assert len(generation.logits) == len(generation.ids) + 1
    fork.truncate(260)
    forced = fork.score(generation.ids, Budget.exact())
    assert divergence(generation.logits[1:], forced)[0].max() < 1e-3

    again = worker.open(sequence)
    assert again.length == 260
    oracle.truncate(260)
    assert divergence(oracle.step(ids[0])[None], again.step(ids[0])[None])[0].max() < 1e-3


def test_sliding_windows(session: Session, store: Store, load_model: Callable, corpus: str) -> None:
    model, tokenizer = load_model("gemma3")
    ids = tokenizer.encode(corpus)[:640]
    context, oracle = Worker(model, session).create(), DenseDecoder(model)
    got, want = context.prefill(ids[:600]), oracle.prefill(ids[:600])
    assert divergence(want[None], got[None])[0].max() < 1e-3
    # Queries only of the layers that attend to everything.
    assert {layer for _, layer, _, _ in store.queries} == {5, 11, 17}
    assert not store.token_text[context.sequence_id]
    rows = context.extend(ids[600:], all_logits=True)
    assert divergence(oracle.score(ids[600:]), rows)[0].max() < 2e-3


def test_misuse_is_refused(session: Session, load_model: Callable) -> None:
    model, _ = load_model("smollm2")
    context = Worker(model, session).create()
    for call in (context.prefill, context.extend):
        with pytest.raises(ValueError, match="no tokens"):
            call([])
    context.prefill([1, 2, 3])
    with pytest.raises(ValueError, match="extend"):
        context.prefill([4])


def test_demo_context(load_model: Callable) -> None:
    _, tokenizer = load_model("smollm2")
    ids, spans = build_context(tokenizer, REPOSITORY, 6000)
    assert len(ids) == 6000 and spans[0].start == 0 and spans[-1].end == 6000
    assert all(a.end == b.start for a, b in zip(spans, spans[1:], strict=False))
    assert "violet-otter-7291" in tokenizer.decode(ids[spans[2].start : spans[2].end])
    assert tokenizer.decode(ids).count("violet-otter") == 1
    assert build_context(tokenizer, REPOSITORY, 6000)[0] == ids
