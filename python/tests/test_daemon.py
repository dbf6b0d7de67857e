"""Against a real kvtierd: both paths agree, exact is exact, sparse is near, kill -9 loses nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import kvtier
from kvtier import AttendItem, Budget, ModelSpec, Profile, Session
from kvtier.daemon import Daemon, sparse_above
from kvtier.demo import divergence
from kvtier.dense import DenseDecoder
from kvtier.worker import Worker

pytestmark = pytest.mark.daemon

SPEC = ModelSpec(3, 8, 2, 64, b"test model", sliding_windows=(0, 128, 0))
TOKENS = {"smollm2": 2700, "gemma3": 2700}


def rows(rng: np.random.Generator, n: int, heads: int = 2, dim: int = 64) -> np.ndarray:
    return kvtier.round_bf16(rng.standard_normal((n, heads, dim)).astype(np.float32))


def fill(session: Session, n: int, profile: Profile = Profile.BALANCED) -> tuple[str, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    sequence = session.create(SPEC, profile=profile).sequence_id
    k, v = rows(rng, n), rows(rng, n)
    for start in range(0, n, 500):
        part = slice(start, min(n, start + 500))
        for layer in range(SPEC.layers):
            session.append(
                sequence, layer, start, kvtier.to_bf16(k[part]), kvtier.to_bf16(v[part]),
                token_ids=range(part.start, part.stop),
                queries=None if SPEC.window(layer) else kvtier.to_bf16(rows(rng, 8, 8)),
            )  # fmt: skip
    return sequence, k, v


@pytest.mark.parametrize("tokens", [1, 300, 3000])
@pytest.mark.parametrize("budget", [Budget.exact(), Budget.share(0.3), Budget.tokens(200), Budget.target(0.1), None])
def test_both_paths_agree(start_daemon: Callable[..., Daemon], tokens: int, budget: Budget | None) -> None:
    daemon = start_daemon(*sparse_above(1024))
    rng = np.random.default_rng(2)
    with daemon.session() as fast, daemon.session(fast_path="") as slow:
        assert fast.uses_fast_path and not slow.uses_fast_path
        # A sequence each: what a target's first answer taught of one would change the second's course.
        ours, theirs = fill(fast, tokens)[0], fill(slow, tokens)[0]
        fast.flush(ours, seal=True)
        slow.flush(theirs, seal=True)
        for layer in range(SPEC.layers):
            q = rows(rng, 1, 8)
            one = fast.attend(ours, layer, tokens - 1, q, budget=budget)
            two = slow.attend(theirs, layer, tokens - 1, q, budget=budget)
            assert np.array_equal(one.output, two.output) and np.array_equal(one.lse, two.lse)
            for field in ("tokens_exact", "tokens_read", "tokens_estimated", "bytes_sealed", "bytes_full", "mode"):
                assert getattr(one.account, field) == getattr(two.account, field)


def test_errors_agree(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    with daemon.session() as fast, daemon.session(fast_path="") as slow:
        sequence, k, v = fill(fast, 40)
        q = rows(np.random.default_rng(3), 1, 8)
        nan = np.full_like(k[:1], np.nan)
        for error, call in (
            (kvtier.AlreadyExistsError, lambda s: s.append(sequence, 0, 0, kvtier.round_bf16(k[:4] + 1), v[:4])),
            (kvtier.OutOfRangeError, lambda s: s.append(sequence, 0, 41, k[:4], v[:4])),
            (kvtier.OutOfRangeError, lambda s: s.attend(sequence, 0, 40, q)),
            (kvtier.NotFoundError, lambda s: s.attend("no-such-sequence", 0, 0, q)),
            (kvtier.InvalidArgumentError, lambda s: s.append(sequence, 9, 40, k[:1], v[:1])),
            (kvtier.InvalidArgumentError, lambda s: s.append(sequence, 0, 40, nan, nan)),
            (kvtier.InvalidArgumentError, lambda s: s.append(sequence, 0, 40, k[:1] + 1e-4, v[:1])),
            # Too few heads: nothing else that lies in shared memory stands in for them.
            (kvtier.InvalidArgumentError, lambda s: s.append(sequence, 0, 40, k[:1, :1], v[:1, :1])),
            (kvtier.InvalidArgumentError, lambda s: s.attend(sequence, 0, 39, q[:, :5])),
        ):
            reasons = []
            for session in (fast, slow):
                with pytest.raises(error) as caught:
                    call(session)
                reasons.append((caught.value.code, caught.value.reason))
            assert reasons[0] == reasons[1] and reasons[0][1]
        # Equal bytes again are accepted, and neither connection has suffered. All is power-safe before.
        fast.flush(sequence)
        assert fast.append(sequence, 0, 0, k[:4], v[:4]) == slow.append(sequence, 0, 0, k[:4], v[:4])


def test_many_sequences_in_one_call(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    rng = np.random.default_rng(4)
    with daemon.session() as fast, daemon.session(fast_path="") as slow:
        ids = [fill(fast, n)[0] for n in (10, 200, 700)]
        items = [AttendItem(s, n - 1, rows(rng, 1, 8)) for s, n in zip(ids, (10, 200, 700), strict=True)]
        items.append(AttendItem(ids[0], 5000, items[0].q))
        for session in (fast, slow):
            with pytest.raises(kvtier.KvtierError):  # one sequence may occur once
                session.attend_many(0, items)
        items[3] = AttendItem("no-such-sequence", 0, items[0].q)
        one = slow.attend_many(0, items)
        assert isinstance(one[3].error, kvtier.NotFoundError)
        alone = [slow.attend(i.sequence_id, 0, i.start, i.q) for i in items[:3]]
        for a, b in zip(one, alone, strict=False):
            assert np.array_equal(a.output, b.output)
        two = fast.attend_many(0, items[:3])
        for a, b in zip(two, alone, strict=True):
            assert np.array_equal(a.output, b.output)


def test_read_back_is_exact(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    with daemon.session() as session:
        sequence, k, v = fill(session, 3000, Profile.EXACT)
        session.flush(sequence, seal=True)
        got_k, got_v, exact = session.client.read_kv(sequence, 0, 100, 2500)
        assert exact
        assert np.array_equal(got_k, kvtier.to_bf16(k[100:2600]))
        assert np.array_equal(got_v, kvtier.to_bf16(v[100:2600]))


def test_kill_and_reopen(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(*sparse_above(1024))
    rng = np.random.default_rng(5)
    with daemon.session() as session:
        sequence, k, v = fill(session, 3000)
        session.flush(sequence, seal=True)
        q = rows(rng, 1, 8)
        before = [session.attend(sequence, layer, 2999, q, budget=Budget.exact()) for layer in range(3)]
        daemon.kill()
        with pytest.raises(kvtier.UnavailableError):
            session.attend(sequence, 0, 2999, q)
        daemon.start()
        # The same session finds the new daemon.
        for layer in range(3):
            after = session.attend(sequence, layer, 2999, q, budget=Budget.exact())
            assert np.array_equal(after.output, before[layer].output)
        assert session.open(sequence, spec=SPEC).ack.accepted == 3000


def test_match_prefix(start_daemon: Callable[..., Daemon], load_model: Callable, corpus: str) -> None:
    daemon = start_daemon()
    model, tokenizer = load_model("smollm2")
    ids = tokenizer.encode(corpus)[:330]
    with daemon.session() as session:
        worker, oracle = Worker(model, session, tokenizer), DenseDecoder(model)
        worker.create().prefill(ids[:300])
        context = worker.resume(ids)
        assert context.length == 256
        got = context.extend(ids[256:], Budget.exact())
        assert divergence(oracle.prefill(ids)[None], got[None])[0].max() < 1e-3
        assert worker.resume([5, 6, 7]).length == 0
        # A sequence that goes on otherwise since it was matched is not forked as what it was.
        match = session.match_prefix(model.spec, ids[:300])
        assert match.tokens == 256 and session.fork(match.sequence_id, 64, match=match).ack.accepted == 64
        session.truncate(match.sequence_id, 0)
        worker.open(match.sequence_id).prefill(ids[30:130])
        with pytest.raises(kvtier.NotFoundError):
            session.fork(match.sequence_id, 64, match=match)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_exact_and_sparse_on_a_model(
    start_daemon: Callable[..., Daemon], load_model: Callable, corpus: str, name: str
) -> None:
    """Exact attention on the exact profile is the dense decoder's; sparse on balanced is near it."""
    daemon = start_daemon(*sparse_above(1024))
    model, tokenizer = load_model(name)
    total, steps = TOKENS[name], 64
    ids = tokenizer.encode(corpus)[: total + 40 + steps]
    assert len(ids) == total + 40 + steps
    oracle = DenseDecoder(model)
    oracle.prefill(ids[:total])
    chunk = oracle.score(ids[total : total + 40])
    want = np.concatenate([oracle.score([token]) for token in ids[total + 40 :]])
    with daemon.session() as session:
        worker = Worker(model, session, tokenizer)
        for profile, budget, limit, scored in (
            (Profile.EXACT, Budget.exact(), 1e-3, 16),
            (Profile.BALANCED, Budget.share(0.2), 0.03, steps),
        ):
            context = worker.create(profile=profile)
            context.prefill(ids[:total])
            ack = context.flush(seal=True)
            assert ack.sealed >= 2048 and ack.power_safe == total
            rows_of_chunk = context.extend(ids[total : total + 40], budget, all_logits=True)
            got = context.score(ids[total + 40 : total + 40 + scored], budget)
            full = [a for a, w in zip(context.accounts, model.config.windows * scored, strict=True) if not w]
            share = kvtier.Account.total(full).share_read
            kl_chunk, _ = divergence(chunk, rows_of_chunk)
            kl, same = divergence(want[:scored], got)
            print(f"{name} {profile.name}: KL {kl.mean():.5f} mean {kl.max():.5f} max, question "
                  f"{kl_chunk.mean():.5f}, top-1 {same:.3f}, read {share:.3f}")  # fmt: skip
            assert kl.mean() < limit and kl_chunk.mean() < limit
            if budget.share_of_bytes:
                assert 0 < share <= budget.share_of_bytes * 1.05
