"""kvbench model against a real daemon: everything read is dense, sparse feeds on, bytes agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvtier.bench import model as bench
from kvtier.bench.comparators import COMPARATORS, oracle
from kvtier.bench.stats import kl_divergence
from kvtier.bench.streams import ComparatorStream, DaemonStream, ExactStream, feed, prefill, read_sealed
from kvtier.daemon import sparse_above
from kvtier.dense import DenseDecoder
from kvtier.types import Budget, Profile

pytestmark = pytest.mark.daemon

FLAGS = (*sparse_above(0, by_page=False), "--audit", "0")


def test_streams_that_read_everything(start_daemon: Callable, load_model: Callable, corpus: str) -> None:
    model, tokenizer = load_model("smollm2")
    ids = tokenizer.encode(corpus)[:402]
    with start_daemon(*FLAGS).session() as session:
        balanced = session.create(model.spec, profile=Profile.BALANCED).sequence_id
        rows, _ = prefill(model, session, [balanced], ids[:400])
        end = session.flush(balanced, seal=True).sealed
        assert 16 < end <= 400 - 256
        sealed = read_sealed(session, balanced, model, 16, end)
        kvtier = DaemonStream(session, session.fork(balanced).sequence_id, Budget.exact())
        codes = ComparatorStream(model, [row.copy() for row in rows], sealed, oracle, 1.0)
        # The truth: the same model, whose last chunk is these two tokens.
        decoder = DenseDecoder(model)
        decoder.length, decoder._rows = 400, [row.copy() for row in rows]
        want = decoder.score(ids[400:])
        got = np.stack([feed(model, [ExactStream(model, rows), kvtier, codes], ids[i], i) for i in (400, 401)])
        assert kl_divergence(want, got[:, 0]).max() < 1e-4
        # kvtier's full read is attention over what it says its codes are; both differ from the truth.
        assert kl_divergence(got[:, 1], got[:, 2]).max() < 1e-4 < kl_divergence(want, got[:, 1]).max()
        # Both count the same bytes for everything at 4 bits.
        assert {full for _, full in kvtier.moved} == {full for _, full in codes.moved}
        assert codes.moved[0][0] == codes.moved[0][1]
        assert len(kvtier.accounts) == 2 * model.config.layers and kvtier.sealed == end


def test_measure(start_daemon: Callable, load_model: Callable, corpus: str) -> None:
    model, tokenizer = load_model("gemma3")
    ids = tokenizer.encode(corpus)[: 640 + 3]
    with start_daemon(*FLAGS).session() as session:
        report = bench.measure(model, session, ids, 2, [0.3])
    assert (report["tokens"], report["positions"], report["layers"]) == (640, 2, 3)
    methods = {result.method: result for result in report["methods"]}
    assert [*methods] == ["kvtier, profile exact", "kvtier, profile neutral", "kvtier, everything at 4 bits",
                          "kvtier", *COMPARATORS]  # fmt: skip
    assert methods["kvtier, profile exact"].kl_max < 1e-4
    assert methods["kvtier, profile neutral"].kl_max < 1e-3
    kvtier = methods["kvtier"]
    assert 0 < kvtier.transferred < 0.4 and kvtier.stated is not None and kvtier.stated > 0
    for name in COMPARATORS:
        # At most what kvtier moved, less at most one block for each call.
        assert methods[name].transferred <= kvtier.transferred + 1e-9
        assert len(methods[name].kl) == 2 and methods[name].stated is None
    assert methods["oracle"].transferred > kvtier.transferred - 0.01
    table = bench.show(report | {"model": "m", "text": "t"})
    assert all(name in table for name in methods)


def test_nothing_sealed_is_refused(start_daemon: Callable, load_model: Callable, corpus: str) -> None:
    model, tokenizer = load_model("smollm2")
    with start_daemon(*FLAGS).session() as session, pytest.raises(ValueError, match="nothing sealed"):
        bench.measure(model, session, tokenizer.encode(corpus)[:40], 4, [0.1])


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    wrongs = ("--shares", "0"), ("--shares", "a"), ("--methods", "quests"), ("--positions", "0"), ("--skip", "-1")
    for wrong in wrongs:
        with pytest.raises(SystemExit):
            bench.main(wrong)
    assert "give some of shares, profiles, comparators" in capsys.readouterr().err
    assert bench.main(["--model", "no-such-model"]) == 2
    assert "known names: smollm2, gemma3" in capsys.readouterr().err


def test_scores_against_definitions() -> None:
    rows = [[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], [[0.2, 0.2, 0.6], [0.2, 0.2, 0.6]]]
    logits = np.log(np.array(rows, np.float32))
    scores = bench.Scores()
    for rows, target in zip(logits, (0, 2), strict=True):
        scores.add(rows, target)
    stream = ComparatorStream.__new__(ComparatorStream)
    stream.moved = [(1.0, 10.0), (2.0, 10.0)]
    got = scores.of(1, "x", 0.1, stream)
    assert got.kl == pytest.approx([0.25 * np.log(2), 0], abs=1e-6)
    assert got.kl_max == pytest.approx(0.25 * np.log(2), abs=1e-6)
    assert got.loss_change == pytest.approx(np.log(2) / 2, abs=1e-6)
    assert (got.top1, got.transferred) == (0.5, 0.15)
